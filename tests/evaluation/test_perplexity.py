"""Perplexity against plain loops, its windows, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from helpers.every_type import make
from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.distance import Beside, with_metrics
from knowledge_compression.evaluation.perplexity import Perplexity
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.models import Model

LINES = [" = Paris = ", "", " the capital of france is paris . the dog is a animal and the cat is a animal . "] * 9


@pytest.fixture
def text_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "wikitext2"
    folder.mkdir()
    (folder / "test.raw.txt").write_text("\n".join(LINES))
    return tmp_path


def stream_of(model: Model, text_dir: Path) -> list[int]:
    text = (text_dir / "wikitext2" / "test.raw.txt").read_text()
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def test_decoder_equals_plain_loop(tiny_model: Callable[[str], Model], text_dir: Path) -> None:
    model = tiny_model("llama")
    found = Perplexity(window=12, bos=False, data_dir=str(text_dir)).evaluate(Scorer(model))
    tokens = stream_of(model, text_dir)
    losses = []
    for start in range(0, len(tokens) - 11, 12):
        ids = torch.tensor([tokens[start : start + 12]])
        losses.append(float(model.network(input_ids=ids, labels=ids).loss))
    assert found.items["nll"].to_list() == pytest.approx(losses, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    error = torch.tensor(losses, dtype=torch.float64).std() / math.sqrt(len(losses))
    assert found.metrics["nats_per_token_stderr"] == pytest.approx(float(error), rel=1e-4)


@torch.no_grad()
def test_windows_behind_a_beginning_of_text_token_equal_a_plain_loop(
    tiny_model: Callable[[str], Model], text_dir: Path
) -> None:
    """By itself where the tokenizer puts one before each text; the same tokens are scored as without."""
    model = tiny_model("llama")
    tokens, losses = stream_of(model, text_dir), []
    for start in range(0, len(tokens) - 11, 12):
        ids = torch.tensor([[model.tokenizer.bos_token_id, *tokens[start : start + 12]]])
        said = ids.clone()
        said[0, 1] = -100  # the first token of a window is read and not scored
        losses.append(float(model.network(input_ids=ids, labels=said).loss))
    suite = Perplexity(window=12, data_dir=str(text_dir))
    for bos in ("auto", True):
        found = replace(suite, bos=bos).evaluate(Scorer(model))
        assert found.items["nll"].to_list() == pytest.approx(losses, rel=1e-5)
        assert found.items["tokens"].to_list() == [11] * len(losses) and found.description["bos"] is True
    without = replace(suite, bos=False).evaluate(Scorer(model))
    assert without.items["nll"].to_list() != pytest.approx(losses, rel=1e-3)
    assert without.items["id"].equals(found.items["id"]) and without.description["bos"] is False
    published = replace(suite, join="gptq").evaluate(Scorer(model))
    assert published.description["bos"] is False
    model.tokenizer = make("bytes_unpadded")  # whose texts begin with themselves
    assert suite.begin(model) == [] and replace(suite, bos=True).begin(model) == [2]


def test_a_beginning_of_text_token_that_is_not_there_is_refused(tiny_model: Callable[[str], Model]) -> None:
    suite = Perplexity(bos=True)
    with pytest.raises(BadInput, match=r"perplexity\.bos=true: tiny-bert is not a decoder; choose auto or false"):
        suite.begin(tiny_model("bert"))
    model = tiny_model("llama")
    model.tokenizer = make("wordpiece")
    with pytest.raises(BadInput, match="without a beginning-of-text token"):
        suite.begin(model)


@torch.no_grad()
def test_encoder_masks_each_position_in_turn(tiny_model: Callable[[str], Model], text_dir: Path) -> None:
    model = tiny_model("bert")
    found = Perplexity(window=8, limit=2, data_dir=str(text_dir)).evaluate(Scorer(model))
    tokens = stream_of(model, text_dir)
    windows = len(tokens) // 8
    expected = []
    for place in (0, windows // 2):
        row = [2, *tokens[8 * place : 8 * place + 8], 3]
        total = 0.0
        for i in range(1, 9):
            ids = torch.tensor([[*row[:i], model.tokenizer.mask_token_id, *row[i + 1 :]]])
            total -= float(model.network(input_ids=ids).logits.log_softmax(-1)[0, i, row[i]])
        expected.append(total / 8)
    assert found.items["nll"].to_list() == pytest.approx(expected, rel=1e-5)
    some = Perplexity(window=8, limit=2, masked_per_window=3, data_dir=str(text_dir)).evaluate(Scorer(model))
    assert some.items["tokens"].to_list() == [3, 3]


@torch.no_grad()
def test_encoder_decoder_is_scored_on_the_second_half(tiny_model: Callable[[str], Model], text_dir: Path) -> None:
    model = tiny_model("t5")
    found = Perplexity(window=10, limit=3, data_dir=str(text_dir)).evaluate(Scorer(model))
    tokens = stream_of(model, text_dir)
    first = torch.tensor([tokens[:10]])
    loss = model.network(input_ids=first[:, :5], labels=first[:, 5:]).loss
    assert found.items["nll"][0] == pytest.approx(float(loss), rel=1e-5)
    assert found.items["tokens"].to_list() == [5, 5, 5]


def test_windows_are_evenly_spaced_and_named_by_place(tiny_model: Callable[[str], Model], text_dir: Path) -> None:
    model = tiny_model("gpt2")
    whole = Perplexity(window=7, data_dir=str(text_dir)).evaluate(Scorer(model))
    some = Perplexity(window=7, limit=4, data_dir=str(text_dir)).evaluate(Scorer(model))
    total = whole.description["of"]
    assert some.items["id"].to_list() == [f"7:{i * total // 4}" for i in range(4)]
    both = some.items.join(whole.items.select("id", pl.col("nll").alias("whole")), on="id")
    assert both["nll"].to_list() == pytest.approx(both["whole"].to_list(), rel=1e-4)
    assert Perplexity(window=7, limit=10**6, data_dir=str(text_dir)).evaluate(Scorer(model)).items.height == total


def test_text_is_joined_as_it_stands_or_as_published(tmp_path: Path) -> None:
    (tmp_path / "wikitext2").mkdir()
    raw = " \n = Paris = \n \n the capital \n of france \n"
    (tmp_path / "wikitext2" / "test.raw.txt").write_text(raw)
    assert Perplexity(data_dir=str(tmp_path)).text() == raw
    published = Perplexity(data_dir=str(tmp_path), join="gptq").text()
    assert published == "\n\n".join(["", " = Paris = \n", "", " the capital \n", " of france \n"])


def test_window_fits_the_positions(tiny_model: Callable[[str], Model], tmp_path: Path) -> None:
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "sample.jsonl").write_text('{"text": "' + "the dog is a animal . " * 60 + '"}\n')
    suite = Perplexity(corpus="c4", data_dir=str(tmp_path))
    assert replace(suite, bos=False).evaluate(Scorer(tiny_model("opt"))).description["window"] == 128
    assert suite.evaluate(Scorer(tiny_model("opt"))).description["window"] == 127
    assert (
        suite.evaluate(Scorer(tiny_model("roberta"))).description["window"] == 128 - 2 + 1
    )  # positions less special tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": "ptb"}, "choose one of wikitext, c4"),
        ({"join": "glue"}, "choose one of text, gptq"),
        ({"window": 1}, "window=1"),
        ({"bos": "maybe"}, "choose one of auto, true, false"),
        ({"limit": 0}, "limit=0"),
        ({"masked_per_window": -1}, "masked_per_window=-1"),
    ],
)
def test_refuses_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Perplexity(**options)  # type: ignore[arg-type]


def test_refuses_missing_and_short_text(tiny_model: Callable[[str], Model], tmp_path: Path, text_dir: Path) -> None:
    with pytest.raises(DataUnavailable, match="nowhere"):
        Perplexity(data_dir=str(tmp_path / "nowhere")).evaluate(Scorer(tiny_model("llama")))
    with pytest.raises(BadInput, match="has only"):
        Perplexity(window=1900, data_dir=str(text_dir)).evaluate(Scorer(tiny_model("llama")))


def test_fingerprint_follows_the_text(text_dir: Path) -> None:
    suite = Perplexity(data_dir=str(text_dir))
    before = suite.fingerprint()
    (text_dir / "wikitext2" / "test.raw.txt").write_text("something else")
    assert suite.fingerprint() != before


@torch.no_grad()
def test_the_distance_of_text_is_what_llama_cpp_calls_it(
    tiny_model: Callable[[str], Model], text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean, median, 99.0 and 99.9 % KLD, same top p and RMS of the change of p, by definition, in float64."""
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    dense = tiny_model("llama")
    other = replace(dense, network=deepcopy(dense.network))
    for weight in other.network.parameters():
        weight.mul_(1.15)
    suite = Perplexity(window=12, bos=False, data_dir=str(text_dir))
    found = with_metrics(Beside(lambda: dense, "dense").ask(suite, Scorer(other), "asked")).metrics
    kld, same, change = [], 0, []
    tokens = stream_of(dense, text_dir)
    for start in range(0, len(tokens) - 11, 12):
        ids = torch.tensor([tokens[start : start + 12]])
        p, q = (model.network(input_ids=ids).logits[0].double().softmax(-1) for model in (dense, other))
        for i in range(11):
            kld.append(float((p[i] * (p[i] / q[i]).log()).sum()))
            same += int(p[i].argmax() == q[i].argmax())
            change.append(float(q[i, ids[0, i + 1]] - p[i, ids[0, i + 1]]))
    ranked, last = sorted(kld), len(kld) - 1

    def quantile(share: float) -> float:
        below = int(share * last)
        rest = share * last - below
        return ranked[below] * (1 - rest) + ranked[min(below + 1, last)] * rest

    expected = {"kl": sum(kld) / len(kld), "same_top": same / len(kld), "positions": len(kld)}
    expected |= {"kl_median": quantile(0.5), "kl_p99": quantile(0.99), "kl_p99_9": quantile(0.999)}
    expected["gold_rms"] = math.sqrt(sum(x * x for x in change) / len(change))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-3)
