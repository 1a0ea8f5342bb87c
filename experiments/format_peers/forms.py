"""The forms of smollm2 that are written, the peers that read each, and how far their answers may be from ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from as_peers import as_llama_cpp, with_inputs_of_8_bits, with_sums_of_floats

# The largest mean divergence (KL, nats a token) of a peer's answers from ours that is accepted: a number, or twice what
# one thing that the peer does, and nothing else, changes in our own answers. Such a thing has its name in OWN.
EXACT = 1e-9  # where it multiplies as this program does
HALF = 1e-4  # where it multiplies in float16
TABLE = 1e-5  # where llama.cpp takes GELU from a table in float16
SHORT = 1e-2  # where it multiplies in kernels that round (bitsandbytes on a CPU)
ROUNDED = "rounded"  # where it rounds activations to 8 bits
FLOAT16 = "float16"  # where it multiplies in float16, and rounds the logits to it
LIKE_LLAMA = "like llama.cpp"  # where it computes a part of Gemma 3n differently
FLOATS = "floats"  # where int8 codes are multiplied as floats, or in another order


@dataclass(frozen=True)
class Refused:
    """A file that a peer does not read.

    Attributes:
        reason: what a part of the line that it ends with looks like, a regular expression; this part is told.
    """

    reason: str


Bound = float | str | Refused
OWN: Mapping[str, Callable[[torch.nn.Module], Any]] = {  # our answers, and what is done to the network before
    ROUNDED: with_inputs_of_8_bits,
    FLOAT16: torch.nn.Module.half,
    FLOATS: with_sums_of_floats,
    LIKE_LLAMA: as_llama_cpp,
    "integers": lambda network: None,
}


@dataclass(frozen=True)
class Written:
    """A form of smollm2, and the peers that read it.

    Attributes:
        name: for the table.
        form: as in `output.save_model`.
        peers: which read it; each with the largest divergence that is accepted.
        choices: what is typed after `run.py`, besides the model, `target=all` and what is saved.
        dtype: in which both programs multiply.
        sums: set if the run rounds inputs, which a file read here does not. Then the run itself is compared, its sums
            taken of `integers`, as this program and vLLM do, or of `floats`, as compressed-tensors does.
    """

    name: str
    form: str
    peers: Mapping[str, Bound]
    choices: str
    dtype: str = "float32"
    sums: str | None = None


def integers(
    name: str, form: str, bits: int, peers: Mapping[str, Bound], target: str = "target=all", **settings: Any
) -> Written:
    """Plain rounding with scales of 16 bits."""
    chosen = {"bits": bits, "group_size": 64, "symmetric": True, "scale_bits": 16} | settings
    typed = [f"compression.{key}={str(value).lower()}" for key, value in chosen.items()]
    return Written(name, form, peers, " ".join(["compression=rtn", *typed, target]))


def blocks(name: str, kind: str) -> Written:
    """A type of llama.cpp."""
    return Written(f"GGUF, {name}", "gguf", BY_LLAMA, f"compression=gguf compression.type={kind}")


BY_GPTQMODEL, BY_TRANSFORMERS, BY_VLLM = {"gptqmodel": HALF}, {"transformers": EXACT}, {"vllm": FLOAT16}
BY_LLAMA = BY_TRANSFORMERS | {"llama_cpp": ROUNDED}
NO_SUCH_GPTQ = {"vllm": Refused(r"Unsupported quantization config: bits=\d, sym=\w+")}
NO_SUCH_INT8 = {"vllm": Refused("No compressed-tensors compatible scheme was found")}
NO_CPU_KERNEL = {"vllm": Refused(r"Failed to find a kernel that can implement the \w+ linear layer")}
NO_CPU_NVFP4 = {"vllm": Refused("Marlin FP4 not available")}
SELF = "corpus=self corpus.samples=16 corpus.length=128"
AWQ = f"compression=awq compression.fold=true compression.group_size=64 {SELF}"
DYNAMIC = "compression=int8_dynamic compression.granularity=per_channel"
SMOOTH = f"compression=smoothquant compression.fold=true {SELF}"
STEPS = "compression.input_steps=127.5"
FIRST = "target=all target.blocks=[0]"
COMPRESSED = "compressed-tensors"
FILES = (
    Written("AWQ, 4 bits", "awq", BY_GPTQMODEL | BY_VLLM, AWQ),
    Written(f"{COMPRESSED}, AWQ, 4 bits, dequantize=True", COMPRESSED, BY_TRANSFORMERS, AWQ),
    *(
        Written(f"{COMPRESSED}, {name}", COMPRESSED, BY_TRANSFORMERS | more, choices, sums=FLOATS)
        for name, choices, more in (
            ("int8", f"{DYNAMIC} {STEPS}", {}),
            ("int8, static inputs", f"compression=int8_static {SELF}", NO_SUCH_INT8),
            ("SmoothQuant", f"{SMOOTH} {STEPS}", {}),
            ("FP8, inputs too", "compression=fp8 compression.activations=true", BY_VLLM),
        )
    ),
    *(
        Written(f"{COMPRESSED}, {name}, steps of 127", COMPRESSED, {"vllm": FLOATS}, choices, sums="integers")
        for name, choices in (
            ("int8", DYNAMIC),
            ("SmoothQuant", SMOOTH),
            ("int8, the first block alone", f"{DYNAMIC} {FIRST}"),
        )
    ),
    Written("bitsandbytes, NF4", "bitsandbytes", {"transformers": SHORT}, "compression=nf4"),
    Written(f"{COMPRESSED}, FP8", COMPRESSED, BY_TRANSFORMERS | NO_CPU_KERNEL, "compression=fp8"),
    *(
        Written(f"{COMPRESSED}, {kind}, both in bfloat16", COMPRESSED, peers, f"compression={kind.lower()}", "bfloat16")
        for kind, peers in (("MXFP4", BY_TRANSFORMERS | NO_CPU_KERNEL), ("NVFP4", BY_TRANSFORMERS | NO_CPU_NVFP4))
    ),
    integers("GPTQ v1, 4 bits", "gptq", 4, BY_GPTQMODEL | BY_VLLM),
    integers("GPTQ v2, 4 bits", "gptq", 4, BY_GPTQMODEL | NO_SUCH_GPTQ, symmetric=False),
    integers("GPTQ v2, 3 bits", "gptq", 3, BY_GPTQMODEL | NO_SUCH_GPTQ, symmetric=False),
    integers(
        "GPTQ v1, 8 bits", "gptq", 8, BY_GPTQMODEL | {"vllm": Refused(r"Marlin does not support weight_bits = \w+")}
    ),
    integers("AWQ's format, plainly rounded", "awq", 4, BY_GPTQMODEL | BY_VLLM, symmetric=False),
    integers(f"{COMPRESSED}, 4 bits", COMPRESSED, 4, BY_TRANSFORMERS | BY_VLLM),
    integers(f"{COMPRESSED}, 4 bits, asymmetric", COMPRESSED, 4, BY_VLLM, symmetric=False),
    integers(f"{COMPRESSED}, 8 bits", COMPRESSED, 8, BY_TRANSFORMERS | NO_CPU_KERNEL),
    *(
        integers(f"{name}, 4 bits, {layers}", form, 4, BY_VLLM, target)
        for name, form in (("GPTQ v1", "gptq"), (COMPRESSED, COMPRESSED))
        for layers, target in (("attention alone", "target=att"), ("the final layer alone", "target=final"))
    ),
    Written("GGUF, F32", "gguf-f32", BY_TRANSFORMERS | {"llama_cpp": EXACT}, "compression=none"),
    Written("GGUF, F16", "gguf-f16", BY_TRANSFORMERS | {"llama_cpp": HALF}, "compression=none"),
    integers("GGUF, Q4_0 with the codes of symmetric rounding", "gguf", 4, BY_LLAMA, group_size=32),
    integers("GGUF, Q5_0 with the codes of asymmetric rounding", "gguf", 4, BY_LLAMA, symmetric=False),
    blocks("MXFP4", "mxfp4"),
    blocks("Q8_0", "q8_0"),
    blocks("Q6_K, Q8_0 where 256 does not divide", "q6_k"),
    blocks("Q4_K, Q5_0 where 256 does not divide", "q4_k"),
    blocks("Q2_K, IQ4_NL where 256 does not divide", "q2_k"),
)
MIXTURES = {  # a tiny random Mixtral: form, target, and whether vLLM reads it
    f"{name}, 4 bits, a tiny random mixtral, {layers}": (form, target, {"vllm": bound})
    for name, form in (("GPTQ v1", "gptq"), (COMPRESSED, COMPRESSED))
    for layers, target, bound in (
        ("attention alone", "att", FLOAT16),
        ("experts too", "all", Refused("No WNA16 MoE backend supports the deployment configuration")),
    )
}
