"""Calibration, tuning and perplexity text: what every corpus is, and how windows are drawn from it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import LongTensor

from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model


class Corpus(Protocol):
    """A source of running text; one file beside this one and one YAML under ``conf/corpus/``.

    Attributes:
        name: what the user types.
        samples: number of calibration windows.
        length: tokens in one window.
        seed: what the drawing starts from.
    """

    name: str
    samples: int
    length: int
    seed: int

    def windows(self, model: Model) -> LongTensor:
        """Calibration windows ``[samples, length]`` of token ids on the CPU, the same for the same seed."""
        ...

    def token_stream(self, model: Model) -> LongTensor:
        """All its text as one row of token ids ``[tokens]``, for tuning; long enough for several epochs of windows."""
        ...


@dataclass(frozen=True)
class Documents:
    """Texts and how a model reads them; the shared part of corpora that are made of text."""

    name: str
    texts: Sequence[str]

    def stream(self, model: Model) -> LongTensor:
        """The documents joined by an empty line, tokenized once without special tokens: ``[tokens]``."""
        encoded = model.tokenizer("\n\n".join(self.texts), add_special_tokens=False, verbose=False)
        return torch.tensor(encoded["input_ids"], dtype=torch.long)

    def draw(self, model: Model, samples: int, length: int, seed: int) -> LongTensor:
        """Windows at random starts, drawn as the published GPTQ and SparseGPT scripts draw them.

        Returns:
            Token ids ``[samples, length]``.

        Raises:
            BadInput: a window is longer than the model's positions or than the text.
        """
        if model.max_positions is not None and length > model.max_positions:
            raise BadInput(
                f"corpus.length={length} is longer than {model.name}'s {model.max_positions} positions; "
                f"choose corpus.length={model.max_positions} or less"
            )
        tokens = self.stream(model)
        if len(tokens) <= length:
            raise BadInput(
                f"corpus={self.name} has {len(tokens)} tokens, too few for windows of {length}; "
                "give more text or a smaller corpus.length"
            )
        generator = random.Random(seed)
        starts = [generator.randint(0, len(tokens) - length - 1) for _ in range(samples)]
        return torch.stack([tokens[start : start + length] for start in starts])


def digest(windows: LongTensor) -> str:
    """Short hash of token ids; it enters the run's hash so that other text is another run."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
