"""lm-evaluation-harness's model interface over the scoring core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.models.huggingface import HFLM

from knowledge_compression.evaluation.scoring import Question, Scorer
from knowledge_compression.models import Model
from knowledge_compression.models.families import ENCODER_DECODER

STOCK_BATCH = 16  # the best of 1, 4, 8, 16, 32, 64 for stock HFLM on two cores; see docs/performance.md


def stock_lm(model: Model, batch_size: int | str = STOCK_BATCH) -> HFLM:
    """lm-eval's own ``HFLM`` around a loaded model, for anyone in doubt."""
    with _weights_left_alone(model):
        return HFLM(**_arguments(model), batch_size=batch_size)


class ScorerLM(HFLM):
    """``HFLM`` with lm-eval's own way from text to tokens, and the log-probabilities from :class:`Scorer`.

    Args:
        model: a decoder or an encoder-decoder; its network may be wrapped by a recovery.
        scorer: the scoring core; None makes one.
    """

    def __init__(self, model: Model, scorer: Scorer | None = None) -> None:
        with _weights_left_alone(model):
            # All rolling windows go to the core at once: it makes its own batches.
            super().__init__(**_arguments(model), batch_size=1 << 30)
        self.scorer = scorer or Scorer(model)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood and greedy flag of each ``(text, context tokens, continuation tokens)``, in their order."""
        places: dict[tuple[int, ...], list[int]] = {}
        cut = [self._fit(context, continuation) for _, context, continuation in requests]
        for i, (context, _) in enumerate(cut):
            places.setdefault(tuple(context), []).append(i)
        questions = [Question(context, [cut[i][1] for i in rows]) for context, rows in places.items()]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for rows, likelihoods in zip(places.values(), self.scorer.log_likelihoods(questions), strict=True):
            for i, likelihood in zip(rows, likelihoods, strict=True):
                answers[i] = (likelihood.log_prob, likelihood.greedy)
        return answers

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[Sequence[int], Sequence[int]]:
        """Cut from the left what the model has no positions for, as stock does (the last token is not read)."""
        if self.backend == "seq2seq":
            return context[-self.max_length :], continuation[-self.max_length :]
        surplus = max(0, len(context) + len(continuation) - (self.max_length + 1))
        return context[surplus:], continuation


def _arguments(model: Model) -> dict[str, Any]:
    return {
        "pretrained": model.network,
        "tokenizer": model.tokenizer,
        "backend": "seq2seq" if model.family == ENCODER_DECODER else "causal",
        "max_length": model.max_positions,
    }


@contextmanager
def _weights_left_alone(model: Model) -> Iterator[None]:
    """``HFLM`` ties the weights of what it is given; a compressed head must stay as it is."""
    model.network.tie_weights = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.network.tie_weights
