"""One run, from start to finish: load a model, compress a part of it, recover it, evaluate it, record it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import polars as pl
import torch
from torch import LongTensor

from knowledge_compression.compression.base import Compression
from knowledge_compression.compression.formats.packed import save_packed
from knowledge_compression.compression.kept import KeptModels, code_of
from knowledge_compression.compression.layer_reports import CompressionReport
from knowledge_compression.compression.methods.none import NoCompression
from knowledge_compression.compression.walk.streaming import compress_streamed
from knowledge_compression.corpora.corpus import Corpus, digest
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.suite import DividedSuite, Evaluation, Suite, ask, item_table
from knowledge_compression.identity import CONTENT, digest_of, draws, known_identity, plain
from knowledge_compression.memory import peak_of_process
from knowledge_compression.models import Model, Target, Targets
from knowledge_compression.models.device import Device, resolve_device, resolve_dtype
from knowledge_compression.models.held import HeldSource
from knowledge_compression.models.loading import LocalModel, ModelSource, check_memory
from knowledge_compression.models.saving import save_checkpoint
from knowledge_compression.models.soundness import non_finite, shown, weights_of
from knowledge_compression.models.streamed import StreamedModel
from knowledge_compression.recovery.base import Recovery
from knowledge_compression.recovery.none import NoRecovery
from knowledge_compression.results.environment import environment
from knowledge_compression.results.layer_map import layer_map
from knowledge_compression.results.secrets import hidden
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.results.tracker import Tracker
from knowledge_compression.results.workplace import Workplace

log = logging.getLogger(__name__)

SAVERS: Mapping[bool | str, Callable[[Model, Path], None]] = {True: save_checkpoint, "packed": save_packed}
SAVED = "model"  # folder of the compressed model inside a run's folder


@dataclass(frozen=True)
class Experiment:
    """Everything that one run is made of.

    Attributes:
        source: where the model comes from.
        target: which of its layers are compressed.
        compression, recovery: what is done to it.
        corpus: text for calibration and recovery, drawn only where one of them needs it.
        suites: what the model is asked, by name.
        called: what the user called a compression or a recovery of that class, e.g. ``{Gptq: "gptq"}``.
        seed: what the user gave the parts that draw; it decides nothing but through their own ``seed`` fields.
        device, dtype: as the user chose them.
        scoring_dtype: type of the products that score the model, see ``models.device``.
        save_model: whether the compressed model is kept in the run's folder, as it is before recovery; ``packed`` keeps
            it as a packed GPTQ checkpoint.
        kept_models: where compressed models are kept for other runs; None compresses in every run.
        holds: whether the model stays in memory for other runs of this process.
    """

    source: ModelSource
    target: Target
    compression: Compression
    recovery: Recovery
    corpus: Corpus
    suites: Mapping[str, Suite]
    called: Mapping[type, str] = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    scoring_dtype: str = "model"
    save_model: bool | str = False
    kept_models: KeptModels | None = None
    holds: bool = False

    @property
    def is_dense(self) -> bool:
        """Whether this is a baseline: nothing compressed, nothing recovered."""
        return isinstance(self.compression, NoCompression) and isinstance(self.recovery, NoRecovery)

    @property
    def streams(self) -> bool:
        """Whether the model is compressed from disk to disk, without being loaded whole."""
        return getattr(self.source, "stream", False) and not isinstance(self.compression, NoCompression)

    @property
    def loads(self) -> bool:
        """Whether the model is needed whole at some time."""
        return bool(self.suites) or self.recovery.trains or not self.streams

    @cached_property
    def loader(self) -> ModelSource:
        """Where this run gets its model from: the source, or what is held of it."""
        return HeldSource(self.source) if self.holds else self.source

    @property
    def needs_text(self) -> bool:
        """Whether a corpus decides the result."""
        return self.compression.calibrated or self.recovery.trains

    def dense(self) -> Experiment:
        """The baseline that this run is compared with."""
        return replace(self, compression=NoCompression(), recovery=NoRecovery(), called={}, save_model=False)

    def check(self) -> None:
        """Refuse what can be seen to be wrong from configurations alone, before anything is loaded or computed.

        Raises:
            BadInput: the model is not to be had, or has no layers of the target.
        """
        if not isinstance(self.recovery, Recovery):
            raise BadInput(
                f"{type(self.recovery).__module__}.{type(self.recovery).__qualname__} is not a recovery; derive from "
                "knowledge_compression.recovery.base.Recovery and declare restores_by"
            )
        resolve_dtype(self.dtype, resolve_device(self.device))
        _ = self.scored_in
        if self.save_model not in (False, *SAVERS) or (self.streams and self.save_model == "packed"):
            raise BadInput(
                f"output.save_model={self.save_model} is not offered here; choose false, true, or packed (not streamed)"
            )
        skeleton = self.loader.skeleton()
        if not isinstance(self.compression, NoCompression):
            self.target.select(skeleton)
        if self.streams and self.loads:
            check_memory(skeleton, self.device, self.dtype)

    @cached_property
    def id(self) -> str:
        """Hash of what decides the result; paths, names, speeds, tracker and launcher do not."""
        return digest_of(self.identity)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the result: the identities of the parts that have a say in it."""
        deciding = self._of_compressed | {"eval": {name: known_identity(suite) for name, suite in self.suites.items()}}
        if self.scored_in is not None:
            deciding["scored_in"] = str(self.scored_in)
        if not isinstance(self.recovery, NoRecovery):
            deciding["recovery"] = known_identity(self.recovery)
        if self.needs_text:
            deciding["corpus"] = known_identity(self.corpus)
        return deciding

    @property
    def drawn(self) -> bool:
        """Whether anything that decides the result is drawn by lot, so that another seed is another run."""
        text = [self.corpus] if self.needs_text else []
        return any(map(draws, [self.compression, self.recovery, *text, *self.suites.values()]))

    @property
    def choices(self) -> dict[str, str]:
        """What the user knows each part by: its own name, for compressions and recoveries that of the file chosen."""
        done: dict[str, Any] = {"compression": self.compression, "recovery": self.recovery}
        named: dict[str, Any] = {"model": self.source, "target": self.target, "corpus": self.corpus}
        return {group: str(part.name) for group, part in named.items()} | {
            group: self.called.get(type(part)) or str(getattr(part, "name", "none")) for group, part in done.items()
        }

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The parts as plain data: what ``config.yaml`` keeps, trackers show and tables name.

        ``choices`` has what each part is called, ``identity`` what of all this decides; a run in which nothing is drawn
        has no ``seed``. What looks like a secret is left out.
        """
        parts = {"model": self.source, "target": self.target, "compression": self.compression}
        parts |= {"recovery": self.recovery, "corpus": self.corpus}
        told = {
            "choices": self.choices,
            **{name: plain(part) for name, part in parts.items()},
            "eval": {name: plain(suite) for name, suite in self.suites.items()},
            "sparsity": _asked_sparsity(self.compression),
            "reading": self.target.reading,
            "seed": self.seed if self.drawn else None,
            "device": self.device,
            "dtype": self.dtype,
            "scoring_dtype": self.scoring_dtype,
            "identity": self.identity,
        }
        return cast(dict[str, Any], hidden(told))

    @cached_property
    def scored_in(self) -> torch.dtype | None:
        """Type of the products that score the model; None for the model's own."""
        return Device.named(self.device).product_dtype(self.scoring_dtype, torch.float32, "scoring_dtype")

    @property
    def compressed_id(self) -> str:
        """Hash of what decides the compressed model: runs that share it differ in what follows."""
        deciding = self._of_compressed | {
            "device": resolve_device(self.device).type,  # another kind of device rounds otherwise
            "made_with": [code_of(self.compression), torch.__version__],
        }
        if self.compression.calibrated:
            deciding["corpus"] = known_identity(self.corpus)
        return digest_of(deciding)

    @cached_property
    def _of_compressed(self) -> dict[str, Any]:
        """What decides everything up to the compression."""
        deciding: dict[str, Any] = {
            "model": known_identity(self.source),
            "dtype": str(resolve_dtype(self.dtype, resolve_device(self.device))),
        }
        if not isinstance(self.compression, NoCompression):
            deciding["target"] = known_identity(self.target)
            deciding["compression"] = known_identity(self.compression)
        if self.streams:
            deciding["streamed"] = True  # in the checkpoint's own floating type
        return deciding

    def run(self, store: RunStore, tracker: Tracker, *, force: bool = False) -> Run:
        """Do the run, or give the one that is there.

        Raises:
            BadInput: what was asked for does not fit together; nothing is written.
        """
        if not force and (done := self._done(store)):
            return done
        with store.claim(self.id, afresh=force) as workplace:
            if not force and (done := self._done(store)):  # by whoever had the claim before us
                return done
            return store.write(self._make(workplace, tracker, force))

    def is_done(self, store: RunStore) -> bool:
        """Whether the run is in the store, with its model where one is wanted."""
        wants_model = bool(self.save_model) or self.streams
        return self.id in store and (not wants_model or (store.runs_folder / self.id / SAVED).is_dir())

    def _done(self, store: RunStore) -> Run | None:
        if not self.is_done(store):
            return None
        log.info("run %s is already finished", self.id)
        return store.find(self.id)

    def _make(self, workplace: Workplace, tracker: Tracker, force: bool) -> Run:
        """The run itself, step by step; a step that an interrupted attempt finished is taken from the workplace."""
        cost = _Cost(resolve_device(self.device))
        parts = self._data_at_hand()
        with cost.of("load"):
            load = self.source.streamed if self.streams else self.loader.load  # type: ignore[attr-defined]
            model = load(self.device, self.dtype)
            if not self.streams:
                Scorer(model)  # finds out how its texts may share a pass, while it answers as it was loaded
        targets = self.target.select(model) if not isinstance(self.compression, NoCompression) else Targets([], model)
        corpus = self.corpus.prepared(model) if self.recovery.trains else None  # while the model is as it was loaded

        with tracker.track(self.id, self.settings) as tracked:
            report: dict[str, Any] = {
                "model": {"name": model.name, "family": model.family, "note": model.note, **model.provenance}
            }
            with cost.of("compress"):
                model, compressed, found = self._compress(model, targets, corpus, workplace.folder / SAVED, force)
            left_out = [asdict(part) for part in targets.left_out]
            report["compression"] = compressed.to_json() | {"found": found, "left_out": left_out}
            if compressed.layers:
                workplace.add("layer_map.png", layer_map(compressed))
            with cost.of("recover"):
                recovered = self.recovery.recover(model, corpus, tracked.log)
            report["recovery"] = recovered.report.to_json() | {"restores_by": self.recovery.restores_by}
            if sick := non_finite(weights_of(model)):
                report["non_finite_weights"] = sick
                log.warning("%s has weights that are not finite (%s): its answers are void", model.name, shown(sick))
            scored_in = self.scored_in if model.dtype == torch.float32 else None  # narrower types stay
            original = partial(self.loader.load, self.device, self.dtype)
            scorer = partial(Scorer, model, prompts=recovered.prompts, dtype=scored_in, original=original)
            evaluations = {}
            for name, suite in self.suites.items():
                with cost.of(f"eval.{name}"):
                    evaluation = self._evaluate(name, suite, parts[name], scorer, workplace)
                evaluations[name] = evaluation.void() if sick else evaluation
            report["eval"] = {
                name: evaluation.description
                | {"fingerprint": known_identity(self.suites[name]).get(CONTENT)}
                | ({"not_finite": evaluation.not_finite} if evaluation.not_finite else {})
                for name, evaluation in evaluations.items()
            }
            report["fallbacks"] = [fallback for found in evaluations.values() for fallback in found.fallbacks]
            report["cost"] = {"seconds": cost.seconds, "peak_memory": cost.peak}
            run = self._record(model, scored_in, evaluations, report)
            saved = workplace.folder / SAVED
            tracked.finish_with(run, saved if saved.is_dir() else None)
        return run

    def _compress(
        self, model: Model, targets: Targets, corpus: Corpus | None, folder: Path, afresh: bool
    ) -> tuple[Model, CompressionReport, bool]:
        """Compress and save where asked, or find it done; a streamed model is loaded only where it is asked something.

        Returns:
            The compressed model, what was done to it, and whether another run had done it.
        """

        def windows() -> LongTensor | None:
            return (corpus or self.corpus.prepared(model)).windows(model) if self.compression.calibrated else None

        def compress() -> CompressionReport:
            text = windows()
            report = self.compression.compress(model, targets, text)
            report.calibration = None if text is None else digest(text)
            return report

        if isinstance(model, StreamedModel):
            text = windows()
            report = compress_streamed(self.compression, model, targets, text, folder)
            report.calibration = None if text is None else digest(text)
            whole = LocalModel(model.name, str(folder))
            return (whole.load(self.device, self.dtype) if self.loads else model), report, False
        if self.kept_models is None or not targets:
            report, found = compress(), False
        else:
            report, found = self.kept_models.compress(
                self.compressed_id, model, targets, self.compression, compress, afresh=afresh
            )
        if self.save_model:
            SAVERS[self.save_model](model, folder)
        return model, report, found

    def _data_at_hand(self) -> dict[str, Mapping[str, Suite]]:
        """See that the data of corpus and suites is to be had, before hours of work that it is needed after.

        Returns:
            The parts of each suite, where it has parts.

        Raises:
            DataUnavailable: some of it is not.
        """
        for part in [*self.suites.values(), *([self.corpus] if self.needs_text else [])]:
            if hasattr(part, "check_data"):
                part.check_data()
        return {name: suite.parts() if isinstance(suite, DividedSuite) else {} for name, suite in self.suites.items()}

    def _evaluate(
        self, name: str, suite: Suite, parts: Mapping[str, Suite], scorer: Callable[[], Scorer], workplace: Workplace
    ) -> Evaluation:
        """Ask a suite, part by part where it has parts; what an interrupted attempt asked is not asked again."""
        if not isinstance(suite, DividedSuite):
            return workplace.evaluation(name, partial(self._ask, suite, scorer))
        return suite.joined(
            {
                part: workplace.evaluation(f"{name}.{part}", partial(self._ask, asked, scorer))
                for part, asked in parts.items()
            }
        )

    def _ask(self, suite: Suite, scorer: Callable[[], Scorer]) -> Evaluation:
        torch.manual_seed(0)  # whatever a suite may draw without a seed of its own is the same in every run
        return ask(suite, scorer())

    def _record(
        self,
        model: Model,
        scored_in: torch.dtype | None,
        evaluations: Mapping[str, Evaluation],
        report: dict[str, Any],
    ) -> Run:
        return Run(
            id=self.id,
            config=dict(self.settings),
            metrics={f"{name}.{key}": value for name, e in evaluations.items() for key, value in e.metrics.items()},
            report=report,
            environment=environment()
            | {
                "device": str(model.device),
                "dtype": str(model.dtype),
                "scored_in": scored_in and str(scored_in),
            },
            _items=pl.concat([item_table([]), *(e.items for e in evaluations.values())], how="diagonal"),
        )


class _Cost:
    """What the steps of a run took: seconds each, and bytes of the process or its GPU at the worst moment."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.peak = device, dict[str, float](), 0

    @contextmanager
    def of(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start
        self.peak = max(self.peak, peak_of_process(self.device))


def _asked_sparsity(compression: Compression) -> float:
    """The share of weights that a compression was asked to remove; 0 where it removes none."""
    return max((float(getattr(part, "sparsity", 0.0)) for part in compression.parts), default=0.0)
