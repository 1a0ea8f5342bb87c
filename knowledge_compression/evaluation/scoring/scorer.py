"""The scorer: log-probabilities of blanks and continuations, with shared beginnings computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring.budget import Budget
from knowledge_compression.evaluation.scoring.depths import depths, head_at_every_depth
from knowledge_compression.evaluation.scoring.generation import Done, filler_id, generate
from knowledge_compression.evaluation.scoring.heads import head_at, read_off
from knowledge_compression.evaluation.scoring.layout import EndToEnd, Layout, Rows
from knowledge_compression.evaluation.scoring.notes import Notes
from knowledge_compression.evaluation.scoring.packed_attention import can_lie_end_to_end
from knowledge_compression.evaluation.scoring.positions import Slots, Watcher, keys_in_rows, keys_in_trees, position_of
from knowledge_compression.evaluation.scoring.products import linears_for_onednn, multiplied_by_onednn
from knowledge_compression.evaluation.scoring.questions import Blank, Likelihood, Question
from knowledge_compression.evaluation.scoring.trees import Tree, plant
from knowledge_compression.evaluation.scoring.ways import Ways, ways_of
from knowledge_compression.memory import is_out_of_memory
from knowledge_compression.models import Model
from knowledge_compression.models.device import multiplied_in
from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER
from knowledge_compression.models.prompts import NO_PROMPTS, Choices, Prompts
from knowledge_compression.progress import shown

_TOKENS_A_STEP = 32  # of the budget per prompt in generation, as its keys and values count too
_PROMPTED = "prompted"  # the attention function of a decoder with prompts
_BRANCHING_ATTENTION = ("sdpa", "eager", _PROMPTED)  # attention functions that take a mask of any shape

# The result of one forward pass: the continuations of the reads, their log-probabilities and greedy hits.
_Reads = tuple[NDArray[np.int64], Tensor, Tensor]


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

    Raises:
        BadInput: the model has prompts but ``prompts`` was not given.

    Attributes:
        notes: notes about items by id: ``chosen_prompts``, one index per layer (of the item's first text, if it has
            several), and ``finite`` (false) if its answer depends on values that are not finite.
        tokens_read, tokens_padded: number of tokens in all forward passes so far, and of padding among them.
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
    ) -> None:
        if model.network.config._attn_implementation == _PROMPTED and not prompts.positions:
            raise BadInput(
                f"{model.name} reads prompts that a recovery put before its input; score it with what the recovery "
                "gave: Scorer(model, prompts=recovered.prompts), or kc.ask(model, suite, recovered)"
            )
        self.model = model
        self.prompts = prompts
        self.dtype = dtype
        self.original = original
        self.watcher = watcher
        self.notes = Notes()
        self.ways = ways or ways_of(model, lambda ways: Scorer(model, 2048, ways=ways))
        self.budget = Budget(model, tokens_per_batch)
        self._linears = linears_for_onednn(model.network) if dtype is None else []
        self.tokens_read = 0
        self.tokens_padded = 0

    @property
    def max_positions(self) -> int | None:
        """Longest input in tokens besides the prompts; None if positions are unlimited (T5)."""
        limit = self.model.max_positions
        return None if limit is None else limit - self.prompts.positions

    @property
    def fallbacks(self) -> list[str]:
        """Deviations to be recorded, e.g. smaller batches for lack of memory."""
        return self.budget.fallbacks

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

    def distributions(self, blanks: Sequence[Blank]) -> Iterator[tuple[list[int], Tensor]]:
        """Log-probabilities over the vocabulary at each blank.

        Yields:
            Batches in an order of the scorer's choice: the indices into ``blanks`` and float32 log-probabilities
            ``[len(indices), vocabulary]`` on the model's device. Reduce each batch before asking for the next.
        """
        lengths = [len(blank.ids) for blank in blanks]
        self.budget.settle(sum(lengths))
        at = partial(head_at, early=self.prompts.positions == 0)
        for batch in self._batches(lengths, [1] * len(blanks)):
            for part, logits in self._fitting(batch, lambda part: self._blank_logits([blanks[i] for i in part], at)):
                if len(logits) != len(part):
                    raise RuntimeError(f"{len(part)} blanks were read and {len(logits)} answered")
                indices = iter(part)
                for rows in logits.split(self.budget.rows):
                    log_probs = torch.log_softmax(rows.float(), dim=-1)
                    batch_of_rows = list(islice(indices, len(rows)))
                    self.notes.add_finite([blanks[i].items for i in batch_of_rows], log_probs[:, 0])
                    yield batch_of_rows, log_probs

    def distributions_by_depth(self, blanks: Sequence[Blank]) -> Iterator[tuple[list[int], Tensor]]:
        """:meth:`distributions` before the first block and after each: ``[len(indices), depths, vocabulary]``."""
        if self.prompts.positions and self.model.family == ENCODER:
            raise BadInput(
                f"eval=[lens] cannot look inside {self.model.name} behind a prompt; choose recovery=lora or none"
            )
        count = depths(self.model.network)
        lengths = [len(blank.ids) for blank in blanks]
        self.budget.settle(sum(lengths))
        for batch in self._batches(lengths, [count] * len(blanks)):
            for part, logits in self._fitting(
                batch, lambda part: self._blank_logits([blanks[i] for i in part], head_at_every_depth)
            ):
                states = logits[: count * len(part)].unflatten(0, (len(part), count))
                yield part, torch.log_softmax(states.float(), dim=-1)

    def log_likelihoods(self, questions: Sequence[Question]) -> list[list[Likelihood]]:
        """The likelihood of every continuation of every question, in order (decoders and encoder-decoders)."""
        score = self._decoder_reads if self.model.family == DECODER else self._encoder_decoder_reads
        counts = [len(question.continuations) for question in questions]
        totals = np.zeros(sum(counts))
        greedy = np.ones(sum(counts), dtype=bool)
        for slots, log_probs, hits in list(score(questions)):  # waits for the device only once, after the last batch
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
        with self.products():
            said = generate(self.model, prompts, most, done, rows=rows, soft=self.prompts)
        for one, of in zip(said, items or (), strict=False):
            self.notes.add(of, {"chosen_prompts": one.chosen} if one.chosen else {})
            self.notes.add(of, {} if one.finite else {"finite": False})
        return [one.tokens for one in said]

    def trees_of(self, questions: Sequence[Question]) -> list[Tree]:
        """The rows that a decoder reads to score the questions, see :func:`~.trees.plant`."""
        return plant(
            questions,
            pairs_per_token=self.budget.pairs_per_token,
            longest=min(2 * self.budget.tokens, self.budget.reads),
            branches=self.branches,
            across=self.prompts.choosing is None,
        )

    def _decoder_reads(self, questions: Sequence[Question]) -> Iterator[_Reads]:
        trees, asked = self.trees_of(questions), Slots(questions)
        self.budget.settle(sum(map(len, trees)))
        batches = self._batches([len(tree) for tree in trees], [tree.predictions for tree in trees])
        for batch in shown(list(batches), "scoring"):
            for part, reads in self._fitting(batch, lambda part: self._read_trees([trees[i] for i in part], asked)):
                *found, choices = reads
                for tree, chosen in zip([trees[i] for i in part], choices, strict=False):
                    for question in tree.questions:
                        self.notes.add(questions[question].items, {"chosen_prompts": chosen}, order=question)
                yield tuple(found)

    @torch.inference_mode()
    def _read_trees(self, trees: Sequence[Tree], asked: Slots) -> tuple[NDArray[np.int64], Tensor, Tensor, Choices]:
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
        if self.watcher:
            keys = keys_in_trees(trees, layout.starts, wanted)
            self.watcher.saw(asked.positions(keys, of_read, targets, slots), states[0][0], logits)
        return slots, *read_off(logits, of_read, targets, self.budget.rows), choices

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

    def _encoder_decoder_reads(self, questions: Sequence[Question]) -> Iterator[_Reads]:
        every = Slots(questions)
        asked = [i for i, question in enumerate(questions) if question.continuations]
        lengths = [
            len(questions[i].context) + sum(len(c) + len(questions[i].context) // 4 for c in questions[i].continuations)
            for i in asked
        ]
        self.budget.settle(sum(lengths))
        reads = [sum(map(len, questions[i].continuations)) for i in asked]
        batches = self._batches(lengths, reads)
        for batch in shown(list(batches), "scoring"):
            for _, reads in self._fitting(
                batch,
                lambda part: self._read_answers([asked[i] for i in part], every),
            ):
                yield reads

    @torch.inference_mode()
    def _read_answers(self, asked: Sequence[int], every: Slots) -> _Reads:
        """One encoder pass over each context, and one decoder row per distinct beginning."""
        network, begin = self.model.network, self.model.decoder_start
        questions, starts = [every.questions[i] for i in asked], every.starts[asked]
        rows: dict[tuple[int, tuple[int, ...]], int] = {}
        reads: list[tuple[int, int, int, int]] = []  # row, position in it, target token, continuation
        for q, (question, start) in enumerate(zip(questions, starts, strict=True)):
            for c, answer in enumerate(question.continuations):
                row = rows.setdefault((q, (begin, *answer[:-1])), len(rows))
                reads += [(row, place, token, start + c) for place, token in enumerate(answer)]
        ids, mask = self._pad([question.context for question in questions])
        said, _ = self._pad([beginning for _, beginning in rows])
        of_question = torch.tensor([q for q, _ in rows], device=ids.device)
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
        if self.watcher:
            keys = keys_in_rows([(questions[q].context, text) for q, text in rows], said.shape[1], wanted)
            self.watcher.saw(every.positions(keys, of_read, targets, slots), states[0][0], logits)
        return slots, *read_off(logits, of_read, targets, self.budget.rows)

    def _batches(self, lengths: Sequence[int], reads: Sequence[int]) -> Iterator[list[int]]:
        return self.budget.batches(lengths, reads, end_to_end=self.end_to_end, alone=not self.ways.padded)

    def _fitting(self, batch: list[int], score: Callable[[list[int]], Any]) -> Iterator[tuple[list[int], Any]]:
        """Score a batch; if memory does not suffice, score its halves and use half the budget from then on."""
        try:
            with self.products():
                scored = score(batch)
            yield batch, scored
            return
        except RuntimeError as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        self.budget.halve()
        for part in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            yield from self._fitting(part, score)

    @contextmanager
    def products(self) -> Iterator[None]:
        """The context in which the network scores: products in the chosen dtype, float32 by the faster library."""
        with multiplied_by_onednn(self._linears), multiplied_in(self.dtype, self.model.device):
            yield

    @torch.inference_mode()
    def _blank_logits(self, blanks: Sequence[Blank], at: Callable[..., AbstractContextManager[Any]]) -> Tensor:
        if self.end_to_end:
            return self._blank_logits_end_to_end(blanks, at)
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
        self._tell(blanks, states, logits)
        for blank, chosen in zip(blanks, choices, strict=False):
            self.notes.add(blank.items, {"chosen_prompts": chosen})
        return logits

    def _blank_logits_end_to_end(
        self, blanks: Sequence[Blank], at: Callable[..., AbstractContextManager[Any]]
    ) -> Tensor:
        lengths = np.array([len(blank.ids) for blank in blanks])
        layout = self._layout(lengths.tolist(), [False] * len(blanks))
        ids = np.fromiter(chain.from_iterable(blank.ids for blank in blanks), np.int64, count=lengths.sum())
        depths = np.arange(len(ids)) - np.repeat(layout.starts, lengths)
        inputs = {"input_ids": self._laid(layout, ids)} | self._places(layout, depths, np.repeat(lengths, lengths))
        asked = [n - 1 if blank.position is None else blank.position for n, blank in zip(lengths, blanks, strict=True)]
        flat = torch.from_numpy(layout.starts + asked).to(self.model.device)
        with at(self.model.network, flat // layout.width, flat % layout.width, layout.width) as states:
            logits: Tensor = layout.read(self.model.network, inputs).logits.flatten(0, 1)
        self._tell(blanks, states, logits)
        return logits

    def _tell(self, blanks: Sequence[Blank], states: list[Tensor] | None, logits: Tensor) -> None:
        """Tell the watcher of blanks, unless they were read at every depth."""
        if self.watcher and states:
            self.watcher.saw([position_of(blank) for blank in blanks], states[0][0], logits)

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
