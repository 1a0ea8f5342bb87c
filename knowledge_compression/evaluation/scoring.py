"""The one scoring core under every suite: log-probabilities of blanks and of continuations, for all three families."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER, ENCODER


@dataclass(frozen=True)
class Blank:
    """A place where one token is asked for.

    Attributes:
        ids: token ids of the whole input (encoder, encoder-decoder) or of what comes before the blank (decoder).
        position: index of the masked token in ``ids``; only for encoders.
        decoder_ids: what the decoder has said so far, e.g. ``[start, <extra_id_0>]``; only for encoder-decoders.
    """

    ids: Sequence[int]
    position: int | None = None
    decoder_ids: Sequence[int] = ()


@dataclass(frozen=True)
class Question:
    """A context and the continuations to compare; at least one token in each.

    Attributes:
        context: token ids of the context (for encoder-decoders: the encoder's whole input).
        continuations: token ids of each answer (for encoder-decoders: what the decoder should say).
    """

    context: Sequence[int]
    continuations: Sequence[Sequence[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of a continuation: its summed log-probability (nats), and whether greedy decoding gives it."""

    log_prob: float
    greedy: bool


@contextmanager
def head_at(network: nn.Module, positions: Tensor, width: int) -> Iterator[None]:
    """Let an encoder's vocabulary head see one position a row, so that its logits are ``[rows, 1, vocabulary]``.

    The head comes after the body in every encoder, so a hook on the body's output serves all of them, with whatever
    was put in the place of their layers.

    Args:
        network: an encoder with its masked-token head; adapters may be wrapped around it.
        positions: the position that is asked for in each row, int64 ``[rows]``.
        width: tokens in a row of input ids; what the body gives beyond it are soft prompts in front of the input.
    """

    def gather(_body: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0]
        rows = torch.arange(len(positions), device=hidden.device)
        output["last_hidden_state"] = hidden[rows, positions + (hidden.shape[1] - width)][:, None]
        return output

    unwrap = getattr(network, "get_base_model", None)  # of peft's wrapper
    inner = unwrap() if callable(unwrap) else network
    handle = inner.base_model.register_forward_hook(gather)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()


class Scorer:
    """Scores blanks and continuations with one model.

    Args:
        model: any family; its network may carry adapters, prompts or quantized modules.
        tokens_per_batch: padded tokens in one forward pass; None takes the engine's own choice.
    """

    def __init__(self, model: Model, tokens_per_batch: int | None = None) -> None:
        self.model = model
        self.tokens_per_batch = tokens_per_batch or 1024

    def distributions(self, blanks: Sequence[Blank]) -> Iterator[tuple[list[int], Tensor]]:
        """Log-probabilities over the vocabulary at each blank.

        Yields:
            Batches in the engine's own order: the indices into ``blanks`` and float32 log-probabilities
            ``[len(indices), vocabulary]`` on the model's device. Reduce each batch before asking for the next.
        """
        order = sorted(range(len(blanks)), key=lambda i: len(blanks[i].ids))
        for batch in self._batches(order, [len(blank.ids) for blank in blanks]):
            logits = self._blank_logits([blanks[i] for i in batch])
            yield batch, torch.log_softmax(logits.float(), dim=-1)

    def log_likelihoods(self, questions: Sequence[Question]) -> list[list[Likelihood]]:
        """The likelihood of every continuation of every question, in their order (decoders and encoder-decoders)."""
        rows = [(q, c) for q, question in enumerate(questions) for c in range(len(question.continuations))]
        lengths = [len(questions[q].context) + len(questions[q].continuations[c]) for q, c in rows]
        scores: list[list[Likelihood | None]] = [[None] * len(question.continuations) for question in questions]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        for batch in self._batches(order, lengths):
            pairs = [(questions[rows[i][0]].context, questions[rows[i][0]].continuations[rows[i][1]]) for i in batch]
            for i, likelihood in zip(batch, self._likelihoods(pairs), strict=True):
                scores[rows[i][0]][rows[i][1]] = likelihood
        return scores  # type: ignore[return-value]

    def _batches(self, order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in order:  # ascending lengths, so the newest row is the longest
            if batch and (len(batch) + 1) * lengths[i] > self.tokens_per_batch:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @torch.inference_mode()
    def _blank_logits(self, blanks: Sequence[Blank]) -> Tensor:
        ids, mask = self._pad([blank.ids for blank in blanks])
        rows = torch.arange(len(blanks), device=ids.device)
        network = self.model.network
        if self.model.family == ENCODER:
            positions = torch.tensor([blank.position for blank in blanks], device=ids.device)
            with head_at(network, positions, ids.shape[1]):
                return network(input_ids=ids, attention_mask=mask).logits[:, 0]
        if self.model.family == DECODER:
            return network(input_ids=ids, attention_mask=mask, use_cache=False).logits[rows, mask.sum(-1) - 1]
        said, said_mask = self._pad([blank.decoder_ids for blank in blanks])
        logits = network(input_ids=ids, attention_mask=mask, decoder_input_ids=said, use_cache=False).logits
        return logits[rows, said_mask.sum(-1) - 1]

    @torch.inference_mode()
    def _likelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        network = self.model.network
        if self.model.family == DECODER:
            ids, mask = self._pad([[*context, *answer][:-1] for context, answer in pairs])
            self.model.announce_context([len(context) for context, _ in pairs])
            logits = network(input_ids=ids, attention_mask=mask, use_cache=False).logits
            starts = [len(context) - 1 for context, _ in pairs]
        else:
            start = network.config.decoder_start_token_id
            ids, mask = self._pad([context for context, _ in pairs])
            said, _ = self._pad([[start, *answer][:-1] for _, answer in pairs])
            logits = network(input_ids=ids, attention_mask=mask, decoder_input_ids=said, use_cache=False).logits
            starts = [0] * len(pairs)
        likelihoods = []
        for row, begin, (_, answer) in zip(logits, starts, pairs, strict=True):
            log_probs = torch.log_softmax(row[begin : begin + len(answer)].float(), dim=-1)
            gold = torch.tensor(answer, device=row.device)
            likelihoods.append(
                Likelihood(float(log_probs.gather(-1, gold[:, None]).sum()), bool((log_probs.argmax(-1) == gold).all()))
            )
        return likelihoods

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        pad = self.model.tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.model.device)
        return ids, mask
