"""How far a compressed model's distributions lie from the dense model's, at every position that a suite reads.

With p the dense model's distribution over the vocabulary and q the compressed one's: KL(p || q), its reverse
KL(q || p), whether both rank the same token first, and the change of the right token's probability. The dense side is
recorded once for a suite (:mod:`.dense_states`) and used by every run that compares with it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from knowledge_compression.cache import cached_folder, keep_within
from knowledge_compression.evaluation.dense_states import ANSWERS, DenseStates, Recording
from knowledge_compression.evaluation.scoring import Scorer, likeliest
from knowledge_compression.evaluation.suite import Evaluation, Suite, ask
from knowledge_compression.heavy import pl, torch
from knowledge_compression.identity import digest_of
from knowledge_compression.models.bodies import head_over
from knowledge_compression.models.families import ENCODER_DECODER

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

    from knowledge_compression.evaluation.scoring.positions import Position
    from knowledge_compression.models import Model

log = logging.getLogger(__name__)

KL, REVERSE, SAME_TOP, GOLD = "kl", "reverse_kl", "same_top", "gold_change"
# Columns of the item table, one entry per position that is read for the item (``gold_change``: one per position with a
# known right token, or else one for the whole answer).
COLUMNS: Mapping[str, str] = {KL: "Float32", REVERSE: "Float32", SAME_TOP: "Boolean", GOLD: "Float32"}
_QUANTILES = {"median": 0.5, "p99": 0.99, "p99_9": 0.999}
_BYTES = 64 << 20  # dense logits processed at a time
FORMAT = 1  # raised whenever recorded states would be misread


def scores(suite: Suite) -> bool:
    """Whether a suite reads log-probabilities, so that distributions can be compared."""
    return bool(getattr(suite, "scores", True))


@dataclass
class Beside:
    """The dense model with which a model is compared.

    Attributes:
        load: loads the dense model; called at most once.
        deciding: everything besides the suite that decides its states.
        dtype: dtype of the products in its scoring, as for the other model; a model narrower than float32 keeps its
            own.
        is_asked: whether the evaluated model is the dense one itself; its states are then recorded, and nothing is
            compared.
        gigabytes: upper bound for all recorded states in the cache; the least recently used are deleted first. 0 keeps
            none.
    """

    load: Callable[[], Model]
    deciding: Any
    dtype: torch.dtype | None = None
    is_asked: bool = False
    gigabytes: float = 32.0
    _loaded: list[Model] = field(default_factory=list, repr=False)

    @property
    def model(self) -> Model:
        """The dense model."""
        if not self._loaded:
            self._loaded.append(self.load())
        return self._loaded[0]

    @property
    def _products(self) -> torch.dtype | None:
        return self.dtype if self.model.dtype == torch.float32 else None

    def ask(self, suite: Suite, scorer: Scorer, asked: Any) -> Evaluation:
        """Evaluate a suite, and compare with the dense model at every position.

        Args:
            suite: a suite or a part of one.
            scorer: scores with the evaluated model.
            asked: everything that decides the suite's questions, as plain data.

        Returns:
            The result of :func:`ask`; the items also have :data:`COLUMNS`, unless the dense model itself is evaluated.

        Raises:
            BadInput: the suite does not fit, or the dense model cannot be loaded.
        """
        if not scores(suite):
            return ask(suite, scorer)
        room = scorer.max_positions
        name = self.place(asked, room)
        if self.is_asked:
            return self._recorded(suite, scorer, name)
        with self._states(suite, name, room) as states:
            watcher = scorer.watcher = Comparing(states, self._dense_logits)
            evaluation = ask(suite, scorer)
        evaluation.items = watcher.beside(evaluation.items)
        if watcher.unknown:
            missing = f"{watcher.unknown} positions are not compared, because the dense model does not read them"
            evaluation.fallbacks.append(missing)
            log.warning(missing)
        elif len(evaluation.items) and evaluation.items[KL].is_null().all():
            tasks = ", ".join(evaluation.items["task"].unique().sort())
            log.warning("distance=true: nothing of %s is compared, because generated answers have no distance", tasks)
        return evaluation

    def place(self, asked: Any, room: int | None) -> str:
        """The place of the dense model's states in the cache.

        Args:
            asked: as for :meth:`ask`.
            room: the longest text that the evaluated model can read.
        """
        return f"dense_states/{digest_of([FORMAT, _our_code(), str(self.dtype), self.deciding, asked, room])}"

    def _recorded(self, suite: Suite, scorer: Scorer, name: str) -> Evaluation:
        """Evaluate the dense model itself, and record its states unless they exist."""
        asked: list[Evaluation] = []
        if self.gigabytes:
            keep_within(
                cached_folder(name, lambda folder: asked.append(_record(suite, scorer, folder))), self.gigabytes
            )
        return asked[0] if asked else ask(suite, scorer)

    @contextmanager
    def _states(self, suite: Suite, name: str, room: int | None) -> Iterator[DenseStates]:
        """The dense model's states for a suite, recorded now if no run has recorded them."""

        def make(folder: Path) -> None:
            log.info("the dense model is evaluated too, once for all runs that compare with it")
            _record(suite, _Silent(self.model, dtype=self._products, room=room), folder)

        if self.gigabytes:
            folder = cached_folder(name, make)
            keep_within(folder, self.gigabytes)
            with closing(DenseStates(folder)) as states:
                yield states
            return
        with TemporaryDirectory() as scratch:
            make(Path(scratch))
            with closing(DenseStates(Path(scratch))) as states:
                yield states

    @cached_property
    def _head(self) -> Scorer:
        return Scorer(self.model, dtype=self._products)

    @torch.inference_mode()
    def _dense_logits(self, states: Tensor) -> Tensor:
        """The dense model's logits ``[positions, vocabulary]`` from states ``[positions, hidden]``."""
        one = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        inputs = {"input_ids": one} | ({"decoder_input_ids": one} if self.model.family == ENCODER_DECODER else {})
        with self._head.products(), head_over(self.model.network, states.to(self.model.device)[None]):
            logits: Tensor = self.model.network(**inputs).logits[0]
        return logits


class _Silent(Scorer):
    """A scorer of the dense model, limited to the input length of the other model, which generates no text."""

    def __init__(self, model: Model, *, dtype: torch.dtype | None, room: int | None) -> None:
        self._room = room
        super().__init__(model, dtype=dtype)

    @property
    def max_positions(self) -> int | None:
        return self._room

    def generate(self, prompts: Sequence[Sequence[int]], *_: Any, **__: Any) -> list[list[int]]:
        """Generate nothing: generated text is not compared."""
        return [[] for _ in prompts]


def _record(suite: Suite, scorer: Scorer, folder: Path) -> Evaluation:
    recording = scorer.watcher = Recording(folder)
    evaluation = ask(suite, scorer)
    recording.end(evaluation)
    return evaluation


class Comparing:
    """A watcher that compares every position with the dense model's state there.

    Args:
        states: the dense model's states.
        head: computes the dense model's logits from states.

    Attributes:
        unknown: number of positions without a state.
    """

    def __init__(self, states: DenseStates, head: Callable[[Tensor], Tensor]) -> None:
        self._states = states
        self._head = head
        self._found: list[pl.DataFrame] = []
        self.unknown = 0

    def saw(self, positions: Sequence[Position], states: Tensor, logits: Tensor) -> None:
        """Compare; logits are processed in parts, so that a second set of them does not fill the memory."""
        rows = self._states.rows([position.key for position in positions])
        asked = np.array([bool(position.gold) for position in positions])
        there = np.flatnonzero(asked & (rows >= 0))
        self.unknown += int(asked.sum()) - len(there)
        if not len(there):
            return
        known = [positions[i] for i in there.tolist()]
        owners = [(place, item, gold) for place, one in enumerate(known) for item, gold in one.gold.items()]
        rows_of_owners = np.array([place for place, *_ in owners])
        tokens = np.array([0 if gold is None else gold for *_, gold in owners])
        parts, changes = [], []
        for part in np.array_split(np.arange(len(there)), -(-len(there) * logits.shape[1] * 4 // _BYTES)):
            dense = self._head(self._states[rows[there[part]]])
            low, high = np.searchsorted(rows_of_owners, [part[0], part[-1] + 1])
            compared = distances(
                dense,
                logits[torch.from_numpy(there[part]).to(logits.device)],
                tokens[low:high],
                rows_of_owners[low:high] - part[0],
            )
            parts.append(np.stack([column.float().cpu().numpy() for column in compared[:3]]))
            changes.append(compared[3].cpu().numpy())
        table, change = np.concatenate(parts, axis=1), np.concatenate(changes)
        named = np.array([gold is not None for *_, gold in owners])
        self._found.append(
            pl.DataFrame(
                {
                    "id": [item for _, item, _ in owners],
                    "key": [known[place].key for place, *_ in owners],
                    KL: table[0, rows_of_owners],
                    REVERSE: table[1, rows_of_owners],
                    SAME_TOP: table[2, rows_of_owners] > 0,
                    GOLD: pl.Series(
                        [float(c) if n else None for c, n in zip(change, named, strict=True)], dtype=pl.Float32
                    ),
                }
            )
        )

    def beside(self, items: pl.DataFrame) -> pl.DataFrame:
        """The items with :data:`COLUMNS`; null where none of an item's positions could be compared."""
        schema = {"id": pl.String()} | {name: pl.List(getattr(pl, kind)()) for name, kind in COLUMNS.items()}
        if self._found:
            each = pl.concat(self._found).unique(["id", "key"], keep="first", maintain_order=True)
            columns = [pl.col(KL, REVERSE, SAME_TOP), pl.col(GOLD).drop_nulls()]
            found = each.group_by("id", maintain_order=True).agg(columns)
        else:
            found = pl.DataFrame(schema=schema)
        dense = self._states.answers.select(*ANSWERS[:2], pl.col(ANSWERS[2]).alias("dense"))
        joined = items.join(found, on="id", how="left", maintain_order="left").join(
            dense, on=["task", "id"], how="left", maintain_order="left"
        )
        of_answer = pl.concat_list((pl.col("log_prob").exp() - pl.col("dense").exp()).cast(pl.Float32))
        named = pl.col(GOLD).list.len() > 0
        answered = pl.when(named.fill_null(value=False)).then(GOLD).when(pl.col("dense").is_not_null()).then(of_answer)
        return joined.with_columns(answered.alias(GOLD)).drop("dense")


def distances(
    dense: Tensor, compressed: Tensor, gold: ArrayLike, of: ArrayLike | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare the distributions of two sets of logits, ``[positions, vocabulary]`` each.

    If one has more columns (because embeddings are padded differently), only the columns of both are compared.

    Args:
        dense, compressed: the logits; converted to float32.
        gold: tokens, ``[tokens]``.
        of: the position of each token, ascending; by default one token per position, in order.

    Returns:
        ``[positions]`` each: KL(dense || compressed) and KL(compressed || dense) in nats, float32; whether the same
        token is first; and ``[tokens]``: the probability of each of ``gold`` in the compressed model minus that in the
        dense one, float32.
    """
    width = min(dense.shape[1], compressed.shape[1])
    at_a_time = max(1, (2 << 20) // (4 * width)) if dense.device.type == "cpu" else len(dense)  # fits in the cache
    tokens = np.asarray(gold, dtype=np.int64)
    places = np.arange(len(dense)) if of is None else np.asarray(of, dtype=np.int64)
    columns = []
    for start in range(0, len(dense), at_a_time):
        one, other = (logits[start : start + at_a_time, :width] for logits in (dense, compressed))
        log_p, log_q = (torch.log_softmax(logits.float(), -1) for logits in (one, other))
        p, q = log_p.exp(), log_q.exp()
        log_ratio = log_p - log_q
        # The sums of p and q differ from 1 by the rounding of log_softmax; subtracting them keeps small distances
        # exact.
        excess = p.sum(-1) - q.sum(-1)
        kl = (p * log_ratio).sum(-1) - excess
        reverse = excess - (q * log_ratio).sum(-1)
        low, high = np.searchsorted(places, [start, start + len(one)])
        row, token = (torch.from_numpy(a).to(p.device) for a in (places[low:high] - start, tokens[low:high]))
        change = q[row, token] - p[row, token]
        columns.append((kl.clamp_min(0), reverse.clamp_min(0), likeliest(one) == likeliest(other), change))
    kl, reverse, same, change = (torch.cat(column) for column in zip(*columns, strict=True))
    return kl, reverse, same, change


def with_metrics(evaluation: Evaluation) -> Evaluation:
    """The evaluation with the metrics of its distances, over all positions and by task; unchanged without distances."""
    if KL not in evaluation.items.columns or evaluation.not_finite:
        return evaluation
    metrics = distance_metrics(evaluation.items)
    tasks = evaluation.items["task"].unique().sort()
    for task in tasks if len(tasks) > 1 else ():
        of_task = distance_metrics(evaluation.items.filter(pl.col("task") == task))
        metrics |= {f"{task}.{name}": value for name, value in of_task.items()}
    return replace(evaluation, metrics=evaluation.metrics | metrics)


def distance_metrics(items: pl.DataFrame) -> dict[str, float]:
    """Statistics over the positions of items; empty if there are no positions.

    Returns:
        ``kl`` and ``reverse_kl`` (means, nats per position), each with ``_median, _p99, _p99_9``; ``same_top`` (share
        of positions); ``gold_rms`` (root mean square of the changes of the right answer's probability); ``positions``.
    """
    values = {name: items[name].explode().drop_nulls() for name in COLUMNS}
    if values[KL].is_empty():
        return {}
    metrics: dict[str, float] = {"positions": float(len(values[KL]))}
    for name in (KL, REVERSE):
        array = values[name].to_numpy().astype(np.float64)
        metrics[name] = float(array.mean())
        metrics |= {f"{name}_{called}": float(np.quantile(array, q)) for called, q in _QUANTILES.items()}
    metrics[SAME_TOP] = float(values[SAME_TOP].to_numpy().mean())
    if len(values[GOLD]):
        metrics["gold_rms"] = float(np.sqrt((values[GOLD].to_numpy().astype(np.float64) ** 2).mean()))
    return metrics


@cache
def _our_code() -> str:
    """Digest of the code that builds the questions, so that states of other questions are not found."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
