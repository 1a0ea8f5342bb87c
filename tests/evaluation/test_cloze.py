"""The cloze engine against plain, slow readings of the same models."""

from __future__ import annotations

import math
import random
from collections import Counter
from copy import deepcopy
from itertools import combinations, pairwise

import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from helpers.networks import build_network
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation import calibration
from knowledge_compression.evaluation.calibration import GroupMean, Questions, answers_by_task, sampled
from knowledge_compression.evaluation.cloze import MASK, Candidates, Cloze, candidate_scores, reader_of
from knowledge_compression.evaluation.probe import Probe, cloze_metrics, rank_among
from knowledge_compression.evaluation.scoring import Blank, Scorer
from knowledge_compression.evaluation.scoring.ways import Ways
from knowledge_compression.evaluation.suite import item_table
from knowledge_compression.models import Model

ENCODERS = ["albert", "bert", "distilbert", "electra", "roberta"]
FAMILIES = ["bert", "roberta", "t5", "bart", "llama", "opt", "gpt2"]
SENTENCES = ["paris is the capital of [MASK] .", "the [MASK] is a wolf and a dog and cat .", "[MASK] wrote the book ."]
WORDS = ["france", "italy", "spain", "japan", "china", "new york", "the red moon"]  # the last two are several tokens


def cloze(sentence: str, gold: str, task: str = "capital", wording: str = "0") -> Cloze:
    return Cloze(task, f"{task}/{sentence}", sentence, "", gold, sentence, wording)


CLOZES = [
    cloze("paris is the capital of [MASK] .", "france"),
    cloze("rome is the capital of [MASK] .", "italy"),
    cloze("madrid is a city in the country [MASK] .", "spain"),
    cloze("the animal is a [MASK] .", "the red moon"),
]
MIDDLE = [cloze("the capital [MASK] is the moon of water .", "japan"), cloze("a dog in [MASK] was red .", "china")]


@torch.no_grad()
def plain_log_prob(model, sentence: str, answer: str) -> float:
    """Log-probability of an answer in the blank, one forward pass a token, nothing shared."""
    tokenizer, network = model.tokenizer, model.network
    tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if model.family == "encoder":
        ids = tokenizer(sentence.replace(MASK, " ".join([MASK] * len(tokens))))["input_ids"]
        first = ids.index(tokenizer.mask_token_id)
        rows = network(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(rows[first + n, token]) for n, token in enumerate(tokens))
    total = 0.0
    if model.family == "decoder":
        before, after = sentence.split(MASK)
        said = tokenizer(before)["input_ids"][:-1]  # without [SEP]
        if any(character.isalpha() for character in after):
            tokens = tokenizer(answer + after, add_special_tokens=False)["input_ids"]
        for token in tokens:
            total += float(network(torch.tensor([said])).logits[0, -1].log_softmax(-1)[token])
            said = [*said, token]
        return total
    if network.config.model_type == "bart":
        ids = tokenizer(sentence)["input_ids"]
        said = [network.config.decoder_start_token_id, *ids[: ids.index(tokenizer.mask_token_id)]]
    else:
        ids = tokenizer(sentence.replace(MASK, "<extra_id_0>"))["input_ids"]
        said = [network.config.decoder_start_token_id, tokenizer.convert_tokens_to_ids("<extra_id_0>")]
    for token in tokens:
        logits = network(torch.tensor([ids]), decoder_input_ids=torch.tensor([said])).logits
        total += float(logits[0, -1].log_softmax(-1)[token])
        said = [*said, token]
    return total


def scores_of(model, clozes, answers):
    reader = reader_of(Scorer(model))
    candidates = Candidates(reader, {c.task: answers for c in clozes})
    return candidate_scores(reader, clozes, reader.blanks(clozes), candidates)


@pytest.mark.parametrize("architecture", ENCODERS)
def test_the_head_sees_only_masked_positions_and_says_the_same(architecture, tiny_model):
    model = tiny_model(architecture)
    blanks = []
    for sentence in SENTENCES:
        ids = model.tokenizer(sentence)["input_ids"]
        blanks.append(Blank(ids, ids.index(model.tokenizer.mask_token_id)))
    head = model.network.get_submodule(model.architecture.final)
    scorer = Scorer(model)  # which asks the network how it may be read
    seen = []
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    scored = {}
    for indices, log_probs in scorer.distributions(blanks):
        scored |= dict(zip(indices, log_probs, strict=True))
    hook.remove()
    assert sum(seen) == len(blanks) * head.in_features
    for i, blank in enumerate(blanks):
        with torch.no_grad():
            logits = model.network(torch.tensor([blank.ids])).logits[0, blank.position]
        torch.testing.assert_close(scored[i], logits.log_softmax(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_candidates_of_one_and_more_tokens_score_as_a_plain_reading(architecture, tiny_model):
    model = tiny_model(architecture)
    answers = ["france", "italy", "red moon", "the capital of china"]
    clozes = [*CLOZES[:3], *MIDDLE]
    for one, scores in zip(clozes, scores_of(model, clozes, answers), strict=True):
        expected = [plain_log_prob(model, one.sentence, answer) for answer in answers]
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    subjects=st.lists(st.sampled_from(["paris", "berlin", "rome", "dog", "wolf", "moon"]), min_size=1, max_size=6),
    words=st.lists(st.sampled_from(["is", "in", "the", "capital", "of", "city"]), min_size=1, max_size=8),
)
def test_the_answer_does_not_depend_on_the_company(architecture, tiny_model, subjects, words):
    model = tiny_model(architecture)
    answers = ["france", "italy", "red moon"]
    clozes = [cloze(f"{subject} {' '.join(words[: n + 1])} [MASK] .", "france") for n, subject in enumerate(subjects)]
    together = scores_of(model, clozes, answers)
    for one, scores in zip(clozes, together, strict=True):
        torch.testing.assert_close(scores, scores_of(model, [one], answers)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bert", "t5", "llama"])
@pytest.mark.parametrize("calibrate", [False, True])
def test_ranking_in_the_vocabulary_against_a_plain_sort(architecture, calibrate, tiny_model):
    model = tiny_model(architecture)
    clozes = CLOZES[:3]
    evaluation = Probe("full", calibrate, top_k=(1, 5)).ask("test", Scorer(model), Questions(clozes, {}))
    size = len(model.tokenizer)
    assert size < model.network.config.vocab_size  # ids beyond stand for no text, and are not ranked
    words = [model.tokenizer.decode([token]) for token in range(size)]
    tokens = [
        token
        for token in range(size)
        if model.tokenizer(words[token], add_special_tokens=False)["input_ids"] == [token]
    ]
    plain = torch.tensor([[plain_log_prob(model, c.sentence, words[token]) for token in tokens] for c in clozes])
    ranked = plain - plain.mean(0) if calibrate else plain
    for row, one, raw, scores in zip(evaluation.items.to_dicts(), clozes, plain, ranked, strict=True):
        gold = [words[token] for token in tokens].index(one.gold)
        assert row["log_prob"] == pytest.approx(float(raw[gold]), abs=1e-4)
        assert row["choices"] == size
        # The plain reading knows only tokens that are words, so it can only rank gold higher.
        better = int((scores > scores[gold]).sum())
        assert 1 + better <= row["rank"] <= 1 + better + size - len(tokens)
        assert row["correct"] == (row["rank"] == 1) == (row["margin"] > 0)
        assert (row["prediction"] == one.gold) == row["correct"]
    ranks = evaluation.items["rank"].to_list()
    assert evaluation.metrics["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
    assert evaluation.metrics["top5"] == pytest.approx(sum(rank <= 5 for rank in ranks) / len(ranks))
    assert evaluation.metrics["top1"] == evaluation.metrics["accuracy"]


def test_ids_that_stand_for_no_text_are_not_ranked(tiny_model):
    model, padded = tiny_model("bert"), tiny_model("bert")
    with torch.no_grad():
        padded.network.get_output_embeddings().bias[len(padded.tokenizer) :] = 50.0  # they take all probability
    plain, other = (
        Probe("full", top_k=(1,)).ask("test", Scorer(one), Questions(CLOZES[:3], {})).items for one in (model, padded)
    )
    for column in ("prediction", "rank", "choices", "correct"):
        assert plain[column].to_list() == other[column].to_list()
    assert max(other["log_prob"]) < -40  # the model's own: nothing is made of what it gives to no text


def test_a_tokenizer_without_the_token_for_a_blank_is_refused(tiny_model):
    masked, blanked = tiny_model("bert"), tiny_model("t5")
    masked.tokenizer = deepcopy(masked.tokenizer)
    masked.tokenizer.mask_token = None
    backend = Tokenizer(models.WordLevel({"the": 0, "[UNK]": 1}, unk_token="[UNK]"))
    blanked.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    for model, token in ((masked, "mask token"), (blanked, "<extra_id_0>")):
        with pytest.raises(BadInput, match=f"the tokenizer of tiny-.* has no {token}"):
            Probe("typed").ask("test", Scorer(model), Questions(CLOZES[:1], answers_by_task(CLOZES[:1])))


@pytest.mark.parametrize("architecture", ["bert", "t5", "llama"])
def test_typed_and_calibrated_ranking_against_a_plain_one(architecture, tiny_model):
    model = tiny_model(architecture)
    clozes = [
        *CLOZES,
        cloze("the cat is a [MASK] .", "dog", wording="1"),
        cloze("the fish is a [MASK] .", "spain", wording="1"),
    ]
    answers = answers_by_task(clozes)
    items = Probe("typed", calibrate=True).ask("test", Scorer(model), Questions(clozes, answers)).items.to_dicts()
    raw = {c.id: [plain_log_prob(model, c.sentence, answer) for answer in answers[c.task]] for c in clozes}
    for row, one in zip(items, clozes, strict=True):
        same = [raw[c.id] for c in clozes if c.wording == one.wording]
        means = [sum(column) / len(same) for column in zip(*same, strict=True)]
        scores = [value - mean for value, mean in zip(raw[one.id], means, strict=True)]
        place = answers[one.task].index(one.gold)
        rivals = scores[:place] + scores[place + 1 :]
        assert row["rank"] == 1 + sum(rival >= scores[place] for rival in rivals)
        assert row["margin"] == pytest.approx(scores[place] - max(rivals), abs=1e-4)
        assert row["log_prob"] == pytest.approx(raw[one.id][place], abs=1e-4)
        assert row["choices"] == len(answers[one.task])


@pytest.mark.parametrize("candidates", ["typed", "full"])
@pytest.mark.parametrize("enough", [128, 4])
def test_a_sample_is_asked_as_if_all_were(candidates, enough, tiny_model, monkeypatch):
    """To the last digit where a group is read whole; close to it where it is larger than what is read of it."""
    monkeypatch.setattr(calibration, "ENOUGH", enough)
    model = tiny_model("llama")
    clozes = [
        cloze(f"the {thing} {name} is in [MASK] .", gold)
        for thing in ("capital", "author", "book", "animal")
        for name, gold in zip(("paris", "rome", "berlin"), ("france", "italy", "germany"), strict=True)
    ]
    whole, answers = Questions(clozes, answers_by_task(clozes)), answers_by_task(clozes)
    few = Questions(sampled(clozes, 3), answers, clozes)
    probe = Probe(candidates, calibrate=True)
    all_items, items = (probe.ask("test", Scorer(model), questions).items for questions in (whole, few))
    same = all_items.join(items, on="id", suffix="_few", maintain_order="right")
    assert items.height == same.height == 3
    exact = enough >= len(clozes)
    assert same["margin_few"].to_list() == pytest.approx(same["margin"].to_list(), abs=1e-5 if exact else 1.0)
    assert not exact or same["rank_few"].to_list() == same["rank"].to_list()
    assert exact or same["margin_few"].to_list() != pytest.approx(same["margin"].to_list(), abs=1e-5)


def test_the_mean_over_some_prompts_is_that_over_all_on_average():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    own = 2
    others = [n for n in range(9) if n != own]
    found = []
    for read in combinations(others, 3):
        total = scores[[own, *read]].sum(0)
        found.append(GroupMean(total, 4, 9).of(scores[own]))
    torch.testing.assert_close(torch.stack(found).mean(0), scores.mean(0))
    torch.testing.assert_close(GroupMean(scores.sum(0), 9, 9).of(scores[own]), scores.mean(0))


@pytest.mark.parametrize("candidates", ["typed", "full"])
def test_a_prompt_without_another_to_calibrate_with_is_left_out_and_counted(candidates, tiny_model):
    alone = cloze("the wolf is in [MASK] .", "spain", wording="alone")
    clozes = [*CLOZES[:2], alone]
    questions = Questions(clozes, answers_by_task(clozes))
    found = Probe(candidates, calibrate=True).ask("test", Scorer(tiny_model("bert")), questions)
    assert found.description["left_out"] == {"no_other_prompt_to_calibrate_with": {"capital": 1}}
    assert found.items["id"].to_list() == [one.id for one in CLOZES[:2]]
    plain = Probe(candidates).ask("test", Scorer(tiny_model("bert")), questions)
    assert plain.description["left_out"] == {} and plain.items.height == 3
    with pytest.raises(BadInput, match="1 no_other_prompt_to_calibrate_with"):
        Probe(candidates, calibrate=True).ask(
            "test", Scorer(tiny_model("bert")), Questions([alone], answers_by_task(clozes))
        )


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=6), st.data())
def test_a_tie_is_lost(scores, data):
    names = [f"answer {n}" for n in range(len(scores))]
    gold = data.draw(st.sampled_from(names))
    raw = torch.tensor(scores, dtype=torch.float64)
    ranking = rank_among(gold, names, [(n,) for n in range(len(scores))], raw)
    own = scores[names.index(gold)]
    rivals = [score for name, score in zip(names, scores, strict=True) if name != gold]
    assert ranking.rank == 1 + sum(rival >= own for rival in rivals)
    assert ranking.correct is (own > max(rivals)) and ranking.margin == own - max(rivals)
    assert (ranking.prediction == gold) is ranking.correct


def test_an_answer_without_rivals_is_right_and_has_no_margin():
    ranking = rank_among("one", ["one"], [(5,)], torch.tensor([-2.0], dtype=torch.float64))
    assert (ranking.rank, ranking.choices, ranking.margin) == (1, 1, None)


def test_a_model_that_says_the_same_of_all_answers_knows_nothing(tiny_model):
    model = tiny_model("bert")
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.zero_()
    for candidates in ("typed", "full"):
        items = Probe(candidates).ask("test", Scorer(model), Questions(CLOZES[:3], answers_by_task(CLOZES[:3]))).items
        assert not items["correct"].any()
        assert items["rank"].to_list() == items["choices"].to_list()


def test_a_model_gone_to_nan_knows_nothing(tiny_model):
    model = tiny_model("bert")
    with torch.no_grad():
        model.network.cls.predictions.bias.fill_(math.nan)
    for candidates in ("typed", "full"):
        items = Probe(candidates).ask("test", Scorer(model), Questions(CLOZES[:3], answers_by_task(CLOZES))).items
        assert not items["correct"].any()


def test_what_cannot_be_asked_is_counted(tiny_model):
    clozes = [*CLOZES, *MIDDLE, cloze("paris is in [MASK] .", "atlantis")]
    description = Probe("full").ask("test", Scorer(tiny_model("llama")), Questions(clozes, {})).description
    assert description["left_out"] == {
        "object_not_last": {"capital": 2},
        "object_of_several_tokens": {"capital": 1},
        "object_unknown_to_tokenizer": {"capital": 1},
    }
    assert description["objects_of_several_tokens"] == {"capital": 1}
    assert description["asked"] == 3
    typed = Probe("typed").ask("test", Scorer(tiny_model("llama")), Questions(clozes, answers_by_task(clozes)))
    assert typed.description["left_out"] == {"object_unknown_to_tokenizer": {"capital": 1}}
    assert typed.items.height == 6


def test_a_mask_that_is_cut_off_is_counted(tiny_model):
    long = cloze("the dog and the cat and the wolf in [MASK] .", "france")
    evaluation = Probe("full", max_tokens=8).ask("test", Scorer(tiny_model("bert")), Questions([*CLOZES[:2], long], {}))
    assert evaluation.description["left_out"] == {"mask_cut_off": {"capital": 1}}
    assert evaluation.items.height == 2


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("sentence", ["{} is [MASK] .", "is [MASK] in {} .", "{} [MASK] was in {} ."])
def test_a_long_answer_in_a_long_text_stays_within_the_positions(architecture, sentence, tiny_tokenizer):
    model = Model(build_network(architecture, max_position_embeddings=64), tiny_tokenizer, "short")
    lengths: list[int] = []
    read = model.network.get_input_embeddings()
    read.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    reader = reader_of(Scorer(model, ways=Ways(end_to_end=False, branching=False)))
    for words in (58, 61, 62, 200):
        one = cloze(sentence.format("dog " * words, "cat " * words), "france")
        if (blanks := reader.blanks([one])) != [None] or not reader.needs_blank:
            (scores,) = candidate_scores(reader, [one], blanks, Candidates(reader, {one.task: WORDS}))
            assert scores.isfinite().sum() == 6  # the tokenizer does not know all of "new york"
    assert max(lengths, default=0) <= 64


def test_common_vocabulary_ranks_among_its_words_only(tiny_model):
    words = ["france", "italy", "red", "blue", "red moon"]
    evaluation = Probe("common").ask("test", Scorer(tiny_model("bert")), Questions(CLOZES[:3], {}), words)
    assert evaluation.items["choices"].to_list() == [4, 4]
    assert evaluation.description["left_out"] == {"object_not_in_common_vocabulary": {"capital": 1}}
    assert set(evaluation.items["prediction"]) <= set(words)


@given(st.integers(1, 60), st.integers(1, 80))
def test_a_limit_takes_questions_from_everywhere(count, limit):
    clozes = [cloze(f"{n} [MASK]", "x") for n in range(count)]
    taken = sampled(clozes, limit)
    assert len(taken) == min(count, limit) and taken == sampled(clozes, limit)
    places = [clozes.index(one) for one in taken]
    gaps = [after - before for before, after in pairwise([*places, places[0] + count])]  # round the end of the list
    assert min(gaps) >= 1 and max(gaps) < 2 * math.ceil(count / len(taken))


def test_a_sample_has_no_rhythm_and_prefers_nothing():
    clozes = [cloze(f"{n} [MASK]", "x", wording=str(n % 2)) for n in range(120)]
    times = Counter(one.id for seed in range(400) for one in sampled(clozes, 20, seed))
    assert len(times) == 120 and max(times.values()) < 2 * 400 / 6
    for limit in (20, 30, 40, 60):  # wordings take turns, and every so-manieth question is one of both
        assert 0.25 < sum(one.wording == "0" for one in sampled(clozes, limit)) / limit < 0.75


@pytest.mark.parametrize("wrong", [{"candidates": "some"}, {"top_k": (0,)}])
def test_what_does_not_exist_is_refused(wrong):
    with pytest.raises(BadInput, match=r"some|top_k=0"):
        Probe(**wrong)


def test_a_model_that_can_be_asked_nothing_is_refused(tiny_model):
    with pytest.raises(BadInput, match=r"none of the 2 questions can be asked of tiny-llama \(2 object_not_last\)"):
        Probe("full").ask("test", Scorer(tiny_model("llama")), Questions(MIDDLE, {}))


@pytest.mark.parametrize("architecture", ["bert", "t5", "llama"])
def test_a_task_may_have_only_long_answers(architecture, tiny_model):
    model = tiny_model(architecture)
    answers = ["red moon", "the capital of china"]
    for one, scores in zip(CLOZES[:2], scores_of(model, CLOZES[:2], answers), strict=True):
        expected = [plain_log_prob(model, one.sentence, answer) for answer in answers]
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=1e-4)


def test_metrics_are_the_same_to_the_last_bit_whenever_they_are_made() -> None:
    """A run that was killed and done again, and one that nobody disturbed, are compared number by number."""
    draw = random.Random(0)
    rows = [
        {
            "suite": "s",
            "task": f"t{i % 17}",
            "id": str(i),
            "gold": "a",
            "prediction": "b",
            "correct": draw.random() < 0.5,
        }
        | {"rank": draw.randint(1, 50), "choices": draw.randint(50, 99)}
        for i in range(500)
    ]
    items = item_table(rows, {"choices": pl.Int64()})
    assert len({repr(sorted(cloze_metrics(items, [1, 10]).items())) for _ in range(30)}) == 1


def test_an_answer_space_without_the_right_answer_is_one_line():
    with pytest.raises(BadInput, match="'gold' is not among the 2") as refusal:
        rank_among("gold", ["a", "b"], [(1,), (2,)], torch.zeros(2))
    assert "\n" not in str(refusal.value)
