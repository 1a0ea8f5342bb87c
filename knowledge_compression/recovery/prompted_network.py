"""A decoder that reads every input after a cached prompt, and selects among several prompts by the input.

This is the inference side of prompt tuning, prefix tuning, concatenated prompts and Inference-time Dynamic Prompting
(Hoang et al., "Do Compressed LLMs Forget Knowledge?", section 3.1.1). The network remains the same object: its
attention function is replaced and a hook on its stack of blocks shifts the positions, so ``generate``, caches, custom
masks and calls to inner modules keep working.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models import Model
from knowledge_compression.models.prompts import Choices, Prompts
from knowledge_compression.recovery.bank import PromptBank, check_decoder, has_rotary_positions
from knowledge_compression.recovery.selection import ONCE, PER_LAYER, PROMPTED, SELECTIONS, Reading, register

if TYPE_CHECKING:
    from torch import Tensor, nn


class _FirstLayerChose(Exception):
    pass


class _Probe(Reading):
    """Stops a forward pass as soon as the first layer has selected."""

    def attend_to_prompt(self, layer: int, query: Tensor, own_sum: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        super().attend_to_prompt(layer, query, own_sum, scale)
        raise _FirstLayerChose


class Prompted:
    """Places a bank of prompts before every input of a decoder.

    Every prompt ends right before the input: its token j of n is at position ``start - n + j`` and the input starts at
    ``start``. With rotary positions only distances matter, so ``start`` is the length of the longest prompt for every
    row, and each prompt is at the same distance as in prompt tuning. Learned positions are absolute: there the first
    layer selects with the input after the longest prompt, and then each row's input starts where its selected prompt
    ends.

    Args:
        model: a decoder; it is changed in place.
        bank: the prompts, e.g. from :func:`~knowledge_compression.recovery.bank.bank_of`.
        selection: ``per_layer`` (each layer selects) or ``once`` (the first layer selects for all).
    """

    def __init__(self, model: Model, bank: PromptBank, selection: str = PER_LAYER) -> None:
        if selection not in SELECTIONS:
            raise BadInput(f"selection='{selection}' does not exist; choose one of {', '.join(SELECTIONS)}")
        check_decoder(model)
        self.model = model
        self.bank = bank
        self.selection = selection
        self.forced: int | None = 0 if len(bank.lengths) == 1 else None
        self.last_choices: Tensor | None = None
        self._chosen: Choices = []
        self._context_lengths: Sequence[int] | None = None
        self._choices_of_cache: WeakKeyDictionary[Any, dict[int, Tensor]] = WeakKeyDictionary()
        self._reading: Reading | None = None
        self._decoder = model.network.get_decoder()
        self._attention_before = model.network.config._attn_implementation
        self._hooks = [
            self._decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            self._decoder.register_forward_hook(self._after),
        ]
        register()
        model.network.set_attn_implementation(PROMPTED)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, whose caches are its own."""
        return vars(self) | {"_choices_of_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_choices_of_cache": WeakKeyDictionary()})
        register()

    @property
    def prompts(self) -> Prompts:
        """The prompts through which the decoder is read from now on."""
        return Prompts(self.bank.longest, self.choosing if len(self.bank.lengths) > 1 else None)

    def remove(self) -> None:
        """Restore the model to its original state."""
        for hook in self._hooks:
            hook.remove()
        self.model.network.set_attn_implementation(self._attention_before)

    @contextmanager
    def choosing(self, context: Sequence[int] | None) -> Iterator[Choices]:
        """See :class:`~knowledge_compression.models.prompts.Prompts`."""
        self._context_lengths, self._chosen = context, []
        try:
            yield self._chosen
        finally:
            self._context_lengths = None

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
                raise ValueError("this cache was not filled by the prompted network, so no prompt was selected for it")
            reading.choices = self._choices_of_cache[cache]
        else:
            reading.context = _context(lengths, mask, rows, length, tokens.device)
        kwargs["position_ids"] = positions + self._start(reading, kwargs, positions)
        kwargs["reading"] = self._reading = reading
        return (), kwargs

    def _start(self, reading: Reading, kwargs: dict[str, Any], positions: Tensor) -> Tensor | int:
        """Where the input starts, ``[rows, 1]`` or a number; absolute positions depend on the first selection."""
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
        return torch.tensor(lengths, device=positions.device)[reading.choices[0].to(positions.device)][:, None]

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        assert self._reading is not None
        reading, self._reading = self._reading, None
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._choices_of_cache[cache] = reading.choices
        if reading.context is not None:
            made = [reading.choices[0 if self.selection == ONCE else layer] for layer in range(len(self.bank.keys))]
            self.last_choices = torch.stack([choice.to(made[0].device) for choice in made]).cpu().T
            self._chosen += self.last_choices.tolist()


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
    raise ValueError("a pass with a custom mask must declare its context (Prompted.choosing)")


def _all_rows(prompt: int, rows: int, device: torch.device) -> Tensor:
    return torch.full((rows,), prompt, dtype=torch.long, device=device)
