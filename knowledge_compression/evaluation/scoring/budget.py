"""How much goes into one forward pass."""

from __future__ import annotations

import logging

from knowledge_compression.models import Model

log = logging.getLogger(__name__)

_TOKENS = {"cpu": 1024, "cuda": 16384}  # small batches stay in a CPU's caches: 2,048 tokens and more were slower
_LOGIT_BYTES = 256 << 20  # logits of one pass, so that a large vocabulary does not fill the memory


class Budget:
    """Tokens and logits in one forward pass of a model on its device.

    Args:
        model: what is scored with.
        tokens: padded tokens; None takes what suits the device.

    Attributes:
        tokens: padded tokens in one pass.
        reads: positions whose logits one pass may give.
        pairs_per_token: query-key pairs of attention that cost as much as all else that one token costs.
    """

    def __init__(self, model: Model, tokens: int | None = None) -> None:
        config = model.network.config
        self.tokens = tokens or _TOKENS.get(model.device.type, 4096)
        self.reads = max(1, _LOGIT_BYTES // (config.vocab_size * model.dtype.itemsize))
        embeddings = sum(p.numel() for p in model.network.get_input_embeddings().parameters())
        body = model.parameter_count() - embeddings
        self.pairs_per_token = body / (2 * config.num_hidden_layers * config.hidden_size)

    def halve(self) -> None:
        """Step back after a pass that did not fit."""
        self.tokens = max(1, self.tokens // 2)
        self.reads = max(1, self.reads // 2)
        log.warning("out of memory: from here on %d tokens go into one pass", self.tokens)
