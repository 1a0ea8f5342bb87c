"""Libraries that take seconds to import, under their usual names: each is imported when it is first used.

Describing a run, or finding that it is finished, needs none of them. So a module that defines a part refers to them
through this one, and can be imported without them::

    from knowledge_compression.heavy import torch

Code that needs such a library at import time (a subclass of ``torch.nn.Module``, a decorator, a registered function) is
in a separate module, which is imported inside the functions that use it. This module becomes unnecessary once Python
has lazy imports (PEP 810).
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["functional", "nn", "pl", "stats", "torch"]


class _Heavy(ModuleType):
    """A placeholder for a library until it is used."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


if TYPE_CHECKING:
    import polars as pl
    import torch
    from scipy import stats
    from torch import nn
    from torch.nn import functional
else:
    torch, nn, functional = _Heavy("torch"), _Heavy("torch.nn"), _Heavy("torch.nn.functional")
    pl, stats = _Heavy("polars"), _Heavy("scipy.stats")
