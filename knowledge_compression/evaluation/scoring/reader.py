"""One forward pass at a time: what a network says of texts that lie in one batch.

A :class:`Reader` knows nothing of suites, and can be handed to other processes (:mod:`.helpers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knowledge_compression.evaluation.scoring.budget import Budget
from knowledge_compression.evaluation.scoring.depths import head_at_every_depth
from knowledge_compression.evaluation.scoring.generation import Done, Said, filler_id, generate
from knowledge_compression.evaluation.scoring.heads import head_at, read_off
from knowledge_compression.evaluation.scoring.layout import EndToEnd, Layout, Rows
from knowledge_compression.evaluation.scoring.packed_attention import can_lie_end_to_end
from knowledge_compression.evaluation.scoring.positions import keys_in_rows, keys_in_trees
from knowledge_compression.evaluation.scoring.products import linears_for_onednn, multiplied_by_onednn
from knowledge_compression.evaluation.scoring.questions import Blank, Question
from knowledge_compression.evaluation.scoring.trees import Tree
from knowledge_compression.evaluation.scoring.ways import FASTEST, Ways
from knowledge_compression.memory import is_out_of_memory
from knowledge_compression.models import Model
from knowledge_compression.models.device import multiplied_in
from knowledge_compression.models.families import ENCODER, ENCODER_DECODER
from knowledge_compression.models.prompts import NO_PROMPTS, Choices, Prompts

_PROMPTED = "prompted"  # the attention function of a decoder with prompts
_BRANCHING_ATTENTION = ("sdpa", "eager", _PROMPTED)  # attention functions that take a mask of any shape


class Asked(NamedTuple):
    """A question of an encoder-decoder, and the number of its first continuation over all questions."""

    question: Question
    start: int


class Seen(NamedTuple):
    """What a watcher is told of a pass.

    Attributes:
        states, logits: what the head read and said, ``[positions, any]`` each.
        keys: of the positions, where reads refer to them; a blank has its own.
        of_read, targets: for each read, the index of its position and its token, ``[reads]`` each.
    """

    states: Tensor
    logits: Tensor
    keys: Sequence[bytes] = ()
    of_read: NDArray[np.int64] | None = None
    targets: NDArray[np.int64] | None = None


class Reads(NamedTuple):
    """What a pass says of continuations.

    Attributes:
        slots: the continuation of each read, by its number, ``[reads]``.
        log_probs, hits: the log-probability of each read's token, and whether it is the most likely, ``[reads]`` each.
        choices: for each row, the prompts that were selected; empty without a selection.
        seen: what a watcher is told, if there is one.
    """

    slots: NDArray[np.int64]
    log_probs: Tensor
    hits: Tensor
    choices: Choices
    seen: Seen | None


class Logits(NamedTuple):
    """What a pass says at blanks: ``logits`` ``[blanks (times depths), vocabulary]``; ``choices`` and ``seen`` as in
    :class:`Reads`."""

    logits: Tensor
    choices: Choices
    seen: Seen | None


class Request(NamedTuple):
    """Things to be read in one pass, or in several if memory does not suffice.

    Attributes:
        kind: the name of the method of :class:`Reader` that reads them.
        things: trees, blanks, questions or prompts.
        watched: whether a watcher is to be told of it.
        more: further arguments of the method.
    """

    kind: str
    things: Sequence[Any]
    watched: bool = False
    more: tuple[Any, ...] = ()


class Reader:
    """Reads batches with one model.

    Args:
        model: any family; its network may carry adapters, prompts or quantized modules.
        prompts: the prompts that a recovery placed before every input.
        dtype: dtype of the matrix products (see ``models.device``); None for the model's own.
        ways: how texts may share a forward pass.
        budget: what fits into a pass.

    Attributes:
        tokens_read, tokens_padded: number of tokens in all forward passes so far, and of padding among them.
    """

    def __init__(
        self,
        model: Model,
        budget: Budget,
        prompts: Prompts = NO_PROMPTS,
        dtype: torch.dtype | None = None,
        ways: Ways = FASTEST,
    ) -> None:
        self.model = model
        self.budget = budget
        self.prompts = prompts
        self.dtype = dtype
        self.ways = ways
        self.linears = linears_for_onednn(model.network) if dtype is None else []
        self.tokens_read = 0
        self.tokens_padded = 0

    @property
    def branches(self) -> bool:
        """Whether the choices of a question can be branches of one row.

        They cannot if the attention function builds its own mask, or if peft places a soft prompt before the input and
        so accepts no mask of ours. Then every distinct text is a separate row.
        """
        takes_masks = self.model.network.config._attn_implementation in _BRANCHING_ATTENTION
        return self.ways.branching and takes_masks and not self.soft_prompted

    @property
    def end_to_end(self) -> bool:
        """Whether texts can lie end to end in one row, without padding, see :class:`EndToEnd`.

        They cannot if prompts are placed before each row, because each text needs its own.
        """
        able = self.model.family != ENCODER_DECODER and not self.soft_prompted and self.prompts.positions == 0
        return self.ways.end_to_end and able and can_lie_end_to_end(self.model.network)

    @property
    def soft_prompted(self) -> bool:
        """Whether peft places a soft prompt before the input, in a wrapper around the network."""
        return bool(getattr(getattr(self.model.network, "active_peft_config", None), "is_prompt_learning", False))

    @property
    def lacks_prompts(self) -> bool:
        """Whether the network reads prompts that nobody told this reader of."""
        return self.model.network.config._attn_implementation == _PROMPTED and not self.prompts.positions

    def light(self) -> Reader:
        """A reader like this one, without what matters only to those who asked for the model."""
        light = copy(self)
        light.model = replace(self.model, provenance={}, objective=None, on_disk=None)
        light.budget = self.budget.of(light.model)
        return light

    def read(self, request: Request) -> Iterator[tuple[int, int, Any]]:
        """Read a batch; if memory does not suffice, read its halves and use half the budget from then on.

        Yields:
            The part of the things that was read, from one index to before another, and the result of the pass.
        """
        yield from self._fitting(request, 0, len(request.things))

    def read_all(self, work: Iterable[tuple[list[int], Request]]) -> Iterator[tuple[list[int], int, int, Any]]:
        """Read requests one after the other: for each, its batch with what :meth:`read` yields."""
        for batch, request in work:
            for part in self.read(request):
                yield (batch, *part)

    def _fitting(self, request: Request, start: int, end: int) -> Iterator[tuple[int, int, Any]]:
        things = request.things[start:end]
        try:
            with self.products():
                found = getattr(self, request.kind)(things, request.watched, *request.more)
            yield start, end, found
            return
        except RuntimeError as error:
            if len(things) == 1 or not is_out_of_memory(error):
                raise
        self.budget.halve()
        middle = start + len(things) // 2
        yield from self._fitting(request, start, middle)
        yield from self._fitting(request, middle, end)

    @contextmanager
    def products(self) -> Iterator[None]:
        """The context in which the network scores: products in the chosen dtype, float32 by the faster library."""
        with multiplied_by_onednn(self.linears), multiplied_in(self.dtype, self.model.device):
            yield

    @torch.inference_mode()
    def trees(self, trees: Sequence[Tree], watched: bool) -> Reads:
        """What a decoder says of the continuations in trees."""
        layout = self._layout([len(tree) for tree in trees], [not tree.is_chain for tree in trees])
        ids = self._laid(layout, np.concatenate([tree.ids for tree in trees]))
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if layout.has_own_places or not all(tree.is_chain for tree in trees):
            depths, ends = (np.concatenate([getattr(tree, name) for tree in trees]) for name in ("depths", "ends"))
            inputs |= self._places(layout, depths, ends)
        nodes = np.concatenate([start + tree.nodes for start, tree in zip(layout.starts, trees, strict=True)])
        wanted, of_read = np.unique(nodes, return_inverse=True)
        flat = torch.from_numpy(wanted).to(ids.device)
        at = head_at(self.model.network, flat // layout.width, flat % layout.width, layout.width)
        with self._choosing([tree.context for tree in trees]) as choices, at as states:
            logits = layout.read(self.model.network, inputs).logits[0]
        targets, slots = (np.concatenate([getattr(tree, name) for tree in trees]) for name in ("targets", "slots"))
        seen = None
        if watched:
            seen = Seen(states[0][0], logits, keys_in_trees(trees, layout.starts, wanted), of_read, targets)
        return Reads(slots, *read_off(logits, of_read, targets, self.budget.rows), choices, seen)

    @torch.inference_mode()
    def answers(self, asked: Sequence[Asked], watched: bool) -> Reads:
        """What an encoder-decoder says of continuations: one encoder pass over each context, and one decoder row per
        distinct beginning."""
        network, begin = self.model.network, self.model.decoder_start
        rows: dict[tuple[int, tuple[int, ...]], int] = {}
        reads: list[tuple[int, int, int, int]] = []  # row, position in it, target token, continuation
        for q, (question, start) in enumerate(asked):
            for c, answer in enumerate(question.continuations):
                row = rows.setdefault((q, (begin, *answer[:-1])), len(rows))
                reads += [(row, place, token, start + c) for place, token in enumerate(answer)]
        ids, mask = self._pad([question.context for question, _ in asked])
        said, _ = self._pad([beginning for _, beginning in rows])
        of_question = torch.tensor([q for q, _ in rows])  # on the CPU: a divided encoder ends on any device
        inputs = {"attention_mask": mask[of_question], "decoder_input_ids": said, "use_cache": False}
        if self.soft_prompted:  # the wrapper places the prompt before the encoder's input
            inputs["input_ids"] = ids[of_question]
        else:
            encoded = network.get_encoder()(input_ids=ids, attention_mask=mask)
            encoded["last_hidden_state"] = encoded.last_hidden_state[of_question]
            inputs["encoder_outputs"] = encoded
        of_row, places, targets, slots = np.array(reads, dtype=np.int64).T
        wanted, of_read = np.unique(of_row * said.shape[1] + places, return_inverse=True)
        flat = torch.from_numpy(wanted).to(ids.device)
        with head_at(network, flat // said.shape[1], flat % said.shape[1], said.shape[1]) as states:
            logits = network(**inputs).logits[0]
        seen = None
        if watched:
            keys = keys_in_rows([(asked[q].question.context, text) for q, text in rows], said.shape[1], wanted)
            seen = Seen(states[0][0], logits, keys, of_read, targets)
        return Reads(slots, *read_off(logits, of_read, targets, self.budget.rows), [], seen)

    def blanks(self, blanks: Sequence[Blank], watched: bool) -> Logits:
        """What the model says at blanks."""
        return self._blanks(blanks, watched, partial(head_at, early=self.prompts.positions == 0))

    def depths(self, blanks: Sequence[Blank], watched: bool) -> Logits:
        """What the head says at blanks before the first block and after each; no watcher is told."""
        return self._blanks(blanks, False, head_at_every_depth)

    def said(self, prompts: Sequence[Sequence[int]], watched: bool, most: int, done: Done) -> list[Said]:
        """Greedy continuations, see :func:`~knowledge_compression.evaluation.scoring.generation.generate`."""
        return generate(self.model, prompts, most, done, soft=self.prompts)

    @torch.inference_mode()
    def _blanks(self, blanks: Sequence[Blank], watched: bool, at: Callable[..., AbstractContextManager[Any]]) -> Logits:
        if self.end_to_end:
            return self._blanks_end_to_end(blanks, watched, at)
        ids, mask = self._pad([blank.ids for blank in blanks])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        read_from, places = ids, mask.sum(-1) - 1
        if self.model.family == ENCODER:
            places = torch.tensor([blank.position for blank in blanks], device=ids.device)
        else:
            inputs["use_cache"] = False
        if self.model.family == ENCODER_DECODER:
            read_from, said_mask = self._pad([blank.decoder_ids for blank in blanks])
            inputs["decoder_input_ids"], places = read_from, said_mask.sum(-1) - 1
        rows = torch.arange(len(blanks), device=ids.device)
        with (
            self._choosing([len(blank.ids) for blank in blanks]) as choices,
            at(self.model.network, rows, places, read_from.shape[1]) as states,
        ):
            logits: Tensor = self.model.network(**inputs).logits.flatten(0, 1)
        return Logits(logits, choices, Seen(states[0][0], logits) if watched else None)

    def _blanks_end_to_end(
        self, blanks: Sequence[Blank], watched: bool, at: Callable[..., AbstractContextManager[Any]]
    ) -> Logits:
        lengths = np.array([len(blank.ids) for blank in blanks])
        layout = self._layout(lengths.tolist(), [False] * len(blanks))
        ids = np.fromiter(chain.from_iterable(blank.ids for blank in blanks), np.int64, count=lengths.sum())
        depths = np.arange(len(ids)) - np.repeat(layout.starts, lengths)
        inputs = {"input_ids": self._laid(layout, ids)} | self._places(layout, depths, np.repeat(lengths, lengths))
        asked = [n - 1 if blank.position is None else blank.position for n, blank in zip(lengths, blanks, strict=True)]
        flat = torch.from_numpy(layout.starts + asked).to(self.model.device)
        with at(self.model.network, flat // layout.width, flat % layout.width, layout.width) as states:
            logits: Tensor = layout.read(self.model.network, inputs).logits.flatten(0, 1)
        return Logits(logits, [], Seen(states[0][0], logits) if watched else None)

    def _choosing(self, context: Sequence[int]) -> AbstractContextManager[Choices]:
        """Let each row of a pass select among the prompts, if there is a choice, by this many of its first tokens."""
        return nullcontext([]) if self.prompts.choosing is None else self.prompts.choosing(context)

    def _layout(self, lengths: Sequence[int], branching: Sequence[bool]) -> Layout:
        """End to end if attention can be informed where a text ends, otherwise one row per text."""
        if not self.end_to_end:
            return Rows(lengths)
        window = getattr(self.model.text_config, "sliding_window", None) or max(lengths)
        return EndToEnd(lengths, [b or length > window for b, length in zip(branching, lengths, strict=True)])

    def _laid(self, layout: Layout, ids: NDArray[np.int64]) -> Tensor:
        laid = layout.lay(ids, filler_id(self.model))
        self._count(laid.size, len(ids))
        return torch.from_numpy(laid).to(self.model.device)

    def _places(self, layout: Layout, depths: NDArray[np.int64], ends: NDArray[np.int64]) -> dict[str, Any]:
        """Positions, and masks for tokens that do not see everything before them; padding sees only itself."""
        config, device = self.model.text_config, self.model.device
        places, until = (torch.from_numpy(layout.lay(values)).to(device) for values in (depths, ends))
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())

        def mask(span: int | None) -> Tensor:
            return layout.masks(until, places, self.model.dtype, span)

        if "sliding_attention" in kinds:
            masks: Any = {"full_attention": mask(None), "sliding_attention": mask(window)}
        else:
            masks = mask(None if kinds else window)
        return {"attention_mask": masks, "position_ids": self.model.first_position + places}

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Rows padded on the right and their masks, int64 ``[rows, longest]`` each."""
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        real = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(real.shape, filler_id(self.model))
        ids[real] = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
        self._count(ids.size, int(lengths.sum()))
        padded, mask = (torch.from_numpy(array).to(self.model.device) for array in (ids, real.astype(np.int64)))
        return padded, mask

    def _count(self, tokens: int, real: int) -> None:
        self.tokens_read += tokens
        self.tokens_padded += tokens - real
