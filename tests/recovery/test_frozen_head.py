"""The loss through a frozen head, and LoRA's own products, give the losses and gradients of the plain way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from knowledge_compression.models import Model, frozen_head
from knowledge_compression.models.device import frozen_kept_in, multiplied_in
from knowledge_compression.models.frozen_head import plain_head
from knowledge_compression.objectives import NextToken
from knowledge_compression.recovery import lora_training
from knowledge_compression.recovery.lora import Lora, add_lora
from knowledge_compression.training import TrainingSettings, train

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
CPU = torch.device("cpu")


def llama(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A frozen network whose first norm is trained."""
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**SMALL))
    if bias:
        network.lm_head = nn.Linear(16, 40)
    network.to(dtype).requires_grad_(False)
    network.model.layers[0].input_layernorm.weight.requires_grad_(True)
    return network


def ids() -> Tensor:
    return torch.randint(2, 40, (3, 12), generator=torch.Generator().manual_seed(1))


def plain_loss(network: nn.Module, tokens: Tensor, pad_id: int | None = None) -> Tensor:
    """By the network's own logits of the whole batch."""
    logits = network(input_ids=tokens, use_cache=False).logits[:, -tokens.shape[1] :][:, :-1].float()
    labels = tokens[:, 1:] if pad_id is None else tokens[:, 1:].masked_fill(tokens[:, 1:] == pad_id, -100)
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def gradients(network: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pad_id", [None, 7])
@pytest.mark.parametrize(
    ("stored", "narrower", "close"),
    [
        (torch.float32, None, 1e-5), (torch.float32, torch.bfloat16, 3e-2), (torch.bfloat16, None, 3e-2),
    ],
)  # fmt: skip
def test_the_loss_of_a_frozen_head(
    monkeypatch: pytest.MonkeyPatch, bias: bool, pad_id: int | None, stored: Any, narrower: Any, close: float
) -> None:
    """Also where a batch takes several products, and these several pieces, the last of them smaller."""
    monkeypatch.setattr(frozen_head, "_LOGITS", 40 * 7)
    monkeypatch.setattr(frozen_head, "_IN_CACHE", 40 * 2)
    network, tokens = llama(bias=bias, dtype=stored), ids()
    assert plain_head(network) is network.lm_head
    with multiplied_in(narrower, CPU):
        expected = plain_loss(network, tokens, pad_id)
    expected.backward()
    reference = gradients(network)
    network.lm_head.register_forward_hook(lambda *_: pytest.fail("the whole head was computed"))
    monkeypatch.setattr(frozen_head, "plain_head", lambda found: found.lm_head)
    with multiplied_in(narrower, CPU):
        loss, count = NextToken(pad_id)(network, tokens)
    loss.backward()
    assert count == sum(token != pad_id for token in tokens[:, 1:].flatten().tolist())
    torch.testing.assert_close(loss, expected, rtol=close, atol=0)
    torch.testing.assert_close(gradients(network), reference, rtol=close, atol=close * float(reference[0].abs().max()))


def test_without_gradients_only_the_loss_is_computed() -> None:
    network, tokens = llama(), ids()
    with torch.no_grad():
        loss, _ = NextToken()(network, tokens)
        torch.testing.assert_close(loss, plain_loss(network, tokens))


def capped() -> nn.Module:
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8, final_logit_softcapping=30.0))


def scaled() -> nn.Module:
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0))


@pytest.mark.parametrize("make", [capped, scaled])
def test_logits_that_are_capped_or_scaled_are_left_to_the_network(make: Any) -> None:
    network, tokens = make(), ids()
    network.requires_grad_(False)
    assert plain_head(network) is None
    loss, _ = NextToken()(network, tokens)
    torch.testing.assert_close(loss, plain_loss(network, tokens))


def test_a_head_that_is_trained_or_watched_is_left_to_the_network() -> None:
    network = llama()
    network.lm_head.weight.requires_grad_(True)
    assert plain_head(network) is None
    network.lm_head.weight.requires_grad_(False)
    assert plain_head(network) is network.lm_head
    network.lm_head.register_forward_hook(lambda *_: None)
    assert plain_head(network) is None


def test_finding_the_head_draws_no_random_numbers() -> None:
    """Dropout would draw others, and a training with it would end elsewhere."""
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**SMALL, attention_dropout=0.5)).train().requires_grad_(False)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert plain_head(network) is not None
    assert torch.equal(torch.rand(4), expected)
    assert network.training


def test_frozen_weights_that_are_kept_narrow_change_nothing_and_come_back() -> None:
    """Losses and gradients are equal to the bit; a shared weight, and one that is trained, keep their type."""
    network, tokens = llama(), ids()
    network.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    network.model.embed_tokens.weight = network.lm_head.weight
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with multiplied_in(torch.bfloat16, CPU):
        expected = plain_loss(network, tokens)
    expected.backward()
    reference = gradients(network)
    with pytest.raises(KeyError), frozen_kept_in(torch.bfloat16, network):
        types = {name.rpartition("layers.")[2]: p.dtype for name, p in network.named_parameters()}
        assert types["0.self_attn.q_proj.weight"] is torch.bfloat16
        assert types["1.mlp.up_proj.weight"] is types["model.embed_tokens.weight"] is torch.float32
        with multiplied_in(torch.bfloat16, CPU):
            loss = plain_loss(network, tokens)
        loss.backward()
        raise KeyError  # whatever ends it, the weights come back
    assert torch.equal(loss, expected)
    for ours, plain in zip(gradients(network), reference, strict=True):
        assert torch.equal(ours, plain)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_training_keeps_frozen_weights_in_the_type_of_its_products() -> None:
    network, seen = llama(), set()
    weight = network.model.layers[0].mlp.up_proj.weight
    network.model.layers[1].register_forward_pre_hook(lambda *_: seen.add(weight.dtype))
    train(network, torch.cat([ids()] * 4), NextToken(), TrainingSettings(steps=2, precision="bfloat16"))
    assert seen == {torch.bfloat16} and weight.dtype == torch.float32


def lora_pair(base: nn.Linear, **settings: Any) -> list[PeftLinear]:
    """peft's layer and ours with the same additions, in training."""
    from peft import LoraConfig

    pair = []
    for kind in (PeftLinear, lora_training.LoraLinear):
        torch.manual_seed(2)
        layer = kind(base, "default", config=LoraConfig(r=4, lora_alpha=16, **settings), r=4, lora_alpha=16)
        nn.init.normal_(layer.lora_B["default"].weight)
        pair.append(layer.train())
    return pair


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("narrower", "close"), [(None, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("of_input", [False, True])
def test_an_addition_is_trained_as_by_peft(bias: bool, narrower: Any, close: float, of_input: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(24, 20, bias=bias).requires_grad_(False)
    found = []
    for layer in lora_pair(base):
        x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(4)).requires_grad_(of_input)
        with multiplied_in(narrower, CPU):
            assert (type(layer) is PeftLinear) or layer._trains_in(x) == (narrower or torch.float32)
            output = layer(x)
        (output.float() * torch.linspace(-1, 1, 20)).sum().backward()
        found.append([output.detach(), *gradients(layer), *([x.grad] if of_input else [])])
    assert len(found[0]) == len(found[1]) == 3 + of_input
    for expected, ours in zip(*found, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=close, atol=close * float(expected.abs().max()))


def test_what_is_no_plain_addition_is_left_to_peft() -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(24, 20).requires_grad_(False), torch.randn(3, 24)
    _, dropping = lora_pair(base, lora_dropout=0.5)
    _, ours = lora_pair(base)
    assert dropping._trains_in(x) is None
    assert ours._trains_in(x) is torch.float32
    for change in (
        lambda: ours.eval(),
        lambda: ours.train().enable_adapters(False),
        lambda: (ours.enable_adapters(True), base.requires_grad_(True)),
        lambda: base.requires_grad_(False).double(),
    ):
        change()
        assert ours._trains_in(x) is None


def test_a_recovery_trains_layers_of_this_kind() -> None:
    model = Model(llama(), None, "tiny")
    add_lora(model, Lora(TrainingSettings(steps=1), rank=2))
    layers = [module for module in model.network.modules() if isinstance(module, PeftLinear)]
    assert layers and {type(layer) for layer in layers} == {lora_training.LoraLinear}
