"""The objects of the command line for use in a notebook: ``import knowledge_compression as kc``.

    model = kc.load("smollm2")
    atlas = kc.choose("eval=atlas")
    known = kc.ask(model, atlas)
    kc.compress(model, kc.choose("compression=magnitude", sparsity=0.4), kc.choose("target=att"))
    left = kc.ask(model, atlas)
    print(kc.drop(known, left))

Names and settings are those of the files under ``conf/``; invalid input raises
:class:`~knowledge_compression.errors.BadInput`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hydra.errors import HydraException

from knowledge_compression.analysis.comparisons import KEY
from knowledge_compression.compression.base import Compression
from knowledge_compression.compression.layer_reports import CompressionReport
from knowledge_compression.configuration import GROUPS, part
from knowledge_compression.corpora.corpus import Corpus
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.distance import Beside, with_metrics
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.suite import Evaluation, Suite
from knowledge_compression.evaluation.suite import ask as ask_suite
from knowledge_compression.models import Model, Target
from knowledge_compression.models.device import Device
from knowledge_compression.models.prompts import NO_PROMPTS
from knowledge_compression.models.source import ModelSource
from knowledge_compression.recovery.base import Recovered, Recovery
from knowledge_compression.statistics import Estimate
from knowledge_compression.statistics import drop as paired_drop
from knowledge_compression.sweeping.cli import one_line


def load(name: str, /, *, device: str = "auto", dtype: str = "auto", **settings: Any) -> Model:
    """A model by its name under ``conf/model/``, e.g. ``load("local", path="my-model")``."""
    source: ModelSource = _part("model", name, settings)
    return source.load(device, dtype)


def compress(model: Model, how: Compression, what: Target, text: Corpus | None = None) -> CompressionReport:
    """Compress the layers that ``what`` selects, in place; ``text`` calibrates the methods that need it.

    Raises:
        BadInput: the method needs text and none is given, or something does not fit the model.
    """
    if how.calibrated and text is None:
        raise BadInput(f"{type(how).__name__} needs calibration text; give e.g. kc.choose('corpus=self')")
    windows = text.prepared(model).windows(model) if how.calibrated and text is not None else None
    return how.compress(model, what.select(model), windows)


def recover(model: Model, how: Recovery, text: Corpus | None = None) -> Recovered:
    """Recover ``model`` in place, trained on ``text``; pass the result to :func:`ask`."""
    if how.trains and text is None:
        raise BadInput(f"{type(how).__name__} needs text to train on; give e.g. kc.choose('corpus=self')")
    return how.recover(model, text)


def ask(
    model: Model,
    suite: Suite,
    recovered: Recovered | None = None,
    *,
    scoring_dtype: str = "model",
    original: Callable[[], Model] | None = None,
    dense: Model | None = None,
) -> Evaluation:
    """Ask a model the questions of a suite.

    Args:
        model: dense, compressed or recovered.
        suite: e.g. ``kc.choose("eval=atlas")``.
        recovered: the result of :func:`recover`, if the model was recovered.
        scoring_dtype: dtype of the products in scoring, as on the command line.
        original: loads the dense model, for suites that compare with it, e.g. ``lambda: kc.load("smollm2")``.
        dense: the dense model, to compare distributions with at every position that is read, as ``distance=true`` does.

    Raises:
        BadInput: the suite does not fit the model, or its data is missing.
    """
    prompts = recovered.prompts if recovered is not None else NO_PROMPTS
    dtype = Device.of(model.device).product_dtype(scoring_dtype, torch.float32, "scoring_dtype")
    dtype = dtype if model.dtype == torch.float32 else None  # narrower types stay
    scorer = Scorer(model, prompts=prompts, dtype=dtype, original=original)
    if dense is None:
        return ask_suite(suite, scorer)
    return with_metrics(Beside(lambda: dense, deciding=None, dtype=dtype, gigabytes=0).ask(suite, scorer, asked=None))


def drop(before: Evaluation, after: Evaluation) -> Estimate:
    """Relative drop in accuracy on the same items, in % of what was known before, with its 95 % interval.

    Raises:
        BadInput: the two were not asked the same questions.
    """
    left, right = (e.items.select(*KEY, "correct").drop_nulls() for e in (before, after))
    both = left.join(right, on=KEY, how="inner", suffix="_after", maintain_order="left")
    if both.is_empty() or not both.height == left.height == right.height:
        raise BadInput("these two evaluations asked different items, so they cannot be compared")
    return paired_drop(both["correct"].to_numpy(), both["correct_after"].to_numpy())


def choose(choice: str, /, **settings: Any) -> Any:
    """The object that a file under ``conf/`` describes, with some settings changed.

    Args:
        choice: as on the command line, e.g. ``compression=gptq``, ``target=att``, ``corpus=c4``, ``eval=atlas``.
        settings: fields of the object, with nested ones as mappings (``training={"tokens": 1000}``), or
            plain values of ``conf/config.yaml`` such as ``sparsity`` and ``data_dir``.

    Raises:
        BadInput: there is no such file or setting.
    """
    group, _, name = choice.partition("=")
    if group not in GROUPS:
        raise BadInput(f"'{choice}' is not a choice; give one of {', '.join(GROUPS)} and a name, e.g. compression=gptq")
    return _part(group, name, settings)


def _part(group: str, name: str, settings: dict[str, Any]) -> Any:
    try:
        return part(group, name, **settings)
    except HydraException as error:
        raise BadInput(one_line(error)) from None
