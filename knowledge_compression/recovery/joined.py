"""A soft prompt read together with the input, for bidirectional stacks (encoders, T5's encoder).

There, every prompt token sees the input, so nothing can be cached. A masked language model's head sees only the
positions of the input; the decoder of an encoder-decoder also attends to the prompt's outputs (Lester et al., 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knowledge_compression.heavy import nn, torch
from knowledge_compression.models import Model
from knowledge_compression.models.families import ENCODER
from knowledge_compression.recovery.bank import check_positions

if TYPE_CHECKING:
    from torch import Tensor

NAME = "soft_prompt"  # name of the parameter added to the network


def join_prompt(model: Model, prompt: Tensor) -> nn.Module:
    """Place a soft prompt before every input of the model's encoder.

    Args:
        model: an encoder or encoder-decoder; the parameter ``soft_prompt`` is added to its network.
        prompt: embeddings ``[tokens, width]``.

    Returns:
        The network.
    """
    check_positions(model, len(prompt))
    network = model.network
    network.register_parameter(NAME, nn.Parameter(prompt.to(model.device)))
    stack = network.base_model if model.family == ENCODER else network.get_encoder()
    stack.register_forward_pre_hook(_Before(network), with_kwargs=True)
    if model.family == ENCODER:
        stack.register_forward_hook(_Cut(len(prompt)))
    else:
        network.get_decoder().register_forward_pre_hook(_Uncover(len(prompt)), with_kwargs=True)
    return network


class _Before:
    """Turns ids into embeddings after the prompt, and extends the masks to cover it."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        kwargs = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        embeddings = kwargs.pop("inputs_embeds", None)
        ids = kwargs.pop("input_ids", None)
        if embeddings is None:
            embeddings = self.network.get_input_embeddings()(ids)  # type: ignore[operator]
        prompt: Tensor = getattr(self.network, NAME)
        joined = prompt.to(embeddings.dtype).expand(len(embeddings), -1, -1)
        with torch.autocast(embeddings.device.type, enabled=False):  # which cannot join float16 on a CPU
            kwargs["inputs_embeds"] = torch.cat([joined, embeddings], 1)
        for name, filling in (("attention_mask", 1), ("token_type_ids", 0)):
            if (given := kwargs.get(name)) is not None:
                kwargs[name] = nn.functional.pad(given, (len(prompt), 0), value=filling)
        return (), kwargs


@dataclass(frozen=True)
class _Cut:
    """Takes the prompt's positions off the output."""

    tokens: int

    def __call__(self, _: nn.Module, __: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, self.tokens :]
        return output


@dataclass(frozen=True)
class _Uncover:
    """Extends the mask so that a decoder sees the prompt's outputs."""

    tokens: int

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if states is not None and mask is not None and states.shape[1] == mask.shape[-1] + self.tokens:
            kwargs = kwargs | {"encoder_attention_mask": nn.functional.pad(mask, (self.tokens, 0), value=1)}
        return args, kwargs
