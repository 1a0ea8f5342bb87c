"""Forward passes over calibration text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from knowledge_compression.errors import BadInput
from knowledge_compression.models.families import DECODER, ENCODER
from knowledge_compression.models.model import Model

if TYPE_CHECKING:
    from torch import LongTensor, Tensor

TOKENS_PER_BATCH = 4096
TOKENS_PER_BATCH_CPU = 1024  # on a CPU larger batches are no faster, and need more memory


def checked_windows(model: Model, calibration: LongTensor | None) -> Tensor:
    """The calibration windows, int64 ``[samples, length]``.

    Raises:
        BadInput: there are none, or they are longer than the model's positions.
    """
    if calibration is None or calibration.numel() == 0:
        raise BadInput("there is no calibration text; choose one with corpus=c4, wikitext, text or self")
    length = calibration.shape[1]
    if model.max_positions is not None and length > model.max_positions:
        raise BadInput(
            f"calibration windows of {length} tokens do not fit {model.name}'s {model.max_positions} positions; "
            f"choose corpus.length={model.max_positions} or less"
        )
    return calibration


def batches(windows: Tensor, on_cpu: bool) -> Iterator[Tensor]:
    """Windows in batches of as many tokens as a pass takes."""
    tokens = TOKENS_PER_BATCH_CPU if on_cpu else TOKENS_PER_BATCH
    yield from windows.split(max(1, tokens // windows.shape[1]))


def read_text(model: Model, ids: Tensor) -> Tensor:
    """Run the network on windows of text: its logits ``[windows, positions, vocabulary]``.

    An encoder-decoder reads the first half of each window and is given the second half as the decoder's input.
    """
    ids = ids.to(model.device)
    logits: Tensor
    if model.family == ENCODER:
        logits = model.network(input_ids=ids).logits
    elif model.family == DECODER:
        logits = model.network(input_ids=ids, use_cache=False).logits
    else:
        text, said = ids.tensor_split(2, dim=1)
        start = torch.full_like(said[:, :1], model.decoder_start)
        said = torch.cat([start, said[:, :-1]], dim=1)
        logits = model.network(input_ids=text, decoder_input_ids=said, use_cache=False).logits
    return logits
