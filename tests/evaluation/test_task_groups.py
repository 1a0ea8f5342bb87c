"""Groups and tags of tasks by name: a user's own, and MMLU with its subjects from tables on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.tasks import ANIMALS, CITIES, documents
from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.harness import Harness
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.suite import Evaluation
from knowledge_compression.evaluation.tasks import names_of
from knowledge_compression.models import Model

CHOICE = {"output_type": "multiple_choice", "doc_to_text": "{{goal}}", "doc_to_target": "label"} | {
    "doc_to_choice": "{{[sol1, sol2]}}",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks of a user's own, of four documents and of two, with a tag; a group of both, and one around that."""
    for name, count in (("one", 4), ("two", 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(documents("piqa", i)) + "\n" for i in range(count)))
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
        write(tmp_path, name, {"task": name, "tag": "small", "test_split": "test"} | files | CHOICE)
    write(tmp_path, "both", {"group": "both", "task": ["one", "two"], "aggregate_metric_list": [{"metric": "acc"}]})
    outer = {"metric": "acc", "weight_by_size": False}
    write(tmp_path, "outer", {"group": "outer", "task": ["both"], "aggregate_metric_list": [outer]})
    return tmp_path


def write(folder: Path, name: str, settings: Any) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))


def asked(model: Model, folder: Path, *names: str, **options: Any) -> Evaluation:
    return Harness(tasks=list(names), data_dir=str(folder), **options).evaluate(Scorer(model))


def test_a_group_is_its_tasks_with_lm_evals_means(folder: Path, tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("llama")
    alone = asked(model, folder, "one", "two")
    found = asked(model, folder, "outer")
    assert found.items.equals(alone.items)
    one, two = (found.metrics[f"{name}.acc"] for name in ("one", "two"))
    assert found.metrics["both.acc"] == pytest.approx((4 * one + 2 * two) / 6)  # lm-eval weighs by size by default
    assert found.metrics["outer.acc"] == pytest.approx((one + two) / 2)
    assert {name for name in found.metrics if name not in alone.metrics} == {"both.acc", "outer.acc"}
    tagged = asked(model, folder, "small")
    assert tagged.items.equals(alone.items) and tagged.metrics == alone.metrics
    assert asked(model, folder, "outer", "one").items.equals(alone.items)  # each task once


def test_what_is_below_a_group_decides_its_fingerprint(folder: Path) -> None:
    suite = Harness(tasks=["outer"], data_dir=str(folder))
    before = suite.fingerprint()
    (folder / "two.jsonl").write_text(json.dumps(documents("piqa", 3)) + "\n")
    assert suite.fingerprint() != before
    (folder / "two.jsonl").unlink()
    with pytest.raises(DataUnavailable, match=r"reads two\.jsonl"):
        suite.fingerprint()


BROKEN = {
    "itself": ({"group": "a", "task": ["b"]}, {"group": "b", "task": "a"}, "contains itself"),
    "nothing": ({"group": "a", "task": []}, {}, "task: must be a list of names"),
    "settings": ({"group": "a", "task": [{"task": "one"}]}, {}, "task: must be a list of names"),
    "an unknown task": ({"group": "a", "task": ["nowhere"]}, {}, "task nowhere is not known"),
    "metrics of a number": (
        {"group": "a", "task": ["one"], "aggregate_metric_list": 3},
        {},
        "is not a list of mappings",
    ),
    "a sum": (
        {"group": "a", "task": ["one"], "aggregate_metric_list": [{"metric": "acc", "aggregation": "sum"}]},
        {},
        "aggregation: sum",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_group_is_one_line(kind: str, folder: Path) -> None:
    a, b, said = BROKEN[kind]
    write(folder, "a", a)
    write(folder, "b", b)
    with pytest.raises(BadInput, match=said) as refused:
        Harness(tasks=["a"], data_dir=str(folder)).fingerprint()
    assert "\n" not in str(refused.value)


HEADER = "question,choice0,choice1,choice2,choice3,answer\n"


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    """Every subject with two questions, anatomy with three, and five examples each."""
    for subject in names_of(["mmlu"], str(tmp_path)).tasks:
        for split, count in (("test", 3 if subject == "mmlu_anatomy" else 2), ("dev", 5)):
            rows = (
                f'"the {ANIMALS[i % 5]}, of {CITIES[i]}",{",".join(CITIES[(i + k) % 6] for k in range(4))},{i % 4}\n'
                for i in range(count)
            )
            file = tmp_path / "mmlu" / split / f"{subject.removeprefix('mmlu_')}_{split}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(HEADER + "".join(rows))
    return tmp_path


def test_mmlu_from_tables_is_asked_as_the_harness_asks_it(mmlu: Path, tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("llama")
    found = asked(model, mmlu, "mmlu_anatomy", num_fewshot=1)

    def shown(i: int) -> str:
        letters = "".join(f"{letter}. {CITIES[(i + k) % 6]}\n" for k, letter in enumerate("ABCD"))
        return f"the {ANIMALS[i % 5]}, of {CITIES[i]}\n{letters}Answer:"

    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    prompts = [f"{head}{shown(0)} A\n\n{shown(i)}" for i in range(3)]
    assert found.items["prompt"].to_list() == prompts and found.items["gold"].to_list() == ["A", "B", "C"]
    for prompt, said in zip(prompts, found.items["prediction"], strict=True):
        scores = []
        for letter in "ABCD":  # written out: the likelihood of each letter after the prompt
            context = model.tokenizer(prompt).input_ids
            ids = model.tokenizer(f"{prompt} {letter}").input_ids
            with torch.no_grad():
                likely = model.network(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
            scores.append(sum(float(likely[i - 1, ids[i]]) for i in range(len(context), len(ids))))
        assert said in [letter for letter, score in zip("ABCD", scores, strict=True) if score >= max(scores) - 1e-4]


@pytest.mark.slow
def test_mmlu_is_57_subjects_in_four_groups(mmlu: Path, tiny_model: Callable[[str], Model]) -> None:
    found = asked(tiny_model("llama"), mmlu, "mmlu")
    assert len(found.description["tasks"]) == 57 and found.items.height == 2 * 57 + 1
    groups = [f"mmlu{part}.acc" for part in ("", "_stem", "_other", "_humanities", "_social_sciences")]
    assert set(groups) <= found.metrics.keys()
    assert found.metrics["mmlu.acc"] == pytest.approx(found.items["correct"].mean())


def test_names_of_mmlus_parts_and_refusals(mmlu: Path) -> None:
    assert len(names_of(["mmlu"], str(mmlu)).tasks) == 57
    stem = names_of(["mmlu_stem"], str(mmlu)).tasks
    assert names_of(["mmlu_stem_tasks"], str(mmlu)).tasks == stem and "mmlu_astronomy" in stem

    def refused(text: str, said: str) -> None:
        (mmlu / "mmlu" / "test" / "anatomy_test.csv").write_text(text)
        with pytest.raises(BadInput, match=said) as end:
            Harness(tasks=["mmlu_anatomy"], data_dir=str(mmlu)).fingerprint()
        assert "\n" not in str(end.value)

    refused("question,A,B,C,D,answer\nx,a,b,c,d,1\n", "has no column choice0")
    refused(HEADER + "x,a,b,c\n", r"anatomy_test\.csv:2: the number of cells is not 6")
    refused(HEADER + "x,a,b,c,d,1,e\n", r"anatomy_test\.csv:2: the number of cells is not 6")
    refused(HEADER + "x,a,b,c,d,B\n", "answer='B' is not a whole number")
    refused(HEADER + '"x,a,b,c,d,1\n', "not comma-separated values")
    (mmlu / "mmlu" / "test" / "anatomy_test.csv").write_text(HEADER + "x,a,b,c,d,1\n")
    (mmlu / "mmlu" / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(DataUnavailable, match=r"lacks mmlu/dev/anatomy_dev\.csv"):
        Harness(tasks=["mmlu_stem"], data_dir=str(mmlu)).fingerprint()
    some = Harness(tasks=["mmlu_stem"], data_dir=str(mmlu), skip_missing=True)
    assert some._available() == [name for name in names_of(["mmlu_stem"], str(mmlu)).tasks if name != "mmlu_anatomy"]


def test_examples_come_from_a_train_file_where_there_is_one(
    tasks_dir: Path, tmp_path: Path, tiny_model: Callable[[str], Model]
) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_bytes((tasks_dir / "piqa" / "validation.jsonl").read_bytes())
    example = {"goal": "where is the example", "sol1": "in the train file", "sol2": "nowhere", "label": 0}
    (tmp_path / "piqa" / "train.jsonl").write_text((json.dumps(example) + "\n") * 2)
    found = asked(tiny_model("llama"), tmp_path, "piqa", num_fewshot=1)
    head = "Question: where is the example\nAnswer: in the train file\n\n"
    assert found.items.height == 7 and all(prompt.startswith(head) for prompt in found.items["prompt"])
