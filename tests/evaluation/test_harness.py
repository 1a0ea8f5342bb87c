"""lm-evaluation-harness tasks over the scoring core: the same answers as stock HFLM, rows, means and refusals."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import knowledge_compression as kc
from helpers.networks import without_special_tokens
from helpers.places import EXHAUSTIVE
from helpers.tasks import ANIMALS, CITIES
from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.harness import Harness
from knowledge_compression.evaluation.lm import ScorerLM, stock_lm
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.tasks import LOCAL
from knowledge_compression.evaluation.tokens import encode
from knowledge_compression.models import Model
from knowledge_compression.models.families import ENCODER_DECODER


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_every_task_answers_as_stock_does(
    tiny_model: Callable[[str], Model], tasks_dir: Path, architecture: str
) -> None:
    model = tiny_model(architecture)
    # Stock lets an encoder-decoder speak the longer, the more its input was padded; see the test of generated text.
    tasks = [task for task in LOCAL if task != "triviaqa" or architecture != "t5"]
    stock, fast = (
        Harness(tasks=tasks, limit=3, data_dir=str(tasks_dir), scoring=scoring).evaluate(Scorer(model))
        for scoring in ("stock", "fast")
    )
    assert set(fast.items["task"]) == set(tasks)
    assert fast.items.height == 3 * len(tasks)
    numbers = ("log_prob", "prediction_log_prob", "margin", "gold_share", "brier")
    same = [name for name in stock.items.columns if name not in (*numbers, "shares")]
    assert fast.items.select(same).equals(stock.items.select(same))
    for column in numbers:
        pairs = zip(fast.items[column], stock.items[column], strict=True)
        assert all(a == b or a == pytest.approx(b, rel=1e-4, abs=1e-4) for a, b in pairs)
    for a, b in zip(fast.items["shares"].to_list(), stock.items["shares"].to_list(), strict=True):
        assert a == b or a == pytest.approx(b, rel=1e-3, abs=1e-4)
    assert fast.metrics == pytest.approx(stock.metrics, rel=1e-4)


def test_tasks_asked_one_by_one_give_what_all_of_them_give(tiny_model: Callable[[str], Model], tasks_dir: Path) -> None:
    suite = Harness(groups={"all": ["piqa", "boolq"]}, num_fewshot=1, limit=5, data_dir=str(tasks_dir))
    model = tiny_model("gpt2")
    whole, parts = (
        suite.evaluate(Scorer(model)),
        {name: part.evaluate(Scorer(model)) for name, part in suite.parts().items()},
    )
    assert [len(part.items) for part in parts.values()] == [5, 5]
    joined = suite.joined(parts)
    assert (joined.metrics, joined.description) == (whole.metrics, whole.description)
    assert joined.items.equals(whole.items)


def test_rows_and_metrics_say_the_same(tiny_model: Callable[[str], Model], tasks_dir: Path) -> None:
    found = Harness(tasks=["piqa", "winogrande", "arc_easy"], limit=5, data_dir=str(tasks_dir)).evaluate(
        Scorer(tiny_model("gpt2"))
    )
    items = found.items
    assert items["id"].n_unique() == items.select("task", "id").n_unique() == items.height == 15
    assert ((items["margin"] > 0) == items["correct"]).all()
    assert ((items["rank"] == 1) == items["correct"]).all()
    assert ((items["prediction"] == items["gold"]) == items["correct"]).all()
    assert ((items["prediction_log_prob"] - items["log_prob"]) == (-items["margin"]).clip(0)).all()
    for task in ("piqa", "winogrande", "arc_easy"):
        rows = items.filter(pl.col("task") == task)
        assert found.metrics[f"{task}.accuracy"] == found.metrics[f"{task}.acc"] == rows["correct"].mean()
    assert found.metrics["piqa.majority"] == 3 / 5  # the first choice is right in items 0, 2 and 4
    assert found.metrics["arc_easy.acc_norm"] == items.filter(pl.col("task") == "arc_easy")["correct_norm"].mean()
    assert found.metrics["majority"] == pytest.approx((3 + 3 + 2) / 15)
    assert found.description["tasks"]["piqa"] == {"version": 1.0, "items": 5, "of": 7, "fewshot": 0}


def test_nine_tasks_means_are_over_what_is_there(
    tiny_model: Callable[[str], Model], tasks_dir: Path, tmp_path: Path
) -> None:
    for task in ("arc_easy", "webqs", "piqa", "winogrande"):
        (tmp_path / task).symlink_to(tasks_dir / task)
    groups = {"world": ["arc_easy", "sciq", "webqs"], "common": ["piqa"], "language": ["winogrande"], "none": ["boolq"]}
    suite = Harness(groups=groups, skip_missing=True, data_dir=str(tmp_path), name="nine_tasks")
    found = suite.evaluate(Scorer(tiny_model("llama")))
    metrics = found.metrics
    assert metrics["group.world"] == (metrics["arc_easy.accuracy"] + metrics["webqs.accuracy"]) / 2
    assert metrics["group.common"] == metrics["piqa.accuracy"]
    assert "group.none" not in metrics
    four = [metrics[f"{task}.accuracy"] for task in ("arc_easy", "webqs", "piqa", "winogrande")]
    assert metrics["average"] == pytest.approx(sum(four) / 4)
    assert found.description["missing"] == ["boolq", "sciq"]
    assert "boolq, sciq" in found.description["note"]
    assert set(found.items["suite"]) == {"nine_tasks"}


def test_few_shot_examples_answer_as_stock_does(tiny_model: Callable[[str], Model], tasks_dir: Path) -> None:
    suite = {"tasks": ["boolq", "arc_easy"], "num_fewshot": 2, "data_dir": str(tasks_dir)}
    model = tiny_model("llama")
    stock, fast = (Harness(scoring=scoring, **suite).evaluate(Scorer(model)) for scoring in ("stock", "fast"))
    assert fast.items["log_prob"].to_list() == pytest.approx(stock.items["log_prob"].to_list(), rel=1e-4)
    assert fast.items["prompt"].equals(stock.items["prompt"])


def test_long_contexts_lose_their_beginning_as_in_stock(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("opt")  # 128 positions
    from lm_eval.api.instance import Instance

    requests = [
        Instance("loglikelihood", {}, ("the dog is a cat . " * n, " wolf in paris"), 0) for n in (1, 20, 30, 60)
    ]
    requests.append(Instance("loglikelihood", {}, ("", "the dog"), 0))
    requests.append(Instance("loglikelihood", {}, ("the dog  ", "cat"), 0))
    fast, stock = (
        ScorerLM(Scorer(model)).loglikelihood(requests),
        stock_lm(Scorer(model)).loglikelihood(requests, disable_tqdm=True),
    )
    for (a, greedy_a), (b, greedy_b) in zip(fast, stock, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert greedy_a == greedy_b


def test_rolling_likelihood_is_that_of_stock(tiny_model: Callable[[str], Model]) -> None:
    from lm_eval.api.instance import Instance

    model = tiny_model("gpt2")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(ANIMALS + CITIES, k=words)) for words in (1, 100, 129, 400)]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    fast = ScorerLM(Scorer(model)).loglikelihood_rolling(requests, disable_tqdm=True)
    assert fast == pytest.approx(stock_lm(Scorer(model)).loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-4)


def test_the_older_triviaqa_is_right_where_an_answer_is_said_greedily(
    tiny_model: Callable[[str], Model], tasks_dir: Path, tmp_path: Path
) -> None:
    """Written out: token by token, each must be the likeliest; the answers of half of the documents are made so."""
    model = without_special_tokens(tiny_model("llama"))

    @torch.no_grad()
    def said(question: str, answer: str) -> bool:
        ids, whole = model.tokenizer([f"Question: {question}\nAnswer:{end}" for end in ("", f" {answer}")]).input_ids
        for token in whole[len(ids) :]:
            if int(model.network(torch.tensor([ids])).logits[0, -1].argmax()) != token:
                return False
            ids = [*ids, token]
        return True

    words = [word for word in model.tokenizer.get_vocab() if word.isalpha()]
    asked = [json.loads(line) for line in (tasks_dir / "triviaqa" / "validation.jsonl").read_text().splitlines()]
    for document in asked[::2]:
        likeliest = next((word for word in words if said(document["question"], word)), None)
        document["answer"]["aliases"] += [likeliest] if likeliest else []
    expected = [any(said(one["question"], alias) for alias in one["answer"]["aliases"]) for one in asked]
    assert set(expected) == {True, False}
    (tmp_path / "triviaqa").mkdir()
    (tmp_path / "triviaqa" / "validation.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    for scoring in ("fast", "stock"):
        found = Harness(["triviaqa_greedy"], data_dir=str(tmp_path), scoring=scoring).evaluate(Scorer(model))
        assert found.items["correct"].to_list() == expected
        assert found.metrics["triviaqa_greedy.exact_match"] == pytest.approx(sum(expected) / len(expected))
        assert found.items["prompt"][0] == f"Question: {asked[0]['question']}\nAnswer:"


@pytest.mark.parametrize("architecture", ["gpt_neox", "t5"])
def test_generated_text_is_that_of_stock(tiny_model: Callable[[str], Model], architecture: str) -> None:
    from lm_eval.api.instance import Instance

    model = tiny_model(architecture)
    requests = [
        Instance("generate_until", {}, (f"the {animal} of {city} is", {"until": until, "max_gen_toks": most}), 0)
        for animal in ANIMALS
        for city, until, most in (("rome", ["cat", "."], 12), ("paris and berlin", ["moon"], 30), ("tokyo", [], 5))
    ]
    fast = ScorerLM(Scorer(model)).generate_until(requests)
    stock = stock_lm(Scorer(model)).generate_until(requests, disable_tqdm=True)
    if model.family == ENCODER_DECODER:  # stock adds the padded input's length to the limit
        assert all(b.startswith(a) for a, b in zip(fast, stock, strict=True))
    else:
        assert fast == stock
    assert any(fast)


def test_a_compressed_head_is_left_alone(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("llama")
    model.untie_head()
    head = model.network.lm_head
    with torch.no_grad():
        head.weight.zero_()
    for make in (ScorerLM, stock_lm):
        make(Scorer(model))
        assert model.network.lm_head is head
        assert not head.weight.any()
    assert model.network.tie_weights.__name__ == "tie_weights"


def test_tokens_are_kept(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import knowledge_compression.evaluation.tokens as tokens

    monkeypatch.setattr(tokens, "_WORTH_KEEPING", 10)
    texts = ["the dog is a cat", "paris", ""]
    first = encode(tiny_tokenizer, texts)
    assert first == [tiny_tokenizer(text)["input_ids"] for text in texts]
    assert encode(tiny_tokenizer, texts, special_tokens=False)[0] == first[0][1:-1]
    monkeypatch.setattr(tokens, "_encode", None)  # only what is kept can answer now
    assert encode(tiny_tokenizer, texts) == first


def test_encoders_are_refused(tiny_model: Callable[[str], Model], tasks_dir: Path) -> None:
    with pytest.raises(BadInput, match="is an encoder"):
        Harness(tasks=["boolq"], data_dir=str(tasks_dir)).evaluate(Scorer(tiny_model("bert")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["bolq"]}, "task bolq is not known; similar names: boolq"),
        ({"tasks": []}, "contains no task"),
        ({"tasks": ["boolq"], "limit": 0}, "limit=0"),
        ({"tasks": ["boolq"], "limit": 0.5}, "limit=0.5"),
        ({"tasks": ["boolq"], "num_fewshot": -1}, "num_fewshot=-1"),
        ({"tasks": ["boolq"], "scoring": "slow"}, "choose one of fast, stock"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, tasks_dir: Path) -> None:
    with pytest.raises(BadInput, match=message):
        Harness(data_dir=str(tasks_dir), **options).fingerprint()


def test_bad_files_are_refused(tasks_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable, match="is not a folder"):
        Harness(tasks=["boolq"], data_dir=str(tmp_path / "nowhere")).fingerprint()
    with pytest.raises(DataUnavailable, match=r"lacks boolq/validation\.jsonl"):
        Harness(tasks=["boolq"], data_dir=str(tmp_path)).fingerprint()
    (tmp_path / "piqa").mkdir()
    path = tmp_path / "piqa" / "validation.jsonl"
    good = (tasks_dir / "piqa" / "validation.jsonl").read_text()
    path.write_text(good + "{broken\n")
    with pytest.raises(BadInput, match=r"validation\.jsonl:8: not JSON"):
        Harness(tasks=["piqa"], data_dir=str(tmp_path)).fingerprint()
    path.write_text(good + '{"goal": "x"}\n')
    with pytest.raises(BadInput, match="line 8 lacks a column; it needs goal, sol1, sol2, label"):
        Harness(tasks=["piqa"], data_dir=str(tmp_path)).fingerprint()
    path.write_text(good)
    before = Harness(tasks=["piqa"], data_dir=str(tmp_path)).fingerprint()
    path.write_text(good.replace("dog", "cat"))
    assert Harness(tasks=["piqa"], data_dir=str(tmp_path)).fingerprint() != before


@pytest.mark.slow
@pytest.mark.data
def test_real_items_answer_as_stock_does(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KC_CACHE_DIR")
    model = kc.choose("model=smollm2").load("cpu", "float32")
    tasks = [task for task in LOCAL if task not in ("sciq", "triviaqa")]
    stock, fast = (
        Harness(tasks=tasks, limit=2 if EXHAUSTIVE else 1, data_dir=str(data_dir), scoring=scoring).evaluate(
            Scorer(model)
        )
        for scoring in ("stock", "fast")
    )
    assert fast.items["prediction"].equals(stock.items["prediction"])
    assert fast.items["log_prob"].to_list() == pytest.approx(stock.items["log_prob"].to_list(), rel=1e-4)
    accuracies = [name for name in fast.metrics if "perplexity" not in name]
    assert {name: fast.metrics[name] for name in accuracies} == {name: stock.metrics[name] for name in accuracies}
