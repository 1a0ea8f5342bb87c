"""How a run is done, step by step: load the model, compress it, recover it, ask it, record what it said."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch import LongTensor

from knowledge_compression.compression.formats.packed import save_packed
from knowledge_compression.compression.layer_reports import CompressionReport
from knowledge_compression.compression.methods.none import NoCompression
from knowledge_compression.compression.walk.streaming import compress_streamed
from knowledge_compression.corpora.corpus import Corpus, digest
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.suite import DividedSuite, Evaluation, Suite, ask, item_table
from knowledge_compression.identity import CONTENT, known_identity
from knowledge_compression.memory import peak_of_process
from knowledge_compression.models import Model, Targets
from knowledge_compression.models.device import resolve_device
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.saving import save_checkpoint
from knowledge_compression.models.soundness import non_finite, shown, weights_of
from knowledge_compression.models.streamed import StreamedModel
from knowledge_compression.results.environment import environment
from knowledge_compression.results.layer_map import layer_map
from knowledge_compression.results.layout import SAVED
from knowledge_compression.results.store import Run
from knowledge_compression.results.tracker import Tracker
from knowledge_compression.results.workplace import Workplace

if TYPE_CHECKING:
    from knowledge_compression.experiment import Experiment

log = logging.getLogger(__name__)

SAVERS: Mapping[bool | str, Callable[[Model, Path], None]] = {True: save_checkpoint, "packed": save_packed}


def do(experiment: Experiment, workplace: Workplace, tracker: Tracker, *, afresh: bool) -> Run:
    """Do the run of an experiment, and give it whole, not yet in the store.

    Args:
        experiment: what the run is made of.
        workplace: holds what an interrupted attempt finished, which is not done again.
        tracker: shows the run while it goes on.
        afresh: compress again although another run has.

    Raises:
        BadInput: what was asked for does not fit together.
    """
    saved, cost = workplace.folder / SAVED, _Cost(resolve_device(experiment.device))
    parts = _data_at_hand(experiment)
    with cost.of("load"):
        load = experiment.source.streamed if experiment.streams else experiment.loader.load  # type: ignore[attr-defined]
        model = load(experiment.device, experiment.dtype)
        if not experiment.streams:
            Scorer(model)  # finds out how its texts may share a pass, while it answers as it was loaded
    targets = Targets([], model)
    if not isinstance(experiment.compression, NoCompression):
        targets = experiment.target.select(model)
    # The corpus may be written by the model: while it is as it was loaded.
    corpus = experiment.corpus.prepared(model) if experiment.recovery.trains else None

    with tracker.track(experiment.id, experiment.settings) as tracked:
        report: dict[str, Any] = {
            "model": {"name": model.name, "family": model.family, "note": model.note, **model.provenance}
        }
        with cost.of("compress"):
            model, compressed, found = _compress(
                experiment, model, targets, corpus, workplace.folder / SAVED, afresh=afresh
            )
        left_out = [asdict(part) for part in targets.left_out]
        report["compression"] = compressed.to_json() | {"found": found, "left_out": left_out}
        if compressed.layers:
            workplace.add("layer_map.png", layer_map(compressed))
        with cost.of("recover"):
            recovered = experiment.recovery.recover(model, corpus, tracked.log)
        report["recovery"] = recovered.report.to_json() | {"restores_by": experiment.recovery.restores_by}
        if sick := non_finite(weights_of(model)):
            report["non_finite_weights"] = sick
            log.warning("%s has weights that are not finite (%s): its answers are void", model.name, shown(sick))
        scored_in = experiment.scored_in if model.dtype == torch.float32 else None  # narrower types stay
        original = partial(experiment.loader.load, experiment.device, experiment.dtype)
        scorer = partial(Scorer, model, prompts=recovered.prompts, dtype=scored_in, original=original)
        evaluations = {}
        for name, suite in experiment.suites.items():
            with cost.of(f"eval.{name}"):
                evaluation = _evaluate(name, suite, parts[name], scorer, workplace)
            evaluations[name] = evaluation.void() if sick else evaluation
        report["eval"] = {
            name: evaluation.description
            | {"fingerprint": known_identity(experiment.suites[name]).get(CONTENT)}
            | ({"not_finite": evaluation.not_finite} if evaluation.not_finite else {})
            for name, evaluation in evaluations.items()
        }
        report["fallbacks"] = [fallback for found in evaluations.values() for fallback in found.fallbacks]
        report["cost"] = {"seconds": cost.seconds, "peak_memory": cost.peak}
        run = _record(experiment, model, scored_in, evaluations, report)
        tracked.finish_with(run, saved if saved.is_dir() else None)
    return run


def _compress(
    experiment: Experiment, model: Model, targets: Targets, corpus: Corpus | None, folder: Path, *, afresh: bool
) -> tuple[Model, CompressionReport, bool]:
    """Compress and save where asked, or find it done; a streamed model is loaded only where it is asked something.

    Returns:
        The compressed model, what was done to it, and whether another run had done it.
    """
    method = experiment.compression

    def windows() -> LongTensor | None:
        return (corpus or experiment.corpus.prepared(model)).windows(model) if method.calibrated else None

    def compress() -> CompressionReport:
        text = windows()
        report = method.compress(model, targets, text)
        report.calibration = None if text is None else digest(text)
        return report

    if isinstance(model, StreamedModel):
        text = windows()
        report = compress_streamed(method, model, targets, text, folder)
        report.calibration = None if text is None else digest(text)
        whole = LocalModel(model.name, str(folder))
        return (whole.load(experiment.device, experiment.dtype) if experiment.loads else model), report, False
    if experiment.kept_models is None or not targets:
        report, found = compress(), False
    else:
        report, found = experiment.kept_models.compress(
            experiment.compressed_id, model, targets, method, compress, afresh=afresh
        )
    if experiment.save_model:
        SAVERS[experiment.save_model](model, folder)
    return model, report, found


def _data_at_hand(experiment: Experiment) -> dict[str, Mapping[str, Suite]]:
    """See that the data of corpus and suites is to be had, before hours of work that it is needed after.

    Returns:
        The parts of each suite, where it has parts.

    Raises:
        DataUnavailable: some of it is not.
    """
    suites = experiment.suites
    for part in [*suites.values(), *([experiment.corpus] if experiment.needs_text else [])]:
        if hasattr(part, "check_data"):
            part.check_data()
    return {name: suite.parts() if isinstance(suite, DividedSuite) else {} for name, suite in suites.items()}


def _evaluate(
    name: str, suite: Suite, parts: Mapping[str, Suite], scorer: Callable[[], Scorer], workplace: Workplace
) -> Evaluation:
    """Ask a suite, part by part where it has parts; what an interrupted attempt asked is not asked again."""
    if not isinstance(suite, DividedSuite):
        return workplace.evaluation(name, partial(_ask, suite, scorer))
    return suite.joined(
        {part: workplace.evaluation(f"{name}.{part}", partial(_ask, asked, scorer)) for part, asked in parts.items()}
    )


def _ask(suite: Suite, scorer: Callable[[], Scorer]) -> Evaluation:
    torch.manual_seed(0)  # whatever a suite may draw without a seed of its own is the same in every run
    return ask(suite, scorer())


def _record(
    experiment: Experiment,
    model: Model,
    scored_in: torch.dtype | None,
    evaluations: Mapping[str, Evaluation],
    report: dict[str, Any],
) -> Run:
    return Run(
        id=experiment.id,
        config=dict(experiment.settings),
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
