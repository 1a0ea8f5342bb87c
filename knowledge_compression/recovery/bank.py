"""Prompts as cached keys and values, computed once for all inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import nn, torch
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER, MIXER
from knowledge_compression.models.targets import linear_layers

if TYPE_CHECKING:
    from torch import Tensor

# Keys and values of one prompt in one layer, each [key heads, tokens, width].
KeysValues: TypeAlias = "tuple[Tensor, Tensor]"


@dataclass(frozen=True)
class PromptBank:
    """The keys and values of several prompts in every layer.

    Attributes:
        lengths: number of tokens of each prompt.
        keys, values: for each layer ``[prompts, key heads, longest, width]``; shorter prompts are padded on the left.
        bias: ``[prompts, 1, 1, longest]``, 0 for tokens and -inf for padding.
    """

    lengths: tuple[int, ...]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    bias: Tensor

    @classmethod
    def stack(cls, prompts: Sequence[Sequence[KeysValues]]) -> PromptBank:
        """Build a bank from prompts given as keys and values per layer."""
        lengths = tuple(prompt[0][0].shape[1] for prompt in prompts)
        longest = max(lengths)

        def padded(layer: int, which: int) -> Tensor:
            return torch.stack(
                [
                    nn.functional.pad(prompt[layer][which], (0, 0, longest - n, 0))
                    for prompt, n in zip(prompts, lengths, strict=True)
                ]
            )

        layers = range(len(prompts[0]))
        keys = [padded(layer, 0) for layer in layers]
        bias = torch.zeros(len(prompts), 1, 1, longest, dtype=keys[0].dtype, device=keys[0].device)
        for row, length in zip(bias, lengths, strict=True):
            row[..., : longest - length] = -torch.inf
        return cls(lengths, keys, [padded(layer, 1) for layer in layers], bias)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt."""
        return max(self.lengths)


def bank_of(model: Model, prompts: Sequence[Tensor]) -> PromptBank:
    """Run each soft prompt through the decoder on its own and keep its keys and values.

    Args:
        model: the decoder, without prompts.
        prompts: embeddings ``[tokens, width]`` of each prompt.
    """
    check_decoder(model)
    longest = max(prompt.shape[0] for prompt in prompts)
    check_positions(model, longest)
    start = longest if has_rotary_positions(model) else None
    return PromptBank.stack([_keys_values(model, prompt, start) for prompt in prompts])


def check_decoder(model: Model) -> None:
    """Refuse networks that cannot read cached prompts: before they are trained, which may take hours."""
    if model.family != DECODER:
        raise BadInput(
            f"{model.name} ({model.family}) reads in both directions, so a prompt's keys and values depend on the "
            "input and cannot be cached; recovery=prompt and recovery=lora fit, idp, concat and prefix need a decoder"
        )
    config = model.text_config
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < (model.max_positions or window):
        raise BadInput(
            f"{model.name} attends within windows of {window} tokens, so later tokens do not see a prompt; "
            "recovery=lora fits it, prompts need full attention"
        )
    if recurrent := next((layer.path for layer in linear_layers(model) if layer.role == MIXER), None):
        raise BadInput(
            f"{model.name} ({model.network.config.model_type}) keeps a state of the text in place of keys and values "
            f"({recurrent}), so a prompt cannot be cached; recovery=lora fits it, prompts need attention in every block"
        )


def check_positions(model: Model, prompt: int) -> None:
    """Refuse a prompt that leaves no positions for the input."""
    limit = model.max_positions
    if limit is not None and prompt >= limit:
        raise BadInput(f"a prompt of {prompt} tokens leaves none of the {limit} positions of {model.name} to the input")


def has_rotary_positions(model: Model) -> bool:
    """Whether positions are relative (rotary: LLaMA, GPT-NeoX) rather than entries of a table (OPT, GPT-2)."""
    return getattr(model.text_config, "rope_parameters", None) is not None


def embedding_width(model: Model) -> int:
    """Width of a network's input embeddings."""
    return int(cast(Any, model.network.get_input_embeddings().weight).shape[1])


def key_shape(model: Model) -> tuple[int, int]:
    """Number of key heads in a decoder's layers, and their width."""
    heads, _, each = _keys_values(model, torch.zeros(1, embedding_width(model)), None)[0][0].shape
    return heads, each


def _keys_values(model: Model, prompt: Tensor, start: int | None) -> list[KeysValues]:
    length = prompt.shape[0]
    first = 0 if start is None else start - length
    positions = torch.arange(first, first + length, device=model.device)[None]
    embeddings = prompt.to(model.device, model.dtype)[None]
    with torch.no_grad():
        cache = model.network.get_decoder()(
            inputs_embeds=embeddings, position_ids=positions, use_cache=True
        ).past_key_values
    return [(layer.keys[0].clone(), layer.values[0].clone()) for layer in cache.layers]
