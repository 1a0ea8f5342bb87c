"""A decoder that reads everything after a cached prompt, and chooses among several prompts by what it reads.

This is the inference side of prompt tuning, prefix tuning, joined prompts and Inference-time Dynamic Prompting (Hoang
et al., "Do Compressed LLMs Forget Knowledge?", section 3.1.1). The network stays the object it was: its attention
function is exchanged and a hook on its stack of blocks moves the positions, so ``generate``, caches, custom masks and
whoever calls an inner module keep working.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER
from knowledge_compression.recovery.attention import PROMPTED, attend

PER_LAYER, ONCE = "per_layer", "once"
SELECTIONS = (PER_LAYER, ONCE)

# Keys and values of one prompt in one layer, each [key heads, tokens, width].
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PromptBank:
    """The keys and values of several prompts in every layer, computed once.

    Attributes:
        lengths: tokens of each prompt.
        keys, values: for each layer ``[prompts, key heads, longest, width]``; a shorter prompt stands at the end.
        bias: ``[prompts, 1, 1, longest]``, 0 where there is a token and -inf where a shorter prompt has none.
    """

    lengths: tuple[int, ...]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    bias: Tensor

    @classmethod
    def stack(cls, prompts: Sequence[Sequence[KeysValues]]) -> PromptBank:
        """A bank from prompts given as keys and values by layer."""
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
        """Tokens of the longest prompt."""
        return max(self.lengths)


@dataclass
class Reading:
    """One pass of a network over some rows: which prompt each row uses in each layer.

    Attributes:
        bank: the prompts.
        selection: ``per_layer`` or ``once``.
        context: float ``[rows, tokens]``, 1 for the input tokens whose attention chooses; None once all is chosen.
        choices: prompt of each row by layer, ``[rows]`` each; filled as the layers are passed.
    """

    bank: PromptBank
    selection: str
    context: Tensor | None
    choices: dict[int, Tensor] = field(default_factory=dict)

    def attend_to_prompt(self, layer: int, query: Tensor, own_sum: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attend to the prompt that each row uses in this layer, choosing it first where it is not chosen yet.

        Args:
            layer: index of the layer.
            query: ``[rows, heads, tokens, width]``.
            own_sum: log-sum-exp of the scores of the input with itself, ``[rows, heads, tokens]``.
            scale: factor on the dot products.

        Returns:
            Attended prompt values ``[rows, heads, tokens, width]`` and their log-sum-exp ``[rows, heads, tokens]``.
        """
        known = self.choices.get(0 if self.selection == ONCE else layer)
        keys, values = self.bank.keys[layer], self.bank.values[layer]
        if known is not None:
            return attend(query, keys[known], values[known], scale=scale, bias=self.bank.bias[known])
        rows = query.shape[0]
        parts = [
            attend(
                query,
                keys[i, :, -n:].expand(rows, -1, -1, -1),
                values[i, :, -n:].expand(rows, -1, -1, -1),
                scale=scale,
            )
            for i, n in enumerate(self.bank.lengths)
        ]
        sums = torch.stack([part_sum for _, part_sum in parts])
        choice = self._choose(sums, own_sum)
        self.choices[layer] = choice
        pick = choice, torch.arange(rows, device=query.device)
        return torch.stack([attended for attended, _ in parts])[pick], sums[pick]

    def _choose(self, sums: Tensor, own_sum: Tensor) -> Tensor:
        """The prompt with the largest mean attention over heads, input tokens and its own tokens (paper, 3.1.1)."""
        assert self.context is not None
        total = torch.logsumexp(torch.cat([sums, own_sum[None]]), dim=0)
        paid = (sums - total).exp().mean(2)  # [prompts, rows, tokens]: attention to all tokens of a prompt
        by_row = (paid * self.context).sum(-1) / self.context.sum(-1)
        return (by_row / torch.tensor(self.bank.lengths, device=sums.device)[:, None]).argmax(0)


class _FirstLayerChose(Exception):
    pass


class _Probe(Reading):
    """A reading that stops as soon as the first layer has chosen."""

    def attend_to_prompt(self, layer: int, query: Tensor, own_sum: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        super().attend_to_prompt(layer, query, own_sum, scale)
        raise _FirstLayerChose


class Prompted:
    """Puts a bank of prompts before everything that a decoder reads.

    Every prompt ends right before the input: its token j of n stands at position ``start - n + j`` and the input starts
    at ``start``. With rotary positions only distances count, so ``start`` is the longest prompt's length for every row
    and each prompt is exactly where prompt tuning had it. Learned positions are absolute: there the first layer chooses
    with the input behind the longest prompt, and then each row's input starts where its chosen prompt ends.

    Args:
        model: a decoder; it is changed in place.
        bank: the prompts, e.g. from :meth:`bank_of`.
        selection: ``per_layer`` (each layer chooses) or ``once`` (the first layer chooses for all).
    """

    def __init__(self, model: Model, bank: PromptBank, selection: str = PER_LAYER) -> None:
        if selection not in SELECTIONS:
            raise BadInput(f"selection='{selection}' does not exist; choose one of {', '.join(SELECTIONS)}")
        check_decoder(model)
        self.model = model
        self.bank = bank
        self.selection = selection
        self.forced: int | None = 0 if len(bank.lengths) == 1 else None
        self.tally = torch.zeros(len(bank.keys), len(bank.lengths), dtype=torch.long)
        self.last_choices: Tensor | None = None
        self._context_lengths: Sequence[int] | None = None
        self._choices_of_cache: WeakKeyDictionary[Any, dict[int, Tensor]] = WeakKeyDictionary()
        self._reading: Reading | None = None
        self._decoder = model.network.get_decoder()
        self._attention_before = model.network.config._attn_implementation
        self._hooks = [
            self._decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            self._decoder.register_forward_hook(self._after),
        ]
        model.network.set_attn_implementation(PROMPTED)
        model.reserved_positions += bank.longest
        if len(bank.lengths) > 1:
            model.on_context = self._note_context

    def remove(self) -> None:
        """Give the model back as it was."""
        for hook in self._hooks:
            hook.remove()
        self.model.network.set_attn_implementation(self._attention_before)
        self.model.reserved_positions -= self.bank.longest
        self.model.on_context = None

    @contextmanager
    def using(self, prompt: int) -> Any:
        """Use one prompt for every row and layer, whatever the input."""
        before, self.forced = self.forced, prompt
        try:
            yield self
        finally:
            self.forced = before

    @staticmethod
    def bank_of(model: Model, prompts: Sequence[Tensor]) -> PromptBank:
        """Run soft prompts through the decoder, each by itself, and keep their keys and values.

        Args:
            model: the decoder, not prompted yet.
            prompts: embeddings ``[tokens, width]`` of each prompt.
        """
        check_decoder(model)
        longest = max(prompt.shape[0] for prompt in prompts)
        check_positions(model, longest)
        start = longest if has_rotary_positions(model) else None
        return PromptBank.stack([_keys_values(model, prompt, start) for prompt in prompts])

    def _note_context(self, lengths: Sequence[int]) -> None:
        self._context_lengths = lengths

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        kwargs = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        tokens: Tensor = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        rows, length = tokens.shape[:2]
        cache = kwargs.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        mask = kwargs.get("attention_mask")
        reading = Reading(self.bank, self.selection, None)
        lengths, self._context_lengths = self._context_lengths, None
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = _positions(mask, rows, length, seen, tokens.device)
        positions = positions.expand(rows, -1)
        if self.forced is not None:
            reading.choices = dict.fromkeys(range(len(self.bank.keys)), _all_rows(self.forced, rows, tokens.device))
        elif seen:
            if cache not in self._choices_of_cache:
                raise ValueError("this cache was not filled by the prompted network, so no prompt was chosen for it")
            reading.choices = self._choices_of_cache[cache]
        else:
            reading.context = _context(lengths, mask, rows, length, tokens.device)
        kwargs["position_ids"] = positions + self._start(reading, kwargs, positions)
        kwargs["reading"] = self._reading = reading
        return (), kwargs

    def _start(self, reading: Reading, kwargs: dict[str, Any], positions: Tensor) -> Tensor | int:
        """Where the input starts, ``[rows, 1]`` or one number; with absolute positions it follows the first choice."""
        longest, lengths = self.bank.longest, self.bank.lengths
        if has_rotary_positions(self.model):
            return longest
        if 0 not in reading.choices and len(set(lengths)) > 1:
            probe = _Probe(self.bank, self.selection, reading.context)
            alone = {"past_key_values": None, "use_cache": False}
            try:
                self._decoder.forward(**kwargs | alone | {"position_ids": positions + longest, "reading": probe})
            except _FirstLayerChose:
                reading.choices[0] = probe.choices[0]
        if 0 not in reading.choices:
            return longest
        return torch.tensor(lengths, device=positions.device)[reading.choices[0]][:, None]

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        assert self._reading is not None
        reading, self._reading = self._reading, None
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._choices_of_cache[cache] = reading.choices
        if reading.context is not None:
            layers = range(len(self.bank.keys))
            chosen = torch.stack([reading.choices[0 if self.selection == ONCE else layer] for layer in layers]).cpu()
            self.last_choices = chosen.T
            for prompt in range(len(self.bank.lengths)):
                self.tally[:, prompt] += (chosen == prompt).sum(1)


def check_decoder(model: Model) -> None:
    """Refuse what cached prompts cannot be put before."""
    if model.family != DECODER:
        raise BadInput(
            f"{model.name} ({model.family}) reads in both directions, so a prompt's keys and values depend on the "
            "input and cannot be cached; recovery=prompt and recovery=lora fit, idp, concat and prefix need a decoder"
        )
    window = getattr(model.network.config, "sliding_window", None)
    if (
        window
        and getattr(model.network.config, "use_sliding_window", True)
        and window < (model.max_positions or window)
    ):
        raise BadInput(
            f"{model.name} attends within windows of {window} tokens, where a prompt drops out of sight; "
            "recovery=lora fits it, prompts need full attention"
        )


def check_positions(model: Model, prompt: int) -> None:
    """Refuse a prompt that leaves the input no position."""
    limit = model.max_positions
    if limit is not None and prompt >= limit:
        raise BadInput(f"a prompt of {prompt} tokens leaves none of the {limit} positions of {model.name} to the input")


def has_rotary_positions(model: Model) -> bool:
    """Whether only distances between positions count (LLaMA, GPT-NeoX), not places in a table (OPT, GPT-2)."""
    return getattr(model.network.config, "rope_parameters", None) is not None


def embedding_width(model: Model) -> int:
    """Width of the vectors that a network reads."""
    return int(cast(Tensor, model.network.get_input_embeddings().weight).shape[1])


def key_shape(model: Model) -> tuple[int, int]:
    """Key heads of a decoder's layers and their width."""
    heads, _, each = _keys_values(model, torch.zeros(1, embedding_width(model)), None)[0][0].shape
    return heads, each


@torch.no_grad()
def _keys_values(model: Model, prompt: Tensor, start: int | None) -> list[KeysValues]:
    length = prompt.shape[0]
    first = 0 if start is None else start - length
    positions = torch.arange(first, first + length, device=model.device)[None]
    embeddings = prompt.to(model.device, model.dtype)[None]
    cache = model.network.get_decoder()(
        inputs_embeds=embeddings, position_ids=positions, use_cache=True
    ).past_key_values
    return [(layer.keys[0].clone(), layer.values[0].clone()) for layer in cache.layers]


def _positions(mask: Tensor | None, rows: int, length: int, seen: int, device: torch.device) -> Tensor:
    if mask is not None and mask.dim() == 2:
        return ((mask.cumsum(-1) - 1).clamp(min=0).long())[:, -length:]
    return torch.arange(seen, seen + length, device=device).expand(rows, -1)


def _context(
    lengths: Sequence[int] | None, mask: Tensor | None, rows: int, length: int, device: torch.device
) -> Tensor:
    if lengths is not None:
        ends = torch.tensor(list(lengths), device=device)
        return (torch.arange(length, device=device) < ends[:, None]).float()
    if mask is None:
        return torch.ones(rows, length, device=device)
    if mask.dim() == 2:
        return mask[:, -length:].float()
    raise ValueError("with a mask of its own shape a pass has to announce its context (Model.announce_context)")


def _all_rows(prompt: int, rows: int, device: torch.device) -> Tensor:
    return torch.full((rows,), prompt, dtype=torch.long, device=device)
