"""Results that other tools made, taken into a store: logs of lm-eval, tables by a mapping, other stores."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import polars as pl
import pytest
import yaml
from polars.testing import assert_frame_equal

from helpers.networks import build_network
from helpers.stores import bits, made_run
from knowledge_compression.analysis import ledger
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.evaluation.harness import Harness
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.tasks import load_tasks
from knowledge_compression.report import main as report
from knowledge_compression.results.store import RunStore
from knowledge_compression.statistics import drop
from knowledge_compression.take import main

TASKS = ["piqa", "boolq", "winogrande", "lambada_openai", "triviaqa", "hellaswag"]


def taken(*arguments: object) -> None:
    main([str(word) for word in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which something is refused; nothing is written."""
    with pytest.raises(SystemExit) as end:
        taken(*arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


def write_log(folder: Path, tasks_dir: Path, model: Path, tasks: list[str]) -> None:
    """What ``lm-eval --log_samples --output_path`` writes, by lm-eval itself."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM

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
        "version": "is of lm-eval 0.5.1; logs of versions 0.4 are read",
        "no version": "is of lm-eval of unknown version",
        "no results": "no file of results",
        "no samples": "task piqa, whose samples",
        "twice": f"{samples}:6: document 0 is there twice",
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

MAPPING = {
    "by": "a friend",
    "suite": "quiz",
    "files": "*.csv",
    "columns": {"model": "who", "made": "how", "task": "topic", "id": "no", "prompt": "ask", "gold": "right"}
    | {"prediction": "said", "prediction_probability": "sure"},
    "made": {"full": {"compression": "none"}, "4bit": {"compression": "nf4", "bits": 4, "stored_mb": 5}},
}
ROWS = [  # who, how, topic, no, ask, right, said, sure
    ("m", "full", "t", "1", "1+1", "2", "2", "0.5"),
    ("m", "full", "t", "2", "1+2", "3", "4", "1"),
    ("m", "full", "u", "1", "2+2", "4", "4", "0.25"),
    ("m", "4bit", "t", "1", "1+1", "2", "3", "0.5"),
    ("m", "4bit", "t", "2", "1+2", "3", "3", "0"),
    ("m", "4bit", "u", "1", "2+2", "4", "4", "0.5"),
]
HEADS = ("who", "how", "topic", "no", "ask", "right", "said", "sure")


@pytest.fixture
def quiz(tmp_path):
    """``quiz(rows, mapping)`` writes a table and a mapping, and gives the words of the command that takes them."""

    def write(rows=ROWS, mapping=MAPPING, heads=HEADS):
        folder = tmp_path / "quiz"
        folder.mkdir(exist_ok=True)
        with (folder / "a.csv").open("w", newline="") as file:
            csv.writer(file).writerows([heads, *rows])
        (tmp_path / "take.yaml").write_text(yaml.safe_dump(mapping))
        return folder, "--as", tmp_path / "take.yaml", "-o", tmp_path / "out"

    return write


def test_a_table_gives_the_runs_that_its_rows_tell_of(quiz, tmp_path):
    taken(*quiz())
    (group,) = compare(list(RunStore(tmp_path / "out")))
    (small,) = group.runs
    assert group.correct(group.dense).tolist() == [True, False, True]
    assert group.correct(small).tolist() == [False, True, True]
    assert small.config["choices"] == {"model": "m", "target": "unknown", "compression": "nf4", "recovery": "none"}
    assert small.config["compression"] == {"bits": 4} and small.config["sparsity"] is None and small.stored_mb == 5
    assert group.dense.stored_mb is None and group.dense.report["model"]["family"] == "unknown"
    assert group.dense.items["prediction_log_prob"].to_list() == [math.log(0.5), 0.0, math.log(0.25)]
    assert small.items["prediction_log_prob"][1] == -math.inf and small.items["log_prob"].null_count() == 3
    assert small.config["taken"]["by"] == "a friend" and list(small.config["taken"]["from"]) == ["a.csv"]


@pytest.mark.parametrize("form", ["list", "lines", "columns"])
def test_the_same_table_in_json_gives_the_same_runs(form, quiz, tmp_path):
    taken(*quiz())
    folder, *rest = quiz(mapping=MAPPING | {"files": "a.json*"})
    rows = [dict(zip(HEADS, row, strict=True)) for row in ROWS]
    if form == "lines":
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        content = rows if form == "list" else dict(zip(HEADS, map(list, zip(*ROWS, strict=True)), strict=True))
        (folder / "a.json").write_text(json.dumps(content))
    taken(folder, *rest[:-1], tmp_path / "again")
    assert {run.id for run in RunStore(tmp_path / "out")} == {run.id for run in RunStore(tmp_path / "again")}


def without(mapping, *keys):
    return mapping | {"columns": {name: column for name, column in mapping["columns"].items() if name not in keys}}


def renamed(name, column):
    return MAPPING | {"columns": MAPPING["columns"] | {name: column}}


@pytest.mark.parametrize(
    ("rows", "mapping", "expected"),
    [
        (ROWS, renamed("gold", "truth"), "a.csv has no column truth, which"),
        (ROWS, renamed("truth", "right"), "truth is no column of an item; known are task, id"),
        (ROWS, without(MAPPING, "id"), "columns needs id"),
        (ROWS, without(MAPPING, "gold"), "columns says nothing of correct, nor of both prediction and gold"),
        (ROWS, without(MAPPING, "made"), "a column made, or --compression NAME, is missing"),
        (ROWS, without(MAPPING, "model"), "the model has no name"),
        (ROWS, MAPPING | {"made": {"full": {"compression": "none"}}}, "made says nothing of 4bit; known are full"),
        (ROWS, MAPPING | {"maid": {}}, "maid: Unexpected keyword argument; known are by, suite, runs"),
        (ROWS, MAPPING | {"made": {"full": {"compression": "none", "seed": 2**40}}}, "seed: Input should be less"),
        (ROWS, MAPPING | {"made": {"full": {"compression": "x", "bits": math.inf}}}, "bits: Input should be a finite"),
        (ROWS, MAPPING | {"fixed": json.loads("[" * 150 + "]" * 150)}, "nested deeper than 100 levels"),
        (ROWS, MAPPING | {"made": {"full": {"bit": 4}}}, "made.full.compression: Field required"),
        (ROWS, MAPPING | {"files": "*.tsv"}, "has no file *.tsv"),
        ([], MAPPING, "a.csv holds no answers"),
        (ROWS, {name: value for name, value in MAPPING.items() if name != "files"}, "files is missing"),
        ([*ROWS, ROWS[0]], MAPPING, "1 items of m full are there twice (the first: t 1)"),
        ([(*ROWS[0][:-1], "2")], MAPPING, "a.csv, row 1: prediction_probability is 2, which is no share"),
        ([(*ROWS[0][:-1], "x")], MAPPING, "a.csv, row 1: prediction_probability is x, which is no number"),
        (ROWS, renamed("correct", "said"), "a.csv, row 1: correct is 2; true, false, 1 and 0 are read"),
        (ROWS, renamed("rank", "sure"), "a.csv, row 1: rank is 0.5, which is no whole number"),
    ],
)
def test_a_table_that_does_not_fit_its_mapping_is_one_line(rows, mapping, expected, quiz, tmp_path, capsys):
    assert expected in refused(capsys, *quiz(rows, mapping))
    assert not (tmp_path / "out").exists()


def test_items_that_do_not_pair_are_named_and_counted(quiz, tmp_path, capsys):
    more = ("m", "4bit", "u", "2", "3+3", "6", "6", "1")
    taken(*quiz([*ROWS, more]))
    assert "m nf4: 1 items are in it alone (the first: u 2)" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    taken(*quiz(ROWS[:-1]))
    assert "m nf4: 1 items that its baseline answers are missing" in capsys.readouterr().out
    assert compare(list(RunStore(tmp_path / "out"))).skipped[0][1] == "1 items that its baseline answers are missing"


def test_as_many_items_that_are_others_are_not_compared(quiz, tmp_path, capsys):
    other = ("m", "4bit", "u", "9", "2+2", "4", "4", "0.5")
    taken(*quiz([*ROWS[:-1], other]))
    assert "1 items that its baseline answers are missing" in capsys.readouterr().out
    report([str(tmp_path / "out"), "-o", str(tmp_path / "page.html")])


def test_the_same_item_with_another_right_answer_is_one_line(quiz, tmp_path, capsys):
    other = ("m", "4bit", "u", "1", "2+2", "5", "4", "0.5")
    said = refused(capsys, *quiz([*ROWS[:-1], other]))
    assert "1 items of m nf4 have other right answers" in said and "u 1, 5 and 4" in said


def test_two_uncompressed_runs_of_one_model_are_one_line(quiz, tmp_path, capsys):
    taken(*quiz())
    other = [(*ROWS[0][:6], "7", "0.1"), *ROWS[1:3]]
    assert "m has two uncompressed runs of quiz with different answers" in refused(capsys, *quiz(other))
    assert len(list(RunStore(tmp_path / "out"))) == 2


def test_a_compressed_run_without_its_dense_one_is_taken_and_says_so(quiz, tmp_path, capsys):
    taken(*quiz(ROWS[3:]))
    assert "m nf4: no dense run of m with the same quiz settings" in capsys.readouterr().out
    taken(*quiz(ROWS[:3]))
    assert len(compare(list(RunStore(tmp_path / "out"))).groups[0].runs) == 1


def test_items_without_an_answer_are_counted_and_unknown(quiz, tmp_path, capsys):
    taken(*quiz([(*ROWS[0][:6], "", ""), *ROWS[1:3]]))
    assert "1 items of m full have no answer or no right answer, and count nowhere" in capsys.readouterr().out
    (run,) = RunStore(tmp_path / "out")
    assert run.items["correct"].to_list() == [None, False, True]


def in_order(quiz, questions, rows=ROWS):
    """The answers apart from the questions, in their order."""
    said = without(MAPPING, "id", "prompt", "gold") | {"in_order": True}
    said["questions"] = {
        "file": "asked.json",
        "keys": "task",
        "columns": {"id": "no", "prompt": "ask", "gold": "right"},
    }
    words = quiz(rows, said)
    (words[0] / "asked.json").write_text(json.dumps(questions))
    return words


ASKED = {
    "t": [{"no": 1, "ask": "1+1", "right": 2}, {"no": 2, "ask": "1+2", "right": 3}],
    "u": [{"no": 1, "ask": "2+2", "right": 4}],
}


def test_answers_in_the_order_of_the_questions(quiz, tmp_path):
    taken(*in_order(quiz, ASKED))
    taken(*quiz()[:-1], tmp_path / "whole")
    apart, whole = (
        sorted(run.items.select("task", "id", "gold", "prediction", "correct").rows() for run in RunStore(folder))
        for folder in (tmp_path / "out", tmp_path / "whole")
    )
    assert apart == whole


@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        ({"t": ASKED["t"][:1], "u": ASKED["u"]}, "m 4bit has 2 answers to the 1 questions of t"),
        ({"t": ASKED["t"] * 2, "u": ASKED["u"]}, "question 1 of t is there twice"),
        ({"t": [{"ask": "1+1"}]}, "asked.json has no column right, which"),
        ("nothing", "asked.json is no table"),
    ],
)
def test_questions_that_do_not_fit_are_one_line(questions, expected, quiz, capsys):
    assert expected in refused(capsys, *in_order(quiz, questions))


def test_answers_to_no_question_are_one_line(quiz, capsys):
    said = without(MAPPING, "prompt", "gold")
    said["questions"] = {"file": "asked.json", "keys": "task", "columns": {"id": "no", "gold": "right"}}
    words = quiz(ROWS, said)
    (words[0] / "asked.json").write_text(json.dumps({"t": ASKED["t"], "u": []}))
    assert "1 answers of m 4bit in u are to no question (the first: 1)" in refused(capsys, *words)


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
    assert "whose runs say themselves" in said
    assert "is the store itself" in refused(capsys, store.folder, "-o", store.folder)


def test_what_holds_no_results_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "holds no results that are known" in refused(capsys, tmp_path / "empty", "-o", tmp_path / "out")
    assert "is not there" in refused(capsys, tmp_path / "nowhere", "-o", tmp_path / "out")
    (tmp_path / "a.yaml").write_text("- 1")
    assert "no statement" in refused(capsys, tmp_path / "empty", "--as", tmp_path / "a.yaml", "-o", tmp_path / "out")
    (tmp_path / "a.yaml").write_text("a: [")
    assert "not YAML" in refused(capsys, tmp_path / "empty", "--as", tmp_path / "a.yaml", "-o", tmp_path / "out")
