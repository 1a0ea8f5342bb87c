"""The recovery corpus of the controlled world: facts about entities that no probe asks about."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from knowledge_compression.corpora.corpus import AUTO, Windowed, check_bos, check_fits
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.identity import ADDED, LABEL
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER

if TYPE_CHECKING:
    from torch import LongTensor


@dataclass(frozen=True)
class WorldText(Windowed):
    """The recovery corpus of the world that the model was trained on; it names no subject that a probe asks about.

    Its windows are like those in the model's training: as many whole sentences as fit, with its family's special
    tokens.

    Attributes:
        bos: decoders only: false leaves out the beginning-of-text token, with which every window in training began.
    """

    name: str = field(default="world", metadata=LABEL)
    length: int = 11
    bos: bool | str = field(default=AUTO, kw_only=True, metadata=ADDED)

    def __post_init__(self) -> None:
        """Refuse anything but true, false and ``auto``."""
        super().__post_init__()
        check_bos(self.bos, "corpus.bos")

    def fingerprint(self) -> str:
        """Empty: the model's fingerprint identifies the world and so the text."""
        return "of the model's world"

    def prepared(self, model: Model) -> WorldText:
        """Itself: the text does not depend on changes to the model.

        Raises:
            BadInput: the model was not trained on a controlled world.
        """
        self._file(model)
        return self

    def windows(self, model: Model) -> LongTensor:
        """Calibration windows ``[samples, length]``."""
        return self._windows(model, self._sentences(model), self.samples)

    def token_stream(self, model: Model) -> LongTensor:
        """Windows, concatenated, enough to contain every sentence."""
        sentences = self._sentences(model)
        a_window = max(1, self.length // (max(map(len, sentences)) + 2))
        return self._windows(model, sentences, ceil(len(sentences) / a_window)).flatten()  # type: ignore[return-value]

    def _windows(self, model: Model, sentences: Sequence[Sequence[int]], count: int) -> LongTensor:
        begins = self.bos is not False or model.family != DECODER
        return sentence_windows(model, sentences, self.length, count, self.seed, begins=begins)

    def _sentences(self, model: Model) -> list[list[int]]:
        lines = self._file(model).read_text(encoding="utf-8").splitlines()
        return model.tokenizer(lines, add_special_tokens=False)["input_ids"]

    def _file(self, model: Model) -> Path:
        folder = model.provenance.get("world")
        if folder is None:
            raise BadInput(
                f"corpus=world is the text of a controlled world, and {model.name} was not trained on one; "
                "take model=world_encoder, world_encoder_decoder or world_decoder, or another corpus"
            )
        return Path(folder) / "recovery.txt"


def sentence_windows(
    model: Model, sentences: Sequence[Sequence[int]], length: int, count: int, seed: int, *, begins: bool = True
) -> LongTensor:
    """Windows of whole shuffled sentences, reshuffled in every epoch, padded on the right.

    Args:
        model: its tokenizer and family determine how a window begins and ends.
        sentences: token ids.
        length: tokens in a window.
        count: number of windows.
        seed: for shuffling.
        begins: whether a window of a decoder or encoder begins with the beginning-of-text token.

    Returns:
        Token ids ``[count, length]``.

    Raises:
        BadInput: a sentence does not fit into a window, or a window into the model's positions.
    """
    check_fits(model, length)
    tokenizer = model.tokenizer
    begin = [tokenizer.bos_token_id] if begins and model.family != ENCODER_DECODER else []
    end = [tokenizer.eos_token_id] if model.family == ENCODER else []
    windows = np.full((count, length), tokenizer.pad_token_id)
    for window, row in zip(windows, packed(sentences, length - len(begin) - len(end), count, seed), strict=True):
        framed = [*begin, *row, *end]
        window[: len(framed)] = framed
    return torch.from_numpy(windows)  # type: ignore[return-value]


def packed(sentences: Sequence[Sequence[int]], length: int, count: int, seed: int) -> list[list[int]]:
    """Rows of whole shuffled sentences, as many as fit into ``length`` tokens: ``count`` rows.

    Raises:
        BadInput: a sentence is longer than a row.
    """
    if (longest := max(map(len, sentences))) > length:
        raise BadInput(
            f"a window has room for {length} tokens, and a sentence has {longest}; raise model.length or corpus.length"
        )
    generator = random.Random(seed)
    order = list(range(len(sentences)))
    rows: list[list[int]] = []
    row: list[int] = []
    while True:
        generator.shuffle(order)
        for sentence in (sentences[i] for i in order):
            if len(row) + len(sentence) > length:
                rows.append(row)
                if len(rows) == count:
                    return rows
                row = []
            row = [*row, *sentence]
