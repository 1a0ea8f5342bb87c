"""Compressed files of one model beside their original: one baseline, one table, the same groups in every comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from helpers.networks import build_network
from knowledge_compression.analysis.advice import kept as kept_rows
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.writing.gptq import GptqWriter
from knowledge_compression.configuration import experiment_from
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.suite import Evaluation, accuracy_metrics, item_table
from knowledge_compression.experiment import Experiment
from knowledge_compression.models import Model, Target
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.results.files import kept_figure, tokens_differ, told
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.results.summary import as_rich, drop_rows
from knowledge_compression.results.tracker import NoTracker
from knowledge_compression.sweeping.cli import CONF


@dataclass(frozen=True)
class NextWord:
    """Asks which token follows each of forty; what is right is given."""

    gold: tuple[int, ...]

    def evaluate(self, scorer: Scorer) -> Evaluation:
        with torch.no_grad():
            logits = scorer.model.network(input_ids=torch.arange(7, 47)[:, None]).logits[:, -1]
        rows = [
            {"suite": "next", "task": "next", "id": str(i), "prompt": "", "gold": str(gold), "prediction": str(answer)}
            | {"correct": answer == gold}
            for i, (gold, answer) in enumerate(zip(self.gold, logits.argmax(-1).tolist(), strict=True))
        ]
        items = item_table(rows)
        return Evaluation(accuracy_metrics(items), items, {"digest": "next-1"})


WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A small LLaMA, ``dense``, and as packed checkpoints of 8 and 2 bits."""
    folder = tmp_path_factory.mktemp("files")
    for name, bits in (("dense", 0), ("eight", 8), ("two", 2)):
        model = Model(build_network("llama", **WIDE), tiny_tokenizer, name)
        if not bits:
            model.network.save_pretrained(folder / name)
            tiny_tokenizer.save_pretrained(folder / name)
            continue
        targets = Target("all", ["decoder_self_att", "ff"]).select(model)
        Rtn(bits=bits, group_size=32, scale_bits=16).compress(model, targets, None)
        GptqWriter().write(model, folder / name)
    return folder


def asked(made: Experiment, files: Path) -> Experiment:
    """The experiment with a suite of whose questions the original answers every fourth wrong."""
    network = LocalModel("dense", str(files / "dense")).load("cpu", "float32").network
    with torch.no_grad():
        answers = network(input_ids=torch.arange(7, 47)[:, None]).logits[:, -1].argmax(-1).tolist()
    gold = tuple(0 if i % 4 == 0 else answer for i, answer in enumerate(answers))
    return replace(made, suites={"next": NextWord(gold)})


def experiment(*overrides: str) -> Experiment:
    GlobalHydra.instance().clear()
    typed = ["model=local", "compression=none", "eval=[atlas]", "limit=150", "device=cpu", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=typed, return_hydra_config=True)
        made = experiment_from(config, config.hydra.runtime.choices)
        assert GlobalHydra.instance().is_initialized()  # as whoever composed left it
    return made


@pytest.fixture(scope="module")
def done(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Run], dict[str, Run], RunStore]:
    """Both files, one of them pruned too, and the baseline of all."""
    store = RunStore(str(tmp_path_factory.mktemp("store")))
    runs, baselines = [], {}
    pruned = ["compression=magnitude", "target=all", "sparsity=0.5"]
    for more in (["eight"], ["two"], ["eight", *pruned]):
        made = asked(experiment(f"model.path={files / more[0]}", f"model.dense={files / 'dense'}", *more[1:]), files)
        run = made.run(store, NoTracker())
        runs.append(run)
        baselines[run.id] = made.dense().run(store, NoTracker())
    return runs, baselines, store


def test_the_original_is_the_baseline_of_every_file(
    files: Path, done: tuple[list[Run], dict[str, Run], RunStore]
) -> None:
    runs, baselines, _ = done
    (dense,) = {run.id: run for run in baselines.values()}.values()
    alone = asked(experiment(f"model.path={files / 'dense'}"), files)
    assert alone.is_dense and alone.id == dense.id  # whoever ran the original by itself has run the baseline
    assert dense.id not in {run.id for run in runs} and len({run.id for run in runs}) == 3
    assert "stored" not in dense.report["compression"]


def test_the_table_shows_the_bits_and_bytes_of_the_files(
    files: Path, done: tuple[list[Run], dict[str, Run], RunStore]
) -> None:
    runs, baselines, _ = done
    table = drop_rows(runs[:2], {run.id: baselines[run.id] for run in runs[:2]})
    rows = {row["compression"]: row for row in table}
    names = [f"{files.name}/eight", f"{files.name}/two"]
    assert [rows[name]["reached_bits"] for name in names] == [8.0, 2.0]
    for name in names:
        size = (files / name.split("/")[1] / "model.safetensors").stat().st_size
        assert rows[name]["stored_mb"] == pytest.approx(size / 1e6)
    assert rows[None]["kept_percent"] is None and rows[None]["reached_bits"] == 32
    assert rows[names[0]]["kept_percent"] >= rows[names[1]]["kept_percent"]
    assert rows[names[0]]["drop_percent"] == pytest.approx(
        100 * (rows[None]["value"] - rows[names[0]]["value"]) / rows[None]["value"]
    )
    assert "kept %" in [column.header for column in as_rich(table).columns]
    line = told(runs[0])
    assert line is not None
    assert line.startswith(f"{names[0]}: gptq, 8 bits a weight, ")
    assert "groups of 32" in line and "made by knowledge_compression" in line


def test_what_was_kept_is_counted_item_by_item(done: tuple[list[Run], dict[str, Run], RunStore]) -> None:
    runs, baselines, _ = done
    run, dense = runs[1], baselines[runs[1].id]
    before = {(r["task"], r["id"]): r["correct"] for r in dense.items.iter_rows(named=True)}
    after = {(r["task"], r["id"]): r["correct"] for r in run.items.iter_rows(named=True)}
    known = [key for key, right in before.items() if right]
    share = 100 * sum(bool(after[key]) for key in known) / len(known)
    (row,) = (row for row in drop_rows([run], {run.id: dense}) if row["run"] == run.id)
    assert row["kept_percent"] == pytest.approx(share)
    assert row["kept_low"] < share < row["kept_high"] or share in (0, 100)


def test_the_figure_has_a_point_for_each_file(done: tuple[list[Run], dict[str, Run], RunStore]) -> None:
    runs, baselines, _ = done
    figure = kept_figure(drop_rows(runs, baselines))
    assert figure is not None
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {run.config["choices"]["compression"] for run in runs}
    assert axes.get_xlabel() == "file (MB)"
    assert kept_figure(drop_rows(list(baselines.values()), {})) is None


def test_comparisons_find_files_and_original_in_a_store(done: tuple[list[Run], dict[str, Run], RunStore]) -> None:
    runs, baselines, _ = done
    found = compare([*runs, *{run.id: run for run in baselines.values()}.values()])
    assert found.skipped == []
    (group,) = found.groups
    assert group.dense.id == next(iter(baselines.values())).id
    assert {run.id for run in group.runs} == {run.id for run in runs}
    assert len(kept_rows(group)) == 4


def test_pruning_a_file_is_named_as_what_it_is(done: tuple[list[Run], dict[str, Run], RunStore]) -> None:
    run = done[0][2]
    assert run.config["choices"]["compression"].endswith("/eight+magnitude")
    assert run.report["compression"]["sparsity"] == pytest.approx(0.5, abs=0.001)
    assert run.report["compression"]["stored"]["format"] == "gptq"


def test_another_tokenizer_is_said(
    files: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    done: tuple[list[Run], dict[str, Run], RunStore],
) -> None:
    build_network("llama", **WIDE).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path / "other")
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    other.save_pretrained(tmp_path / "other")
    made = experiment(f"model.path={files / 'eight'}", f"model.dense={tmp_path / 'other'}")
    run = made.run(RunStore(str(tmp_path / "store")), NoTracker())
    line = tokens_differ(run)
    assert line is not None and "have different tokenizers: answers are compared by text" in line
    assert tokens_differ(done[0][0]) is None
    with pytest.raises(BadInput, match="distance=true compares probabilities of the same tokens"):
        replace(made, distance=True).run(RunStore(str(tmp_path / "store")), NoTracker())


def test_files_lie_the_further_from_their_original_the_fewer_their_bits(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    store = RunStore(str(tmp_path / "store"))
    far = []
    for name in ("eight", "two"):
        made = experiment(f"model.path={files / name}", f"model.dense={files / 'dense'}", "distance=true")
        far.append(made.run(store, NoTracker()).metrics["atlas.kl"])
    assert 0 < 100 * far[0] < far[1]


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        ("smollm3", r"model\.dense=smollm3 is neither a path nor a model \(did you mean smollm2\?\)"),
        ("world_encoder", "is a model that is trained here"),
    ],
)
def test_an_original_that_is_none_is_one_line(dense: str, message: str, files: Path) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        experiment(f"model.path={files / 'eight'}", f"model.dense={dense}")
    assert "\n" not in str(caught.value)


def test_an_original_may_be_named(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = experiment(f"model.path={files / 'eight'}", "model.dense=smollm2")
    assert made.choices["model"] == "smollm2" and not made.is_dense
    assert made.dense().source.name == "smollm2" and made.dense().is_dense
