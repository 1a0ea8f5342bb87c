"""Tables of answers by a mapping, taken into a store."""

from __future__ import annotations

import csv
import json
import math
import shutil

import pytest
import yaml

from helpers.taking import refused, taken
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.report import main as report
from knowledge_compression.results.store import RunStore

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
        (ROWS, renamed("truth", "right"), "truth is not a column of an item; choose one of task, id"),
        (ROWS, without(MAPPING, "id"), "columns needs id"),
        (ROWS, without(MAPPING, "gold"), "columns needs correct, or both prediction and gold"),
        (ROWS, without(MAPPING, "made"), "a column made, or --compression NAME, is missing"),
        (ROWS, without(MAPPING, "model"), "the model has no name"),
        (ROWS, MAPPING | {"made": {"full": {"compression": "none"}}}, "made lacks 4bit; it has full"),
        (ROWS, MAPPING | {"maid": {}}, "maid: Unexpected keyword argument; known are by, suite, runs"),
        (ROWS, MAPPING | {"made": {"full": {"compression": "none", "seed": 2**40}}}, "seed: Input should be less"),
        (ROWS, MAPPING | {"made": {"full": {"compression": "x", "bits": math.inf}}}, "bits: Input should be a finite"),
        (ROWS, MAPPING | {"fixed": json.loads("[" * 150 + "]" * 150)}, "nested deeper than 100 levels"),
        (ROWS, MAPPING | {"made": {"full": {"bit": 4}}}, "made.full.compression: Field required"),
        (ROWS, MAPPING | {"files": "*.tsv"}, "has no file *.tsv"),
        ([], MAPPING, "a.csv holds no answers"),
        (ROWS, {name: value for name, value in MAPPING.items() if name != "files"}, "files is missing"),
        ([*ROWS, ROWS[0]], MAPPING, "1 items of m full appear twice (the first: t 1)"),
        ([(*ROWS[0][:-1], "2")], MAPPING, "a.csv, row 1: prediction_probability is 2, which is not a share"),
        ([(*ROWS[0][:-1], "x")], MAPPING, "a.csv, row 1: prediction_probability is x, which is not a number"),
        (ROWS, renamed("correct", "said"), "a.csv, row 1: correct is 2; give true, false, 1 or 0"),
        (ROWS, renamed("rank", "sure"), "a.csv, row 1: rank is 0.5, which is not a whole number"),
        ([(*ROWS[0][:-2], "1e19", "1")], renamed("rank", "said"), "rank is 1e19, which is not a whole number"),
        ([(*ROWS[0][:-1], "0")], renamed("choices", "sure"), "choices is 0, which is not a whole number from 1 on"),
        ([*ROWS, [""] * len(HEADS)], MAPPING, "a.csv, row 7: it has no id"),
    ],
)
def test_a_table_that_does_not_fit_its_mapping_is_one_line(rows, mapping, expected, quiz, tmp_path, capsys):
    assert expected in refused(capsys, *quiz(rows, mapping))
    assert not (tmp_path / "out").exists()


def test_a_column_name_twice_is_one_line(quiz, tmp_path, capsys):
    """The other column used to be left out without a word, and might be the one that was meant."""
    words = quiz([(*row, "4") for row in ROWS], heads=(*HEADS, "said"))
    assert "a.csv has 2 columns said; give each a name of its own" in refused(capsys, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--by", "--model"])
def test_a_name_that_is_no_text_is_one_line(option, quiz, tmp_path, capsys):
    """As a terminal in Latin-1 passes it."""
    said = refused(capsys, *quiz(), option, "caf\udce9", "--compression", "none")
    assert said == f"error: {option} 'caf\\udce9' is not UTF-8 text; give a name in UTF-8\n"
    assert not (tmp_path / "out").exists()


def test_figures_leave_out_amounts_that_nobody_stated(quiz, tmp_path):
    """GPTQ of unknown bits, and pruning that touched an unknown share of the parameters."""
    made = {"full": {"compression": "none", "family": "decoder"}, "4bit": {"compression": "gptq", "target": "att"}}
    taken(*quiz(mapping=MAPPING | {"made": made}))
    pruned = {"compression": "magnitude", "target": "att", "sparsity": 0.5}
    others = [row if row[1] == "full" else (*row[:6], "9", "1") for row in ROWS]
    taken(*quiz(others, mapping=MAPPING | {"made": made | {"4bit": pruned}}))
    words = [str(tmp_path / "out"), "-o", str(tmp_path / "report.html"), "--figures", str(tmp_path / "figures")]
    report([*words, "--per-parameter"])
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert "results" in names and not {name for name in names if name.startswith(("pruning", "accuracy_by"))}


def test_a_text_that_was_cut_within_a_character_is_taken(quiz, tmp_path):
    rows = [dict(zip(HEADS, row, strict=True)) | {"said": "2\ud83d"} for row in ROWS[:3]]
    folder, *rest = quiz(mapping=MAPPING | {"files": "a.json"})
    (folder / "a.json").write_text(json.dumps(rows))
    taken(folder, *rest)
    (run,) = RunStore(tmp_path / "out")
    assert run.items["prediction"].to_list() == ["2?"] * 3


def test_items_that_do_not_pair_are_named_and_counted(quiz, tmp_path, capsys):
    more = ("m", "4bit", "u", "2", "3+3", "6", "6", "1")
    taken(*quiz([*ROWS, more]))
    assert "m nf4: 1 items are only in it (the first: u 2)" in capsys.readouterr().out
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
    assert "1 items of m full lack an answer or a right one and are not counted" in capsys.readouterr().out
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
        ({"t": ASKED["t"] * 2, "u": ASKED["u"]}, "question 1 of t appears twice"),
        ({"t": [{"ask": "1+1"}]}, "asked.json has no column right, which"),
        ("nothing", "asked.json is not a table"),
    ],
)
def test_questions_that_do_not_fit_are_one_line(questions, expected, quiz, capsys):
    assert expected in refused(capsys, *in_order(quiz, questions))


def test_answers_to_no_question_are_one_line(quiz, capsys):
    said = without(MAPPING, "prompt", "gold")
    said["questions"] = {"file": "asked.json", "keys": "task", "columns": {"id": "no", "gold": "right"}}
    words = quiz(ROWS, said)
    (words[0] / "asked.json").write_text(json.dumps({"t": ASKED["t"], "u": []}))
    assert "1 answers of m 4bit in u have no question (the first: 1)" in refused(capsys, *words)
