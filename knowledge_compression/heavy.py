"""Libraries that take seconds to import, under their usual names: each is imported when something of it is first used.

To describe a run, and to see that it is finished, takes none of them. So a module that says what a part is names them
through this one, and may be imported without them::

    from knowledge_compression.heavy import torch

What needs such a library while it is being imported itself (a subclass of ``torch.nn.Module``, a decorator, a function
that is registered) lies in a module of its own, which whoever does the work imports inside a function. This module goes
when Python has lazy imports of its own (PEP 810).
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["functional", "nn", "pl", "stats", "torch"]


class _Heavy(ModuleType):
    """Stands for a library until something of it is used."""

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
