"""Results that other tools made, taken into a store: logs of lm-eval, tables by a mapping, other stores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import yaml
from polars.testing import assert_frame_equal

from helpers.networks import build_network
from helpers.stores import bits, made_run
from helpers.taking import refused, taken
from knowledge_compression.analysis import ledger
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.evaluation.harness import Harness
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.tasks import load_tasks
from knowledge_compression.report import main as report
from knowledge_compression.results.store import RunStore
from knowledge_compression.statistics import drop

TASKS = ["piqa", "boolq", "winogrande", "lambada_openai", "triviaqa", "hellaswag"]


def write_log(folder: Path, tasks_dir: Path, model: Path, tasks: list[str]) -> None:
    """What ``lm-eval --log_samples --output_path`` writes, by lm-eval itself."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = load_tasks(tasks, str(tasks_dir)).tasks
    tracker = EvaluationTracker(output_path=str(folder))
    with pytest.MonkeyPatch.context() as patch:  # half a minute's look around the machine
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
        found = simple_evaluate(
            HFLM(pretrained=str(model), device="cpu", batch_size=4),
            tasks=list(loaded.values()),
            limit=5,
            bootstrap_iters=0,
            evaluation_tracker=tracker,
            task_manager=TaskManager(include_defaults=False),  # else it reads all of its 13,000 tasks' files, twice
        )
    samples = found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=samples)
    for task in found["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])


@pytest.fixture(scope="session")
def logs(tmp_path_factory, tasks_dir, tiny_tokenizer) -> Path:
    """Logs of a tiny LLaMA and of the same with half of its weights at zero, as lm-eval wrote them."""
    folder = tmp_path_factory.mktemp("logs")
    network = build_network("llama")
    for name in ("dense", "halved"):
        if name == "halved":
            for parameter in network.parameters():
                parameter.data[::2] = 0
        network.save_pretrained(folder / name / "model")
        tiny_tokenizer.save_pretrained(folder / name / "model")
        write_log(folder / name, tasks_dir, folder / name / "model", TASKS)
        shutil.rmtree(folder / name / "model")
    return folder


def one(pattern: str, folder: Path) -> Path:
    (found,) = folder.rglob(pattern)
    return found


def test_a_log_of_lm_eval_is_what_the_harness_suite_says_of_the_same_model(logs, tmp_path, tasks_dir, tiny_model):
    taken(logs / "dense", "-o", tmp_path, "--model", "tiny", "--compression", "none")
    (run,) = RunStore(tmp_path)
    suite = Harness(tasks=TASKS, limit=5, data_dir=str(tasks_dir), scoring="stock")
    ours = suite.evaluate(Scorer(tiny_model("llama")))
    columns = ["task", "id", "prompt", "correct", "prediction_log_prob", "choices", "filters", "correct_norm"]
    told, expected = (items.sort("task", "id") for items in (run.items, ours.items))
    assert_frame_equal(told.select(columns), expected.select(columns), abs_tol=1e-5)
    known = ["gold", "gold_index", "prediction", "log_prob", "margin", "rank"]
    rest = pl.col("task") != "winogrande"  # whose log does not say which of the two sentences is right
    assert_frame_equal(told.filter(rest).select(known), expected.filter(rest).select(known), abs_tol=1e-5)
    assert told.filter(~rest)["gold"].null_count() == 5
    shared = {f"lm_eval.{task}.accuracy" for task in TASKS} | {"lm_eval.accuracy", "lm_eval.items"}
    assert {name: run.metrics[name] for name in shared} == pytest.approx(
        {f"lm_eval.{name}": ours.metrics[name] for name in (one.partition(".")[2] for one in shared)}
    )


def test_logs_are_compared_as_our_own_runs_are(logs, tmp_path, capsys):
    taken(logs / "dense", "-o", tmp_path, "--model", "tiny", "--compression", "none", "--by", "the cluster")
    taken(logs / "halved", "-o", tmp_path, "--model", "tiny", "--compression", "halving", "--sparsity", "0.5")
    assert "1 runs taken" in capsys.readouterr().out
    dense, halved = sorted(RunStore(tmp_path), key=lambda run: run.config["choices"]["compression"] != "none")
    (group,) = compare([dense, halved])
    assert group.dense.id == dense.id and [run.id for run in group.runs] == [halved.id]
    before, after = (of.items.sort("task", "id")["correct"].to_numpy() for of in (dense, halved))
    expected = drop(before, after)
    found = group.drops[halved.id]
    assert (found.value, found.p) == (expected.value, expected.p)
    fates = ledger.fates(dense, halved, "lm_eval")["fate"].to_list()
    assert fates.count("lost") == (before & ~after).sum() and fates.count("gained") == (~before & after).sum()
    report([str(tmp_path), "-o", str(tmp_path / "page.html")])
    mark = dense.config["taken"]
    assert mark["by"] == "the cluster" and mark["written_by"].startswith("lm-eval 0.4.")
    assert halved.config["taken"]["by"] == "unknown" and halved.stored_mb is None
    assert len(mark["from"]) == 1 + len(TASKS) and all(len(digest) == 64 for digest in mark["from"].values())


def test_taking_the_same_again_changes_nothing(logs, tmp_path, capsys):
    for _ in range(2):
        taken(logs / "dense", "-o", tmp_path, "--model", "tiny", "--compression", "none")
    assert "0 runs taken; 1 were there already" in capsys.readouterr().out
    assert len(list(RunStore(tmp_path))) == 1


def test_several_logs_at_once_by_a_statement(logs, tmp_path):
    said = {"by": "us", "runs": {"dense": {"model": "m", "compression": "none"}}}
    said["runs"]["halved"] = {"model": "m", "compression": "halving", "bits": 8}
    (tmp_path / "take.yaml").write_text(yaml.safe_dump(said))
    taken(logs, "--as", tmp_path / "take.yaml", "-o", tmp_path / "out")
    assert len(list(RunStore(tmp_path / "out"))) == 2


@pytest.mark.parametrize(
    "damage", ["version", "no version", "no results", "no samples", "twice", "short", "field", "text"]
)
def test_a_log_that_is_not_whole_is_one_line(damage, logs, tmp_path, capsys):
    folder = tmp_path / "log"
    shutil.copytree(logs / "dense", folder)
    results, samples = one("results_*.json", folder), one("samples_piqa_*.jsonl", folder)
    content, lines = json.loads(results.read_text()), samples.read_text().splitlines()
    if damage == "version":
        results.write_text(json.dumps(content | {"lm_eval_version": "0.5.1"}))
    elif damage == "no version":
        del content["lm_eval_version"]
        results.write_text(json.dumps(content))
    elif damage == "no results":
        results.unlink()
    elif damage == "no samples":
        samples.unlink()
    elif damage == "twice":
        samples.write_text("\n".join([*lines, lines[0]]))
    elif damage == "short":
        samples.write_text("\n".join(lines[:-1]))
    elif damage == "field":
        samples.write_text("\n".join([json.dumps({**json.loads(lines[0]), "arguments": None}), *lines[1:]]))
    elif damage == "text":
        samples.write_text("\n".join(["{", *lines]))
    said = refused(capsys, folder, "-o", tmp_path / "out", "--model", "m", "--compression", "none")
    expected = {
        "version": "was written by lm-eval 0.5.1; logs of versions 0.4 are read",
        "no version": "was written by lm-eval (unknown version)",
        "no results": "no file of results",
        "no samples": "task piqa, but its samples",
        "twice": f"{samples}:6: document 0 appears twice",
        "short": "holds 4 of the 5 documents",
        "field": f"{samples}:1: its answers cannot be read",
        "text": f"{samples}:1: not JSON",
    }
    assert expected[damage] in said and not (tmp_path / "out").exists()


def test_a_task_that_was_logged_twice_is_one_line(logs, tmp_path, capsys):
    folder = tmp_path / "log"
    shutil.copytree(logs / "dense", folder)
    for path in [*folder.rglob("samples_*.jsonl"), *folder.rglob("results_*.json")]:
        again = path.name.rpartition("_")[0] + "_2001-01-01T00-00-00.5" + path.suffix
        shutil.copy(path, path.with_name(again))
    assert "was logged twice" in refused(
        capsys, folder, "-o", tmp_path / "out", "--model", "m", "--compression", "none"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--compression", "none"], "model is missing"),
        (["--model", "m"], "compression: Field required"),
        (["--model", "m", "--compression", "x", "--bits", "four"], "--bits: Input should be a valid number"),
        (["--model", "m", "--compression", "x", "--sparsity", "40"], "--sparsity: Input should be less than"),
    ],
)
def test_what_is_not_said_of_a_log_is_asked_for(arguments, expected, logs, tmp_path, capsys):
    assert expected in refused(capsys, logs / "dense", "-o", tmp_path / "out", *arguments)


def test_several_logs_without_a_statement_are_one_line(logs, tmp_path, capsys):
    said = refused(capsys, logs, "-o", tmp_path / "out", "--model", "m", "--compression", "none")
    assert "logs of 2 models" in said


# Tables


# Other stores


def test_another_store_is_taken_with_its_ids_and_a_mark(tmp_path, capsys):
    store = RunStore(tmp_path / "theirs")
    theirs = [made_run(bits("1100"), compression="none", id="dense000"), made_run(bits("1010"), id="small000")]
    theirs[1].report["compression"] |= {"layers": [{"path": "a", "parameters": 4, "removed": 2}]}
    for run in theirs:
        store.write(run)
    taken(store.folder, "-o", tmp_path / "ours", "--by", "a colleague")
    ours = RunStore(tmp_path / "ours")
    dense, small = ours.find("dense000"), ours.find("small000")
    assert dense.config["taken"]["by"] == "a colleague" and not dense.taken
    assert small.items.equals(theirs[1].items) and small.layers == [{"path": "a", "parameters": 4, "removed": 2}]
    assert [len(group.runs) for group in compare([dense, small])] == [1]
    assert small.environment["dtype"] == "float32"
    taken(store.folder, "-o", tmp_path / "ours")
    assert "0 runs taken; 2 were there already" in capsys.readouterr().out
    said = refused(capsys, store.folder, "-o", tmp_path / "ours", "--model", "m")
    assert "its runs say how" in said
    assert "is the store itself" in refused(capsys, store.folder, "-o", store.folder)


def test_what_holds_no_results_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "holds no known results" in refused(capsys, tmp_path / "empty", "-o", tmp_path / "out")
    assert "is not there" in refused(capsys, tmp_path / "nowhere", "-o", tmp_path / "out")
    (tmp_path / "a.yaml").write_text("- 1")
    assert "no statement" in refused(capsys, tmp_path / "empty", "--as", tmp_path / "a.yaml", "-o", tmp_path / "out")
    (tmp_path / "a.yaml").write_text("a: [")
    assert "not YAML" in refused(capsys, tmp_path / "empty", "--as", tmp_path / "a.yaml", "-o", tmp_path / "out")
