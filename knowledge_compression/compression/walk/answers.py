"""What a network says of each token of a text, kept small, and how far another one is from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

LIKELIEST = 256  # words whose probabilities are kept one by one
_LEAST = 1e-9  # probability of all other words together, at least


@dataclass(frozen=True)
class Answers:
    """The likeliest words at each position, and their log-probabilities; all others together are one more.

    Attributes:
        words: token ids, int32 ``[positions, kept]``.
        log_probs: float32 ``[positions, kept + 1]``, of these words and of all others together.
    """

    words: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Answers:
        """Those of logits ``[..., vocabulary]``."""
        log_probs = logits.flatten(0, -2).float().log_softmax(-1)
        words = log_probs.topk(min(LIKELIEST, log_probs.shape[-1] - 1)).indices
        return cls(words.int(), _with_others(log_probs, words))

    def divergence(self, logits: Tensor) -> Tensor:
        """Mean KL divergence of a network's distributions from these, nats a position; over the kept words and the
        rest.

        Args:
            logits: of the same text, ``[..., vocabulary]``.
        """
        here = _with_others(logits.flatten(0, -2).float().log_softmax(-1), self.words.long())
        return (self.log_probs.exp() * (self.log_probs - here)).sum(-1).mean()


def _with_others(log_probs: Tensor, words: Tensor) -> Tensor:
    kept = log_probs.gather(-1, words)
    others = (1 - kept.exp().sum(-1, keepdim=True)).clamp(min=_LEAST).log()
    return torch.cat([kept, others], dim=-1)
