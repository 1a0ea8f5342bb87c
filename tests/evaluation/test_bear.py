"""BEAR: sentence scores by the plain definition, ranks and metrics by fact, and what broken data gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

import knowledge_compression as kc
from helpers.networks import without_special_tokens
from helpers.tasks import ANIMALS
from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.bear import Bear, ranked
from knowledge_compression.evaluation.cloze import MASK
from knowledge_compression.evaluation.distance import Beside, with_metrics
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.sentences import (
    Statement,
    masked_by_word,
    scores_of_answers,
    sentences_after_opening,
)
from knowledge_compression.evaluation.suite import ask
from knowledge_compression.models import Model
from knowledge_compression.models.prompts import NO_PROMPTS

TEMPLATES = ["The [X] is in [Y].", "it is [Y] where the [X] was.", "The [X] of [Y] ."]
ANSWERS = ["paris", "rome", "the moon", "paris and berlin"]


def write(folder: Path, facts: list[tuple[str, str]], answers: list[str] = ANSWERS, name: str = "BEAR") -> Path:
    """A data folder with the relations P1 and P2."""
    place = folder / "bear" / name
    place.mkdir(parents=True, exist_ok=True)
    metadata = {"templates": TEMPLATES, "answer_space_labels": answers, "answer_space_ids": [f"Q{a}" for a in answers]}
    (place / "metadata_relations.json").write_text(json.dumps({"P2": metadata, "P1": metadata}))
    rows = [{"sub_id": f"Q{subject}", "sub_label": subject, "obj_label": gold} for subject, gold in facts]
    for relation in ("P1", "P2"):
        (place / f"{relation}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, [(animal, ANSWERS[i % 4]) for i, animal in enumerate(ANIMALS)])


@torch.no_grad()
def plainly(model: Model, text: str) -> float:
    """The definition, one token and one forward pass at a time."""
    tokenizer = model.tokenizer
    network: Any = model.network
    if model.family == "decoder":
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        return sum(
            float(network(torch.tensor([ids[:n]])).logits[0, -1].log_softmax(-1)[ids[n]]) for n in range(1, len(ids))
        )
    batch = tokenizer(text, return_special_tokens_mask=True)
    total = 0.0
    for place, token in enumerate(batch.input_ids):
        if batch.special_tokens_mask[place]:
            continue
        masked = [
            tokenizer.mask_token_id if later >= place and batch.word_ids()[later] == batch.word_ids()[place] else other
            for later, other in enumerate(batch.input_ids)
        ]
        total += float(network(torch.tensor([masked])).logits[0, place].log_softmax(-1)[token])
    return total


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_an_answers_score_is_that_of_its_whole_sentence(
    architecture: str, folder: Path, tiny_model: Callable[[str], Model]
) -> None:
    model = tiny_model(architecture)
    found = Bear(str(folder), relations=["P1"]).evaluate(Scorer(model)).items
    assert found["id"].to_list() == [f"P1/Q{animal}/{t}" for animal in ANIMALS for t in range(3)]
    for row in found.iter_rows(named=True):
        whole = [row["prompt"].replace(MASK, answer) for answer in ANSWERS]
        scores = [plainly(model, text[0].upper() + text[1:]) for text in whole]
        right = ANSWERS.index(row["gold"])
        assert row["log_prob"] == pytest.approx(scores[right], abs=1e-4)
        assert row["prediction_log_prob"] == pytest.approx(max(scores), abs=1e-4)
        assert row["rank"] == sorted(scores, reverse=True).index(scores[right]) + 1
        assert row["correct"] == (row["rank"] == 1) == (row["margin"] > 0) and row["choices"] == 4


def test_words_of_several_tokens_are_masked_to_their_end() -> None:
    model = kc.choose("model=bert_tiny").load("cpu")
    statement = Statement("a", f"Ulaanbaatar is the capital of {MASK}.", ["Kyrgyzstan", "New Zealand"])
    assert max(np.bincount([w for w in model.tokenizer(statement.completed()[0]).word_ids() if w is not None])) > 1
    (found,) = scores_of_answers(Scorer(model), [statement])
    assert found is not None
    assert found.tolist() == pytest.approx([plainly(model, text) for text in statement.completed()], abs=1e-3)


def test_an_encoder_decoder_says_the_answer(folder: Path, tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("t5")
    found = Bear(str(folder), relations=["P2"], templates=[1]).evaluate(Scorer(model)).items
    network: Any = model.network
    tokenizer = model.tokenizer
    first = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    for row in found.iter_rows(named=True):
        ids = torch.tensor([tokenizer(row["prompt"].replace(MASK, "<extra_id_0>")).input_ids])
        said = [first, *tokenizer(row["gold"], add_special_tokens=False).input_ids]
        with torch.no_grad():
            decoder_ids = torch.tensor([[model.decoder_start, *said[:-1]]])
            likely = network(input_ids=ids, decoder_input_ids=decoder_ids).logits[0].log_softmax(-1)
        expected = sum(float(likely[i, token]) for i, token in enumerate(said) if i > 0)
        assert row["log_prob"] == pytest.approx(expected, abs=1e-4)


def whole_sentences(model: Model, text: str) -> list[tuple[np.ndarray, int]]:
    """The logits before each token of a sentence, float64, and the token; one forward pass each."""
    tokenizer, network, rows = model.tokenizer, cast("Any", model.network), []
    if model.family == "decoder":
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        inputs = [(ids[:n], -1, ids[n]) for n in range(1, len(ids))]
    else:
        of = tokenizer(text, return_special_tokens_mask=True)
        places = masked_by_word(of.input_ids, of.special_tokens_mask, of.word_ids(), tokenizer.mask_token_id)
        inputs = [(list(masked), place, of.input_ids[place]) for place, masked in places]
    with torch.no_grad():
        for read, place, token in inputs:
            rows.append((network(torch.tensor([read])).logits[0, place].double().numpy(), token))
    return rows


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_the_distance_of_a_fact_is_that_along_its_right_sentence(
    architecture: str, tmp_path: Path, tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    suite = Bear(str(write(tmp_path, [])), relations=["P1"], templates=[0, 2])
    # The first two facts are of namesakes: the same sentence with another right answer.
    facts = [("Q1", "cat", "paris"), ("Q2", "cat", "rome"), ("Q3", "dog", "paris and berlin")]
    rows = [{"sub_id": of, "sub_label": subject, "obj_label": gold} for of, subject, gold in facts]
    (tmp_path / "bear" / "BEAR" / "P1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dense = tiny_model(architecture)
    other = replace(dense, network=deepcopy(dense.network))
    with torch.no_grad():
        for weight in other.network.parameters():
            weight.mul_(1.1)
    found = with_metrics(Beside(lambda: dense, "dense").ask(suite, Scorer(other), "asked"))
    assert found.items.height == 6
    for row in found.items.iter_rows(named=True):
        text = row["prompt"].replace(MASK, row["gold"])
        before, after = (whole_sentences(model, text[0].upper() + text[1:]) for model in (dense, other))
        p, q = (softmax(np.stack([logits for logits, _ in of]), axis=1) for of in (before, after))
        steps = np.arange(len(before)), [token for _, token in before]
        assert sorted(row["kl"]) == pytest.approx(sorted(rel_entr(p, q).sum(1)), rel=5e-3, abs=2e-6)
        assert sorted(row["gold_change"]) == pytest.approx(sorted(q[steps] - p[steps]), abs=1e-6)
    lengths = found.items["kl"].list.len()
    assert found.metrics["positions"] == lengths.sum() and lengths.min() >= 4 and not found.fallbacks


def test_a_tokenizer_that_puts_no_beginning_is_given_one(folder: Path, tiny_model: Callable[[str], Model]) -> None:
    model, bare = tiny_model("llama"), without_special_tokens(tiny_model("llama"))
    assert bare.tokenizer("rome").input_ids[0] != bare.tokenizer.bos_token_id
    one, other = (Bear(str(folder)).evaluate(Scorer(of)).items for of in (model, bare))
    assert one["log_prob"].to_list() == pytest.approx(other["log_prob"].to_list(), abs=1e-4)


def test_knowledge_is_of_the_fact_and_parts_give_the_whole(folder: Path, tiny_model: Callable[[str], Model]) -> None:
    scorer = Scorer(tiny_model("llama"))
    suite = Bear(str(folder), top_k=(2,))
    found = suite.evaluate(scorer)
    joined = suite.joined({name: ask(part, scorer) for name, part in suite.parts().items()})
    assert joined.items.equals(found.items) and joined.metrics == found.metrics
    right = {fact: rows["correct"].to_list() for (fact,), rows in found.items.group_by("fact")}
    assert all(len(of) == 3 for of in right.values())
    assert found.metrics["known_in_all"] == np.mean([all(of) for of in right.values()])
    assert found.metrics["known_in_none"] == np.mean([not any(of) for of in right.values()])
    assert found.metrics["template_1.accuracy"] == np.mean([of[1] for of in right.values()])
    assert found.metrics["accuracy"] == pytest.approx(np.mean(list(right.values())))
    assert found.description["duplicates_dropped"] == 0 and found.description["left_out"] == {}
    once = Bear(str(folder), templates=[1]).evaluate(scorer)
    same = found.items.filter(found.items["wording"] == "1")
    assert once.items["id"].to_list() == same["id"].to_list() and "known_in_all" not in once.metrics
    assert once.items["log_prob"].to_list() == pytest.approx(same["log_prob"].to_list(), abs=1e-4)


def test_a_sample_is_of_facts_and_answers_as_the_whole(folder: Path, tiny_model: Callable[[str], Model]) -> None:
    scorer = Scorer(tiny_model("llama"))
    whole, some = (Bear(str(folder), limit=limit).evaluate(scorer).items for limit in (None, 4))
    assert some.height == 12 and some["fact"].n_unique() == 4
    same = whole.filter(whole["id"].is_in(some["id"].to_list()))
    assert same.drop("log_prob", "prediction_log_prob", "margin").equals(
        some.drop("log_prob", "prediction_log_prob", "margin")
    )
    assert same["log_prob"].to_list() == pytest.approx(some["log_prob"].to_list(), abs=1e-4)


def test_lite_takes_lines_by_number_and_only_their_answers(tmp_path: Path) -> None:
    write(tmp_path, [(animal, ANSWERS[i % 4]) for i, animal in enumerate(ANIMALS)], name="BEAR-big")
    (tmp_path / "bear" / "bear_lite_indices.json").write_text(json.dumps({"P1": [3, 1], "P2": [0, 1]}))
    suite = Bear(str(tmp_path), dataset="BEAR-big", lite=True)
    relation = suite.parts()["P1"].relation  # type: ignore[attr-defined]
    assert [fact.subject for fact in relation.facts] == ["fish", "cat"]
    assert relation.answers == ["paris and berlin", "rome"]
    before = suite.fingerprint()
    (tmp_path / "bear" / "bear_lite_indices.json").write_text(json.dumps({"P1": [3, 1], "P2": [0, 5]}))
    with pytest.raises(BadInput, match="these indices choose from BEAR-big"):
        Bear(str(tmp_path), dataset="BEAR-big", lite=True).fingerprint()
    assert Bear(str(tmp_path), dataset="BEAR-big").fingerprint() != before


def test_what_is_said_twice_is_dropped_and_counted(tmp_path: Path, tiny_model: Callable[[str], Model]) -> None:
    write(tmp_path, [("dog", "rome"), ("cat", "paris"), ("dog", "rome")])
    found = Bear(str(tmp_path)).evaluate(Scorer(tiny_model("gpt2")))
    assert found.items.height == found.items["id"].n_unique() == 12 and found.description["duplicates_dropped"] == 2


def test_sentences_longer_than_the_model_are_left_out_and_counted(
    tmp_path: Path, tiny_model: Callable[[str], Model]
) -> None:
    for architecture in ("opt", "bert"):
        model = tiny_model(architecture)
        assert model.max_positions is not None
        write(tmp_path, [("dog", "rome"), ("dog " * model.max_positions, "rome")])
        found = Bear(str(tmp_path)).evaluate(Scorer(model))
        assert found.items.height == 6 and found.description["left_out"] == {"P1": 3, "P2": 3}


def test_where_the_input_chooses_a_prompt_what_the_answers_share_chooses_it(
    folder: Path, tiny_model: Callable[[str], Model]
) -> None:
    """The beginning is not scored then, so that all answers of a sentence are that much likelier."""
    read: list[int] = []

    def choosing(contexts: Any) -> Any:
        read.extend(contexts)
        return nullcontext([])

    model = tiny_model("llama")
    statements = [Statement(str(i), f"The {animal} is in {MASK} .", ANSWERS) for i, animal in enumerate(ANIMALS)]
    plain = scores_of_answers(Scorer(model), statements)
    chosen = scores_of_answers(Scorer(model, prompts=replace(NO_PROMPTS, choosing=choosing)), statements)
    assert set(read) == {5}  # the beginning of a text, and four words
    for one, other in zip(plain, chosen, strict=True):
        assert one is not None and other is not None
        assert np.ptp(other - one) == pytest.approx(0.0, abs=1e-4) and (other > one).all()
    with pytest.raises(BadInput, match="the answer would influence"):
        encoder = Scorer(tiny_model("bert"))
        encoder.prompts = replace(NO_PROMPTS, choosing=choosing)
        scores_of_answers(encoder, statements)


def test_a_tie_is_wrong_and_a_number_that_is_none_shows() -> None:
    assert ranked("b", ["a", "b"], np.array([-1.0, -1.0])) | {"margin": 0.0} == ranked(
        "b", ["a", "b"], np.array([-1.0, -1.0])
    )
    assert ranked("b", ["a", "b"], np.array([-1.0, -1.0]))["prediction"] == "a"
    assert ranked("a", ["a", "b", "c"], np.array([-1.0, -3.0, -2.0]))["margin"] == 1.0
    assert np.isnan(ranked("a", ["a", "b", "c"], np.array([-1.0, np.nan, -2.0]))["margin"])


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda folder: write(folder, [("dog", "paris")], ["paris"]), {}, "relation P2 has fewer than two answers"),
        (lambda folder: write(folder, [("dog", "tokyo")]), {}, r"P2\.jsonl:1: the answer 'tokyo' is not among the 4"),
        (lambda folder: write(folder, [("dog", "rome"), ("dog", "paris")]), {}, "has two answers, rome and paris"),
        (None, {"templates": [0, 3]}, "relation P2 has no template 3; its templates are 0, 1, 2"),
        (None, {"templates": [1, 1]}, "is not a list of distinct template numbers"),
        (None, {"templates": []}, "is not a list of distinct template numbers"),
        (None, {"relations": ["P9"]}, "bear has no relation 'P9'; relations: P2, P1"),
        (None, {"dataset": "../bear/BEAR"}, "is not a folder name in data_dir/bear"),
        (None, {"limit": 0}, "limit=0"),
        (None, {"lite": True}, "bear_lite_indices.json cannot be read"),
        (
            lambda folder: (folder / "bear/BEAR/P1.jsonl").write_text("{}\n"),
            {},
            r"P1\.jsonl:1: needs the texts "
            "sub_label",
        ),
        (lambda folder: (folder / "bear/BEAR/P1.jsonl").write_text("x\n"), {}, r"P1\.jsonl:1: not JSON"),
        (lambda folder: (folder / "bear/BEAR/metadata_relations.json").write_text("[]"), {}, "not a JSON object"),
        (
            lambda folder: (folder / "bear/BEAR/metadata_relations.json").write_text('{"P1": 1}'),
            {},
            "no list of templates",
        ),
        (
            lambda folder: (folder / "bear/BEAR/metadata_relations.json").write_text(
                '{"P1": {"templates": ["[X] is."], "answer_space_labels": ["a", "b"]}}'
            ),
            {},
            r"needs \[X\], and \[Y\] once",
        ),
        (
            lambda folder: (folder / "bear/BEAR/metadata_relations.json").unlink(),
            {},
            "metadata_relations.json does not exist",
        ),
    ],
)
def test_bad_data_is_one_line(change: Any, options: dict[str, Any], said: str, folder: Path) -> None:
    if change:
        change(folder)
    with pytest.raises((BadInput, DataUnavailable), match=said) as refused:
        Bear(str(folder), **options).fingerprint()
    assert "\n" not in str(refused.value)


def test_without_a_folder_it_says_so() -> None:
    with pytest.raises(DataUnavailable, match="data_dir=DIR"):
        Bear().check_data()


@pytest.mark.data
def test_real_data_is_whole(data_dir: Path) -> None:
    suite = Bear(str(data_dir))
    parts = suite.parts()
    assert len(parts) == 60 and sum(len(part.relation.facts) for part in parts.values()) == 7731  # type: ignore[attr-defined]


def test_reading_sentences_leaves_the_tokenizer_as_it_was(tiny_model: Callable[[str], Model]) -> None:
    """It is told to begin a text, which makes the library derive anew what stands around one."""
    tokenizer = tiny_model("llama").tokenizer
    texts = ["paris and berlin", "the moon"]
    before = tokenizer(texts)["input_ids"]
    opened = sentences_after_opening(tokenizer, texts)
    assert tokenizer(texts)["input_ids"] == before
    assert [row[0] for row in opened] == [tokenizer.bos_token_id] * 2
