"""What this program writes, read by the programs that others use, each in an environment of its own.

    PYTHONPATH=tests python experiments/format_peers/study.py --environments DIR --outputs DIR --table

makes the environments that are missing (GPTQModel brings its own torch, 6 GB in all; llama.cpp is compiled, which takes
half an hour on one core), has `run.py` compress the whole of smollm2 and save it in every form, writes tiny networks of
every architecture as GGUF, asks the peers for logits, and puts versions and differences into `docs/formats.md`. It ends
with status 1 where a difference exceeds its bound. What is written or answered is not repeated. It is not run in CI.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from as_peers import with_inputs_of_8_bits, with_sums_of_floats

import knowledge_compression as kc
from knowledge_compression.compression.writing.writers import writer_of
from knowledge_compression.models import Model
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.targets import linear_layers

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "formats.md"
BEGIN, END = "<!-- peers: made by experiments/format_peers/study.py -->", "<!-- peers: end -->"
TEXT = (
    "The capital of France is Paris, and the capital of Japan is Tokyo. Water boils at one hundred degrees. In 1969 "
    "two men walked on the moon; the third stayed in orbit. The author of Hamlet was born in Stratford, in England."
)
TEXTS = ("The capital of France is Paris, isn't it?", " two  spaces\tand a tab\n", "Zürich, São Paulo, 東京, 🙂")
UNASKED = ("phi3",)  # llama.cpp takes tokens of its tokenizer for granted that the tiny one lacks
HEADINGS = (
    "| file | read by | KL, nats a token | largest difference of log-probabilities | first choice | token ids |",
    "|---|---|---|---|---|---|",
)
QUICK = ("eval=[atlas]", "eval.atlas.relations=[capital_of]")  # a run asks something
# The largest mean divergence (KL, nats a token) of a peer's answers from ours that is accepted:
EXACT = 1e-9  # where it multiplies as this program does
HALF = 1e-4  # where it multiplies in float16
TABLE = 1e-5  # where llama.cpp takes GELU from a table in float16
ROUNDED = None  # where it rounds activations to 8 bits: twice what that rounding alone changes in our own answers
SHORT = 1e-2  # where it multiplies in kernels that round (bitsandbytes on a CPU)


@dataclass(frozen=True)
class Written:
    """A form of smollm2, and the peers that read it.

    Attributes:
        name: for the table.
        form: as in `output.save_model`.
        peers: which read it; each with the largest divergence that is accepted (:data:`ROUNDED`: see there).
        choices: what is typed after `run.py`, besides the model and what is saved.
        dtype: in which both programs multiply.
        rounds_inputs: whether the run rounds inputs, which a file read here does not: the run itself is compared, its
            sums taken of floats as the peer takes them.
    """

    name: str
    form: str
    peers: Mapping[str, float | None]
    choices: str
    dtype: str = "float32"
    rounds_inputs: bool = False


def integers(name: str, form: str, bits: int, peers: Mapping[str, float | None], **settings: Any) -> Written:
    """Plain rounding with scales of 16 bits."""
    chosen = {"bits": bits, "group_size": 64, "symmetric": True, "scale_bits": 16} | settings
    typed = [f"compression.{key}={str(value).lower()}" for key, value in chosen.items()]
    return Written(name, form, peers, " ".join(["compression=rtn", *typed]))


def blocks(name: str, kind: str) -> Written:
    """A type of llama.cpp."""
    return Written(f"GGUF, {name}", "gguf", BY_LLAMA, f"compression=gguf compression.type={kind}")


BY_GPTQMODEL, BY_TRANSFORMERS = {"gptqmodel": HALF}, {"transformers": EXACT}
BY_LLAMA = BY_TRANSFORMERS | {"llama_cpp": ROUNDED}
SELF = "corpus=self corpus.samples=16 corpus.length=128"
AWQ = f"compression=awq compression.fold=true compression.group_size=64 {SELF}"
DYNAMIC = "compression=int8_dynamic compression.granularity=per_channel compression.input_steps=127.5"
SMOOTH = f"compression=smoothquant compression.fold=true compression.input_steps=127.5 {SELF}"
COMPRESSED = "compressed-tensors"
FILES = (
    Written("AWQ, 4 bits", "awq", BY_GPTQMODEL, AWQ),
    Written(f"{COMPRESSED}, AWQ, 4 bits, dequantize=True", COMPRESSED, BY_TRANSFORMERS, AWQ),
    *(
        Written(f"{COMPRESSED}, {name}", COMPRESSED, BY_TRANSFORMERS, choices, rounds_inputs=True)
        for name, choices in (
            ("int8", DYNAMIC),
            ("int8, static inputs", f"compression=int8_static {SELF}"),
            ("SmoothQuant", SMOOTH),
            ("FP8, inputs too", "compression=fp8 compression.activations=true"),
        )
    ),
    Written("bitsandbytes, NF4", "bitsandbytes", {"transformers": SHORT}, "compression=nf4"),
    Written(f"{COMPRESSED}, FP8", COMPRESSED, BY_TRANSFORMERS, "compression=fp8"),
    Written(f"{COMPRESSED}, MXFP4, both in bfloat16", COMPRESSED, BY_TRANSFORMERS, "compression=mxfp4", "bfloat16"),
    Written(f"{COMPRESSED}, NVFP4, both in bfloat16", COMPRESSED, BY_TRANSFORMERS, "compression=nvfp4", "bfloat16"),
    integers("GPTQ v1, 4 bits", "gptq", 4, BY_GPTQMODEL),
    integers("GPTQ v2, 4 bits", "gptq", 4, BY_GPTQMODEL, symmetric=False),
    integers("GPTQ v2, 3 bits", "gptq", 3, BY_GPTQMODEL, symmetric=False),
    integers("GPTQ v1, 8 bits", "gptq", 8, BY_GPTQMODEL),
    integers("AWQ's format, plainly rounded", "awq", 4, BY_GPTQMODEL, symmetric=False),
    integers(f"{COMPRESSED}, 4 bits", COMPRESSED, 4, BY_TRANSFORMERS),
    integers(f"{COMPRESSED}, 8 bits", COMPRESSED, 8, BY_TRANSFORMERS),
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


def main() -> int:
    """Write, ask, compare, tell."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--environments", type=Path, required=True, help="a folder of one environment a peer")
    options.add_argument("--outputs", type=Path, required=True, help="a folder for the files that are written")
    options.add_argument("--peers", default="gptqmodel,transformers,llama_cpp", help="which are asked")
    options.add_argument("--only", default="", help="only files whose name contains this")
    options.add_argument("--table", action="store_true", help="put the table into docs/formats.md")
    asked = options.parse_args()
    peers = asked.peers.split(",")
    for peer in peers:
        environment(asked.environments / peer, peer)
    wanted = partial(chosen, asked.only, peers)
    asking = [*of_smollm2(asked.outputs, wanted), *of_architectures(asked.outputs / "architectures", wanted)]
    for peer in peers:
        asked_before = f"{peer}.npy"  # what is answered is not asked again
        if places := [q.place for q in asking if q.peer == peer and not (q.place / asked_before).is_file()]:
            program = [asked.environments / peer / "bin" / "python", HERE / f"ask_{peer}.py", *places]
            subprocess.run(program, check=False, env=apart())
    rows = [question.row() for question in asking]
    table = [*HEADINGS, *(row for row, _ in rows)]
    print("\n".join(table))
    for question in asking:
        if (question.place / "exact.npy").is_file():
            apart_by = divergence_of(*(question.answer(name) for name in ("exact", "ours")))
            print(f"{question.name}: sums of whole numbers give other answers than sums of floats, KL {apart_by:.1e}")
    if asked.table:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text("\n".join([before + BEGIN, "", *table, "", END + rest.partition(END)[2].rstrip("\n"), ""]))
    return int(not all(good for _, good in rows))


def apart() -> dict[str, str]:
    """The variables of a peer's process: nothing of this program, and what GPTQModel 7.7 needs on two processors."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    return kept | {"TORCHDYNAMO_DISABLE": "1", "GPTQMODEL_CPU_WORKERS": "2"}


def environment(place: Path, peer: str) -> None:
    """Make a peer's environment where it is missing."""
    if (place / ".complete").is_file():
        return
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    pip = [place / "bin" / "pip", "install", "--quiet"]
    needs = HERE / f"requirements-{peer}.txt"
    if peer == "gptqmodel":  # its setup imports torch
        first = [line for line in needs.read_text().split() if line.startswith("torch")]
        subprocess.run([*pip, "setuptools", "wheel", "numpy", *first], check=True)
        pip.append("--no-build-isolation")
    subprocess.run([*pip, "-r", needs], check=True)
    (place / ".complete").touch()


@dataclass(frozen=True)
class Question:
    """A file, and the peer that is to read it.

    Attributes:
        name: for the table.
        peer: who.
        place: the folder of the file, which also has what is asked and answered.
        bound: the largest divergence that is accepted, or :data:`ROUNDED`.
    """

    name: str
    peer: str
    place: Path
    bound: float | None

    def row(self) -> tuple[str, bool]:
        """A row of the table, and whether the difference is within its bound."""
        if (error := self.place / f"{self.peer}.error").is_file():
            return (
                f"| {self.name} | {self.peer} | not read: {error.read_text().replace(str(self.place), '...')} | | | |",
                False,
            )
        if not (told := self.place / f"{self.peer}.txt").is_file():
            return f"| {self.name} | {self.peer} | the peer ended without an answer | | | |", False
        one, other = (self.answer(name) for name in ("ours", self.peer))
        divergence = divergence_of(one, other)
        bound = 2 * divergence_of(one, self.answer("rounded")) if self.bound is None else self.bound
        largest, alike = float((one - other).abs().max()), float((one.argmax(-1) == other.argmax(-1)).double().mean())
        good, said = (
            divergence <= bound,
            f"{divergence:.1e} (accepted: {bound:.0e}) | {largest:.1e} | {alike:.0%}",
        )
        if self.peer == "llama_cpp":
            ids, read = ((self.place / name).read_text() for name in ("texts_ids.json", "read.json"))
            good, said = good and ids == read, f"{said} | {'equal' if ids == read else 'different'} |"
        else:
            said = f"{said} | |"
        return f"| {self.name} | {told.read_text()} | {said}", good

    def answer(self, name: str) -> torch.Tensor:
        """Log-probabilities, float64 ``[texts, tokens, words]``."""
        return torch.from_numpy(np.load(self.place / f"{name}.npy")).double().log_softmax(-1)


def divergence_of(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(one || other), nats a token."""
    return max(0.0, float((one.exp() * (one - other)).sum(-1).mean()))


def chosen(part: str, peers: Sequence[str], name: str, peer: str) -> bool:
    """Whether a file is to be asked about, by its name and who would be asked."""
    return part in name and peer in peers


def of_smollm2(outputs: Path, wanted: Callable[[str, str], bool]) -> Iterator[Question]:
    """Have run.py compress smollm2 and save it in every form."""
    for written in FILES:
        place = outputs / "".join(letter if letter.isalnum() else "_" for letter in written.name)
        asking = [(peer, bound) for peer, bound in written.peers.items() if wanted(written.name, peer)]
        if asking and not (place / "ours.npy").is_file():
            store = outputs / "stores" / written.form  # a run has one saved model, whatever its form
            typed = ["model=smollm2", "target=all", *written.choices.split(), *QUICK, f"output.dir={store}"]
            program = [sys.executable, str(HERE.parents[1] / "run.py"), *typed, f"output.save_model={written.form}"]
            before = set(store.glob("runs/*/model"))
            subprocess.run(program, check=True)
            (saved,) = set(store.glob("runs/*/model")) - before or {(place / "model").resolve()}
            place.mkdir(parents=True, exist_ok=True)
            (place / "model").unlink(missing_ok=True)
            (place / "model").symlink_to(saved.resolve())
            ask(place, None, written)
        yield from (Question(written.name, peer, place, bound) for peer, bound in asking)


def of_architectures(outputs: Path, wanted: Callable[[str, str], bool]) -> Iterator[Question]:
    """Write tiny random networks of every architecture as GGUF."""
    from helpers.gguf_tiny import WRITTEN, tiny

    for name in WRITTEN:
        told = f"GGUF, F32, a tiny random {name}"
        if name in UNASKED or not wanted(told, "llama_cpp") or (model := tiny(name)).network.config.is_encoder_decoder:
            continue  # llama-cpp-python evaluates decoders alone
        if not (outputs / name / "ours.npy").is_file():
            writer_of("gguf").write(model, outputs / name / "model")
            ask(outputs / name, np.random.default_rng(0).integers(3, 60, (2, 24)))
        yield Question(told, "llama_cpp", outputs / name, TABLE)


def ask(place: Path, ids: np.ndarray | None, written: Written | None = None) -> None:
    """Put beside a file what its readers are asked, and what this program answers.

    Args:
        place: the folder of the file.
        ids: token ids ``[texts, tokens]``; None for those of a text.
        written: what the file is, if it is one of smollm2.
    """
    read = LocalModel("written", str(place / "model")).load("cpu", written.dtype if written else "float32")
    if ids is None:
        ids = np.array([read.tokenizer(TEXT)["input_ids"]], dtype=np.int64)
    network = read.network
    if written and written.rounds_inputs:
        network = again(written, read).network
        save(place / "exact.npy", network, ids)
        with_sums_of_floats(network)
    save(place / "ours.npy", network, ids)
    if written and ROUNDED in written.peers.values():
        with_inputs_of_8_bits(network)
        save(place / "rounded.npy", network, ids)
    np.save(place / "ids.npy", ids)
    texts = TEXTS if read.network.config.vocab_size > 1000 else ("abc dead beef", "zebra")
    (place / "texts.json").write_text(json.dumps(texts))
    ids_of_texts = [read.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    (place / "texts_ids.json").write_text(json.dumps(ids_of_texts))


def save(file: Path, network: torch.nn.Module, ids: np.ndarray) -> None:
    """Keep a network's logits."""
    with torch.no_grad():
        np.save(file, network(torch.from_numpy(ids)).logits.float().numpy())


def again(written: Written, read: Model) -> Model:
    """The model of the run, whose layers round their inputs, compressed once more.

    Raises:
        SystemExit: its weights are not those of the file, so that it is not the model of the run.
    """
    settings: dict[str, dict[str, Any]] = {"compression": {}, "corpus": {}}
    for typed in written.choices.split():
        key, _, value = typed.partition("=")
        group, _, name = key.partition(".")
        settings[group][name] = yaml.safe_load(value)
    method, text = (settings[group] for group in ("compression", "corpus"))
    model = kc.load("smollm2", device="cpu")
    corpus = kc.choose(f"corpus={text.pop('')}", **text) if text else None
    kc.compress(model, kc.choose(f"compression={method.pop('')}", **method), kc.choose("target=all"), corpus)
    for layer in linear_layers(model):
        if not torch.equal(layer.weight, dict(read.network.named_modules())[layer.path].weight):
            raise SystemExit(f"{written.name}: {layer.path} of the file is not that of the same compression")
    return model


if __name__ == "__main__":
    raise SystemExit(main())
