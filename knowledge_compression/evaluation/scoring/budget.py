"""The budget of one forward pass: how many tokens and logits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

import torch

from knowledge_compression.cache import kept_finding
from knowledge_compression.models import Model
from knowledge_compression.models.families import ENCODER_DECODER
from knowledge_compression.timing import timed

log = logging.getLogger(__name__)

_CACHE = 2 << 20  # bytes that stay in a CPU core's cache
_ON_CPU = (1024, 4096)  # padded tokens in a pass on a CPU, minimum and maximum
_CASTING = 2048  # the minimum where each pass casts the weights; twice as many are little faster and take more memory
_UNPROBED = 4096  # padded tokens on other devices, if there is too little work to be worth probing
_FIRST, _LAST = 2048, 262_144  # sizes tried there
_WORTH_PROBING = 65_536  # tokens of work
_GAIN = 1.05  # doubling the tokens must be this much faster per token
_ROW = 128  # tokens per row while probing
_MOST_PADDING = 0.08  # the largest share of padding in a batch's tokens
_LOGIT_BYTES = 256 << 20  # bytes of logits in one pass, so that a large vocabulary does not fill the memory


class Budget:
    """The number of tokens and logits in one forward pass of a model on its device.

    Args:
        model: the model that scores.
        tokens: padded tokens; None chooses what suits the device.
        device: the device on which it will score; None for its current one.
        products: dtype of the matrix products; None for the model's own.

    Attributes:
        tokens: padded tokens in one pass.
        reads: maximum number of positions whose logits one pass computes.
        rows: rows of logits processed at a time, few enough to stay in a CPU's cache.
        fallbacks: deviations to be recorded: smaller passes for lack of memory.
        pairs_per_token: number of query-key pairs of attention that cost as much as everything else for one token.
    """

    def __init__(
        self,
        model: Model,
        tokens: int | None = None,
        device: torch.device | None = None,
        products: torch.dtype | None = None,
    ) -> None:
        config = model.text_config
        on_cpu = (device or model.device).type == "cpu"
        self._model = model
        self.fallbacks: list[str] = []
        self._settled = tokens is not None or on_cpu
        self.tokens = tokens or (_tokens_on_cpu(model, products) if on_cpu else _UNPROBED)
        self.reads = max(1, _LOGIT_BYTES // (config.vocab_size * model.dtype.itemsize))
        self.rows = max(1, _CACHE // (config.vocab_size * 4)) if on_cpu else self.reads
        embeddings = sum(p.numel() for p in model.network.get_input_embeddings().parameters())
        body = model.parameter_count() - embeddings
        self.pairs_per_token = body / (2 * config.num_hidden_layers * config.hidden_size)

    def of(self, model: Model) -> Budget:
        """The same budget for an equal model, with a list of fallbacks of its own."""
        other = copy(self)
        other._model, other.fallbacks = model, []
        return other

    def settle(self, work: int) -> None:
        """Find the best number of tokens for the device, once for each model and device, if ``work`` is large enough.

        Args:
            work: number of tokens about to be read.
        """
        if self._settled or work < _WORTH_PROBING:
            return
        self.tokens = _kept_probe(self._model)
        self._settled = True

    def batches(
        self, lengths: Sequence[int], reads: Sequence[int], *, end_to_end: bool, alone: bool
    ) -> Iterator[list[int]]:
        """Indices of texts in batches, longest first, so that running out of memory shows at once.

        A batch keeps to the budgets of tokens, including padding, and of logits; once it is large enough, it ends
        before padding would exceed a few per cent.

        Args:
            lengths, reads: tokens of each text, and positions to read in it.
            end_to_end: texts lie end to end, without padding.
            alone: texts may not share a pass, so that each text is a batch.
        """
        batch: list[int] = []
        real = read = 0
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            padded = real + lengths[i] if end_to_end else (len(batch) + 1) * lengths[batch[0]] if batch else 0
            wasteful = padded - real - lengths[i] > _MOST_PADDING * padded and 4 * padded > self.tokens
            full = padded > self.tokens or read + reads[i] > self.reads or wasteful
            if batch and (full or alone):
                yield batch
                batch, real, read = [], 0, 0
            batch.append(i)
            real += lengths[i]
            read += reads[i]
        if batch:
            yield batch

    def halve(self) -> None:
        """Reduce the budget after a pass that did not fit in memory."""
        self.tokens = max(1, self.tokens // 2)
        self.reads = max(1, self.reads // 2)
        self._settled = True
        self.fallbacks.append(f"out of memory: from here on {self.tokens} tokens go into one pass")
        log.warning(self.fallbacks[-1])


def _tokens_on_cpu(model: Model, products: torch.dtype | None) -> int:
    """As many tokens as keep one hidden state in the cache: 1,024 for wide networks, more where calls dominate.

    With narrower products than its weights, a network casts all of them in every pass, so a pass takes more tokens.
    """
    least, most = _ON_CPU
    if products is not None and products.itemsize < model.dtype.itemsize:
        least = _CASTING
    return min(most, max(least, _CACHE // (4 * model.text_config.hidden_size)))


def probe(seconds: Callable[[int], float]) -> int:
    """The number of tokens beyond which larger passes are no faster per token.

    Args:
        seconds: time of one pass over a number of tokens; raises ``torch.OutOfMemoryError`` if it does not fit.

    Returns:
        The smallest size that is not clearly slower than the next one, which is twice as large.
    """
    tokens, rate = _FIRST, 0.0
    while tokens <= _LAST:
        try:
            now = tokens / seconds(tokens)
        except torch.OutOfMemoryError:
            break
        if now < _GAIN * rate:
            break
        tokens, rate = 2 * tokens, now
    return max(_FIRST // 2, tokens // 2)


def _kept_probe(model: Model) -> int:
    """The result of :func:`probe` for this kind of model on this kind of device, kept in the user's cache."""
    place = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    told = [model.network.config.to_dict(), str(model.dtype), place, torch.__version__, type(model.network).__name__]

    def find() -> int:
        tokens = probe(lambda tokens: _seconds(model, tokens))
        log.info("%d tokens go into one pass of %s on %s", tokens, model.name, place)
        return tokens

    return int(kept_finding("budget", told, find))


@torch.inference_mode()
def _seconds(model: Model, tokens: int) -> float:
    """The shortest of three passes over rows of random tokens, without the head."""
    network: Any = model.network
    body = network.get_encoder() if model.family == ENCODER_DECODER else network.base_model
    ids = torch.randint(model.text_config.vocab_size, (tokens // _ROW, _ROW), device=model.device)
    return min(timed(model.device, lambda: body(input_ids=ids))[0] for _ in range(3))
