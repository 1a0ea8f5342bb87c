"""What the scoring core is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Blank:
    """A place where one token is asked for.

    Attributes:
        ids: token ids of the whole input (encoder, encoder-decoder) or of what comes before the blank (decoder).
        position: index of the masked token in ``ids``; only for encoders.
        decoder_ids: what the decoder has said so far, e.g. ``[start, <extra_id_0>]``; only for encoder-decoders.
        items: ids of the items that it is asked for; what is noted of the answer is noted of them.
    """

    ids: Sequence[int]
    position: int | None = None
    decoder_ids: Sequence[int] = ()
    items: Sequence[str] = ()


@dataclass(frozen=True)
class Question:
    """A context and the continuations to compare; at least one token in each.

    Attributes:
        context: token ids of the context (for encoder-decoders: the encoder's whole input).
        continuations: token ids of each answer (for encoder-decoders: what the decoder should say).
        items: ids of the items that it is asked for; what is noted of the answers is noted of them.
    """

    context: Sequence[int]
    continuations: Sequence[Sequence[int]] = field(default_factory=list)
    items: Sequence[str] = ()


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of a continuation: summed log-probability (nats), and whether greedy decoding gives it."""

    log_prob: float
    greedy: bool
