"""The scoring core of every suite: log-probabilities of blanks and of continuations, for all three families."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from knowledge_compression.evaluation.scoring.heads import head_at, likeliest
from knowledge_compression.evaluation.scoring.questions import Blank, Likelihood, Question

if TYPE_CHECKING:
    from knowledge_compression.evaluation.scoring.scorer import Scorer

__all__ = ["Blank", "Likelihood", "Question", "Scorer", "head_at", "likeliest"]


def __getattr__(name: str) -> Any:
    """The scorer is loaded when it is first used, because questions can be built without it."""
    if name != "Scorer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from knowledge_compression.evaluation.scoring.scorer import Scorer

    return Scorer
