"""How many scales an int8 layer has."""

from __future__ import annotations

from knowledge_compression.errors import BadInput

GRANULARITIES = ("per_tensor", "per_channel")


def check_granularity(granularity: str) -> None:
    """Refuse an unknown granularity."""
    if granularity not in GRANULARITIES:
        raise BadInput(f"granularity={granularity} does not exist; choose one of {', '.join(GRANULARITIES)}")
