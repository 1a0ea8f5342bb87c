"""Files that other programs themselves write, read by this program; their weights and answers beside ours.

    PYTHONPATH=tests python experiments/format_peers/theirs.py --environments DIR --outputs DIR --table

makes the environments that are missing (see `study.py`), has each program compress a piece of smollm2 in each way, and
compares what it decodes from its own file with what is read here: every weight of the blocks, after ours is rounded to
the type in which the program decodes, and the probabilities of a text. It ends with status 1 where weights differ or a
difference exceeds its bound. What is written or answered is not repeated. It is not run in CI.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forms import EXACT, HALF
from safetensors.torch import load_file
from study import HERE, PAGE, Question, apart, ask, divergence_of, environment
from transformers import LlamaConfig, LlamaForCausalLM

import knowledge_compression as kc
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.saving import save_checkpoint

BEGIN, END = "<!-- theirs: made by experiments/format_peers/theirs.py -->", "<!-- theirs: end -->"
HEADINGS = ("| written by | as | read by | weights | KL, nats a token | read here as |", "|---|---|---|---|---|---|")
BLOCKS = 2
# The blocks, cut so that they are quickly compressed and groups of 128 divide them.
CUT = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Way:
    """A file that a program is to write.

    Attributes:
        peer: the program, which has `requirements-PEER.txt`, `write_PEER.py` and `ask_PEER.py`.
        name: for the table.
        settings: what `write_PEER.py` is told.
        bound: the largest divergence that is accepted.
        cut: whether the blocks are cut.
    """

    peer: str
    name: str
    settings: Any
    bound: float = EXACT
    cut: bool = True


def gptqmodel(name: str, **settings: Any) -> Way:
    """GPTQModel's; it multiplies in float16."""
    return Way("gptqmodel", name, settings, HALF, cut=False)


def plainly(scheme: str, bound: float = EXACT, **settings: Any) -> Way:
    """llm-compressor's, by one of its schemes and without a calibrated method."""
    told = ", ".join([scheme, *settings])
    return Way("llmcompressor", told, [{"is": "QuantizationModifier", "scheme": scheme} | settings], bound)


def compressed(name: str, *modifiers: Mapping[str, Any]) -> Way:
    """llm-compressor's, by several modifiers."""
    return Way("llmcompressor", name, list(modifiers))


def of(kind: str, **settings: Any) -> dict[str, Any]:
    """A modifier of llm-compressor."""
    return {"is": f"{kind}Modifier"} | settings


def weights(bits: int, kind: str = "int", group: int | None = None, symmetric: bool = True) -> dict[str, Any]:
    """The weights of a group of layers in llm-compressor; one scale per output if there is no group."""
    spread = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"weights": {"num_bits": bits, "type": kind, "symmetric": symmetric} | spread}


def hqq(name: str, nbits: int, **settings: Any) -> Way:
    """HQQ's."""
    return Way("hqq", name, {"nbits": nbits, "group_size": 64} | settings)


PRUNED = of("SparseGPT", sparsity=0.5, mask_structure="2:4")
KEYS = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
MIXED = {
    "attention": {"targets": ["re:.*self_attn.*"]} | weights(8, "float"),
    "feed-forward": {"targets": ["re:.*mlp.*"]} | weights(4, group=128, symmetric=False),
}
WAYS = (
    gptqmodel("GPTQ, 4 bits", bits=4),
    gptqmodel("GPTQ, 4 bits, act-order", bits=4, desc_act=True),
    gptqmodel("GPTQ, 3 bits, asymmetric", bits=3, sym=False, format="gptq_v2"),
    gptqmodel("GPTQ, 8 bits", bits=8),
    gptqmodel("AWQ, 4 bits", bits=4, method="awq", format="gemm", sym=False),
    *map(plainly, ("W4A16", "W4A16_ASYM", "W2A16", "W3A16", "W5A16", "W8A16", "W8A8")),
    *map(plainly, ("W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4A16", "MXFP4", "MXFP8A16", "MXFP8")),
    *(plainly(scheme, HALF) for scheme in ("NVFP4A16", "NVFP4")),  # their products are rounded to bfloat16
    plainly("FP8", kv_cache_scheme=KEYS),
    compressed("W4A16 by GPTQ", of("GPTQ", scheme="W4A16")),
    compressed("W4A16_ASYM by GPTQ", of("GPTQ", scheme="W4A16_ASYM")),
    compressed("W4A16_ASYM by AWQ", of("AWQ"), of("Quantization", scheme="W4A16_ASYM")),
    compressed("W8A8 by SmoothQuant and GPTQ", of("SmoothQuant"), of("GPTQ", scheme="W8A8")),
    compressed("W4A16 after SpinQuant's R1, R2", of("SpinQuant"), of("Quantization", scheme="W4A16")),
    compressed("2:4 by SparseGPT", PRUNED),
    compressed("2:4 by SparseGPT, then FP8_DYNAMIC", PRUNED, of("Quantization", scheme="FP8_DYNAMIC")),
    compressed("FP8 and 4 bits by layer", of("Quantization", targets=[], config_groups=MIXED)),
    *(Way("autoawq", f"GEMM, groups of {size}", {"q_group_size": size}, HALF) for size in (64, 128)),
    *(hqq(f"{bits} bits, axis {axis}", bits, axis=axis) for bits in (8, 4, 3, 2, 1) for axis in (0, 1)),
    hqq("4 bits, codes declared as floats", 4, axis=1, view_as_float=True),
    hqq("4 bits, one group a row", 4, axis=1, group_size=None),
    Way("auto_round", "W4A16 (auto_gptq)", {"scheme": "W4A16"}, HALF),
    Way("auto_round", "W4A16, asymmetric (auto_awq)", {"scheme": "W4A16", "sym": False}, HALF),
    Way("auto_round", "W2A16, asymmetric", {"scheme": "W2A16", "sym": False}, HALF),
    Way(
        "auto_round",
        "W4A16, values of 8 bits",
        {"scheme": "W4A16", "layer_config": {"self_attn.v_proj": {"bits": 8, "group_size": 32}}},
        HALF,
    ),
)


def main() -> int:
    """Have them written, read them, compare."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--environments", type=Path, required=True, help="a folder of one environment a peer")
    options.add_argument("--outputs", type=Path, required=True, help="a folder for the files that are written")
    options.add_argument("--peers", default=",".join(dict.fromkeys(way.peer for way in WAYS)), help="whose files")
    options.add_argument("--only", default="", help="only ways whose name contains this")
    options.add_argument("--table", action="store_true", help="put the table into docs/formats.md")
    asked = options.parse_args()
    rows = []
    for peer in asked.peers.split(","):
        environment(asked.environments / peer, peer)
        ways = [way for way in WAYS if way.peer == peer and asked.only in way.name]
        rows += list(compared(ways, asked.environments / peer / "bin" / "python", asked.outputs))
    table = [*HEADINGS, *(row for row, _ in rows)]
    print("\n".join(table))
    if asked.table:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text("\n".join([before + BEGIN, "", *table, "", END + rest.partition(END)[2].rstrip("\n"), ""]))
    return int(not all(good for _, good in rows))


def compared(ways: Sequence[Way], python: Path, outputs: Path) -> Iterator[tuple[str, bool]]:
    """A program's files as rows of the table, and whether each reads as the program itself reads it."""
    if not ways:
        return
    peer = ways[0].peer
    places = [outputs / peer / "".join(sign if sign.isalnum() else "_" for sign in way.name) for way in ways]
    asked = list(zip(ways, places, strict=True))
    if missing := [(way, place) for way, place in asked if not (place / "model" / "config.json").is_file()]:
        typed = []
        for way, place in missing:
            place.mkdir(parents=True, exist_ok=True)
            typed += [str(dense(outputs, way.cut)), str(place / "model"), json.dumps(way.settings)]
        subprocess.run([python, HERE / f"write_{peer}.py", *typed], check=True, env=apart())
    for place in places:
        if not (place / "ours.npy").is_file():
            ask(place, None)
    if unasked := [place for place in places if not (place / f"{peer}.npy").is_file()]:
        subprocess.run([python, HERE / f"ask_{peer}.py", *unasked], check=False, env=apart())
    for way, place in asked:
        yield row(way, place)


def dense(outputs: Path, cut: bool) -> Path:
    """The first blocks of smollm2 as a folder."""
    place = outputs / ("cut" if cut else "dense")
    if place.is_dir():
        return place
    model = kc.load("smollm2", device="cpu")
    network = model.network
    network.model.layers = network.model.layers[:BLOCKS]
    network.config.num_hidden_layers = BLOCKS
    if cut:
        whole = network.state_dict()
        model.network = LlamaForCausalLM(LlamaConfig(**network.config.to_dict() | CUT)).eval()
        kept = {name: tuple(map(slice, tensor.shape)) for name, tensor in model.network.state_dict().items()}
        model.network.load_state_dict({name: whole[name][part] for name, part in kept.items()})
    save_checkpoint(model, place)
    config = json.loads((place / "config.json").read_text())  # transformers 4 finds the base of rotations only here
    told = config | {"rope_theta": config["rope_parameters"]["rope_theta"]}
    (place / "config.json").write_text(json.dumps(told, indent=2))
    return place


def row(way: Way, place: Path) -> tuple[str, bool]:
    """A row of the table, and whether weights are equal and answers within their bound."""
    question = Question(way.name, way.peer, place, way.bound)
    if (error := place / f"{way.peer}.error").is_file() or not (place / f"{way.peer}.npy").is_file():
        told = error.read_text() if error.is_file() else "it ended without an answer"
        return f"| {way.peer} | {way.name} | not by itself: {told} | | | |", False
    good, same = True, ""
    model = LocalModel("theirs", str(place / "model")).load("cpu", "float32")
    if (decoded := place / f"{way.peer}.safetensors").is_file():
        state, theirs = model.network.state_dict(), load_file(decoded)
        equal = [torch.equal(state[name].to(tensor.dtype), tensor) for name, tensor in theirs.items()]
        kind = str(next(iter(theirs.values())).dtype).removeprefix("torch.")
        good, same = all(equal) and bool(equal), f"{sum(equal)} of {len(equal)} equal, {kind}"
    divergence = divergence_of(*(question.answer(name) for name in ("ours", way.peer)))
    stored = model.on_disk
    kept = f"{stored.format}, {stored.layer_bits:.3g} bits a weight" if stored else "plain floats"
    read_by = (place / f"{way.peer}.txt").read_text()
    said = f"| {way.peer} | {way.name} | {read_by} | {same} | {divergence:.1e} (accepted: {way.bound:.0e}) | {kept} |"
    return said, good and divergence <= way.bound


if __name__ == "__main__":
    raise SystemExit(main())
