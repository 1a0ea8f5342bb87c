"""The scoring core against a plain reference that shares nothing, on every architecture."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from helpers.networks import FAMILY, TINY, VOCABULARY
from helpers.questions import CONTINUING, assert_equals_plain, plainly, random_questions, tokens
from knowledge_compression.evaluation.scoring import Blank, Question, Scorer, budget, likeliest
from knowledge_compression.evaluation.scoring.budget import probe
from knowledge_compression.evaluation.scoring.packed_attention import causal_attention_in_pieces
from knowledge_compression.evaluation.scoring.trees import attention_masks, plant
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER, ENCODER

DECODERS = [name for name in TINY if FAMILY[name] == DECODER]
ONE_STACK = [name for name in TINY if FAMILY[name] in (DECODER, ENCODER)]
ATTENTION = ["sdpa", "eager"]  # texts end to end in one row, and each in a padded row of its own


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("architecture", CONTINUING)
def test_equals_plain_on_every_architecture(
    tiny_model: Callable[[str], Model], architecture: str, attention: str
) -> None:
    model = tiny_model(architecture)
    model.network.set_attn_implementation(attention)
    assert_equals_plain(model, random_questions(1))
    assert_equals_plain(model, random_questions(1), tokens_per_batch=70)
    assert model.network.config._attn_implementation == attention


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CONTINUING)
def test_greedy_continuations_are_found(tiny_model: Callable[[str], Model], architecture: str) -> None:
    model = tiny_model(architecture)
    context = random_questions(2)[0].context
    said: list[int] = []
    for _ in range(2):
        rows = [Question(context, [[*said, token] for token in range(VOCABULARY)])]
        scores = [plain for plain, _ in plainly(model, rows[0])]
        said.append(int(np.argmax(scores)))
    wrong = [*said[:-1], (said[-1] + 1) % VOCABULARY]
    found = Scorer(model).log_likelihoods([Question(context, [said, wrong])])[0]
    assert [answer.greedy for answer in found] == [
        greedy for _, greedy in plainly(model, Question(context, [said, wrong]))
    ]


@pytest.mark.parametrize("architecture", ["llama", "opt", "t5"])
@pytest.mark.parametrize("budget", [1, 50, 100_000])
def test_result_does_not_depend_on_the_budget(
    tiny_model: Callable[[str], Model], architecture: str, budget: int
) -> None:
    model, questions = tiny_model(architecture), random_questions(3, count=30)
    reference = Scorer(model).log_likelihoods(questions)
    found = Scorer(model, tokens_per_batch=budget).log_likelihoods(questions)
    for a, b in zip(reference, found, strict=True):
        assert [x.greedy for x in a] == [x.greedy for x in b]
        assert [x.log_prob for x in a] == pytest.approx([x.log_prob for x in b], rel=1e-5, abs=1e-5)


def test_padding_stays_small(tiny_model: Callable[[str], Model]) -> None:
    questions, tokens_padded = random_questions(4, count=300), {}
    for attention in ATTENTION:
        model = tiny_model("llama")
        model.network.set_attn_implementation(attention)
        scorer = Scorer(model, tokens_per_batch=200)
        scorer.log_likelihoods(questions)
        tokens_padded[attention] = scorer.tokens_padded
        assert scorer.tokens_padded < 0.08 * scorer.tokens_read
    assert tokens_padded["sdpa"] == 0 < tokens_padded["eager"]


def test_shared_tokens_are_read_once(tiny_model: Callable[[str], Model]) -> None:
    draw = random.Random(5)
    context, choices = tokens(draw, 40), [tokens(draw, 5) for _ in range(4)]
    scorer = Scorer(tiny_model("llama"))
    scorer.log_likelihoods([Question(context, choices)])
    assert scorer.tokens_read == 40 + 4 * 4  # the last token of a choice is only predicted
    scorer = Scorer(tiny_model("llama"))
    scorer.log_likelihoods([Question(context, [choice[:1] for choice in choices])])
    assert scorer.tokens_read == 40


def test_few_shot_examples_are_read_once(tiny_model: Callable[[str], Model]) -> None:
    draw = random.Random(6)
    examples = tokens(draw, 60)
    questions = [Question(examples + tokens(draw, 5), [tokens(draw, 3), tokens(draw, 3)]) for _ in range(6)]
    model = tiny_model("llama")
    scorer = Scorer(model)
    scorer.budget.pairs_per_token = 3000.0  # as in a model of ordinary width
    scorer.log_likelihoods(questions)
    assert scorer.tokens_read < 60 + 6 * 10
    assert_equals_plain(model, questions)


@given(
    length=st.integers(1, 300), groups=st.integers(1, 3), scale=st.sampled_from([None, 0.3]), seed=st.integers(0, 99)
)
@settings(max_examples=40)
def test_attention_in_pieces_is_causal_attention(length: int, groups: int, scale: float | None, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 2 * groups, length, 8, generator=draw)
    key, value = torch.randn(2, 2, 2, length, 8, generator=draw)
    expected = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=groups > 1
    )
    torch.testing.assert_close(causal_attention_in_pieces(query, key, value, scale), expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox"])
def test_long_texts_equal_plain(tiny_model: Callable[[str], Model], architecture: str) -> None:
    draw = random.Random(11)
    assert_equals_plain(
        tiny_model(architecture), [Question(tokens(draw, n), [tokens(draw, 2)]) for n in (180, 180, 300)]
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rows_without_branches_say_the_same(tiny_model: Callable[[str], Model], architecture: str) -> None:
    model = tiny_model(architecture)

    class Unbranched(Scorer):
        branches = False  # type: ignore[assignment]

    questions = random_questions(7)
    plain, shared = Unbranched(model).log_likelihoods(questions), Scorer(model).log_likelihoods(questions)
    for a, b in zip(plain, shared, strict=True):
        assert [x.log_prob for x in a] == pytest.approx([x.log_prob for x in b], rel=1e-4)


@pytest.mark.parametrize("attention", ATTENTION)
def test_steps_back_when_memory_runs_out(
    tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    model, questions = tiny_model("llama"), random_questions(8, count=20)
    model.network.set_attn_implementation(attention)
    reference = Scorer(model).log_likelihoods(questions)
    longest = max(map(len, Scorer(model, tokens_per_batch=1000).trees_of(questions)))
    forward, sizes = model.network.forward, []

    def small_memory(*args: object, **inputs: torch.Tensor) -> object:
        sizes.append(inputs["input_ids"].numel())
        if sizes[-1] > longest + 20:
            raise torch.OutOfMemoryError("no room")
        return forward(*args, **inputs)

    monkeypatch.setattr(model.network, "forward", small_memory)
    scorer = Scorer(model, tokens_per_batch=1000)
    found = scorer.log_likelihoods(questions)
    assert max(sizes) > longest + 20
    assert scorer.budget.tokens < 1000
    assert scorer.fallbacks[-1] == f"out of memory: from here on {scorer.budget.tokens} tokens go into one pass"
    for a, b in zip(reference, found, strict=True):
        assert [x.log_prob for x in a] == pytest.approx([x.log_prob for x in b], rel=1e-5)


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        (lambda tokens: 1 + tokens / 1e4, 131072),  # a fixed cost a pass: more tokens pay until it no longer counts
        (lambda tokens: tokens * 1e-5, 2048),  # nothing to gain
        (lambda tokens: tokens * 1e-5 * (1 if tokens < 9000 else 2) + 0.05, 8192),  # out of the caches
    ],
)
def test_budget_grows_while_it_pays(seconds: Callable[[int], float], found: int) -> None:
    assert probe(seconds) == found


@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 2**20))
def test_the_likeliest_token_is_the_first_of_the_best(rows: int, vocabulary: int, seed: int) -> None:
    logits = torch.randint(0, 9, (rows, vocabulary), generator=torch.Generator().manual_seed(seed)).float()
    logits[0, vocabulary // 2 :] = -torch.inf
    best = logits.amax(1, keepdim=True)
    assert likeliest(logits).tolist() == [row.index(True) for row in (logits == best).tolist()]


def test_budget_keeps_to_what_fits() -> None:
    def seconds(tokens: int) -> float:
        if tokens > 5000:
            raise torch.OutOfMemoryError("no room")
        return 1.0

    assert probe(seconds) == 4096


def test_budget_is_found_once(
    tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path))
    passes: list[int] = []
    monkeypatch.setattr(budget, "_seconds", lambda _, tokens: passes.append(tokens) or tokens * 1e-5)
    for architecture, expected in (("llama", 2), ("llama", 2), ("t5", 4)):  # two passes show that more do not pay
        found = budget.Budget(tiny_model(architecture))
        found._settled = False  # as on a device that is no CPU
        before = found.tokens
        found.settle(10)
        assert found.tokens == before
        found.settle(10**6)
        assert (found.tokens, len(passes)) == (2048, expected)
    assert budget.Budget(tiny_model("llama"), 77).tokens == 77


def test_passes_are_long_where_weights_are_cast_in_each(
    tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_CACHE", 1)
    model = tiny_model("llama")
    assert [budget.Budget(model, products=dtype).tokens for dtype in (None, torch.bfloat16)] == [1024, 2048]


@pytest.mark.parametrize("architecture", ["llama", "t5", "bert"])
def test_a_pass_is_timed(tiny_model: Callable[[str], Model], architecture: str) -> None:
    assert budget._seconds(tiny_model(architecture), 256) > 0


def test_other_errors_are_not_swallowed(tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def broken(**_: object) -> object:
        raise RuntimeError("a shape does not fit")

    monkeypatch.setattr(model.network, "forward", broken)
    with pytest.raises(RuntimeError, match="does not fit"):
        Scorer(model).log_likelihoods(random_questions(9))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("architecture", ONE_STACK)
@torch.no_grad()
def test_blanks(tiny_model: Callable[[str], Model], architecture: str, attention: str) -> None:
    model = tiny_model(architecture)
    model.network.set_attn_implementation(attention)
    texts = [question.context for question in random_questions(10)]
    encoder = model.family == ENCODER
    blanks = [Blank(text, position=len(text) // 2 if encoder else None) for text in texts]
    seen: list[int] = []
    for indices, log_probs in Scorer(model, tokens_per_batch=64).distributions(blanks):
        for i, row in zip(indices, log_probs, strict=True):
            logits = model.network(input_ids=torch.tensor([blanks[i].ids])).logits[0]
            expected = logits[-1 if blanks[i].position is None else blanks[i].position].log_softmax(-1)
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
        seen += indices
    assert sorted(seen) == list(range(len(blanks)))


@pytest.mark.parametrize("architecture", CONTINUING)
@torch.no_grad()
def test_generates_the_likeliest_tokens(tiny_model: Callable[[str], Model], architecture: str) -> None:
    model = tiny_model(architecture)
    prompts = [question.context for question in random_questions(12, count=5)]
    lengths = {1: 3, 2: 7, 3: 5}  # some end early, by what they said

    def done(said: Sequence[int]) -> bool:
        return len(said) >= lengths.get(said[0] % 4, 9)

    expected = []
    for prompt in prompts:
        said: list[int] = []
        while len(said) < 6 and not (said and done(said)):
            if model.family == DECODER:
                logits = model.network(input_ids=torch.tensor([[*prompt, *said]])).logits
            else:
                begin = model.network.config.decoder_start_token_id
                ids, spoken = torch.tensor([list(prompt)]), torch.tensor([[begin, *said]])
                logits = model.network(input_ids=ids, decoder_input_ids=spoken).logits
            said.append(int(logits[0, -1].argmax()))
        expected.append(said)
    assert Scorer(model, tokens_per_batch=64).generate(prompts, 6, done) == expected


def test_bfloat16_stays_near(tiny_model: Callable[[str], Model]) -> None:
    model, questions = tiny_model("llama"), random_questions(11)
    exact = Scorer(model).log_likelihoods(questions)
    model.network.to(torch.bfloat16)
    for a, b in zip(exact, Scorer(model).log_likelihoods(questions), strict=True):
        assert [x.log_prob for x in b] == pytest.approx([x.log_prob for x in a], rel=0.05)


texts = st.lists(st.integers(0, 3), min_size=1, max_size=12)
questions_of_few_tokens = st.lists(
    st.builds(Question, texts, st.lists(texts, min_size=0, max_size=4)), min_size=1, max_size=8
)


@settings(max_examples=200)
@given(questions_of_few_tokens, st.booleans(), st.booleans(), st.sampled_from([0.0, 10.0, 1e9]))
def test_trees_hold_every_text_once(
    questions: list[Question], branches: bool, across: bool, pairs_per_token: float
) -> None:
    trees = plant(questions, pairs_per_token=pairs_per_token, longest=20, branches=branches, across=across)
    expected = [(q.context, c) for q in questions for c in q.continuations]
    found: dict[int, list[tuple[list[int], int]]] = {slot: [] for slot in range(len(expected))}
    for tree in trees:
        for node, target, slot in zip(tree.nodes, tree.targets, tree.slots, strict=True):
            index = np.arange(len(tree))
            path = tree.ids[(index <= node) & (node < tree.ends)]
            assert len(path) == tree.depths[node] + 1
            found[slot].append((path.tolist(), int(target)))
        assert branches or tree.is_chain
        assert len(tree) <= 20 or tree.is_chain  # one text that is longer by itself, with what it begins with
    for slot, (context, answer) in enumerate(expected):
        texts_read = [[*context, *answer[:i]] for i in range(len(answer))]
        assert found[slot] == list(zip(texts_read, answer, strict=True))


@given(questions_of_few_tokens)
def test_a_token_sees_its_own_beginnings_alone(questions: list[Question]) -> None:
    for tree in plant(questions, pairs_per_token=1e9, longest=1000):
        ends, depths = torch.from_numpy(tree.ends)[None], torch.from_numpy(tree.depths)[None]
        seen = attention_masks(ends, depths, torch.float32, None)[0, 0] == 0
        assert seen.sum(-1).tolist() == (tree.depths + 1).tolist()
        near = attention_masks(ends, depths, torch.float32, 3)[0, 0] == 0
        assert near.sum(-1).tolist() == np.minimum(tree.depths + 1, 3).tolist()


@pytest.mark.parametrize("architecture", ["llama", "opt", "t5"])
def test_lora_is_scored_through_its_wrapper(tiny_model: Callable[[str], Model], architecture: str) -> None:
    from peft import LoraConfig, get_peft_model

    model, questions = tiny_model(architecture), random_questions(13)
    bare = Scorer(model).log_likelihoods(questions)
    torch.manual_seed(0)
    target = ["q", "v"] if architecture == "t5" else ["q_proj", "v_proj"]
    model.network = get_peft_model(
        model.network, LoraConfig(r=2, target_modules=target, init_lora_weights=False)
    ).eval()
    assert Scorer(model).branches
    assert_equals_plain(model, questions)
    assert Scorer(model).log_likelihoods(questions) != bare


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_soft_prompts_of_peft_are_scored_row_by_row(tiny_model: Callable[[str], Model], architecture: str) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model, questions = tiny_model(architecture), random_questions(14)
    bare = Scorer(model).log_likelihoods(questions)
    kind = "CAUSAL_LM" if model.family == DECODER else "SEQ_2_SEQ_LM"
    torch.manual_seed(0)
    model.network = get_peft_model(model.network, PromptTuningConfig(task_type=kind, num_virtual_tokens=5)).eval()
    scorer = Scorer(model)
    assert not scorer.branches
    found = scorer.log_likelihoods(questions)
    assert found != bare
    for question, answers in zip(questions, found, strict=True):
        for answer, (log_prob, greedy) in zip(answers, prompted_plainly(model, question, 5), strict=True):
            assert answer.log_prob == pytest.approx(log_prob, rel=1e-4, abs=1e-5)
            assert answer.greedy == greedy


@torch.no_grad()
def prompted_plainly(model: Model, question: Question, prompt: int) -> list[tuple[float, bool]]:
    """As :func:`plainly`, where a decoder's logits begin with those of the prompt."""
    if model.family != DECODER:
        return plainly(model, question)
    answers = []
    for answer in question.continuations:
        logits = model.network(input_ids=torch.tensor([[*question.context, *answer]])).logits
        log_probs = logits[0, prompt + len(question.context) - 1 : -1].log_softmax(-1)
        gold = torch.tensor(list(answer))
        answers.append((float(log_probs.gather(-1, gold[:, None]).sum()), bool((log_probs.argmax(-1) == gold).all())))
    return answers


@pytest.mark.parametrize("selection", ["per_layer", "once"])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_prompts_chosen_by_the_input_are_the_same_for_all_choices(
    tiny_model: Callable[[str], Model], architecture: str, selection: str
) -> None:
    from knowledge_compression.recovery.bank import bank_of
    from knowledge_compression.recovery.prompted_network import Prompted

    model = tiny_model(architecture)
    width = model.network.get_input_embeddings().weight.shape[1]
    torch.manual_seed(0)
    bank = bank_of(model, [torch.randn(tokens, width) for tokens in (3, 6)])
    prompted = Prompted(model, bank, selection)
    questions = random_questions(15)
    found = Scorer(model, prompts=prompted.prompts).log_likelihoods(questions)
    chosen = set()
    for question, answers in zip(questions, found, strict=True):
        for c, answer in enumerate(question.continuations):
            # a row of its own, its choice made from the context alone
            ids = torch.tensor([[*question.context, *answer]])
            with torch.no_grad(), prompted.choosing([len(question.context)]):
                log_probs = model.network(input_ids=ids).logits[0, len(question.context) - 1 : -1].log_softmax(-1)
            chosen.add(tuple(prompted.last_choices[0].tolist()))
            gold = torch.tensor(list(answer))
            assert answers[c].log_prob == pytest.approx(float(log_probs.gather(-1, gold[:, None]).sum()), rel=1e-4)
    assert len(chosen) > 1  # otherwise the test says nothing of the choice
