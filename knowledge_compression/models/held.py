"""A model that many runs of one process start from, loaded once."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import psutil

from knowledge_compression.heavy import torch
from knowledge_compression.models.model import Model
from knowledge_compression.models.source import ModelSource
from knowledge_compression.models.spread import Spread

log = logging.getLogger(__name__)

_loaded: dict[Any, Model] = {}  # the last one loaded; it is never handed out itself
_skeletons: dict[Any, Model] = {}


@dataclass(frozen=True)
class HeldSource:
    """A source that loads another source's model once and hands out copies.

    A copy shares nothing with the original, so no run sees another's changes. If memory has no room for two, the model
    is loaded each time.
    """

    source: ModelSource

    def __getattr__(self, name: str) -> Any:
        """Every other attribute is that of the other source."""
        if name == "source":  # still under construction, e.g. by copy()
            raise AttributeError(name)
        return getattr(self.source, name)

    def skeleton(self) -> Model:
        """The other source's skeleton, built once; skeletons are never changed."""
        key = self.source.fingerprint()
        if key not in _skeletons:
            _skeletons[key] = self.source.skeleton()
        return _skeletons[key]

    def load(self, device: str | Spread = "auto", dtype: str = "auto") -> Model:
        """A copy of the loaded model."""
        key = (self.source.fingerprint(), device, dtype)
        if key not in _loaded:
            _loaded.clear()
            model = self.source.load(device, dtype)
            if not _fits_again(model):
                log.info("memory has no room for a second copy of %s, so every run loads it", model.name)
                return model
            _loaded[key] = model
        held = _loaded[key]
        return replace(held, network=deepcopy(held.network), tokenizer=deepcopy(held.tokenizer))


def _fits_again(model: Model) -> bool:
    """Whether a copy leaves three times its size of free memory for the run itself."""
    size = sum(p.numel() * p.element_size() for p in model.network.parameters())
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    return bool(4 * size < free)
