"""Greedy decoding of many prompts: prompts of similar length share a batch, and each leaves it when it is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring.heads import head_at
from knowledge_compression.models import Model
from knowledge_compression.models.caches import cache_of
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
        cache: what the network keeps of the tokens read so far, as an argument; empty before the first pass.
        again: whether the network keeps nothing, so that every pass reads all tokens, which are padded on the right.
    """

    tokens: Tensor
    mask: Tensor
    encoded: Any = None
    cache: Mapping[str, Any] = field(default_factory=dict)
    again: bool = False

    @property
    def last(self) -> Tensor:
        """The place of each row's last token among those to read, int64 ``[rows]``."""
        return self.mask.sum(-1) - 1 if self.again else torch.full_like(self.tokens[:, 0], self.tokens.shape[1] - 1)

    def keep(self, rows: Tensor) -> None:
        """Continue with some rows only, given on the CPU, as parts of a divided network lie on several devices."""
        self.tokens, self.mask = self.tokens[rows], self.mask[rows]
        if self.encoded is not None:
            self.encoded["last_hidden_state"] = self.encoded.last_hidden_state[rows]
        for cache in self.cache.values():
            cache.reorder_cache(rows)  # batch_select_indices() is not there for recurrent states

    def inputs(self) -> dict[str, Any]:
        """The arguments for the network."""
        shared = {"attention_mask": self.mask, "use_cache": not self.again, **self.cache}
        if "cache_params" in self.cache:  # a state-space model, which would read a new token once for each in the mask
            del shared["attention_mask"]
        if self.encoded is not None:
            return shared | {"encoder_outputs": self.encoded, "decoder_input_ids": self.tokens}
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -self.tokens.shape[1] :]
        return shared | {"input_ids": self.tokens, "position_ids": positions}

    def add(self, tokens: Tensor, cache: Mapping[str, Any]) -> None:
        """Continue with each row's next token ``[rows]``."""
        new, self.cache = tokens[:, None], cache
        if self.again:
            place = self.last[:, None] + 1
            self.tokens, self.mask = (pad(each, (0, 1)) for each in (self.tokens, self.mask))
            self.tokens, self.mask = self.tokens.scatter(1, place, new), self.mask.scatter(1, place, 1)
            return
        self.tokens = new
        if self.encoded is None:
            self.mask = torch.cat([self.mask, torch.ones_like(new)], dim=1)

    def read_again(self) -> None:
        """Move the padding of prompts to the right, because the network keeps nothing of them."""
        order = (1 - self.mask).argsort(dim=1, stable=True)
        self.tokens, self.mask, self.again = self.tokens.gather(1, order), self.mask.gather(1, order), True


def _start(model: Model, prompts: Sequence[Sequence[int]]) -> _State:
    """The first pass.

    A decoder's prompts end together, so the generated tokens line up in one column. An encoder's begin together,
    because positions in it may be counted over the padding too.
    """
    width, filler = max(map(len, prompts)), pad_id(model)
    left = model.family != ENCODER_DECODER

    def filled(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        more = ([value] * (width - len(row)) for row in rows)
        whole = ([*fill, *row] if left else [*row, *fill] for row, fill in zip(rows, more, strict=True))
        return torch.tensor(list(whole), device=model.device)

    ids, mask = filled(prompts, filler), filled([[1] * len(prompt) for prompt in prompts], 0)
    if left:
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
    for step in range(most):
        choosing = choose(None) if step == 0 else nullcontext([])
        with choosing as choices:
            output = _read(model, state)
        cache = cache_of(output)
        if not (cache or state.again):
            state.read_again()
            output = _read(model, state)
        logits = output.logits[0]
        tokens = logits.argmax(-1)
        state.add(tokens, cache)
        yield tokens.tolist(), logits.amax(-1).isfinite().tolist(), choices


def _read(model: Model, state: _State) -> Any:
    """The output of one pass, with logits ``[1, rows, vocabulary]`` after the last tokens."""
    rows = torch.arange(len(state.tokens), device=state.tokens.device)
    with head_at(model.network, rows, state.last, state.tokens.shape[1]):
        return model.network(**state.inputs())


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
