"""The questions and answers of the scoring core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Blank:
    """A position at which one token is predicted.

    Attributes:
        ids: token ids of the whole input (encoder, encoder-decoder) or of the text before the blank (decoder).
        position: index of the masked token in ``ids``; only for encoders.
        decoder_ids: the decoder's input so far, e.g. ``[start, <extra_id_0>]``; only for encoder-decoders.
        items: ids of the items that it belongs to; notes about the answer are filed under them.
        gold: the right token, if the suite gives one; its probability is compared with the dense model's.
    """

    ids: Sequence[int]
    position: int | None = None
    decoder_ids: Sequence[int] = ()
    items: Sequence[str] = ()
    gold: int | None = None


@dataclass(frozen=True)
class Question:
    """A context and the continuations to compare, each of at least one token.

    Attributes:
        context: token ids of the context (for encoder-decoders: the encoder's whole input).
        continuations: token ids of each answer (for encoder-decoders: the decoder's output).
        items: ids of the items that it belongs to; notes about the answers are filed under them.
        gold: index of the right continuation, if the suite gives one; the probability of each of its tokens is compared
            with the dense model's.
        right: for suites that compare whole sentences: the right continuations, by index, and the item of each. Only
            the positions of these are compared with the dense model's, each for its own item.
    """

    context: Sequence[int]
    continuations: Sequence[Sequence[int]] = field(default_factory=list)
    items: Sequence[str] = ()
    gold: int | None = None
    right: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Likelihood:
    """A continuation's score: its summed log-probability (nats), and whether greedy decoding produces it."""

    log_prob: float
    greedy: bool
