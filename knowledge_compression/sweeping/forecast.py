"""The cost of a sweep, estimated without starting it: ``python run.py -m ... run.plan=true``.

Every suite is rehearsed once on a miniature of the network: the same kind of network with the same depth and tokenizer,
but only a few numbers wide (see ``rehearsal.py``). Hooks count the tokens that pass each linear layer. Together with
the layers' true shapes, from the configuration on the meta device, this gives the multiply-adds. Their speed is given
(``run.rate``), taken from the finished runs of the store, or measured on one block of true width with random weights.

The forecast counts linear layers, the passes and second moments of calibrated compressions, and training. With
``distance=true`` it also counts the dense model's head at every compared position, its states on disk, and a pass of
its own if no run records them. It does not count attention's own products or the work of a suite outside its model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import psutil

from knowledge_compression.cache import cache_folder
from knowledge_compression.compression.calibrated import Calibrated
from knowledge_compression.compression.reshaping import left_of
from knowledge_compression.corpora.own_samples import OwnSamples
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.distance import Beside, scores
from knowledge_compression.evaluation.suite import DividedSuite
from knowledge_compression.experiment import Experiment
from knowledge_compression.identity import digest_of, known_identity
from knowledge_compression.models import Model
from knowledge_compression.models.device import resolve_device
from knowledge_compression.models.spread import Spread
from knowledge_compression.models.targets import linear_layers
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.sweeping.rate import measured_rate, weights_dtype
from knowledge_compression.sweeping.rehearsal import Work, multiply_adds, reached, rehearse

log = logging.getLogger(__name__)

_READING = 1e9  # bytes per second at which a model is read
_A_PASS = 4096  # tokens per transfer of a divided network's weights to the computing device
_ITEM_BYTES = 100.0  # per row of items.parquet
# The cost of a calibrated method's solving (columns one by one, the search for a grid) and of sampling text from the
# model, in matrix products: fitted to one run of GPTQ on smollm2, compared with other runs in docs/scaling.md.
_SOLVING, _WRITING = 8, 4


@dataclass
class Forecast:
    """The cost of one run.

    Attributes:
        label: distinguishes it from the others.
        state: ``finished``, ``to do``, or ``shared`` if another run does its compression.
        seconds, macs: time and multiply-adds of the remaining work.
        memory, disk: peak bytes of memory, and bytes written.
        unknown: suites whose cost cannot be predicted.
    """

    label: str
    state: str
    seconds: float = 0.0
    macs: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    unknown: list[str] = field(default_factory=list)


class Forecaster:
    """Predicts the cost of runs that share this machine, a store and a sweep.

    Args:
        store: its finished runs are not repeated, and show how fast this machine is.
        rate: multiply-adds per second, if known; None measures.
        process_each: whether each run starts its own process.
        holds: whether one process does all runs and keeps the model in addition to the copy that a run changes.
    """

    def __init__(
        self, store: RunStore, rate: float | None = None, *, process_each: bool = False, holds: bool = False
    ) -> None:
        if rate is not None and rate <= 0:
            raise BadInput(f"run.rate={rate} is not a rate; give multiply-adds per second, e.g. 2e11")
        self.store, self.rate, self.holds = store, rate, holds
        self.started = time.time() - psutil.Process().create_time() if process_each else 0.0
        self.libraries = float(psutil.Process().memory_info().rss)
        self._works: dict[Any, Work | None] = {}
        self._rates: dict[Any, float] = {}
        self._reached: dict[str, Callable[[int], dict[str, float]]] = {}
        self._compressed: set[str] = set()
        self._done: set[str] = set()
        self._written: set[Any] = set()  # models whose own samples exist by then
        self._recorded: set[Any] = set()  # dense models and suites whose states are on disk by then

    def of(self, experiment: Experiment, label: str) -> list[Forecast]:
        """The run, and its dense baseline if this sweep has not made it by then."""
        found = [self._one(experiment, label)]
        dense = experiment.dense()
        if experiment.suites and not experiment.is_dense:
            baseline = self._one(dense, f"dense baseline of {label}")
            found += [baseline] if baseline.state != "finished" else []
        return found

    def _one(self, experiment: Experiment, label: str) -> Forecast:
        if experiment.id in self._done or experiment.is_done(self.store):
            return Forecast(label, "finished")
        self._done.add(experiment.id)
        skeleton = experiment.loader.skeleton()
        size = _bytes_of_weights(experiment, skeleton)
        before = self.libraries + self.holds * size
        held, travelling = _held(experiment, skeleton, size)
        forecast = Forecast(label, "to do", memory=before + 1.2 * held)
        forecast.seconds = self.started + size / _READING
        self._compress(forecast, experiment, skeleton)
        self._train(forecast, experiment, skeleton)
        left = left_of(experiment.compression, lambda: experiment.target.select(skeleton))
        on_cpu, shared = resolve_device(experiment.device).type == "cpu", 0.0  # multiply-adds done by other GPUs
        for name in experiment.suites:
            work = self.work(experiment, skeleton, name)
            if work is None:
                forecast.unknown.append(name)
                continue
            asked = multiply_adds(skeleton, {path: n * left.get(path, 1.0) for path, n in work.tokens.items()})
            forecast.macs += asked
            shared += asked * (0.0 if on_cpu else 1.0 - 1.0 / experiment.processes)
            forecast.seconds += travelling / _READING * max(work.tokens.values()) / _A_PASS
            forecast.disk += work.items * _ITEM_BYTES
            logits = 8.0 * work.widest * skeleton.text_config.vocab_size
            forecast.memory = max(forecast.memory, before + held + logits + self._of_helpers(experiment, held, logits))
            if experiment.distance and scores(experiment.suites[name]):
                self._compare(forecast, experiment, skeleton, name)
        if experiment.compares and any(map(scores, experiment.suites.values())):  # the dense model too
            forecast.memory += held
            forecast.seconds += size / _READING
        forecast.seconds += (forecast.macs - shared) / self.rate_of(experiment, skeleton)
        return forecast

    def _of_helpers(self, experiment: Experiment, held: float, logits: float) -> float:
        """Bytes of the other processes of ``run.processes``: on a CPU all of them share one copy of the weights."""
        others = experiment.processes - 1
        copies = min(others, 1) if resolve_device(experiment.device).type == "cpu" else others
        return copies * held + others * (self.libraries + logits)

    def _compress(self, forecast: Forecast, experiment: Experiment, skeleton: Model) -> None:
        if experiment.is_dense or experiment.compression.__class__.__name__ == "NoCompression":
            return
        targets = experiment.target.select(skeleton)
        size = _bytes_of_weights(experiment, skeleton) * targets.parameters / skeleton.parameter_count()
        if experiment.save_model:
            forecast.disk += _bytes_of_weights(experiment, skeleton)
        key = experiment.compressed_id
        if experiment.kept_models is not None and experiment.kept_models.takes(size) and not experiment.streams:
            if key in self._compressed or (cache_folder() / "compressions" / key).is_dir():
                forecast.state = "shared"
                forecast.seconds += size / _READING
                return
            self._compressed.add(key)
            forecast.disk += size
            forecast.memory += size  # while it is written
        forecast.seconds += 4 * size / _READING  # ranking or rounding, and writing
        if not experiment.compression.calibrated:
            return
        if (took := self._past_seconds(experiment)) is not None:
            forecast.seconds += took
            return
        corpus = experiment.corpus
        tokens = corpus.samples * corpus.length
        layers = linear_layers(skeleton)
        one_pass = self.tokens_through(experiment, skeleton, tokens)
        written = (experiment.source.fingerprint(), digest_of(known_identity(corpus)))
        if isinstance(corpus, OwnSamples) and written not in self._written:
            self._written.add(written)
            forecast.macs += _WRITING * multiply_adds(skeleton, one_pass)
        one_pass = {layer.path: one_pass[layer.path] for layer in layers if layer.role != "final"}
        shapes = [(one_pass.get(layer.path, tokens), *layer.weight.shape) for layer in targets]
        for part in experiment.compression.parts:
            forecast.macs += part.passes(corpus.samples, corpus.length) * multiply_adds(skeleton, one_pass)
            if isinstance(part, Calibrated) and part.second_order:
                forecast.macs += sum(
                    read * width**2 + _SOLVING * (width**3 + rows * width**2) for read, rows, width in shapes
                )
                forecast.memory += 12.0 * max(width**2 for _, _, width in shapes)

    def _compare(self, forecast: Forecast, experiment: Experiment, skeleton: Model, suite: str) -> None:
        """Add the cost of the distance to the dense model for one suite of a run."""
        work, dense = self.work(experiment, skeleton, suite), experiment.dense()
        assert work is not None  # it has been rehearsed
        key = (dense.compressed_id, digest_of(known_identity(experiment.suites[suite])))
        records = key not in self._recorded and not _is_recorded(dense, skeleton, suite)
        if records and (experiment.is_dense or dense.id in self._done or dense.is_done(self.store)):
            self._recorded.add(key)
            kept = experiment.kept_models is not None and experiment.kept_models.gigabytes
            state = skeleton.text_config.hidden_size * weights_dtype(experiment, skeleton).itemsize
            forecast.disk += work.compared * state if kept else 0.0
            if not experiment.is_dense:
                forecast.macs += multiply_adds(skeleton, work.tokens)
        if not experiment.is_dense:
            forecast.macs += _of_head(skeleton, work)

    def _past_seconds(self, experiment: Experiment) -> float | None:
        """The seconds of this compression in a finished run that differs only in later steps."""
        parts = ("model", "target", "compression", "corpus")
        asked = {part: experiment.identity.get(part) for part in parts}
        for run in self._past:
            did = run.config.get("identity", {})
            if all(did.get(part) == settings for part, settings in asked.items()):
                took = run.report.get("cost", {}).get("seconds", {}).get("compress")
                if took is not None and not run.report["compression"].get("found"):
                    return float(took)
        return None

    @cached_property
    def _past(self) -> list[Run]:
        return list(self.store)

    def _train(self, forecast: Forecast, experiment: Experiment, skeleton: Model) -> None:
        training = experiment.recovery.budget
        if training is None:
            return
        length = experiment.corpus.length
        tokens = training.steps_over(length) * training.batch_size * training.accumulate * length
        layers = linear_layers(skeleton)
        # forward, and backward through the frozen weights to what is trained
        forecast.macs += 2 * multiply_adds(skeleton, self.tokens_through(experiment, skeleton, tokens))
        one = self.tokens_through(experiment, skeleton, 1)
        widths = sum(sum(layer.weight.shape) * one[layer.path] for layer in layers)
        forecast.memory += 4.0 * training.batch_size * length * widths

    def tokens_through(self, experiment: Experiment, skeleton: Model, tokens: int) -> dict[str, float]:
        """The number of tokens that pass each matrix, for so many tokens of text; see :func:`~.rehearsal.reached`."""
        key = experiment.source.fingerprint()
        if key not in self._reached:
            self._reached[key] = reached(skeleton)
        return self._reached[key](tokens)

    def work(self, experiment: Experiment, skeleton: Model, suite: str) -> Work | None:
        """The work of a suite on this kind of network; None if it cannot be rehearsed."""
        key = (experiment.source.fingerprint(), digest_of(known_identity(experiment.suites[suite])))
        if key not in self._works:
            log.info("rehearsing %s on a miniature of %s", suite, experiment.source.name)
            try:
                self._works[key] = rehearse(skeleton, experiment.suites[suite])
            except Exception as error:
                log.warning("%s cannot be rehearsed (%s: %s)", suite, type(error).__name__, error)
                self._works[key] = None
        return self._works[key]

    def rate_of(self, experiment: Experiment, skeleton: Model) -> float:
        """Multiply-adds per second: as given, as in finished runs of this model, or as measured on one block."""
        key = (experiment.source.fingerprint(), experiment.device, experiment.dtype, experiment.scored_in)
        if self.rate is None and key not in self._rates:
            self._rates[key] = self._past_rate(experiment, skeleton) or measured_rate(experiment, skeleton)
        return self.rate or self._rates[key]

    def _past_rate(self, experiment: Experiment, skeleton: Model) -> float | None:
        """From finished runs of the same model and suites on the same kind of device."""
        macs = seconds = 0.0
        device = str(resolve_device(experiment.device))
        scored_in = experiment.scored_in and str(experiment.scored_in)
        for run in self._past:
            same = run.config.get("identity", {}).get("model") == experiment.identity["model"]
            did = tuple(run.environment.get(name) for name in ("device", "scored_in"))
            if not same or did != (device, scored_in) or run.environment.get("processes", 1) != 1:
                continue
            for name in experiment.suites:
                if run.config["identity"]["eval"].get(name) != experiment.identity["eval"][name]:
                    continue
                took = run.report.get("cost", {}).get("seconds", {}).get(f"eval.{name}", 0.0)
                if took and (work := self.work(experiment, skeleton, name)) is not None:
                    macs, seconds = macs + multiply_adds(skeleton, work.tokens), seconds + took
                    if run.config["identity"].get("distance") and scores(experiment.suites[name]):
                        macs += _of_head(skeleton, work)
        return macs / seconds if seconds else None


def _of_head(skeleton: Model, work: Work) -> float:
    """Multiply-adds of a head over the positions at which distributions are compared."""
    return float(work.compared * skeleton.network.get_submodule(skeleton.architecture.final).weight.numel())  # type: ignore[operator]


def _is_recorded(dense: Experiment, skeleton: Model, suite: str) -> bool:
    """Whether a dense model's states for a suite lie in the cache."""
    if dense.kept_models is None or not dense.kept_models.gigabytes:
        return False
    whole = dense.suites[suite]
    parts = whole.parts() if isinstance(whole, DividedSuite) else [suite]
    beside = Beside(dense.loader.skeleton, dense.compressed_id, dense.scored_in)
    asked = known_identity(whole)
    return all((cache_folder() / beside.place([part, asked], skeleton.max_positions)).is_dir() for part in parts)


def _bytes_of_weights(experiment: Experiment, skeleton: Model) -> float:
    return float(skeleton.parameter_count() * weights_dtype(experiment, skeleton).itemsize)


def _held(experiment: Experiment, skeleton: Model, size: float) -> tuple[float, float]:
    """For a model of so many bytes: the peak in memory, and the bytes moved to the computing device in each pass."""
    if experiment.streams and not experiment.loads:  # from disk to disk, block by block
        return largest_block(skeleton) * weights_dtype(experiment, skeleton).itemsize, 0.0
    if not isinstance(experiment.device, Spread):
        return size, 0.0
    main = resolve_device(experiment.device)
    room = experiment.device.room(main)
    computing = sum(bytes_ for place, bytes_ in room.items() if place != "cpu" or main.type == "cpu")
    return min(size, float(room["cpu"])), max(0.0, size - computing)


def largest_block(skeleton: Model) -> int:
    """Number of parameters of the largest block of a network, or of its embeddings if these are larger."""
    network: Any = skeleton.network
    paths = skeleton.architecture.block_paths(network)
    parts = [*map(network.get_submodule, paths), network.get_input_embeddings()]
    return max(sum(parameter.numel() for parameter in part.parameters()) for part in parts)


def totals(found: Iterable[Forecast], at_once: int, gpus: int) -> dict[str, Any]:
    """The cost of a whole sweep: figures by name."""
    todo = [forecast for forecast in found if forecast.state != "finished"]
    seconds = sum(forecast.seconds for forecast in todo)
    return {
        "runs to do": len(todo),
        "multiply-adds": sum(forecast.macs for forecast in todo),
        "seconds, one after the other": seconds,
        "seconds, as launched": max([seconds / max(at_once, 1), *(forecast.seconds for forecast in todo)]),
        "disk": sum(forecast.disk for forecast in todo),
        "GPU-hours": gpus * seconds / 3600,
    }


def show(found: Sequence[Forecast], whole: Mapping[str, Any]) -> None:
    """Print the table and the totals."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    table = Table(title="What the sweep would do; nothing was started", title_justify="left")
    table.add_column("run")
    for name in ("state", "10^12 multiply-adds", "time", "peak memory GB", "disk MB"):
        table.add_column(name, justify="right")
    for forecast in found:
        done = forecast.state == "finished"
        figures = (f"{forecast.macs / 1e12:.3g}", _time(forecast.seconds), f"{forecast.memory / 1e9:.2f}")
        table.add_row(
            forecast.label,
            forecast.state,
            *("" if done else figure for figure in figures),
            "" if done else f"{forecast.disk / 1e6:.1f}",
        )
    console.print(table)
    console.print(
        f"{whole['runs to do']} runs to do: {whole['multiply-adds'] / 1e12:.3g} * 10^12 multiply-adds, "
        f"{_time(whole['seconds, one after the other'])} one after the other, "
        f"{_time(whole['seconds, as launched'])} as launched, {whole['disk'] / 1e6:.0f} MB on disk"
        + (f", {whole['GPU-hours']:.1f} GPU-hours" if whole["GPU-hours"] else "")
    )
    if unknown := sorted({name for forecast in found for name in forecast.unknown}):
        console.print(f"not included: {', '.join(unknown)}, whose cost cannot be predicted")


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
