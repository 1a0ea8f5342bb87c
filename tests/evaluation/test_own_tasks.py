"""Tasks of a user's own: whatever their metrics and filters, one row an item and lm-eval's figures; they are data."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.networks import without_special_tokens
from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.harness import Harness
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.suite import Evaluation, ask
from knowledge_compression.models import Model
from knowledge_compression.sweeping.cli import main

PLACES = ["france paris", "germany berlin", "italy rome", "spain madrid", "japan tokyo", "china beijing"]
ASKED = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "documents.jsonl"}}, "test_split": "test"}
CHOICE = {"output_type": "multiple_choice", "doc_to_text": "{{country}} is in", "doc_to_target": "place"} | {
    "doc_to_choice": "{{cities}}"
}
SAID = {"output_type": "generate_until", "doc_to_text": "{{country}}", "doc_to_target": "{{city}}"} | {
    "generation_kwargs": {"until": ["moon"], "max_gen_toks": 6}
}
FILTERS = [
    {"name": "first", "filter": [{"function": "regex", "regex_pattern": "^ *([a-z]+)"}, {"function": "take_first"}]},
    {"name": "any", "filter": [{"function": "regex", "regex_pattern": "([a-z])"}, {"function": "take_first"}]},
]
TASKS: dict[str, dict[str, Any]] = {
    "norm": CHOICE | {"metric_list": [{"metric": "acc_norm"}]},
    "mutual": CHOICE | {"metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}]},
    "correlated": CHOICE | {"metric_list": [{"metric": "mcc"}]},
    "f1": CHOICE
    | {"doc_to_choice": "{{cities[:2]}}", "doc_to_target": "{{place % 2}}"}
    | {"metric_list": [{"metric": "f1"}, {"metric": "acc"}]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{country}} . {{city}}"}
    | {"metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]},
    "translated": SAID | {"metric_list": [{"metric": "bleu"}]},
    "filtered": SAID | {"metric_list": [{"metric": "exact_match"}], "filter_list": FILTERS},
    "said": {"output_type": "loglikelihood", "doc_to_text": "{{country}} is", "doc_to_target": " {{city}}"}
    | {"metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
    "answers": SAID | {"doc_to_target": "{{cities}}", "metric_list": [{"metric": "exact_match"}]},
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A data folder with a file a task, and the documents beside them."""
    documents = []
    for i, place in enumerate(PLACES):
        country, city = place.split()
        cities = [city, "moon", "the sun"][i % 3 :] + [city, "moon", "the sun"][: i % 3]
        documents.append({"country": country, "city": city, "cities": cities, "place": cities.index(city)})
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    for name, settings in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | ASKED | settings))
    return tmp_path


def asked_of(suite: Harness, model: Model) -> Evaluation:
    return ask(suite, Scorer(model))


def theirs(model: Model, folder: Path, name: str) -> dict[str, float]:
    """lm-eval's own figures, from its own evaluator and model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    kwargs = {"data_files": {"test": str(folder / "documents.jsonl")}}
    place = folder / "theirs"
    place.mkdir(exist_ok=True)
    (place / f"{name}.yaml").write_text(
        yaml.safe_dump({"task": name} | ASKED | TASKS[name] | {"dataset_kwargs": kwargs})
    )
    lm = HFLM(pretrained=model.network, tokenizer=model.tokenizer, max_length=128)
    manager = TaskManager(include_path=str(place), include_defaults=False)
    return simple_evaluate(lm, tasks=[name], task_manager=manager, bootstrap_iters=0)["results"][name]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_by_any_metric_has_lm_evals_figures_and_a_row_an_item(
    name: str, tasks: Path, tiny_model: Callable[[str], Model]
) -> None:
    model = tiny_model("llama")
    found = asked_of(Harness(tasks=[name], data_dir=str(tasks)), model)
    expected = {
        tuple(key.split(",")): value
        for key, value in theirs(model, tasks, name).items()
        if "," in key and "stderr" not in key
    }
    several = len({filtered for _, filtered in expected}) > 1
    assert expected
    for (metric, filtered), value in expected.items():
        assert found.metrics[f"{name}.{metric}{'.' + filtered if several else ''}"] == pytest.approx(value, rel=1e-4)
    items = found.items
    assert items.height == items["id"].n_unique() == found.metrics["items"] == 6
    if name in ("rolling", "translated"):
        assert (
            items["correct"].null_count() == 6 and "accuracy" not in found.metrics and "majority" not in found.metrics
        )
    else:
        assert items["correct"].null_count() == 0 and found.metrics["accuracy"] == items["correct"].mean()
    if name == "norm":
        assert found.metrics["accuracy"] == expected["acc_norm", "none"]
    if name == "mutual":  # the choices by themselves, which lm-eval asks too, are no answers
        assert items["choices"].to_list() == [3] * 6 and not items["prompt"].str.contains("|", literal=True).any()
    if name == "rolling":
        assert (items["log_prob"] < 0).all()
    if name == "filtered":
        assert [[one["filter"] for one in row] for row in items["filters"]] == [["first", "any"]] * 6
        assert found.metrics["accuracy"] == expected["exact_match", "first"]


def test_tasks_of_all_kinds_together_have_means_over_those_that_are_right_or_wrong(
    tasks: Path, tiny_model: Callable[[str], Model]
) -> None:
    found = asked_of(Harness(tasks=list(TASKS), data_dir=str(tasks)), tiny_model("llama"))
    judged = [name for name in TASKS if name not in ("rolling", "translated")]
    accuracies = [found.metrics[f"{name}.accuracy"] for name in judged]
    assert [found.metrics[f"accuracy{of}"] for of in ("", "_macro")] == pytest.approx([sum(accuracies) / 7] * 2)
    assert not {"rolling.accuracy", "translated.accuracy"} & found.metrics.keys() and found.items.height == 54


def test_a_share_of_probability_is_the_headline_as_it_is(tasks: Path, tiny_model: Callable[[str], Model]) -> None:
    """As TruthfulQA's second task gives: no item is right or wrong."""
    (tasks / "shares.py").write_text(
        "import math\n\n\ndef share(doc, results):\n"
        "    odds = [math.exp(score) for score, _ in results]\n"
        "    return {'acc': odds[doc['place']] / sum(odds)}\n"
    )
    file = tasks / "shared.yaml"
    settings = yaml.safe_dump({"task": "shared"} | ASKED | CHOICE | {"metric_list": [{"metric": "acc"}]})
    file.write_text(settings + "process_results: !function shares.share\n")
    suite = Harness(tasks=["shared"], data_dir=str(tasks), allow_code=True)
    found = asked_of(suite, tiny_model("llama"))
    shares = found.items["share"]
    assert found.items["correct"].null_count() == 6 and shares.null_count() == 0 and 0 < shares.min() < shares.max() < 1
    assert found.metrics["accuracy"] == pytest.approx(shares.mean())
    assert found.metrics["shared.accuracy"] == pytest.approx(found.metrics["shared.acc"])
    both = asked_of(replace(suite, tasks=["f1", "shared"]), tiny_model("llama")).metrics
    assert "f1.majority" in both and "majority" not in both  # that would not be of the items of the accuracy


def test_more_examples_than_documents_are_one_line(tasks: Path, tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("llama")

    def asked(few: int, **settings: Any) -> Any:
        own = {"task": "few", "num_fewshot": 1} | ASKED | CHOICE | {"metric_list": [{"metric": "acc"}]} | settings
        (tasks / "few.yaml").write_text(yaml.safe_dump(own))
        return asked_of(Harness(tasks=["few"], data_dir=str(tasks), num_fewshot=few), model)

    files = {"data_files": {"train": "documents.jsonl", "test": "documents.jsonl"}}
    train = {"dataset_kwargs": files, "training_split": "train", "fewshot_split": "train"}
    assert asked(6, **train).items.height == 6
    with pytest.raises(BadInput, match=r"few has 6 documents for few-shot examples, but 7 are needed; .*num_fewshot=6"):
        asked(7, **train)
    assert asked(5, fewshot_split="test").items.height == 6
    with pytest.raises(BadInput, match="few has 5 documents"):  # the evaluated one is not among them
        asked(6, fewshot_split="test")


FUNCTION = "doc_to_text: !function marker.run\n"
MARKERS = {
    "a function": ({"a.yaml": FUNCTION}, r"a\.yaml holds code \(!function marker\.run\)"),
    "an included function": ({"a.yaml": "include: b.yaml\n", "b.yaml": FUNCTION}, r"b\.yaml holds code"),
    "one below that": (
        {"a.yaml": "include: [b.yaml]\n", "b.yaml": "include: c.yml\n", "c.yml": FUNCTION},
        r"c\.yml holds code",
    ),
    "a function in a list": (
        {"a.yaml": "metric_list: [{metric: !function marker.run, aggregation: mean}]\n"},
        "holds code",
    ),
    "an object of Python's": ({"a.yaml": "x: !!python/object/apply:os.system ['touch marker']\n"}, "holds code"),
    "a class": ({"a.yaml": "class: marker.Task\n"}, r"holds code \(class: marker\.Task\)"),
    "a program for a metric": ({"a.yaml": "metric_list: [{metric: ./marker.py}]\n"}, "is not one of lm-eval's own"),
    "a metric of the hub": (
        {"a.yaml": "metric_list: [{metric: acc, hf_evaluate: true}]\n"},
        "is not one of lm-eval's own",
    ),
    "a prompt's program": ({"a.yaml": "use_prompt: 'marker:*'\n"}, "holds code"),
}


@pytest.mark.parametrize("kind", MARKERS)
def test_code_in_a_task_file_is_refused_and_never_run(
    kind: str, tasks: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Model]
) -> None:
    ran = tasks / "ran"
    (tasks / "marker.py").write_text(f"open({str(ran)!r}, 'w')\n\ndef run(*_, **__):\n    return 'x'\n")
    files, said = MARKERS[kind]
    whole = yaml.safe_dump({"task": "a"} | ASKED | {key: CHOICE[key] for key in ("output_type", "doc_to_target")})
    for name, text in files.items():
        (tasks / name).write_text((whole if name == "a.yaml" else "") + text)
    monkeypatch.chdir(tasks)
    suite = Harness(tasks=["a"], data_dir=str(tasks))
    for attempt in (suite.fingerprint, lambda: asked_of(suite, tiny_model("llama"))):
        with pytest.raises(BadInput, match=said) as refused:
            attempt()
        assert "\n" not in str(refused.value) and "allow_code=true" in str(refused.value)
    assert not ran.exists()


def test_code_runs_where_it_is_allowed_and_what_lm_eval_ships_is_trusted(
    tasks: Path, tiny_model: Callable[[str], Model]
) -> None:
    (tasks / "marker.py").write_text("def text(doc):\n    return doc['country']\n")
    own = {"task": "a"} | ASKED | CHOICE | {"metric_list": [{"metric": "acc"}]}
    del own["doc_to_text"]
    (tasks / "b.yaml").write_text("doc_to_text: !function marker.text\n")
    (tasks / "a.yaml").write_text(yaml.safe_dump(own | {"include": "b.yaml"}))
    found = asked_of(Harness(tasks=["a"], data_dir=str(tasks), allow_code=True), tiny_model("llama"))
    assert found.items["prompt"].to_list() == [place.split()[0] for place in PLACES]
    before = Harness(tasks=["a"], data_dir=str(tasks), allow_code=True).fingerprint()
    (tasks / "b.yaml").write_text("doc_to_text: '{{country}} is'\n")
    assert Harness(tasks=["a"], data_dir=str(tasks)).fingerprint() != before  # what is included decides, too
    import lm_eval

    stock = Path(lm_eval.__file__).parent / "tasks" / "triviaqa" / "default.yaml"
    (tasks / "c.yaml").write_text(yaml.safe_dump({"task": "c", "include": str(stock)} | ASKED | SAID))
    assert Harness(tasks=["c"], data_dir=str(tasks)).fingerprint()


TEMPLATES = [
    "{{ country.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "{{ self.__init__.__globals__ }}",
    "{% set _ = cities.append('ran') %}{{ country }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_reaches_documents_and_not_python(
    template: str, tasks: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Model]
) -> None:
    monkeypatch.chdir(tasks)
    own = {"task": "a"} | ASKED | CHOICE | {"doc_to_text": template, "metric_list": [{"metric": "acc"}]}
    (tasks / "a.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(BadInput, match="task a cannot be evaluated") as refused:
        asked_of(Harness(tasks=["a"], data_dir=str(tasks)), tiny_model("llama"))
    assert "\n" not in str(refused.value) and not (tasks / "ran").exists()


BROKEN = {
    "a list": ("- task: a\n", "is a list; a task file is a mapping"),
    "a word": ("task\n", "is no mapping"),
    "nothing": ("", "is no mapping"),
    "no YAML": ("task: [\n", "is not YAML"),
    "not UTF-8": ("task: \xff", "is not UTF-8"),
    "numbers for names": ("1: 2\n", "is no mapping"),
    "itself": ("include: a.yaml\n", "includes itself"),
    "what is not there": ("include: nowhere.yaml\n", "nowhere.yaml cannot be read"),
    "no documents": ("task: a\n", "lists no documents"),
    "documents of a number": ("dataset_kwargs: {data_files: {test: 3}}\n", "lists no documents"),
    "documents elsewhere": ("dataset_kwargs: {data_files: {test: ../documents.jsonl}}\n", "from another folder"),
    "metrics of a number": ("metric_list: 3\n", "metric_list is not a list"),
    "without end": ("x: " + "[" * 2000, "is not YAML"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_task_file_is_one_line(kind: str, tasks: Path, tiny_model: Callable[[str], Model]) -> None:
    text, said = BROKEN[kind]
    (tasks / "a.yaml").write_bytes(text.encode("latin-1"))
    suite = Harness(tasks=["a"], data_dir=str(tasks))
    for attempt in (suite.fingerprint, lambda: asked_of(suite, tiny_model("llama"))):
        with pytest.raises((BadInput, DataUnavailable), match=said) as refused:
            attempt()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        {"doc_to_text": "{{nothing}}"},
        {"doc_to_text": "{{country"},
        {"doc_to_choice": "{{country}} is no list"},
        {"output_type": "telepathy"},
        {"filter_list": 3},
        {"test_split": "nowhere"},
        {"metric_list": [{"metric": "f1"}]},  # of two classes, and these are three
    ],
)
def test_a_task_that_cannot_be_asked_is_one_line(
    change: dict[str, Any], tasks: Path, tiny_model: Callable[[str], Model]
) -> None:
    own = {"task": "a"} | ASKED | CHOICE | {"metric_list": [{"metric": "acc"}]} | change
    (tasks / "a.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(BadInput, match="task a cannot be evaluated") as refused:
        asked_of(Harness(tasks=["a"], data_dir=str(tasks)), tiny_model("llama"))
    assert "\n" not in str(refused.value)


def test_an_answer_longer_than_the_positions_is_one_line(tasks: Path, tiny_model: Callable[[str], Model]) -> None:
    own = {"task": "a"} | ASKED | CHOICE | {"metric_list": [{"metric": "acc"}]}
    (tasks / "a.yaml").write_text(
        yaml.safe_dump(own | {"doc_to_choice": "{{[cities[0] + ' moon' * 200, 'moon', 'sun']}}"})
    )
    with pytest.raises(BadInput, match=r"an answer has 20\d tokens, more than the 128 positions of tiny-gpt2"):
        asked_of(Harness(tasks=["a"], data_dir=str(tasks)), without_special_tokens(tiny_model("gpt2")))


def test_an_empty_prompt_is_continued_from_the_beginning_of_a_text(
    tasks: Path, tiny_model: Callable[[str], Model]
) -> None:
    metric = {"metric_list": [{"metric": "exact_match"}]}
    model = without_special_tokens(tiny_model("llama"))
    said = {}
    for name, text in (("empty", ""), ("begun", "[CLS]")):
        (tasks / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name} | ASKED | SAID | metric | {"doc_to_text": text})
        )
        said[name] = asked_of(Harness(tasks=[name], data_dir=str(tasks)), model).items["prediction"].to_list()
    assert said["empty"] == said["begun"]


def test_from_the_command_line_code_ends_with_status_2(
    tasks: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tasks / "a.yaml").write_text(FUNCTION)
    arguments = ["model=local", f"model.path={tiny_folder}", "eval=[harness]", "eval.harness.tasks=[a]"]
    arguments += [f"data_dir={tasks}", f"output.dir={tasks / 'outputs'}"]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    said = capfd.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and "allow_code" in said
    assert not (tasks / "outputs").exists()
