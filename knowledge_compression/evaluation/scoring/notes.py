"""Notes about items, which the scoring core takes while it answers their questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


class Notes:
    """Named values for each item that was asked by its id, e.g. ``chosen_prompts``."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, Any]] = {}
        self._orders: dict[tuple[str, str], int] = {}

    def of(self, item: str) -> Mapping[str, Any]:
        """The notes about an item; empty if there are none."""
        return self._of.get(item, {})

    def add(self, items: Sequence[str], found: Mapping[str, Any], order: int = 0) -> None:
        """Note values about items; of several values with one name, the one with the lowest order is kept."""
        for item in items:
            notes = self._of.setdefault(item, {})
            for name, value in found.items():
                if order <= self._orders.get((item, name), order):
                    notes[name] = value
                    self._orders[item, name] = order

    def add_finite(self, items: Sequence[Sequence[str]], values: Tensor) -> None:
        """Note ``finite=False`` about the items of every entry of ``values``, ``[entries]``, that is not finite."""
        for place in (~values.isfinite()).nonzero()[:, 0].tolist():
            self.add(items[place], {"finite": False})
