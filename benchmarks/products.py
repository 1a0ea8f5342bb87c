"""The bare matrix products that reading some text needs, with which a scoring core is compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.scoring.products import linears_for_onednn, onednn_linear
from knowledge_compression.models.families import DECODER, ENCODER

Product = tuple[Callable[[Tensor, Tensor], Tensor], Tensor]  # how, and the weight


class Products:
    """One forward pass of a decoder or an encoder over rows of text, as bare products of the model's own shapes.

    Every token goes once through every linear layer of the body and attends to the tokens it may see (in a decoder, on
    average half of its row). The head sees only the positions that are read, and so does the part of an encoder's last
    block after its attention. There are no norms, softmax, masks, padding or Python between.

    Args:
        scorer: scores with the model; products are of the type it scores in and on the model's device.
        lengths: tokens of each row.
        reads: positions whose log-probabilities are read.
        chunk: tokens that go through a layer at a time.
        fastest: whether to use the library that is faster here; otherwise the one that torch chooses.
    """

    def __init__(self, scorer: Scorer, lengths: Sequence[int], reads: int, chunk: int, *, fastest: bool = True) -> None:
        model, dtype = scorer.model, scorer.dtype
        self.lengths, self.reads, self.chunk = sorted(lengths, reverse=True), reads, chunk
        self.causal = model.family == DECODER
        config, network = model.network.config, model.network
        self.heads, self.layers = config.num_attention_heads, config.num_hidden_layers
        self.head_size = config.hidden_size // self.heads
        body = network.base_model if model.family == ENCODER else network.get_decoder()
        inside = {id(module) for module in body.modules()}
        linears = {path: module for path, module in network.named_modules() if isinstance(module, nn.Linear)}
        *_, last = model.architecture.block_paths(network)
        read_only = {path for path in linears if path.startswith(f"{last}.")} if model.family == ENCODER else set()
        read_only -= {path for path in read_only if path.endswith((".query", ".key", ".value"))}
        of_all = [path for path, module in linears.items() if id(module) in inside and path not in read_only]
        like = {"dtype": dtype or model.dtype, "device": model.device}
        by_onednn = set(linears_for_onednn(network)) if fastest and dtype is None else set()

        def product(linear: nn.Linear) -> Product:
            return onednn_linear if linear in by_onednn else nn.functional.linear, linear.weight.to(**like)

        self.of_all = [product(linears[path]) for path in of_all]
        self.of_reads = [product(linear) for path, linear in linears.items() if path not in of_all]
        widths = {weight.shape[1] for _, weight in [*self.of_all, *self.of_reads]}
        self._inputs = {width: torch.randn(chunk, width, **like) for width in widths}
        self._states = torch.randn(chunk * config.hidden_size, **like)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(self.lengths)

    @torch.inference_mode()
    def multiply(self) -> None:
        """Do them all."""
        for rows in self._chunks():
            self._through(self.of_all, sum(rows))
            length = max(1, sum(rows) // len(rows))
            seen = max(1, length // 2) if self.causal else length
            shape = (len(rows) * self.heads, length, self.head_size)
            queries = self._states[: math.prod(shape)].view(shape)
            keys = queries[:, :seen]
            for _ in range(self.layers):
                torch.bmm(torch.bmm(queries, keys.mT), keys)
        for start in range(0, self.reads, self.chunk):
            self._through(self.of_reads, min(self.chunk, self.reads - start))

    def _through(self, products: Sequence[Product], tokens: int) -> None:
        for multiply, weight in products:
            multiply(self._inputs[weight.shape[1]][:tokens], weight)

    def _chunks(self) -> Iterator[list[int]]:
        """Lengths of rows that together have about as many tokens as go through a layer at a time."""
        rows: list[int] = []
        for length in self.lengths:
            if rows and sum(rows) + length > self.chunk:
                yield rows
                rows = []
            rows.append(min(length, self.chunk))
        yield rows
