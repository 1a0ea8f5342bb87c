"""What compression does to the knowledge inside a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from knowledge_compression.errors import BadInput
    from knowledge_compression.library import ask, choose, compress, drop, load, recover

__all__ = ["BadInput", "ask", "choose", "compress", "drop", "load", "recover"]


def __getattr__(name: str) -> Any:
    """The library's functions, loaded when first used, so that importing the package alone is quick."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from knowledge_compression import library

    return getattr(library, name)
