"""A model that many runs of one process begin with, loaded once."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from knowledge_compression.models.loading import ModelSource
from knowledge_compression.models.model import Model

log = logging.getLogger(__name__)

_loaded: dict[Any, Model] = {}  # the last one, as it was loaded; nobody else gets hold of it
_skeletons: dict[Any, Model] = {}


@dataclass(frozen=True)
class HeldSource:
    """Another source, whose model is loaded once and copied for whoever asks.

    A copy shares nothing with what is held, so that no run sees what another did. Where memory has no room for two, the
    model is loaded each time.
    """

    source: ModelSource

    def __getattr__(self, name: str) -> Any:
        """All else is the other source's."""
        if name == "source":  # this one is still being made, as by a copy
            raise AttributeError(name)
        return getattr(self.source, name)

    def skeleton(self) -> Model:
        """The other source's, made once; nobody changes a skeleton."""
        key = self.source.fingerprint()
        if key not in _skeletons:
            _skeletons[key] = self.source.skeleton()
        return _skeletons[key]

    def load(self, device: str = "auto", dtype: str = "auto") -> Model:
        """A copy of the model as it was loaded."""
        key = (self.source.fingerprint(), device, dtype)
        if key not in _loaded:
            _loaded.clear()
            model = self.source.load(device, dtype)
            if not _fits_again(model):
                log.info("memory has no room for a second %s; every run loads it", model.name)
                return model
            _loaded[key] = model
        held = _loaded[key]
        return replace(held, network=deepcopy(held.network), tokenizer=deepcopy(held.tokenizer))


def _fits_again(model: Model) -> bool:
    """Whether a copy leaves three times as much memory for the run itself."""
    size = sum(p.numel() * p.element_size() for p in model.network.parameters())
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    return bool(4 * size < free)
