"""The embedded facts and the suite that asks them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import knowledge_compression as kc
from helpers.networks import lower_cased
from helpers.places import EXHAUSTIVE
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.atlas import Atlas, atlas_facts, atlas_relations
from knowledge_compression.evaluation.calibration import (
    Questions,
    group_means,
    group_of,
    group_sizes,
    sampled,
)
from knowledge_compression.evaluation.cloze import MASK, Candidates, candidate_scores, reader_of
from knowledge_compression.evaluation.probe import rank_among
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.suite import ITEM_COLUMNS
from knowledge_compression.statistics import accuracy

RELATIONS = atlas_relations()


@pytest.fixture(scope="module")
def bert_tiny():
    return kc.choose("model=bert_tiny").load("cpu")


@pytest.fixture(scope="module")
def whole(bert_tiny):
    """What the suite says of all questions."""
    return Atlas().evaluate(Scorer(bert_tiny))


def test_about_a_thousand_facts():
    assert 1000 <= sum(len(atlas_facts(relation["relation"])) for relation in RELATIONS) <= 1300


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation["relation"])
def test_a_relation_is_sound(relation):
    facts = atlas_facts(relation["relation"])
    subjects = [fact["sub_label"] for fact in facts]
    assert len(set(subjects)) == len(subjects) == len({fact["uuid"] for fact in facts})
    assert {fact["predicate_id"] for fact in facts} == {relation["relation"]}
    assert all(fact["obj_label"] and fact["obj_label"].strip() == fact["obj_label"] for fact in facts)
    assert all(len(fact["obj_label"].split()) == 1 for fact in facts)
    assert len({fact["obj_label"] for fact in facts}) >= 3
    wordings = relation["wordings"]
    assert relation["template"] == wordings[0]
    assert len(set(wordings)) == len(wordings) >= 3
    assert all(wording.count("[X]") == wording.count("[Y]") == 1 for wording in wordings)
    at_the_end = [wording for wording in wordings if wording.endswith("[Y].")]
    assert len(at_the_end) >= 2
    assert len(at_the_end) < len(wordings)


def test_answers_do_not_stand_in_the_question():
    for cloze in Atlas(wordings="all").clozes():
        assert cloze.gold.lower() not in cloze.sentence.replace(".", "").lower().split(), cloze


def test_objects_are_single_tokens_of_the_embedded_models(bert_tiny):
    for relation in RELATIONS:
        objects = sorted({fact["obj_label"] for fact in atlas_facts(relation["relation"])})
        ids = bert_tiny.tokenizer(objects, add_special_tokens=False)["input_ids"]
        long = [name for name, tokens in zip(objects, ids, strict=True) if len(tokens) > 1]
        # Currencies and animal classes are too few to do without the longer ones.
        assert not long or relation["relation"] in ("currency", "animal_class"), long


def test_turns_ask_each_fact_once_and_end_in_the_object():
    clozes = Atlas().clozes()
    assert len({cloze.fact for cloze in clozes}) == len({cloze.id for cloze in clozes}) == len(clozes)
    assert all(cloze.ends_in_blank and cloze.sentence.count(MASK) == 1 for cloze in clozes)
    by_wording = Counter(cloze.wording for cloze in clozes if cloze.task == "capital_of")
    assert max(by_wording.values()) - min(by_wording.values()) <= 1
    assert len(by_wording) >= 2


def test_every_wording_asks_every_fact_and_keeps_the_names_of_turns():
    everything = {cloze.id: cloze for cloze in Atlas(wordings="all").clozes()}
    turns = Atlas().clozes()
    assert len(everything) == sum(
        len(relation["wordings"]) * len(atlas_facts(relation["relation"])) for relation in RELATIONS
    )
    assert all(everything[cloze.id] == cloze for cloze in turns)


@pytest.mark.parametrize("architecture", ["bert", "t5", "bart", "llama", "gpt2"])
def test_all_families_are_asked_the_same(architecture, tiny_model):
    model = lower_cased(tiny_model(architecture))
    # The tiny vocabulary knows few of the objects; the others are counted.
    evaluation = Atlas(relations=["capital_of", "language"], wordings="all").evaluate(Scorer(model))
    unknown = sum(evaluation.description["left_out"]["object_unknown_to_tokenizer"].values())
    clozes = Atlas(relations=["capital_of", "language"], wordings="all").clozes()
    assert evaluation.items.height == len(clozes) - unknown == evaluation.metrics["items"]
    assert evaluation.items.columns[: len(ITEM_COLUMNS)] == list(ITEM_COLUMNS)
    for column in ("log_prob", "margin", "rank", "choices", "prediction"):
        assert evaluation.items[column].null_count() == 0
    assert set(evaluation.items["suite"]) == {"atlas"}


def test_bert_tiny_knows_its_capitals_once_calibrated(bert_tiny):
    evaluation = Atlas(relations=["capital"]).evaluate(Scorer(bert_tiny))
    assert evaluation.metrics["accuracy"] >= 0.9
    raw = Atlas(relations=["capital"], calibrate=False).evaluate(Scorer(bert_tiny))
    assert raw.metrics["accuracy"] < 0.5 < evaluation.metrics["accuracy"]
    assert evaluation.metrics["chance"] == pytest.approx(1 / 41, rel=0.05)


@pytest.mark.slow
def test_bert_tiny_is_well_above_chance_and_majority_on_everything(whole):
    evaluation = whole
    assert evaluation.metrics["accuracy"] > 2 * max(evaluation.metrics["chance"], evaluation.metrics["majority"])
    assert evaluation.description["left_out"] == {}
    assert set(evaluation.description["objects_of_several_tokens"]) == {"animal_class", "currency"}


def test_what_is_asked_again_is_answered_again(bert_tiny):
    first, again = (Atlas(relations=["capital_of", "currency"]).evaluate(Scorer(bert_tiny)).items for _ in range(2))
    assert again.equals(first)


def test_a_limit_keeps_the_candidates(bert_tiny):
    whole = Atlas(relations=["capital_of"], calibrate=False).evaluate(Scorer(bert_tiny)).items
    some = Atlas(relations=["capital_of"], calibrate=False, limit=10).evaluate(Scorer(bert_tiny)).items
    same = whole.filter(whole["id"].is_in(some["id"].implode()))
    assert some.height == 10
    assert same.select("id", "rank", "choices", "prediction").equals(some.select("id", "rank", "choices", "prediction"))


@pytest.fixture(scope="module")
def scored(bert_tiny):
    """Every question of the atlas, the tokens of its candidates, and the score of each, read once."""
    whole = Atlas().questions(bert_tiny)
    reader = reader_of(Scorer(bert_tiny))
    candidates = Candidates(reader, whole.answers)
    scores = candidate_scores(reader, whole.asked, reader.blanks(whole.asked), candidates)
    tokens = {cloze.task: candidates.tokens(cloze) for cloze in whole.asked}
    return whole, tokens, {cloze.id: row for cloze, row in zip(whole.asked, scores, strict=True)}


def answers_of(questions, tokens, scores):
    """Right or wrong of each question asked, from scores that are there already."""
    read = questions.calibrating()
    sizes = group_sizes(questions, read, [True] * len(read))
    means = group_means(read, [scores[cloze.id] for cloze in read], sizes)

    def right(cloze):
        raw = scores[cloze.id]
        mean = means[group_of(cloze)].of(raw)
        return rank_among(cloze.gold, questions.answers[cloze.task], tokens[cloze.task], raw, mean).correct

    return np.array([right(cloze) for cloze in questions.asked])


def test_the_stored_scores_answer_as_the_suite_does(scored, whole, bert_tiny):
    questions, tokens, scores = scored
    for limit, found in ((None, whole), (60, Atlas(limit=60).evaluate(Scorer(bert_tiny)))):
        asked = Questions(sampled(questions.asked, limit), questions.answers, questions.asked)
        assert found.items["correct"].to_list() == answers_of(asked, tokens, scores).tolist()


@pytest.mark.parametrize("limit", [50, 100, 200] if EXHAUSTIVE else [100])
def test_a_quick_look_is_an_unbiased_sample_of_the_whole(scored, limit):
    whole, tokens, scores = scored
    share = answers_of(whole, tokens, scores).mean()
    found, within = [], []
    for seed in range(50):
        few = Questions(sampled(whole.asked, limit, seed), whole.answers, whole.asked)
        right = answers_of(few, tokens, scores)
        interval = accuracy(right)
        found.append(right.mean())
        within.append(interval.low <= share <= interval.high)
    assert np.mean(within) >= 0.9  # of a 95 % interval
    assert abs(np.mean(found) - share) < 3 * np.std(found) / np.sqrt(len(found))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"relations": ["capitals"]}, "'capitals'.*capital_of"),
        ({"wordings": "some"}, "'some'.*rotate, all"),
        ({"candidates": "common"}, "choose full or typed"),
        ({"candidates": "open"}, "'open'.*full, common, typed"),
        ({"limit": 0}, "limit=0"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(wrong, says):
    with pytest.raises(BadInput, match=says) as refusal:
        Atlas(**wrong)
    assert "\n" not in str(refusal.value)
