"""lm-evaluation-harness's model interface, on top of the scoring core."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import handle_non_serializable, hash_string

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring import Question, Scorer
from knowledge_compression.evaluation.tokens import encode
from knowledge_compression.models import Model
from knowledge_compression.models.families import ENCODER_DECODER

STOCK_BATCH = 16  # the fastest of 1, 4, 8, 16, 32, 64 for stock HFLM on two cores; see docs/performance.md


def stock_lm(scorer: Scorer, batch_size: int | str = STOCK_BATCH) -> HFLM:
    """lm-eval's own ``HFLM`` around the model of ``scorer``, to verify results.

    Raises:
        BadInput: the input selects among prompts. ``HFLM`` cannot tell where the answers begin, which must not
            influence the selection.
    """
    if scorer.prompts.choosing is not None:
        raise BadInput(
            "scoring=stock cannot be used with a recovery whose prompts are selected by the input (recovery=idp), "
            "because the answers would influence the selection; choose scoring=fast, or a recovery with one prompt"
        )
    with _weights_left_alone(scorer.model):
        return HFLM(**_arguments(scorer), batch_size=batch_size, mixed_precision_dtype=scorer.dtype)


def item_id(place: int, document: Any) -> str:
    """The id of a task's document: its index and the beginning of its hash in lm-eval's log."""
    text = json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return f"{place}:{hash_string(text)[:12]}"


class ScorerLM(HFLM):
    """``HFLM`` with lm-eval's own tokenization and the log-probabilities of :class:`Scorer`.

    Args:
        scorer: scores with a decoder or an encoder-decoder; its network may be wrapped by a recovery.
    """

    def __init__(self, scorer: Scorer) -> None:
        with _weights_left_alone(scorer.model):
            # All rolling windows are passed to the core at once; it forms its own batches.
            super().__init__(**_arguments(scorer), batch_size=1 << 30)
        self.scorer = scorer
        self._ids: dict[tuple[str, bool | None], list[int]] = {}
        self._items: list[str] = []  # ids of the requests being answered

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood and greedy flag of each request's continuation; all texts are tokenized in one call."""
        pairs = [request.args for request in requests]
        if self.backend == "causal":
            self._encode(None, [text for c, a in pairs if c for text in (c.rstrip(), c + a)])
            self._encode(False, [a for c, a in pairs if not c])
        else:
            self._encode(None, [c.rstrip() for c, _ in pairs if c])
            self._encode(False, [c[len(c.rstrip()) :] + a for c, a in pairs])
        self._items = [item_id(request.doc_id, request.doc) for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._ids.clear()
            self._items.clear()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids as from ``HFLM``; looked up if they were tokenized ahead."""
        ids = self._ids.get((string, add_special_tokens)) if not options else None
        return super().tok_encode(string, add_special_tokens, **options) if ids is None else ids

    def _encode(self, special_tokens: bool | None, texts: list[str]) -> None:
        """Tokenize ahead; texts that begin with the prefix token are left to ``HFLM``, which treats them specially."""
        prefix = self.tokenizer.decode(self.prefix_token_id)
        distinct = [text for text in dict.fromkeys(texts) if not text.startswith(prefix)]
        rows = encode(self.tokenizer, distinct, special_tokens=special_tokens)
        self._ids |= {(text, special_tokens): row for text, row in zip(distinct, rows, strict=True)}

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood and greedy flag of each ``(text, context tokens, continuation tokens)``, in order."""
        questions, places = self.questions_of(requests)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for rows, likelihoods in zip(places, self.scorer.log_likelihoods(questions), strict=True):
            for i, likelihood in zip(rows, likelihoods, strict=True):
                answers[i] = (likelihood.log_prob, likelihood.greedy)
        return answers

    def questions_of(
        self, requests: Sequence[tuple[Any, list[int], list[int]]]
    ) -> tuple[list[Question], list[list[int]]]:
        """Group tokenized requests by context; also return, for each question, the indices of its requests."""
        places: dict[tuple[int, ...], list[int]] = {}
        cut = [self._fit(context, continuation) for _, context, continuation in requests]
        for i, (context, _) in enumerate(cut):
            places.setdefault(tuple(context), []).append(i)
        items = (
            self._items if len(self._items) == len(requests) else [""] * len(requests)
        )  # rolling windows have no document
        questions = [
            Question(context, [cut[i][1] for i in rows], tuple(dict.fromkeys(items[i] for i in rows if items[i])))
            for context, rows in places.items()
        ]
        return questions, list(places.values())

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text generated after each request's context, up to a stop sequence."""
        if self.scorer.soft_prompted or not _plain_greedy(self.model.generation_config):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        texts: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for rows in alike.values():
            options = normalize_gen_kwargs(requests[rows[0]].args[1], self.max_gen_toks)
            if options["do_sample"]:
                sampled = super().generate_until([requests[i] for i in rows], disable_tqdm=disable_tqdm)
                texts |= zip(rows, sampled, strict=True)
            else:
                texts |= zip(rows, self._say([requests[i] for i in rows], options), strict=True)
        return [texts[i] for i in range(len(requests))]

    def _say(self, requests: list[Any], options: Any) -> list[str]:
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stops, most = handle_stop_sequences(options["until"], eos=eos), options["max_gen_toks"]
        room = self.max_length - (most if self.backend == "causal" else 0)
        if room < 1:
            raise BadInput(
                f"the model has {self.max_length} positions, too few to generate {most} tokens (max_gen_toks)"
            )
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])

        done = _Ended(self.tokenizer, frozenset(ends), tuple(filter(None, stops)))
        rows = encode(self.tokenizer, [request.args[0] for request in requests])
        prompts = [ids[-room:] or [self.prefix_token_id] for ids in rows]  # nothing is read as in loglikelihood()
        items = [(item_id(request.doc_id, request.doc),) for request in requests]
        said = self.scorer.generate(prompts, most, done, items)
        return [postprocess_generated_text(self.tok_decode(ids), stops, None) for ids in said]

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[Sequence[int], Sequence[int]]:
        """Truncate from the left to the model's positions, as stock lm-eval does (the last token is not read)."""
        if self.backend == "seq2seq":
            return context[-self.max_length :], continuation[-self.max_length :]
        if len(continuation) > self.max_length:
            raise BadInput(
                f"an answer has {len(continuation)} tokens, more than the {self.max_length} positions of "
                f"{self.scorer.model.name}; choose another task or a model with more"
            )
        surplus = max(0, len(context) + len(continuation) - (self.max_length + 1))
        return context[surplus:], continuation


@dataclass(frozen=True)
class _Ended:
    """Whether a text is at its end: by its last token, or because it holds a stop sequence."""

    tokenizer: Any
    ends: frozenset[int | None]
    stops: Sequence[str]

    def __call__(self, said: Sequence[int]) -> bool:
        if said[-1] in self.ends:
            return True
        text = self.tokenizer.decode(said, skip_special_tokens=True) if self.stops else ""
        return any(stop in text for stop in self.stops)


def _plain_greedy(config: Any) -> bool:
    """Whether a model's generation settings amount to plain greedy decoding: no beams, penalties or forced tokens."""
    neutral: dict[str, tuple[Any, ...]] = {
        "num_beams": (None, 1),
        "repetition_penalty": (None, 1.0),
        "encoder_repetition_penalty": (None, 1.0),
        "no_repeat_ngram_size": (None, 0),
        "encoder_no_repeat_ngram_size": (None, 0),
        "min_length": (None, 0),
        "min_new_tokens": (None, 0),
        "bad_words_ids": (None,),
        "forced_bos_token_id": (None,),
        "forced_eos_token_id": (None,),
        "suppress_tokens": (None,),
        "begin_suppress_tokens": (None,),
        "guidance_scale": (None, 1.0),
        "sequence_bias": (None,),
    }
    return all(getattr(config, name, None) in fine for name, fine in neutral.items())


def _arguments(scorer: Scorer) -> dict[str, Any]:
    model = scorer.model
    return {
        "pretrained": model.network,
        "tokenizer": model.tokenizer,
        "backend": "seq2seq" if model.family == ENCODER_DECODER else "causal",
        "max_length": scorer.max_positions,
    }


@contextmanager
def _weights_left_alone(model: Model) -> Iterator[None]:
    """Prevent ``HFLM`` from tying the network's weights: a compressed head must stay unchanged."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    model.network.tie_weights = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.network.tie_weights
        logger.setLevel(level)
