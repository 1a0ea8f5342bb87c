"""Coverage-guided fuzzing of the readers of other programs' files: any input is read, or refused in one line of ours.

atheris is not a dependency of this project. Give it an environment of its own that sees the project's packages::

    python -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris
    python -c "import site; print(site.getsitepackages()[0])" > $(echo /tmp/fuzz/lib/python3*/site-packages)/project.pth
    nice -n 19 /tmp/fuzz/bin/python benchmarks/fuzz.py store --seconds 600

Fuzzing begins with a whole file of each kind, made here. An input that is neither read nor refused ends the program,
which prints the exception and the place where libFuzzer put the input.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lm_eval.api.metrics  # noqa: F401 - loaded before what is instrumented
import polars as pl
import torch
from safetensors.torch import save

with atheris.instrument_imports(include=["knowledge_compression"]):
    from knowledge_compression.errors import BadInput
    from knowledge_compression.evaluation.lama_data import LamaFolder
    from knowledge_compression.evaluation.suite import item_table
    from knowledge_compression.evaluation.tasks.own import files_of
    from knowledge_compression.models.streamed import INDEX, SINGLE, Checkpoint
    from knowledge_compression.results.store import Run, RunStore

FACT = {"sub_label": "Paris", "obj_label": "France", "uuid": "u", "predicate_id": "P1", "masked_sentences": ["[MASK]"]}
TASK = b"""task: t
include: [other.yaml]
dataset_kwargs: {data_files: {test: d.jsonl}}
doc_to_text: '{{q}}'
metric_list: [{metric: acc, aggregation: mean}]
filter_list: [{name: a, filter: [{function: take_first}]}]
"""


def lama(data: bytes, folder: Path) -> None:
    """Lines of LAMA's facts and templates."""
    (folder / "TREx").mkdir(exist_ok=True)
    (folder / "TREx" / "P1.jsonl").write_bytes(data)
    (folder / "relations.jsonl").write_bytes(data)
    source = LamaFolder(folder)
    for read in (lambda: list(source.facts("TREx")), source.templates):
        _refused_or_read(read)


def safetensors(data: bytes, folder: Path) -> None:
    """The header of a checkpoint that is streamed, and its index: the first byte says which."""
    index = data[:1] > b"\x7f"
    (folder / INDEX).unlink(missing_ok=True)
    (folder / (INDEX if index else SINGLE)).write_bytes(data[1:])

    def read() -> None:
        checkpoint = Checkpoint(folder)
        checkpoint.described()
        for name in list(checkpoint.file_of)[:4]:
            checkpoint.read(name)

    _refused_or_read(read)


STORE_FILES = ("config.yaml", "metrics.json", "report.json", "environment.json", "layers.json", "items.parquet")


def store(data: bytes, folder: Path) -> None:
    """One file of a run: the first byte says which."""
    if not data:
        return
    place = folder / "runs" / "a"
    name = STORE_FILES[data[0] % len(STORE_FILES)]
    whole = (place / name).read_bytes()
    (place / name).write_bytes(data[1:])
    try:
        found = RunStore(folder).look_up("a")
        if isinstance(found, Run):
            _ = found.items, found.layers
        else:
            assert isinstance(found, str) and "\n" not in found, repr(found)
    finally:
        (place / name).write_bytes(whole)


def task(data: bytes, folder: Path) -> None:
    """A task file and, after a line of dashes, one that it may include."""
    first, _, second = data.partition(b"\n---\n")
    (folder / "t.yaml").write_bytes(first)
    (folder / "other.yaml").write_bytes(second)
    _refused_or_read(lambda: files_of(folder / "t.yaml", allow_code=False))


def _refused_or_read(read: Callable[[], object]) -> None:
    try:
        read()
    except BadInput as error:
        assert str(error), "refused without a word"


def _seeds(name: str, folder: Path) -> list[bytes]:
    """Whole files of a kind; of the store also puts the run there."""
    if name == "lama":
        template = {"relation": "P1", "template": "[X] is in [Y] .", "label": "l"}
        return [json.dumps(one).encode() + b"\n" for one in (FACT, template)]
    if name == "safetensors":
        index = {"metadata": {"total_size": 4}, "weight_map": {"a": SINGLE, "b": "model-2.safetensors"}}
        weights = {"a": torch.ones(2, 2), "b": torch.ones(3, dtype=torch.bfloat16)}
        return [b"\x00" + save(weights, {"format": "pt"}), b"\xff" + json.dumps(index).encode()]
    if name == "task":
        return [TASK + b"\n---\ndoc_to_target: '{{a}}'\n", TASK + b"\n---\ndoc_to_text: !function m.f\n"]
    choices = {"model": "m", "target": "att", "compression": "magnitude", "recovery": "none"}
    config = {"choices": choices, "eval": {"s": {"limit": 1}}, "seed": 0, "sparsity": 0.5, "reading": "module"}
    report = {"model": {"name": "m", "family": "decoder"}, "eval": {"s": {}}, "recovery": {"trainable_parameters": 0}}
    report["compression"] = {"sparsity": 0.5, "bits": 4.0, "layers": [{"path": "a.0.b", "parameters": 4, "removed": 2}]}
    rows = [{"suite": "s", "task": "t", "id": str(i), "correct": i % 2 == 0, "log_prob": -0.5} for i in range(20)]
    run = Run("a", config | {"compression": {"sparsity": 0.5}}, {"s.accuracy": 0.5}, report, {}, None, item_table(rows))
    place = RunStore(folder).write(run).folder
    assert place is not None
    environment = json.loads((place / "environment.json").read_text())
    del environment["digests"]  # else a table that differs by a byte would be refused unread
    (place / "environment.json").write_text(json.dumps(environment))
    return [bytes([i]) + (place / file).read_bytes() for i, file in enumerate(STORE_FILES)]


READERS: Mapping[str, Callable[[bytes, Path], None]] = {
    "lama": lama,
    "safetensors": safetensors,
    "store": store,
    "task": task,
}


def main() -> None:
    """Fuzz one reader."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--seconds", type=int, default=600, help="how long (%(default)s)")
    options = parser.parse_args()
    pl.Config.set_verbose(False)
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    corpus, work = scratch / "corpus", scratch / "work"
    corpus.mkdir()
    work.mkdir()
    for number, seed in enumerate(_seeds(options.reader, work)):
        (corpus / str(number)).write_bytes(seed)
    reader = READERS[options.reader]
    arguments = [sys.argv[0], str(corpus), f"-max_total_time={options.seconds}", "-timeout=20", "-rss_limit_mb=4096"]
    arguments += [
        "-max_len=4096",
        "-print_final_stats=1",
        f"-artifact_prefix={tempfile.gettempdir()}/fuzz-{options.reader}-",
    ]
    atheris.Setup(arguments, lambda data: reader(data, work))
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
