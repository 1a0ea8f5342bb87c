"""What networks keep of the tokens that they have read, so that the next one does not read them again."""

from __future__ import annotations

from typing import Any

_NAMES = ("past_key_values", "cache_params")  # the second is that of state-space models


def cache_of(output: Any) -> dict[str, Any]:
    """A network's cache in its output, by the name of the argument that takes it; empty if it returns none."""
    found = ((name, getattr(output, name, None)) for name in _NAMES)
    return {name: cache for name, cache in found if cache is not None}
