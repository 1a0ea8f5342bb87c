"""The scorer: log-probabilities of blanks and continuations, with shared beginnings computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring.budget import Budget
from knowledge_compression.evaluation.scoring.depths import depths
from knowledge_compression.evaluation.scoring.generation import Done
from knowledge_compression.evaluation.scoring.notes import Notes
from knowledge_compression.evaluation.scoring.positions import Slots, Watcher, position_of
from knowledge_compression.evaluation.scoring.questions import Blank, Likelihood, Question
from knowledge_compression.evaluation.scoring.reader import Asked, Reader, Reads, Request
from knowledge_compression.evaluation.scoring.trees import Tree, plant
from knowledge_compression.evaluation.scoring.ways import FASTEST, Ways, ways_of
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER, ENCODER
from knowledge_compression.models.prompts import NO_PROMPTS, Prompts
from knowledge_compression.progress import counted

if TYPE_CHECKING:
    from knowledge_compression.evaluation.scoring.helpers import Helpers

_TOKENS_A_STEP = 32  # of the budget per prompt in generation, as its keys and values count too


class Scorer:
    """Scores blanks and continuations with one model.

    Args:
        model: any family; its network may carry adapters, prompts or quantized modules.
        tokens_per_batch: padded tokens in one forward pass; None uses the best size found for this model and device.
        prompts: the prompts that a recovery placed before every input.
        dtype: dtype of the matrix products (see ``models.device``); None for the model's own.
        original: loads the dense model, for suites that compare with it.
        ways: how texts may share a forward pass; None uses the fastest correct ways for this network (see ``ways.py``).
        watcher: is told of every position at which tokens are predicted, but for generation and the lens.
        helpers: other processes that read batches too.

    Raises:
        BadInput: the model has prompts but ``prompts`` was not given.

    Attributes:
        notes: notes about items by id: ``chosen_prompts``, one index per layer (of the item's first text, if it has
            several), and ``finite`` (false) if its answer depends on values that are not finite.
        passes: number of batches read so far.
    """

    def __init__(
        self,
        model: Model,
        tokens_per_batch: int | None = None,
        *,
        prompts: Prompts = NO_PROMPTS,
        dtype: torch.dtype | None = None,
        original: Callable[[], Model] | None = None,
        ways: Ways | None = None,
        watcher: Watcher | None = None,
        helpers: Helpers | None = None,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.dtype = dtype
        self.original = original
        self.watcher = watcher
        self.helpers = helpers
        self.notes = Notes()
        self.passes = 0
        budget = Budget(model, tokens_per_batch, products=dtype)
        self.reader = Reader(model, budget, prompts, dtype, ways or FASTEST)
        if self.reader.lacks_prompts:
            raise BadInput(
                f"{model.name} reads prompts that a recovery put before its input; score it with what the recovery "
                "gave: Scorer(model, prompts=recovered.prompts), or kc.ask(model, suite, recovered)"
            )
        self.reader.ways = ways or ways_of(model, lambda ways: Scorer(model, 2048, ways=ways))

    @property
    def max_positions(self) -> int | None:
        """Longest input in tokens besides the prompts; None if positions are unlimited (T5)."""
        limit = self.model.max_positions
        return None if limit is None else limit - self.prompts.positions

    @property
    def budget(self) -> Budget:
        """What fits into a pass."""
        return self.reader.budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        self.reader.budget = budget

    @property
    def ways(self) -> Ways:
        """How texts may share a forward pass."""
        return self.reader.ways

    @property
    def fallbacks(self) -> list[str]:
        """Deviations to be recorded, e.g. smaller batches for lack of memory."""
        return self.budget.fallbacks

    @property
    def tokens_read(self) -> int:
        """Number of tokens in all forward passes so far."""
        return self.reader.tokens_read

    @property
    def tokens_padded(self) -> int:
        """Number of tokens of padding among them."""
        return self.reader.tokens_padded

    @property
    def branches(self) -> bool:
        """Whether the choices of a question can be branches of one row, see :class:`Reader`."""
        return self.reader.branches

    @property
    def end_to_end(self) -> bool:
        """Whether texts can lie end to end in one row, see :class:`Reader`."""
        return self.reader.end_to_end

    @property
    def soft_prompted(self) -> bool:
        """Whether peft places a soft prompt before the input, in a wrapper around the network."""
        return self.reader.soft_prompted

    def products(self) -> AbstractContextManager[None]:
        """The context in which the network scores, see :class:`Reader`."""
        return self.reader.products()

    def distributions(self, blanks: Sequence[Blank]) -> Iterator[tuple[list[int], Tensor]]:
        """Log-probabilities over the vocabulary at each blank.

        Yields:
            Batches in an order of the scorer's choice: the indices into ``blanks`` and float32 log-probabilities
            ``[len(indices), vocabulary]`` on the model's device. Reduce each batch before asking for the next.
        """
        lengths = [len(blank.ids) for blank in blanks]
        self.budget.settle(sum(lengths))
        batches = self._batches(lengths, [1] * len(blanks))
        for part, (logits, choices, seen) in self._passes("blanks", batches, blanks):
            if len(logits) != len(part):
                raise RuntimeError(f"{len(part)} blanks were read and {len(logits)} answered")
            if self.watcher and seen:
                self.watcher.saw([position_of(blanks[i]) for i in part], seen.states, seen.logits)
            for i, chosen in zip(part, choices, strict=False):
                self.notes.add(blanks[i].items, {"chosen_prompts": chosen})
            indices = iter(part)
            for rows in logits.split(self.budget.rows):
                log_probs = torch.log_softmax(rows.to(self.model.device).float(), dim=-1)
                batch_of_rows = list(islice(indices, len(rows)))
                self.notes.add_finite([blanks[i].items for i in batch_of_rows], log_probs[:, 0])
                yield batch_of_rows, log_probs

    def distributions_by_depth(self, blanks: Sequence[Blank]) -> Iterator[tuple[list[int], Tensor]]:
        """:meth:`distributions` before the first block and after each: ``[len(indices), depths, vocabulary]``."""
        if self.prompts.positions and self.model.family == ENCODER:
            raise BadInput(
                f"eval=[lens] cannot read the depths of {self.model.name} behind a prompt; choose recovery=lora or none"
            )
        count = depths(self.model.network)
        lengths = [len(blank.ids) for blank in blanks]
        self.budget.settle(sum(lengths))
        batches = self._batches(lengths, [count] * len(blanks))
        for part, (logits, choices, _) in self._passes("depths", batches, blanks):
            for i, chosen in zip(part, choices, strict=False):
                self.notes.add(blanks[i].items, {"chosen_prompts": chosen})
            states = logits[: count * len(part)].unflatten(0, (len(part), count)).to(self.model.device)
            yield part, torch.log_softmax(states.float(), dim=-1)

    def log_likelihoods(self, questions: Sequence[Question]) -> list[list[Likelihood]]:
        """The likelihood of every continuation of every question, in order (decoders and encoder-decoders)."""
        score = self._decoder_reads if self.model.family == DECODER else self._encoder_decoder_reads
        counts = [len(question.continuations) for question in questions]
        totals = np.zeros(sum(counts))
        greedy = np.ones(sum(counts), dtype=bool)
        asked = Slots(questions)
        reads = [self._told(found, asked) for found in score(questions)]
        for slots, log_probs, hits in reads:  # waits for the device only once, after the last batch
            np.add.at(totals, slots, log_probs.double().cpu().numpy())
            np.logical_and.at(greedy, slots, hits.cpu().numpy())
        ends = np.cumsum([0, *counts])
        items = [question.items for question in questions for _ in question.continuations]
        self.notes.add_finite(items, torch.from_numpy(totals))
        return [
            [Likelihood(float(totals[i]), bool(greedy[i])) for i in range(start, end)] for start, end in pairwise(ends)
        ]

    def generate(
        self, prompts: Sequence[Sequence[int]], most: int, done: Done, items: Sequence[Sequence[str]] | None = None
    ) -> list[list[int]]:
        """Greedy continuations, see :func:`~knowledge_compression.evaluation.scoring.generation.generate`.

        Args:
            prompts, most, done: as there.
            items: for each prompt, the ids of the items that it belongs to.
        """
        rows = max(1, self.budget.tokens // _TOKENS_A_STEP)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        batches = [order[start : start + rows] for start in range(0, len(order), rows)]
        said: list[list[int]] = [[] for _ in prompts]
        for part, found in self._passes("said", batches, prompts, most, done, bar="generating"):
            for i, one in zip(part, found, strict=True):
                said[i] = one.tokens
                of = items[i] if items else ()
                self.notes.add(of, {"chosen_prompts": one.chosen} if one.chosen else {})
                self.notes.add(of, {} if one.finite else {"finite": False})
        return said

    def trees_of(self, questions: Sequence[Question]) -> list[Tree]:
        """The rows that a decoder reads to score the questions, see :func:`~.trees.plant`."""
        return plant(
            questions,
            pairs_per_token=self.budget.pairs_per_token,
            longest=min(2 * self.budget.tokens, self.budget.reads),
            branches=self.branches,
            across=self.prompts.choosing is None,
        )

    def _decoder_reads(self, questions: Sequence[Question]) -> Iterator[Reads]:
        trees = self.trees_of(questions)
        self.budget.settle(sum(map(len, trees)))
        batches = list(self._batches([len(tree) for tree in trees], [tree.predictions for tree in trees]))
        for part, found in self._passes("trees", batches, trees, bar="scoring"):
            for i, chosen in zip(part, found.choices, strict=False):
                for question in trees[i].questions:
                    self.notes.add(questions[question].items, {"chosen_prompts": chosen}, order=question)
            yield found

    def _encoder_decoder_reads(self, questions: Sequence[Question]) -> Iterator[Reads]:
        starts = Slots(questions).starts
        asked = [Asked(question, int(starts[i])) for i, question in enumerate(questions) if question.continuations]
        lengths = [
            len(question.context) + sum(len(c) + len(question.context) // 4 for c in question.continuations)
            for question, _ in asked
        ]
        self.budget.settle(sum(lengths))
        reads = [sum(map(len, question.continuations)) for question, _ in asked]
        for _, found in self._passes("answers", list(self._batches(lengths, reads)), asked, bar="scoring"):
            yield found

    def _told(self, found: Reads, asked: Slots) -> tuple[Any, Tensor, Tensor]:
        """What is kept of reads, once the watcher has been told."""
        seen = found.seen
        if self.watcher and seen and seen.of_read is not None and seen.targets is not None:
            positions = asked.positions(seen.keys, seen.of_read, seen.targets, found.slots)
            self.watcher.saw(positions, seen.states, seen.logits)
        return found.slots, found.log_probs, found.hits

    def _batches(self, lengths: Sequence[int], reads: Sequence[int]) -> Iterator[list[int]]:
        return self.budget.batches(lengths, reads, end_to_end=self.end_to_end, alone=not self.reader.ways.padded)

    def _passes(
        self, kind: str, batches: Iterable[list[int]], things: Sequence[Any], *more: Any, bar: str = ""
    ) -> Iterator[tuple[list[int], Any]]:
        """Read batches, here and where there are helpers by these too.

        Args:
            kind, more: see :class:`~.reader.Request`.
            batches: indices into ``things``.
            things: what is read.
            bar: the title of a progress bar; without one there is none.

        Yields:
            The indices of what was read in a pass, and what that said.
        """
        watched = self.watcher is not None
        work = ((batch, Request(kind, [things[i] for i in batch], watched, more)) for batch in batches)
        helpers = self.helpers if self.helpers and self.helpers.processes > 1 else None
        read = helpers.read(self.reader, work) if helpers else self.reader.read_all(work)
        shown = counted(len(batches), bar) if bar and isinstance(batches, Sized) else nullcontext(lambda _: None)
        with shown as advance:
            for batch, start, end, found in read:
                yield batch[start:end], found
                if end == len(batch):
                    self.passes += 1
                    advance(1)
