"""The training objectives of each family, on windows of token ids ``[batch, length]``.

An objective is called with the network and a batch on the network's device and returns the summed negative
log-likelihood (nats, a scalar tensor with gradient) and the number of predicted tokens. Random masks come from torch's
global generator. Logits are counted from their end, so that networks that place a soft prompt before the text work too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import functional, nn, torch
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER, ENCODER

if TYPE_CHECKING:
    from torch import BoolTensor, LongTensor, Tensor

Objective: TypeAlias = "Callable[[nn.Module, LongTensor], tuple[Tensor, int]]"

_IGNORED = -100


@dataclass(frozen=True)
class NextToken:
    """Causal language modelling: every token from those before it.

    Attributes:
        pad_id: token that pads short windows on the right and is not predicted; None if all windows are full.
        balance: weight of the load-balancing loss of a mixture's routers, added for each predicted token; 0 for none.
    """

    pad_id: int | None = None
    balance: float = 0.0

    def __call__(self, network: nn.Module, ids: LongTensor) -> tuple[Tensor, int]:
        """Loss of a batch; padding is on the right, which causal attention never sees."""
        from knowledge_compression.models.frozen_head import head_inputs, plain_head, summed_loss

        if not self.balance and (head := plain_head(network)) is not None:
            labels = ids[:, 1:]
            read = torch.ones_like(labels, dtype=torch.bool) if self.pad_id is None else labels != self.pad_id
            return summed_loss(head_inputs(network, ids)[:, :-1][read], head, labels[read]), int(read.sum())
        routed: dict[str, Any] = {"output_router_logits": True} if self.balance else {}
        outputs = network(input_ids=ids, use_cache=False, **routed)
        logits = outputs.logits[:, -ids.shape[1] :]
        labels = ids if self.pad_id is None else ids.masked_fill(ids == self.pad_id, _IGNORED)
        loss, count = _summed_loss(logits[:, :-1], labels[:, 1:])
        if self.balance:
            loss = loss + self.balance * count * _imbalance(outputs.router_logits, network.config, labels != _IGNORED)
        return loss, count


class Noise(Protocol):
    """Chooses the tokens that are hidden from the model."""

    def mask(self, ids: LongTensor) -> BoolTensor:
        """Which tokens of windows ``[batch, length]`` are hidden, at least one per window; bool ``[batch, length]``."""


@dataclass(frozen=True)
class RandomSpans:
    """Noise that hides all tokens with equal probability, as in BERT (single tokens) and T5 (spans).

    Attributes:
        rate: share of a window's tokens.
        mean_span: mean length of a run of hidden tokens.
        specials: ids that are never hidden (padding among them).
    """

    rate: float = 0.15
    mean_span: float = 1.0
    specials: tuple[int, ...] = ()

    def mask(self, ids: LongTensor) -> BoolTensor:
        """Which tokens are hidden: ``[batch, length]``."""
        return _random_spans(_eligible(ids, self.specials), self.rate, self.mean_span)


@dataclass(frozen=True)
class LastWords:
    """Noise that hides the last word of a sentence more often than other words.

    In a text whose sentences end in the answer this is salient span masking (Guu et al., REALM, 2020, section 3.4).

    Attributes:
        stop_id: token that ends a sentence.
        rate: probability to hide the token before it.
        other: probability to hide any other token.
        specials: ids that are never hidden (padding among them).
    """

    stop_id: int
    rate: float = 0.9
    other: float = 0.03
    specials: tuple[int, ...] = ()

    def mask(self, ids: LongTensor) -> BoolTensor:
        """Which tokens are hidden: ``[batch, length]``."""
        last = functional.pad(ids[:, 1:], (0, 1), value=-1) == self.stop_id
        score = torch.rand(ids.shape, device=ids.device) / torch.where(last, self.rate, self.other)
        score = score.masked_fill(~_eligible(ids, self.specials), torch.inf)
        return (score < 1.0) | ((score == score.amin(-1, keepdim=True)) & score.isfinite())  # type: ignore[return-value]


@dataclass(frozen=True)
class MaskedTokens:
    """Masked language modelling as in BERT (Devlin et al., 2019, section 3.1).

    Of the hidden tokens, 80 % become the mask, 10 % a random token, and 10 % stay unchanged.

    Attributes:
        mask_id: id of the mask token.
        vocabulary: number of ids from which a random token is drawn.
        noise: which tokens are hidden.
        pad_id: token that pads short windows; None if all windows are full.
    """

    mask_id: int
    vocabulary: int
    noise: Noise
    pad_id: int | None = None

    def __call__(self, network: nn.Module, ids: LongTensor) -> tuple[Tensor, int]:
        """Loss of a batch over its hidden tokens."""
        hidden = self.noise.mask(ids)
        draw = torch.rand(ids.shape, device=ids.device)
        random = torch.randint(self.vocabulary, ids.shape, device=ids.device)
        shown = torch.where(hidden & (draw < 0.8), self.mask_id, torch.where(hidden & (draw >= 0.9), random, ids))
        attention = {} if self.pad_id is None else {"attention_mask": (ids != self.pad_id).long()}
        logits = network(input_ids=shown, **attention).logits[:, -ids.shape[1] :]
        return _summed_loss(logits[hidden], ids[hidden])


@dataclass(frozen=True)
class SpanCorruption:
    """T5's objective (Raffel et al., 2020, section 3.1.4).

    Runs of hidden tokens become sentinels in the input; the decoder predicts each sentinel and the tokens behind it.

    Attributes:
        sentinels: ids of ``<extra_id_0>``, ``<extra_id_1>``, ...; further spans are not hidden.
        start_id: the decoder's first token.
        end_id: end of sequence, added after input and output.
        pad_id: padding of inputs and outputs.
        noise: which tokens are hidden.
    """

    sentinels: tuple[int, ...]
    start_id: int
    end_id: int
    pad_id: int
    noise: Noise

    def __call__(self, network: nn.Module, ids: LongTensor) -> tuple[Tensor, int]:
        """Loss of a batch over its outputs."""
        inputs, outputs = self.corrupt(ids, self.noise.mask(ids))
        logits = network(
            input_ids=inputs,
            attention_mask=(inputs != self.pad_id).long(),
            decoder_input_ids=functional.pad(outputs, (1, 0), value=self.start_id)[:, :-1],
            use_cache=False,
        ).logits[:, -outputs.shape[1] :]
        return _summed_loss(logits, outputs.masked_fill(outputs == self.pad_id, _IGNORED))

    def corrupt(self, ids: LongTensor, hidden: BoolTensor) -> tuple[LongTensor, LongTensor]:
        """Inputs and outputs for a mask, each ``[batch, its longest]`` and padded on the right."""
        before = functional.pad(hidden, (1, 0))[:, :-1]
        number = (hidden & ~before).cumsum(-1)  # number of the span of a hidden token, from 1
        hidden = hidden & (number <= len(self.sentinels))  # type: ignore[assignment]
        starts = hidden & ~before
        sentinel = torch.tensor(self.sentinels, device=ids.device)[(number - 1).clamp(0, len(self.sentinels) - 1)]

        inputs = torch.where(starts, sentinel, ids.masked_fill(hidden, self.pad_id))
        outputs = torch.stack([sentinel.masked_fill(~starts, self.pad_id), ids.masked_fill(~hidden, self.pad_id)], -1)
        return self._compact(inputs), self._compact(outputs.flatten(1))

    def _compact(self, ids: Tensor) -> LongTensor:
        """Rows without their padding, with the end of sequence, padded to the longest again."""
        kept = ids != self.pad_id
        lengths = kept.sum(-1, keepdim=True)
        order = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)
        width = int(lengths.max())
        rows = functional.pad(ids.gather(-1, order)[:, :width], (0, 1), value=self.pad_id)
        return rows.scatter(-1, lengths, self.end_id)  # type: ignore[return-value]


def objective_for(model: Model, *, rate: float = 0.15) -> Objective:
    """The objective of a model: its own, or that of its family for full windows of running text.

    Args:
        model: any family.
        rate: share of tokens hidden from encoders (single tokens) and encoder-decoders (spans of three on average).

    Raises:
        BadInput: the tokenizer lacks the mask token or the sentinels that the objective needs.
    """
    if model.objective is not None:
        return model.objective
    tokenizer = model.tokenizer
    if model.family == DECODER:
        return NextToken()
    specials = tuple(tokenizer.all_special_ids)
    if model.family == ENCODER:
        if tokenizer.mask_token_id is None:
            raise BadInput(f"{model.name}: its tokenizer has no mask token, so it cannot be trained on masked tokens")
        return MaskedTokens(tokenizer.mask_token_id, len(tokenizer), RandomSpans(rate, specials=specials))
    sentinels: list[int] = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])  # type: ignore[assignment]
    known = tuple(i for i in sentinels if i is not None and i != tokenizer.unk_token_id)
    if not known:
        raise BadInput(
            f"{model.name}: its tokenizer has no sentinels (<extra_id_0>), so it cannot be trained on masked spans"
        )
    start = model.decoder_start
    spans = RandomSpans(rate, 3.0, specials)
    return SpanCorruption(known, start, tokenizer.eos_token_id, tokenizer.pad_token_id, spans)


def _summed_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    loss = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), ignore_index=_IGNORED, reduction="sum"
    )
    return loss, int((labels != _IGNORED).sum())


def _imbalance(router_logits: Sequence[Tensor], config: Any, read: Tensor) -> Tensor:
    """How unevenly the routers spread the tokens, mean over blocks; if evenly, it is the number of experts per token.

    Each router counts by itself, as published (Fedus et al., Switch Transformers, 2022, equations 4 to 6). transformers
    adds up all blocks first, so one block could neglect the experts that another prefers.

    Args:
        router_logits: ``[tokens, experts]`` of each block.
        config: the network's configuration, with the number of experts that read a token.
        read: which tokens count: bool ``[batch, length]``.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    blocks = [
        cast("Tensor", load_balancing_loss_func((logits,), logits.shape[-1], config.num_experts_per_tok, read))
        for logits in router_logits
    ]
    return torch.stack(blocks).mean()


def _eligible(ids: LongTensor, specials: Sequence[int]) -> BoolTensor:
    return ~torch.isin(ids, torch.tensor(specials, device=ids.device, dtype=ids.dtype))  # type: ignore[return-value]


def _random_spans(eligible: Tensor, rate: float, mean_span: float) -> BoolTensor:
    """Hidden spans drawn as in T5, rotated by a random offset so that no position is favoured: ``[batch, length]``.

    Each row hides ``round(rate * its eligible tokens)`` tokens, at least one, in spans of ``mean_span`` on average.
    """
    lengths = eligible.sum(-1)
    noise = (lengths * rate).round().clamp_min(1).minimum(lengths).long()
    spans = (noise / mean_span).round().clamp_min(1).minimum((lengths - noise).clamp_min(1)).long()
    width = eligible.shape[1]
    hidden_lengths = _random_parts(noise, spans, width)
    shown_lengths = _random_parts(lengths - noise, spans, width)
    ends = torch.stack([shown_lengths, hidden_lengths], -1).flatten(1).cumsum(-1)

    rank = (eligible.cumsum(-1) - 1).clamp_min(0)  # place among the row's eligible tokens
    turn = (torch.rand(len(lengths), device=eligible.device) * lengths).long()
    turned = (rank + turn[:, None]) % lengths.clamp_min(1)[:, None]
    segment = torch.searchsorted(ends, turned, right=True)  # shown, hidden, shown, hidden, ...
    return eligible & (segment % 2 == 1)  # type: ignore[return-value]


def _random_parts(total: Tensor, parts: Tensor, width: int) -> Tensor:
    """Lengths of a random split of each total into parts of at least one: ``[batch, width]``, padded with zeros."""
    places = torch.arange(width, device=total.device)
    inside = (places > 0) & (places < total[:, None])
    order = torch.rand(inside.shape, device=total.device).masked_fill(~inside, 2.0).argsort(-1).argsort(-1)
    begins = inside & (order < (parts - 1)[:, None])
    part = begins.cumsum(-1)
    return torch.zeros_like(part).scatter_add(1, part, (places < total[:, None]).long())
