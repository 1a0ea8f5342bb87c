"""The scoring core of every suite: log-probabilities of blanks and of continuations, for all three families."""

from knowledge_compression.evaluation.scoring.heads import head_at, likeliest
from knowledge_compression.evaluation.scoring.questions import Blank, Likelihood, Question
from knowledge_compression.evaluation.scoring.scorer import Scorer

__all__ = ["Blank", "Likelihood", "Question", "Scorer", "head_at", "likeliest"]
