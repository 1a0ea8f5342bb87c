"""PopQA and SimpleQA: generated answers, their grades, ranks by popularity, and what broken data gets."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from helpers.networks import without_special_tokens
from helpers.tasks import ANIMALS, CITIES
from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.open_questions import contains, matches
from knowledge_compression.evaluation.popqa import PopQA
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.simpleqa import SimpleQA, graded
from knowledge_compression.models import Model


def popqa(folder: Path, rows: list[dict[str, Any]], kind: str = "jsonl") -> Path:
    (folder / "popqa").mkdir(exist_ok=True)
    if kind == "jsonl":
        (folder / "popqa" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with (folder / "popqa" / "popQA.tsv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    return folder


def rows() -> list[dict[str, Any]]:
    """In the published columns."""
    return [
        {"id": 100 + i, "subj": animal, "prop": "place", "obj": CITIES[i], "s_pop": 10**i}
        | {"question": f"the {animal} is in", "possible_answers": json.dumps([CITIES[i], f"{CITIES[i]} of the moon"])}
        for i, animal in enumerate(ANIMALS)
    ]


def test_popqa_is_generated_ranked_and_told_by_popularity(tmp_path: Path, tiny_model: Callable[[str], Model]) -> None:
    model = without_special_tokens(tiny_model("llama"))
    suite = PopQA(str(popqa(tmp_path, rows(), "tsv")), prompt="{question}", candidates=None, most=4)
    found = suite.evaluate(Scorer(model))
    items = found.items
    assert items["bin"].to_list() == ["tail", "tail", "middle", "head", "head"]
    assert items["popularity"].to_list() == [1, 10, 100, 1000, 10000]
    network: Any = model.network
    for row, asked in zip(items.iter_rows(named=True), rows(), strict=True):
        ids = model.tokenizer(asked["question"]).input_ids
        said: list[int] = []
        with torch.no_grad():  # written out: greedily, token by token
            while len(said) < 4 and (not said or said[-1] != model.tokenizer.eos_token_id):
                said.append(int(network(torch.tensor([[*ids, *said]])).logits[0, -1].argmax()))
            scores = {}
            for city in CITIES[:5]:
                whole = model.tokenizer(f"{asked['question']} {city}").input_ids
                likely = network(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
                scores[city] = sum(float(likely[i - 1, whole[i]]) for i in range(len(ids), len(whole)))
        text = model.tokenizer.decode(said, skip_special_tokens=True).strip()
        assert row["prediction"] == text
        assert row["rank"] == sorted(scores.values(), reverse=True).index(scores[row["gold"]]) + 1
        assert row["choices"] == 5 and row["correct"] == (asked["obj"] in text.split()) and not row["exact"]
    assert found.metrics["ranked"] == (items["rank"] == 1).mean()
    for name in ("tail", "middle", "head"):
        assert found.metrics[f"{name}.accuracy"] == items.filter(pl.col("bin") == name)["correct"].mean()
    again = PopQA(str(popqa(tmp_path, rows())), prompt="{question}", candidates=None, most=4)  # JSON lines go first
    assert again.evaluate(Scorer(model)).items.equals(items)


def test_some_candidates_are_the_right_one_and_wrong_ones_the_same_for_every_model(tmp_path: Path) -> None:
    twice = [*rows(), rows()[2]]
    suite = PopQA(str(popqa(tmp_path, twice)), candidates=3)
    assert suite._read[1] == 1 and len(suite._questions) == 5
    for question in suite._questions:
        assert question.choices[0] == question.answers[0] and len(set(question.choices)) == 3
        assert question.prompt.startswith("Q: the ") and question.prompt.endswith("\nA:")
    assert [q.choices for q in PopQA(str(tmp_path), candidates=3)._questions] == [q.choices for q in suite._questions]
    assert {q.id for q in PopQA(str(tmp_path), limit=2)._questions} < {q.id for q in suite._questions}
    assert not PopQA(str(tmp_path), candidates=0)._questions[0].choices


def test_texts_match_and_contain_answers_in_normal_form() -> None:
    assert matches("The  Beatles!", ["beatles"]) and not matches("the beatles band", ["beatles"])
    assert contains("It was the Beatles, in 1960.", ["Beatles"]) and not contains("Romeo", ["Rome"])
    assert not contains("anything", ["the"]) and not matches("", [""]) and contains("in U.S.A. now", ["USA"])


GRADES = {
    "Paris, France": "correct",
    "It is Rome.": "incorrect",
    "": "not attempted",
    "I don't know.": "not attempted",
    "I'm not sure, sorry": "not attempted",
    "That is unknown": "not attempted",
    "I do not know, perhaps Paris": "correct",
    "Known as Rome": "incorrect",
}


@pytest.mark.parametrize("text", GRADES)
def test_answers_are_graded_by_rule(text: str) -> None:
    assert graded(text, "Paris") == GRADES[text]


def simpleqa(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    (folder / "simpleqa").mkdir(exist_ok=True)
    with (folder / "simpleqa" / "simple_qa_test_set.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("metadata", "problem", "answer"), *(("{}", *pair) for pair in pairs)])
    return folder


def test_simpleqa_counts_what_was_not_attempted(
    tmp_path: Path, tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(f"where is the {animal}, {n}", "Paris") for n, animal in enumerate(ANIMALS)]
    suite = SimpleQA(str(simpleqa(tmp_path, [*pairs, pairs[0]])))
    found = suite.evaluate(Scorer(tiny_model("llama")))
    assert found.items.height == found.items["id"].n_unique() == 5 and found.description["duplicates_dropped"] == 1
    texts = ["Paris", "in Paris", "Rome", "I don't know", ""]
    monkeypatch.setattr("knowledge_compression.evaluation.simpleqa.said", lambda *_: texts)
    told = suite.evaluate(Scorer(tiny_model("llama"))).metrics
    assert (told["accuracy"], told["incorrect"], told["not_attempted"]) == (2 / 5, 1 / 5, 2 / 5)
    assert told["correct_given_attempted"] == pytest.approx(2 / 3)
    assert told["f_score"] == pytest.approx(2 / (5 / 2 + 3 / 2))


def test_encoders_are_refused(tmp_path: Path, tiny_model: Callable[[str], Model]) -> None:
    popqa(simpleqa(tmp_path, [("where", "Paris")]), rows())
    for suite in (PopQA(str(tmp_path)), SimpleQA(str(tmp_path))):
        with pytest.raises(BadInput, match="is an encoder"):
            suite.evaluate(Scorer(tiny_model("bert")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"s_pop": "many"}, r"test\.jsonl:1: s_pop='many' is not a whole number"),
        ({"s_pop": math.inf}, r"test\.jsonl:1: s_pop='inf' is not a whole number"),
        ({"s_pop": 2**63}, r"test\.jsonl:1: s_pop='9223372036854775808' is not a whole number"),
        ({"possible_answers": "Paris"}, "possible_answers: not JSON"),
        ({"possible_answers": "[1]"}, "possible_answers is not a list of texts"),
        ({"obj": ""}, r"test\.jsonl:1: no obj; each row needs question, prop, obj"),
    ],
)
def test_a_bad_row_is_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    popqa(tmp_path, [rows()[0] | change])
    with pytest.raises(BadInput, match=said) as refused:
        PopQA(str(tmp_path)).fingerprint()
    assert "\n" not in str(refused.value)


def test_half_a_character_in_a_file_is_read_as_a_question_mark(tmp_path: Path) -> None:
    popqa(tmp_path, [rows()[0] | {"question": "who\ud83d"}])
    assert PopQA(str(tmp_path), prompt="{question}")._questions[0].prompt == "who?"


def test_missing_and_broken_files_and_bad_options_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable, match=r"has none of popqa/test\.jsonl"):
        PopQA(str(tmp_path)).fingerprint()
    simpleqa(tmp_path, [])
    with pytest.raises(BadInput, match="no rows"):
        SimpleQA(str(tmp_path)).fingerprint()
    file = tmp_path / "simpleqa" / "simple_qa_test_set.csv"
    file.write_text("metadata,problem,answer\nx,y\n")
    with pytest.raises(BadInput, match=r"csv:2: not 3 cells as in the header"):
        SimpleQA(str(tmp_path)).fingerprint()
    for make, said in (
        (lambda: PopQA(prompt="Q:"), "lacks {question}"),
        (lambda: PopQA(candidates=1), "candidates=1"),
        (lambda: PopQA(most=0), "most=0"),
        (lambda: SimpleQA(limit=0), "limit=0"),
        (lambda: SimpleQA(prompt=""), "lacks {question}"),
    ):
        with pytest.raises(BadInput, match=said):
            make()
