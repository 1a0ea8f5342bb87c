"""The training loop and its objectives."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers.networks import build_network
from knowledge_compression.errors import BadInput
from knowledge_compression.models.device import Device
from knowledge_compression.objectives import LastWords, MaskedTokens, NextToken, RandomSpans, SpanCorruption
from knowledge_compression.training import TrainingSettings, train

VOCABULARY = 40
SENTINELS = tuple(range(30, 40))
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def decoder(dropout: float = 0.1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_attention_heads=2, attention_dropout=dropout))


def encoder() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SMALL, num_attention_heads=2, max_position_embeddings=32))


def encoder_decoder() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **shape))


def text(rows: int = 24, length: int = 12) -> torch.Tensor:
    """Windows in which every token follows from the one before."""
    starts = torch.randint(3, 25, (rows, 1), generator=torch.Generator().manual_seed(1))
    return (starts + torch.arange(length)) % 22 + 3


FAMILIES = {
    "decoder": (decoder, NextToken()),
    "encoder": (encoder, MaskedTokens(2, 28, RandomSpans(0.2))),
    "encoder_decoder": (encoder_decoder, SpanCorruption(SENTINELS, 0, 1, 0, RandomSpans(0.3, 2.0))),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss_of_every_family(family):
    make, objective = FAMILIES[family]
    report = train(make(), text(), objective, TrainingSettings(steps=80, batch_size=24, learning_rate=1e-2))
    assert report.loss_after < 0.9 * report.loss_before
    assert report.tokens == 80 * 24 * 12


@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupted_training_ends_bit_for_bit_where_an_uninterrupted_one_does(family, tmp_path):
    make, objective = FAMILIES[family]
    plan = TrainingSettings(steps=30, batch_size=5, accumulate=2, learning_rate=1e-2, checkpoint_every=7)
    straight = make()
    whole = train(straight, text(), objective, plan)

    class Killed(Exception):
        pass

    def kill(metrics, step):
        if step == 20:
            raise Killed

    with pytest.raises(Killed):
        train(make(), text(), objective, plan, checkpoint=tmp_path / "state", report_to=kill)
    torch.manual_seed(99)  # whatever else used the generators in between
    resumed = make()
    report = train(resumed, text(), objective, plan, checkpoint=tmp_path / "state")
    assert report.resumed_at == 14
    assert (report.loss_before, report.loss_after) == (whole.loss_before, whole.loss_after)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_training_leaves_the_callers_random_state_alone():
    network = decoder()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(network, text(), NextToken(), TrainingSettings(steps=2))
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_of_another_training_is_not_gone_on_from(tmp_path, caplog):
    state = tmp_path / "state"
    train(decoder(), text(), NextToken(), TrainingSettings(steps=4), checkpoint=state)
    report = train(decoder(), text(), NextToken(), TrainingSettings(steps=4, learning_rate=1e-3), checkpoint=state)
    assert report.resumed_at is None
    assert "belongs to another training" in caplog.text


def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path, caplog):
    state = tmp_path / "state"
    state.write_bytes(b"no safetensors")
    assert train(decoder(), text(), NextToken(), TrainingSettings(steps=4), checkpoint=state).resumed_at is None
    assert "cannot be read" in caplog.text
    assert train(decoder(), text(), NextToken(), TrainingSettings(steps=4), checkpoint=state).resumed_at == 4


def test_only_parameters_that_require_gradients_are_trained_and_saved(tmp_path):
    network = decoder()
    network.requires_grad_(False)
    network.lm_head.weight.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = train(network, text(), NextToken(), TrainingSettings(steps=3), checkpoint=tmp_path / "state")
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"lm_head.weight"}
    assert report.parameters == network.lm_head.weight.numel()
    saved = {key for key in load_file(tmp_path / "state") if key.startswith("parameter/")}
    assert saved == {"parameter/lm_head.weight"}


def test_accumulated_batches_give_the_gradient_of_one_large_batch():
    """Also where the parts hold different numbers of predicted tokens."""
    windows = text(8)
    windows[:4, 6:] = 0
    objective = NextToken(pad_id=0)
    results = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        network = decoder(dropout=0.0)
        plan = TrainingSettings(steps=1, batch_size=batch_size, accumulate=accumulate, clip=0.0)
        seen: dict[str, torch.Tensor] = {}
        for name, parameter in network.named_parameters():
            parameter.register_hook(lambda g, name=name, seen=seen: seen.update({name: seen.get(name, 0) + g}))
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        train(network, windows, objective, plan)
        moved = torch.cat([(p - before[name]).detach().flatten() for name, p in network.named_parameters()])
        results.append((torch.cat([g.flatten() for g in seen.values()]), moved))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-8)
    agree = (results[0][1] - results[1][1]).abs() < 1e-6
    assert agree.float().mean() > 0.98  # AdamW's first step is a sign, which noise decides where the gradient is nought


def test_routers_are_balanced_block_by_block_over_what_is_no_padding():
    """Against equations 4 to 6 of the Switch Transformers paper, one block and one expert at a time."""
    network, windows = build_network("mixtral"), text(6)
    windows[:3, 7:] = 0
    read: list[list[torch.Tensor]] = []
    for block in network.model.layers:
        read.append([])
        block.mlp.register_forward_pre_hook(lambda _, args, seen=read[-1]: seen.append(args[0].detach()))
    plain, count = NextToken(pad_id=0)(network, windows)
    balanced, same_count = NextToken(pad_id=0, balance=0.5)(network, windows)
    expected = 0.0
    for block, seen in zip(network.model.layers, read, strict=True):
        chances = (seen[0][windows != 0] @ block.mlp.gate.weight.T).softmax(-1).detach()
        chosen = [row.topk(2).indices.tolist() for row in chances]
        for expert in range(4):
            share = sum(expert in pair for pair in chosen) / len(chosen)
            expected += 4 * share * float(chances[:, expert].mean()) / len(read)
    assert count == same_count
    assert float(balanced - plain) == pytest.approx(0.5 * count * expected, rel=1e-4)
    gate = network.model.layers[0].mlp.gate.weight
    assert torch.autograd.grad(balanced - plain, gate)[0].abs().sum() > 0


class TooLittleMemory:
    """An objective with room for a few windows at a time."""

    def __init__(self, objective, room):
        self.objective, self.room, self.sizes = objective, room, []

    def __call__(self, network, batch):
        self.sizes.append(len(batch))
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("no room")
        return self.objective(network, batch)


def test_windows_that_do_not_fit_in_memory_go_in_smaller_parts(tmp_path, caplog):
    """The training is that of the smaller batches accumulated; the parts are kept to, also after an interruption."""
    plan = TrainingSettings(steps=6, batch_size=8, checkpoint_every=3)
    smaller = TrainingSettings(steps=6, batch_size=2, accumulate=4, checkpoint_every=3)
    network, reference = decoder(0.0), decoder(0.0)
    tight = TooLittleMemory(NextToken(), room=3)
    report = train(network, text(8), tight, plan, checkpoint=tmp_path / "state.safetensors")
    assert report.windows_at_once == 2 and tight.sizes == [8, 4, *[2] * 4 * 6]
    assert [record.message for record in caplog.records if "out of memory" in record.message][-1].endswith(
        "2 windows at once"
    )
    assert train(reference, text(8), NextToken(), smaller).windows_at_once is None
    for (name, here), (_, there) in zip(network.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(here, there, msg=name)
    roomy = TooLittleMemory(NextToken(), room=8)
    again = train(decoder(0.0), text(8), roomy, plan, checkpoint=tmp_path / "state.safetensors")
    assert again.resumed_at == 6 and again.windows_at_once == 2 and not roomy.sizes


def test_one_window_that_does_not_fit_ends_the_training():
    with pytest.raises(torch.OutOfMemoryError):
        train(decoder(), text(8), TooLittleMemory(NextToken(), room=0), TrainingSettings(steps=1, batch_size=8))


def test_a_loss_that_is_no_number_stops_the_training_and_keeps_the_last_good_state(tmp_path):
    class Breaks:
        calls = 0

        def __call__(self, network, ids):
            self.calls += 1
            loss, tokens = NextToken()(network, ids)
            return loss * (math.nan if self.calls == 8 else 1.0), tokens

    plan = TrainingSettings(steps=20, checkpoint_every=5)
    with pytest.raises(BadInput, match=r"loss of step 8 of 20 is nan.*kept in state.*learning_rate"):
        train(decoder(), text(), Breaks(), plan, checkpoint=tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as file:
        assert '"step": 5' in file.metadata()["state"]
        assert all(torch.isfinite(file.get_tensor(key)).all() for key in file.keys())  # noqa: SIM118


def test_the_learning_rate_rises_and_falls():
    plan = TrainingSettings(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [plan.learning_rate_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0) == max(rates)
    assert rates[99] == pytest.approx(1 / 90)
    constant = TrainingSettings(steps=100, learning_rate=1.0, warmup=0.1, schedule="constant")
    assert constant.learning_rate_at(99, 100) == 1.0


def test_a_budget_in_tokens_is_rounded_up_to_steps():
    assert TrainingSettings(tokens=1000, batch_size=4, accumulate=2).steps_over(16) == 8


@pytest.mark.parametrize(
    ("given_settings", "says"),
    [
        ({}, "neither is set; give either steps or tokens"),
        ({"steps": 1, "tokens": 1}, "steps=1 and tokens=1 are both set; give either steps or tokens"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1, "schedule": "cosine"}, "choose one of linear, constant"),
        ({"steps": 1, "learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(given_settings, says):
    with pytest.raises(BadInput, match=says):
        TrainingSettings(**given_settings)


def test_nothing_to_train_and_nothing_to_train_on_are_refused():
    with pytest.raises(BadInput, match="nothing to train"):
        train(decoder().requires_grad_(False), text(), NextToken(), TrainingSettings(steps=1))
    with pytest.raises(BadInput, match="no window"):
        train(decoder(), text()[:0], NextToken(), TrainingSettings(steps=1))


def test_progress_is_reported():
    seen = []
    train(decoder(), text(), NextToken(), TrainingSettings(steps=25), report_to=lambda m, step: seen.append((step, m)))
    assert [step for step, _ in seen] == [10, 20, 25]
    assert set(seen[0][1]) == {"loss", "learning_rate", "tokens_per_second"}


def test_next_token_is_the_loss_that_the_network_gives_itself():
    network, windows = decoder(dropout=0.0), text()
    total, tokens = NextToken()(network, windows)
    assert total.item() / tokens == pytest.approx(float(network(input_ids=windows, labels=windows).loss), rel=1e-5)


def test_span_corruption_is_the_loss_that_the_network_gives_itself():
    network, windows = encoder_decoder().eval(), text()
    objective = SpanCorruption(SENTINELS, 0, 1, 0, RandomSpans(0.3, 2.0))
    torch.manual_seed(0)
    total, tokens = objective(network, windows)
    torch.manual_seed(0)
    inputs, outputs = objective.corrupt(windows, objective.noise.mask(windows))
    labels = outputs.masked_fill(outputs == 0, -100)
    expected = network(input_ids=inputs, attention_mask=(inputs != 0).long(), labels=labels).loss
    assert total.item() / tokens == pytest.approx(float(expected), rel=1e-5)


@given(seed=st.integers(0, 2**31), rate=st.floats(0.05, 0.6), mean_span=st.floats(1, 4), rows=st.integers(1, 5))
@settings(max_examples=60)
def test_corrupted_spans_put_back_give_the_text(seed, rate, mean_span, rows):
    """Against a slow reference that puts the decoder's words in the sentinels' places, on rows of any length."""
    torch.manual_seed(seed)
    generator = random.Random(seed)
    lengths = [generator.randint(2, 16) for _ in range(rows)]
    ids = torch.zeros(rows, 16, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 29, (length,))
    noise = RandomSpans(rate, mean_span, specials=(0,))
    hidden = noise.mask(ids)
    inputs, outputs = SpanCorruption(SENTINELS, 0, 1, 0, noise).corrupt(ids, hidden)
    for row, length in enumerate(lengths):
        assert hidden[row].sum() == max(1, round(float(torch.tensor(length) * rate)))
        answers: dict[int, list[int]] = {}
        for token in outputs[row, : outputs[row].tolist().index(1)].tolist():
            if token in SENTINELS:
                answers[token] = []
            else:
                answers[max(answers)].append(token)
        said = inputs[row, : inputs[row].tolist().index(1)].tolist()
        assert [token for token in said if token in SENTINELS] == sorted(answers)
        restored = [t for token in said for t in (answers[token] if token in SENTINELS else [token])]
        assert restored == ids[row, :length].tolist()


def test_hidden_spans_favour_no_place_and_have_the_length_asked_for():
    torch.manual_seed(0)
    hidden = RandomSpans(0.15, 3.0).mask(torch.ones(4000, 40, dtype=torch.long))
    assert (hidden.sum(-1) == 6).all()
    share = hidden.float().mean(0)
    assert (share - 0.15).abs().max() < 0.03
    starts = (hidden & ~torch.nn.functional.pad(hidden, (1, 0))[:, :-1]).sum(-1).float()
    assert 6 / starts.mean() == pytest.approx(3.0, abs=0.5)


def test_last_words_are_hidden_as_often_as_asked_and_specials_never():
    torch.manual_seed(0)
    stop, padding = 2, 0
    ids = torch.tensor([[1, 10, 11, 12, 20, stop, 10, 21, stop, padding]]).repeat(4000, 1)
    hidden = LastWords(stop, 0.6, 0.05, specials=(0, 1)).mask(ids)
    assert not hidden[:, [0, 9]].any()
    assert hidden.any(-1).all()
    for place in (4, 7):
        assert 0.6 <= hidden[:, place].float().mean() < 0.75
    for place in (1, 2, 3, 5, 6, 8):
        assert 0.03 < hidden[:, place].float().mean() < 0.15
    assert not LastWords(stop, specials=(0,)).mask(torch.zeros(1, 3, dtype=torch.long)).any()


def test_masked_tokens_become_masks_mostly():
    class Sees(nn.Module):
        def forward(self, input_ids, **_):
            self.ids = input_ids
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, VOCABULARY, requires_grad=True)})

    torch.manual_seed(0)
    network, ids = Sees(), torch.randint(3, 28, (2000, 20))
    _, tokens = MaskedTokens(2, 28, RandomSpans(0.2))(network, ids)
    assert tokens == 2000 * 4
    assert (network.ids == 2).sum() / tokens == pytest.approx(0.8, abs=0.02)
    changed = ((network.ids != 2) & (network.ids != ids)).sum() / tokens
    assert changed == pytest.approx(0.1 * 27 / 28, abs=0.02)


@pytest.mark.parametrize(("gain", "stored", "taken"), [
    (4.0, torch.float32, "bfloat16"), (1.0, torch.float32, "float32"), (4.0, torch.bfloat16, "bfloat16"),
])  # fmt: skip
def test_auto_trains_in_the_type_that_suits_the_device(
    monkeypatch: pytest.MonkeyPatch, gain: float, stored: torch.dtype, taken: str
) -> None:
    monkeypatch.setitem(Device.known, torch.device("cpu"), Device(torch.device("cpu"), bfloat16_gain=gain))
    network, seen = decoder().to(stored), set()
    network.get_output_embeddings().register_forward_hook(lambda _, __, logits: seen.add(logits.dtype))
    report = train(network, text(), NextToken(), TrainingSettings(steps=2, precision="auto"))
    assert report.multiplied_in == taken and seen == {getattr(torch, taken)}
    assert {p.dtype for p in network.parameters()} == {stored}
