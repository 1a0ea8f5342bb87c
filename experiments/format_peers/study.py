"""What this program writes, read by the programs that others use, each in an environment of its own.

    PYTHONPATH=tests python experiments/format_peers/study.py --environments DIR --outputs DIR --table

makes the environments that are missing (GPTQModel brings its own torch, 6 GB in all; llama.cpp is compiled, which takes
half an hour on one core; vLLM is its build for CPUs), has `run.py` compress the whole of smollm2 and save it in every
form, writes tiny networks of every architecture as GGUF, asks the peers for logits, and puts versions and differences
into `docs/formats.md`. It ends with status 1 where a difference exceeds its bound, or where a peer refuses a file for
another reason than is known. What is written or answered is not repeated. It is not run in CI.

    ... --peers vllm --only "compressed-tensors" --table

asks one peer about some files, and renews their rows alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from forms import FILES, FLOATS, LIKE_LLAMA, MIXTURES, OWN, TABLE, Bound, Refused, Written
from page import put

import knowledge_compression as kc
from knowledge_compression.compression.writing.writers import writer_of
from knowledge_compression.models import Model
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.targets import linear_layers

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "formats.md"
TEXT = (
    "The capital of France is Paris, and the capital of Japan is Tokyo. Water boils at one hundred degrees. In 1969 "
    "two men walked on the moon; the third stayed in orbit. The author of Hamlet was born in Stratford, in England."
)
TEXTS = ("The capital of France is Paris, isn't it?", " two  spaces\tand a tab\n", "Zürich, São Paulo, 東京, 🙂")
TINY = "GGUF, F32, a tiny random {}"
HEADINGS = (
    "| file | read by | KL, nats a token | largest difference of log-probabilities | first choice | token ids |",
    "|---|---|---|---|---|---|",
)
QUICK = ("eval=[atlas]", "eval.atlas.relations=[capital_of]")  # a run asks something


def main() -> int:
    """Write, ask, compare, tell."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--environments", type=Path, required=True, help="a folder of one environment a peer")
    options.add_argument("--outputs", type=Path, required=True, help="a folder for the files that are written")
    options.add_argument("--peers", default="gptqmodel,transformers,llama_cpp,vllm", help="which are asked")
    options.add_argument("--only", default="", help="only files whose name contains this")
    options.add_argument("--table", action="store_true", help="put what was asked into the table of docs/formats.md")
    asked = options.parse_args()
    peers = asked.peers.split(",")
    for peer in peers:
        environment(asked.environments / peer, peer)
    wanted = partial(chosen, asked.only, peers)
    asking = [*of_smollm2(asked.outputs, wanted), *of_mixtures(asked.outputs / "mixtures", wanted)]
    asking += of_architectures(asked.outputs / "architectures", wanted)
    for peer in peers:
        asked_before = f"{peer}.npy"  # what is answered is not asked again
        if places := [q.place for q in asking if q.peer == peer and not (q.place / asked_before).is_file()]:
            program = [asked.environments / peer / "bin" / "python", HERE / f"ask_{peer}.py", *places]
            subprocess.run(program, check=False, env=apart())
    rows = {(question.name, question.peer): question.row() for question in asking}
    print("\n".join([*HEADINGS, *(row for row, _ in rows.values())]))
    for question in asking:
        if (question.place / "integers.npy").is_file():
            apart_by = divergence_of(*(question.answer(name) for name in ("integers", FLOATS)))
            print(f"{question.name}: sums of whole numbers give other answers than sums of floats, KL {apart_by:.1e}")
    if asked.table:
        put(PAGE, HEADINGS, {key: row for key, (row, _) in rows.items()}, list(everything()))
    return int(not all(good for _, good in rows.values()))


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
    if peer == "vllm":  # pip takes over an hour to choose versions
        subprocess.run([*pip, "uv"], check=True)
        uv, python = [place / "bin" / "uv", "pip"], ["--python", place / "bin" / "python"]
        # PyPI lacks torch's build for CPUs. It has these three for CUDA alone, which breaks beside it; text needs none.
        indexes = {
            "UV_EXTRA_INDEX_URL": "https://download.pytorch.org/whl/cpu",
            "UV_INDEX_STRATEGY": "unsafe-best-match",
        }
        subprocess.run([*uv, "install", *python, "-r", needs], check=True, env=indexes | os.environ)
        subprocess.run([*uv, "uninstall", *python, "torchvision", "torchaudio", "torchcodec"], check=True)
    else:
        subprocess.run([*pip, "-r", needs], check=True)
    (place / ".complete").touch()


@dataclass(frozen=True)
class Question:
    """A file, and the peer that is to read it.

    Attributes:
        name: for the table.
        peer: who.
        place: the folder of the file, which also has what is asked and answered.
        bound: the largest divergence that is accepted.
    """

    name: str
    peer: str
    place: Path
    bound: Bound

    def row(self) -> tuple[str, bool]:
        """A row of the table, and whether the difference is within its bound."""
        versions = self.place / f"{self.peer}.txt"
        start = f"| {self.name} | {versions.read_text() if versions.is_file() else self.peer} |"
        if (error := self.place / f"{self.peer}.error").is_file():
            why = error.read_text().replace(str(self.place), "...").replace("|", "/")
            known = isinstance(self.bound, Refused) and re.search(self.bound.reason, why)
            return f"{start} not read: {known[0] if known else why} | | | |", bool(known)
        if not (self.place / f"{self.peer}.npy").is_file():
            return f"{start} the peer ended without an answer | | | |", False
        one, other = (self.answer(name) for name in ("ours", self.peer))
        divergence = divergence_of(one, other)
        bound = self.bound if isinstance(self.bound, float) else 0.0  # none is accepted where a refusal is known
        if isinstance(self.bound, str):
            bound = 2 * divergence_of(one, self.answer(self.bound))
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
        return f"{start} {said}", good

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
        if asking and not (place / "model").exists():
            store = outputs / "stores" / written.form  # a run has one saved model, whatever its form
            layers = [] if "target=" in written.choices else ["target=all"]
            typed = ["model=smollm2", *layers, *written.choices.split(), *QUICK, f"output.dir={store}"]
            program = [sys.executable, str(HERE.parents[1] / "run.py"), *typed, f"output.save_model={written.form}"]
            before = set(store.glob("runs/*/model"))
            subprocess.run(program, check=True)
            (saved,) = set(store.glob("runs/*/model")) - before or {(place / "model").resolve()}
            place.mkdir(parents=True, exist_ok=True)
            (place / "model").unlink(missing_ok=True)
            (place / "model").symlink_to(saved.resolve())
        if asking:
            answers = {bound for bound in written.peers.values() if isinstance(bound, str)}
            ask(place, None, answers | ({"integers", FLOATS} if written.sums == FLOATS else set()), written)
        yield from (Question(written.name, peer, place, bound) for peer, bound in asking)


def of_mixtures(outputs: Path, wanted: Callable[[str, str], bool]) -> Iterator[Question]:
    """Round a tiny mixture, whose width and heads are such as vLLM's kernels for CPUs take."""
    from helpers.gguf_tiny import tiny

    for name, (form, target, peers) in MIXTURES.items():
        place = outputs / f"{form}_{target}"
        asking = [(peer, bound) for peer, bound in peers.items() if wanted(name, peer)]
        if asking and not (place / "model").exists():
            model = tiny("mixtral", hidden_size=128, intermediate_size=128, head_dim=32)
            way = kc.choose("compression=rtn", bits=4, group_size=32, symmetric=True, scale_bits=16)
            kc.compress(model, way, kc.choose(f"target={target}"))
            writer_of(form).write(model, place / "model")
        if asking:
            answers = {bound for bound in peers.values() if isinstance(bound, str)}
            ask(place, np.random.default_rng(0).integers(3, 60, (2, 24)), answers)
        yield from (Question(name, peer, place, bound) for peer, bound in asking)


def of_architectures(outputs: Path, wanted: Callable[[str, str], bool]) -> Iterator[Question]:
    """Write tiny random networks of every architecture as GGUF."""
    from helpers.gguf_tiny import WRITTEN, tiny

    for name in WRITTEN:
        told = TINY.format(name)
        if not wanted(told, "llama_cpp") or (model := tiny(name)).network.config.is_encoder_decoder:
            continue  # llama-cpp-python evaluates decoders alone
        if not (outputs / name / "ours.npy").is_file():
            # llama.cpp takes tokens for granted in the vocabulary of a model whose name says Phi 3.
            writer_of("gguf").write(replace(model, name="tiny"), outputs / name / "model")
            ask(outputs / name, np.random.default_rng(0).integers(3, 60, (2, 24)))
        yield Question(told, "llama_cpp", outputs / name, TABLE)


def everything() -> Iterator[tuple[str, str]]:
    """The rows that the table may have, in order: file and peer."""
    from helpers.gguf_tiny import WRITTEN

    yield from ((written.name, peer) for written in FILES for peer in written.peers)
    yield from ((name, peer) for name, (_, _, peers) in MIXTURES.items() for peer in peers)
    yield from ((TINY.format(name), "llama_cpp") for name in WRITTEN)


def ask(place: Path, ids: np.ndarray | None, more: Collection[str] = (), written: Written | None = None) -> None:
    """Put beside a file what its readers are asked, and what this program answers.

    Args:
        place: the folder of the file.
        ids: token ids ``[texts, tokens]``; None for those of a text.
        more: names of further answers.
        written: what the file is, if it is one of smollm2.
    """
    wanted = {"ours": written.sums if written else LIKE_LLAMA} | {name: name for name in more}
    wanted = {name: way for name, way in wanted.items() if not (place / f"{name}.npy").is_file()}
    if not wanted:
        return
    read = LocalModel("written", str(place / "model")).load("cpu", written.dtype if written else "float32")
    if ids is None:
        ids = np.array([read.tokenizer(TEXT)["input_ids"]], dtype=np.int64)
    network = again(written, read).network if written and written.sums else read.network
    for name, way in wanted.items():
        asked = deepcopy(network)
        if way:
            OWN[way](asked)
        save(place / f"{name}.npy", asked, ids)
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
    settings: dict[str, dict[str, Any]] = {"compression": {}, "corpus": {}, "target": {}}
    for typed in written.choices.split():
        key, _, value = typed.partition("=")
        group, _, name = key.partition(".")
        settings[group][name] = yaml.safe_load(value)
    method, text, layers = (settings[group] for group in ("compression", "corpus", "target"))
    target = kc.choose(f"target={layers.pop('', 'all')}", **layers)
    model = kc.load("smollm2", device="cpu")
    corpus = kc.choose(f"corpus={text.pop('')}", **text) if text else None
    kc.compress(model, kc.choose(f"compression={method.pop('')}", **method), target, corpus)
    for layer in linear_layers(model):
        if not torch.equal(layer.weight, dict(read.network.named_modules())[layer.path].weight):
            raise SystemExit(f"{written.name}: {layer.path} of the file is not that of the same compression")
    return model


if __name__ == "__main__":
    raise SystemExit(main())
