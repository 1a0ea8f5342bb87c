"""Inference-time Dynamic Prompting: equal to prompt tuning where it must be, and choosing by the input alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PromptTuningConfig, TaskType, get_peft_model

from helpers.networks import VOCABULARY, build_network
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.calibration import Questions, answers_by_task
from knowledge_compression.evaluation.cloze import MASK, Cloze
from knowledge_compression.evaluation.harness import Harness
from knowledge_compression.evaluation.probe import Probe
from knowledge_compression.evaluation.scoring import Blank, Question, Scorer
from knowledge_compression.evaluation.suite import ask
from knowledge_compression.recovery.bank import bank_of
from knowledge_compression.recovery.bank_attention import attend, attend_plainly
from knowledge_compression.recovery.prompted_network import Prompted
from knowledge_compression.recovery.selection import ONCE, PER_LAYER, SELECTIONS

DECODERS = ("llama", "opt", "gpt2", "gpt_neox", "qwen2")
LENGTHS = (3, 7)


def soft_prompts(model, lengths=LENGTHS, seed=1):
    torch.manual_seed(seed)
    width = model.network.get_input_embeddings().weight.shape[1]
    return [torch.randn(n, width) for n in lengths]


def prompt_tuned(architecture, prompt):
    """The plain way: peft joins the prompt's embeddings with the input's."""
    network = build_network(architecture)
    peft = get_peft_model(
        network,
        PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(prompt), token_dim=prompt.shape[1]),
    )
    peft.prompt_encoder["default"].embedding.weight.data.copy_(prompt)
    return peft.eval()


def inputs(rows=4, length=9, seed=1):
    torch.manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - row :] = 0  # rows of different lengths, padded at the end
    return ids, mask


@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_forced_to_one_prompt_it_is_prompt_tuning_with_that_prompt(tiny_model, architecture, selection):
    model = tiny_model(architecture)
    prompts = soft_prompts(model)
    prompted = Prompted(model, bank_of(model, prompts), selection)
    ids, mask = inputs()
    for i, prompt in enumerate(prompts):
        prompted.forced = i
        with torch.no_grad():
            ours = model.network(input_ids=ids, attention_mask=mask).logits
            unpadded = model.network(input_ids=ids).logits
            plain = prompt_tuned(architecture, prompt)
            theirs = plain(input_ids=ids, attention_mask=mask).logits[:, len(prompt) :]
            theirs_unpadded = plain(input_ids=ids).logits[:, len(prompt) :]
        assert (ours - theirs)[mask.bool()].abs().max() < 1e-4
        assert (unpadded - theirs_unpadded).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", DECODERS)
def test_one_prompt_is_prompt_tuning(tiny_model, architecture):
    model = tiny_model(architecture)
    (prompt,) = soft_prompts(model, (5,))
    Prompted(model, bank_of(model, [prompt]))
    ids, _ = inputs()
    with torch.no_grad():
        ours = model.network(input_ids=ids).logits
        theirs = prompt_tuned(architecture, prompt)(input_ids=ids).logits[:, 5:]
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", DECODERS)
def test_chosen_once_each_row_is_prompt_tuning_with_its_prompt(tiny_model, architecture):
    model = tiny_model(architecture)
    prompts = soft_prompts(model, (3, 4, 7))
    prompted = Prompted(model, bank_of(model, prompts), ONCE)
    ids, mask = inputs(rows=8, length=12)
    with torch.no_grad():
        ours = model.network(input_ids=ids, attention_mask=mask).logits
        chosen = prompted.last_choices[:, 0]
        for i, prompt in enumerate(prompts):
            theirs = prompt_tuned(architecture, prompt)(input_ids=ids, attention_mask=mask).logits[:, len(prompt) :]
            rows = mask.bool() & (chosen == i)[:, None]
            assert not rows.any() or (ours - theirs)[rows].abs().max() < 1e-4
    assert (prompted.last_choices == chosen[:, None]).all()


def test_layers_choose_by_mean_attention_as_written_out(tiny_model):
    """Against the definition: one softmax over every prompt and the input, then means; layer by layer."""
    model = tiny_model("llama")
    prompts = soft_prompts(model, (3, 6))
    seen = []

    def attention(module, query, key, value, attention_mask, scaling=None, reading=None, **_):
        layer, bank = module.layer_idx, reading.bank
        query_heads = query.shape[1] // key.shape[1]
        parts = [(bank.keys[layer][i, :, -n:], bank.values[layer][i, :, -n:]) for i, n in enumerate(bank.lengths)]
        width, length = sum(bank.lengths), query.shape[2]
        keys = torch.cat([*(k.expand(len(query), -1, -1, -1) for k, _ in parts), key], 2)
        values = torch.cat([*(v.expand(len(query), -1, -1, -1) for _, v in parts), value], 2)
        keys, values = keys.repeat_interleave(query_heads, 1), values.repeat_interleave(query_heads, 1)
        scores = query @ keys.transpose(-1, -2) * scaling
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores[..., width:].masked_fill_(hidden, -torch.inf)
        weights = scores.softmax(-1).split([*bank.lengths, length], -1)
        choice = torch.stack([w.mean((1, 2, 3)) for w in weights[:-1]]).argmax(0)
        seen.append(choice)
        start = 0
        for i, n in enumerate(bank.lengths):  # the prompt that a row did not choose is masked
            scores[choice != i, :, :, start : start + n] = -torch.inf
            start += n
        return (scores.softmax(-1) @ values).transpose(1, 2), None

    from transformers import AttentionInterface

    prompted = Prompted(model, bank_of(model, prompts), PER_LAYER)
    ids, _ = inputs(rows=6)
    with torch.no_grad():
        ours = model.network(input_ids=ids).logits
        chosen = prompted.last_choices
        AttentionInterface.register("written_out", attention)
        model.network.set_attn_implementation("written_out")
        prompted.forced = 0  # the written-out function makes its own choice
        theirs = model.network(input_ids=ids).logits
    assert torch.equal(chosen, torch.stack(seen, 1))
    assert len(chosen.unique()) == 2, "a test in which only one prompt is ever chosen shows nothing"
    assert (ours - theirs).abs().max() < 1e-5


def rotated(x, positions, base):
    """Rotary positions of ``[heads, tokens, width]``."""
    width = x.shape[-1]
    angles = (positions[:, None] / base ** (torch.arange(0, width, 2) / width)).repeat(1, 2)
    halves = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
    return x * angles.cos() + halves * angles.sin()


def normed(x, norm):
    return norm.weight * x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def attended(query, keys, values, width):
    """Causal attention, the keys of what stands before the queries first."""
    scores = query @ keys.transpose(1, 2) / width**0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + keys.shape[1] - query.shape[1])
    return scores.masked_fill(hidden, -torch.inf).softmax(-1), values


def after(block, x, weights_and_values):
    """A block's output from its input and its attention."""
    weights, values = weights_and_values
    x = x + (weights @ values).transpose(0, 1).flatten(1) @ block.self_attn.o_proj.weight.T
    y, mlp = normed(x, block.post_attention_layernorm), block.mlp
    return (
        x + (torch.nn.functional.silu(y @ mlp.gate_proj.weight.T) * (y @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    )


@torch.no_grad()
def idp_by_hand(network, prompts, ids):
    """A LLaMA that reads one text behind several prompts, as the paper words it, from its weights alone.

    In each block every prompt is read by itself; one softmax goes over all prompts and the text; the prompt with the
    largest mean attention over heads, the text's tokens and its own tokens is kept, and the text attends to it alone.
    """
    width, groups = network.config.head_dim, network.config.num_attention_heads // network.config.num_key_value_heads
    base, longest = network.config.rope_parameters["rope_theta"], max(map(len, prompts))
    prompts, text, choices = list(prompts), network.model.embed_tokens.weight[ids], []
    for block in network.model.layers:

        def read(x, start, block=block):
            """Queries, keys and values of what starts at a position; each prompt ends where the text begins."""
            at, x = torch.arange(start, start + len(x)), normed(x, block.input_layernorm)
            parts = (getattr(block.self_attn, f"{name}_proj").weight for name in "qkv")
            query, key, value = ((x @ part.T).view(len(x), -1, width).transpose(0, 1) for part in parts)
            key, value = (rotated(key, at, base).repeat_interleave(groups, 0), value.repeat_interleave(groups, 0))
            return rotated(query, at, base), key, value

        kept = [read(prompt, longest - len(prompt)) for prompt in prompts]
        prompts = [
            after(block, prompt, attended(*of_prompt, width)) for prompt, of_prompt in zip(prompts, kept, strict=True)
        ]
        query, key, value = read(text, longest)
        weights, _ = attended(query, torch.cat([*(keys for _, keys, _ in kept), key], 1), value, width)
        shares = [part.mean() for part in weights.split([*map(len, prompts), len(text)], -1)[:-1]]
        choices.append(shares.index(max(shares)))
        _, keys, values = kept[choices[-1]]
        text = after(block, text, attended(query, torch.cat([keys, key], 1), torch.cat([values, value], 1), width))
    return normed(text, network.model.norm) @ network.lm_head.weight.T, choices


@pytest.mark.parametrize("lengths", [(3, 6), (4, 4, 9), (2, 11)])
def test_choices_and_logits_are_those_of_a_plain_rewrite(lengths, tiny_model):
    model = tiny_model("llama")
    prompts = soft_prompts(model, lengths)
    ids, _ = inputs(rows=12, length=10, seed=3)
    expected = [idp_by_hand(model.network, prompts, row) for row in ids]
    prompted = Prompted(model, bank_of(model, prompts), PER_LAYER)
    with torch.no_grad():
        ours = model.network(input_ids=ids).logits
    assert prompted.last_choices.tolist() == [choices for _, choices in expected]
    assert len(prompted.last_choices.unique()) > 1, "a test in which only one prompt is ever chosen shows nothing"
    assert (ours - torch.stack([logits for logits, _ in expected])).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_prompts_do_not_see_each_other(tiny_model, architecture):
    model = tiny_model(architecture)
    first, second = soft_prompts(model)
    one, other = (bank_of(model, [first, second + change]) for change in (0.0, 1.0))
    for ours, theirs in zip([*one.keys, *one.values], [*other.keys, *other.values], strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert not torch.equal(ours[1], theirs[1])
    prompted = Prompted(model, other)
    ids, _ = inputs()
    prompted.forced = 0
    perturbed = model.network(input_ids=ids).logits
    prompted.remove()
    prompted = Prompted(model, one)
    prompted.forced = 0
    assert torch.equal(model.network(input_ids=ids).logits, perturbed)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_choice_does_not_depend_on_the_continuation(tiny_model, architecture, selection):
    model = tiny_model(architecture)
    prompted = Prompted(model, bank_of(model, soft_prompts(model)), selection)
    ids, _ = inputs(rows=16, length=8)
    answers, _ = inputs(rows=16, length=6, seed=2)
    lengths = [3 + row % 6 for row in range(16)]
    with torch.no_grad():
        chosen = []
        for tail in (answers, answers.flip(0), answers[:, :0]):
            joined = torch.cat([ids, tail], 1)
            for row, length in enumerate(lengths):  # what follows the context is answer, here other answers each time
                joined[row, length:] = joined[row, length:].roll(tail.shape[1])
            with prompted.choosing(lengths):
                model.network(input_ids=joined)
            chosen.append(prompted.last_choices)
    assert torch.equal(chosen[0], chosen[1]) and torch.equal(chosen[0], chosen[2])
    assert len(chosen[0].unique()) == 2


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_generation_keeps_the_prompt_that_the_input_chose(tiny_model, architecture, selection):
    model = tiny_model(architecture)
    prompted = Prompted(model, bank_of(model, soft_prompts(model)), selection)
    ids, _ = inputs(rows=6)
    said = model.network.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    with torch.no_grad(), prompted.choosing([ids.shape[1]] * len(ids)):
        logits = model.network(input_ids=said).logits
    logits[..., model.network.generation_config.eos_token_id] = -torch.inf
    assert torch.equal(logits[:, ids.shape[1] - 1 : -1].argmax(-1), said[:, ids.shape[1] :])
    assert prompted.last_choices.shape == (len(ids), 2)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_each_item_tells_which_prompt_it_chose(tiny_model, selection):
    """Items that begin alike each have a choice of their own: answers come back by the ids that questions carry."""
    model = tiny_model("llama")
    prompted = Prompted(model, bank_of(model, soft_prompts(model)), selection)
    words = ["the", "capital", "of", "france", "is", "an", "animal", "in", "red", "moon", "and", "book", "was", "by"]
    texts = [" ".join(words[:n]) for n in range(1, len(words) + 1)]  # each begins the next
    ids = {text: model.tokenizer(text, add_special_tokens=False).input_ids for text in texts}
    expected = {}
    for text in texts:
        with torch.no_grad():
            model.network(input_ids=torch.tensor([ids[text]]))
        expected[text] = prompted.last_choices[0].tolist()
    assert len({tuple(choice) for choice in expected.values()}) > 1, "all chose alike, which shows nothing"
    scorer = Scorer(model, prompts=prompted.prompts)
    scorer.log_likelihoods([Question(ids[text], [[9], [11, 12]], (f"likelihood {text}",)) for text in texts])
    for _ in scorer.distributions([Blank(ids[text], items=(f"blank {text}",)) for text in texts]):
        pass
    scorer.generate(list(ids.values()), 3, lambda _: False, [(f"said {text}",) for text in texts])
    for text in texts:
        for way in ("likelihood", "blank", "said"):
            assert scorer.notes.of(f"{way} {text}") == {"chosen_prompts": expected[text]}, (way, text)


def test_of_an_item_of_several_texts_the_choice_of_the_first_is_noted(tiny_model):
    model = tiny_model("llama")
    prompted = Prompted(model, bank_of(model, soft_prompts(model)))
    contexts = inputs(rows=8)[0].tolist()
    for order in (contexts, contexts[::-1]):
        scorer = Scorer(model, prompts=prompted.prompts)
        scorer.log_likelihoods([Question(context, [[9]], ("one",)) for context in order])
        with torch.no_grad():
            model.network(input_ids=torch.tensor([order[0]]))
        assert scorer.notes.of("one")["chosen_prompts"] == prompted.last_choices[0].tolist()


class Days:
    """Clozes that a decoder is asked for, some by one token and some by several."""

    def evaluate(self, scorer):
        clozes = [
            Cloze("capital", f"{place}", place, place, "red moon" if place == "rome" else "france",
                  f"the capital of {place} is {MASK}", "0")
            for place in ("paris", "berlin", "rome", "tokyo")
        ]  # fmt: skip
        return Probe().ask("days", scorer, Questions(clozes, answers_by_task(clozes)))


def test_a_suite_gives_its_items_with_their_choices(tiny_model, tasks_dir):
    model = tiny_model("llama")
    prompted = Prompted(model, bank_of(model, soft_prompts(model)))
    scorer = partial(Scorer, model, prompts=prompted.prompts)
    harness = Harness(["boolq", "winogrande"], data_dir=str(tasks_dir))
    for suite in (Days(), *harness.parts().values()):
        items = ask(suite, scorer()).items
        assert items["chosen_prompts"].null_count() == 0 and items.height > 3
        assert set(items["chosen_prompts"].list.len()) == {2}  # layers
    with pytest.raises(
        BadInput, match="scoring=stock cannot be used with a recovery whose prompts are selected by the input"
    ):
        ask(replace(harness, scoring="stock"), scorer())
    with pytest.raises(BadInput, match="reads prompts that a recovery put before its input"):
        Scorer(model)


def test_rows_do_not_depend_on_their_batch(tiny_model):
    model = tiny_model("llama")
    Prompted(model, bank_of(model, soft_prompts(model)))
    ids, mask = inputs(rows=6, length=11)
    with torch.no_grad():
        together = model.network(input_ids=ids, attention_mask=mask).logits
        for row in range(len(ids)):
            length = int(mask[row].sum())
            alone = model.network(input_ids=ids[row : row + 1, :length]).logits[0]
            assert (together[row, :length] - alone).abs().max() < 1e-5


def test_a_removed_prompt_leaves_no_trace(tiny_model):
    model = tiny_model("opt")
    ids, _ = inputs()
    positions = Scorer(model).max_positions
    with torch.no_grad():
        before = model.network(input_ids=ids).logits
        prompted = Prompted(model, bank_of(model, soft_prompts(model)))
        assert Scorer(model, prompts=prompted.prompts).max_positions == positions - 7
        assert not torch.equal(model.network(input_ids=ids).logits, before)
        prompted.remove()
        assert torch.equal(model.network(input_ids=ids).logits, before)
    assert Scorer(model).max_positions == positions


@pytest.mark.parametrize(("architecture", "why"), [("bert", "both directions"), ("t5", "both"), ("mistral", "windows")])
def test_what_cannot_be_prompted_says_so(tiny_model, architecture, why):
    model = tiny_model(architecture)
    with pytest.raises(BadInput, match=why):
        bank_of(model, [torch.zeros(2, 16)])


def test_bad_settings_say_so(tiny_model):
    model = tiny_model("opt")
    bank = bank_of(model, soft_prompts(model))
    with pytest.raises(BadInput, match="selection='both' does not exist; choose one of per_layer, once"):
        Prompted(model, bank, "both")
    with pytest.raises(BadInput, match="a prompt of 128 tokens leaves none of the 128 positions"):
        bank_of(model, soft_prompts(model, (128,)))


@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(1, 5), st.integers(1, 6), st.booleans(),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=40)
def test_the_fused_kernel_is_the_definition(rows, key_heads, group, queries, keys, biased, causal):
    torch.manual_seed(rows + 7 * keys)
    query = torch.randn(rows, key_heads * group, queries, 8)
    if causal:
        biased, keys = False, queries
    key, value = torch.randn(2, rows, key_heads, keys, 8)
    bias = torch.randn(rows, 1, 1, keys) if biased else None
    ours = attend(query, key, value, scale=0.3, bias=bias, causal=causal)
    plain = attend_plainly(query, key, value, scale=0.3, bias=bias, causal=causal)
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).abs().max() < 1e-5
