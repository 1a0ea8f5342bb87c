"""Greedy decoding of many prompts: prompts of similar length share a batch, and each leaves it when it is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring.heads import head_at
from knowledge_compression.models import Model
from knowledge_compression.models.families import ENCODER_DECODER
from knowledge_compression.models.prompts import NO_PROMPTS, Choices, Prompts

Done = Callable[[Sequence[int]], bool]


@dataclass
class Said:
    """The text that a model generated after a prompt.

    Attributes:
        tokens: the generated tokens, including the one that ended generation.
        chosen: the soft prompt that each layer selected; None if there is no selection.
        finite: whether every distribution from which a token was taken was finite.
    """

    tokens: list[int] = field(default_factory=list)
    chosen: list[int] | None = None
    finite: bool = True


def generate(
    model: Model, prompts: Sequence[Sequence[int]], most: int, done: Done, *, soft: Prompts = NO_PROMPTS
) -> list[Said]:
    """Generate after each prompt of a batch by greedy decoding.

    Args:
        model: a decoder or an encoder-decoder.
        prompts: token ids of each prompt (for encoder-decoders: the encoder's whole input).
        most: maximum number of tokens to generate.
        done: tells whether the tokens so far are enough.
        soft: soft prompts before every prompt.

    Returns:
        The text generated for each prompt, in order.

    Raises:
        BadInput: the tokenizer's padding token has no embedding in the network.
    """
    said = [Said() for _ in prompts]
    choose = soft.choosing or _nothing_chosen
    going = list(range(len(prompts)))
    state = _start(model, prompts)
    for step, (tokens, finite, choices) in enumerate(_steps(model, state, most, choose)):
        for i, chosen in zip(going, choices if step == 0 else (), strict=False):
            said[i].chosen = chosen
        for i, token, fine in zip(going, tokens, finite, strict=True):
            if not said[i].tokens or not done(said[i].tokens):
                said[i].tokens.append(token)
                said[i].finite &= fine
        open_ = [place for place, i in enumerate(going) if not done(said[i].tokens)]
        if not open_:
            break
        if len(open_) < len(going) and soft.choosing is None:  # the selection of prompts is stored by row
            going = [going[place] for place in open_]
            state.keep(torch.tensor(open_))
    return said


@dataclass
class _State:
    """A batch during generation.

    Attributes:
        tokens: the tokens to read next, int64 ``[rows, tokens]``.
        mask: 1 for each token read so far that is not padding, int64 ``[rows, seen]``; of the encoder's input for
            encoder-decoders.
        encoded: the encoder's output, or None for decoders.
        cache: keys and values of the tokens read so far; None before the first pass.
    """

    tokens: Tensor
    mask: Tensor
    encoded: Any = None
    cache: Any = None

    def keep(self, rows: Tensor) -> None:
        """Continue with some rows only, given on the CPU: the parts of a divided network's cache lie on its devices."""
        self.tokens, self.mask = self.tokens[rows], self.mask[rows]
        if self.encoded is not None:
            self.encoded["last_hidden_state"] = self.encoded.last_hidden_state[rows]
        self.cache.batch_select_indices(rows)

    def inputs(self) -> dict[str, Any]:
        """The arguments for the network."""
        shared = {"attention_mask": self.mask, "past_key_values": self.cache, "use_cache": True}
        if self.encoded is not None:
            return shared | {"encoder_outputs": self.encoded, "decoder_input_ids": self.tokens}
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -self.tokens.shape[1] :]
        return shared | {"input_ids": self.tokens, "position_ids": positions}


def _start(model: Model, prompts: Sequence[Sequence[int]]) -> _State:
    """The first pass: prompts end together, so the generated tokens line up in one column."""
    width, pad = max(map(len, prompts)), pad_id(model)
    ids = torch.tensor([[*[pad] * (width - len(p)), *p] for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    if model.family != ENCODER_DECODER:
        return _State(ids, mask)
    with torch.inference_mode():
        encoded = model.network.get_encoder()(input_ids=ids, attention_mask=mask)
    begin = torch.full((len(prompts), 1), model.decoder_start, device=model.device)
    return _State(begin, mask, encoded)


@torch.inference_mode()
def _steps(
    model: Model, state: _State, most: int, choose: Callable[[None], AbstractContextManager[Choices]]
) -> Iterator[tuple[list[int], list[bool], Choices]]:
    """Yield the most likely next token of each row, step by step; the caller may drop rows of ``state`` in between.

    Each step also yields whether each row's logits were finite, and the soft prompts that were selected when the rows
    were first read.
    """
    for _ in range(most):
        count, width = state.tokens.shape
        rows = torch.arange(count, device=state.tokens.device)
        choosing = choose(None) if state.cache is None else nullcontext([])
        with choosing as choices, head_at(model.network, rows, torch.full_like(rows, width - 1), width):
            output = model.network(**state.inputs())
        state.cache, state.tokens = output.past_key_values, output.logits[0].argmax(-1)[:, None]
        if state.encoded is None:
            state.mask = torch.cat([state.mask, torch.ones_like(state.tokens)], dim=1)
        yield state.tokens[:, 0].tolist(), output.logits[0].amax(-1).isfinite().tolist(), choices


def pad_id(model: Model) -> int:
    """The token that fills rows up; 0 if the tokenizer has none, as no token attends to it.

    Raises:
        BadInput: the network has no embedding for it.
    """
    pad, rows = model.tokenizer.pad_token_id or 0, _rows(model)
    if not 0 <= pad < rows:
        raise BadInput(
            f"the padding token of {model.name} has id {pad}, and its network has embeddings for the ids 0 to "
            f"{rows - 1}; use the tokenizer that it was trained with, or one whose padding token is among these"
        )
    return pad


def filler_id(model: Model) -> int:
    """As :func:`pad_id`, but 0 also where the network has no embedding: scoring generates no tokens."""
    pad = model.tokenizer.pad_token_id or 0
    return pad if 0 <= pad < _rows(model) else 0


def _rows(model: Model) -> int:
    embeddings: Any = model.network.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def _nothing_chosen(_: Sequence[int] | None) -> AbstractContextManager[Choices]:
    return nullcontext([])
