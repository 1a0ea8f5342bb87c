"""An experiment: the parts of a run, the settings that decide its result, and whether that result exists already."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from knowledge_compression.compression.base import Compression, Method
from knowledge_compression.compression.kept import KeptModels, code_of
from knowledge_compression.compression.methods.none import NoCompression
from knowledge_compression.compression.reshaping import Reshaping
from knowledge_compression.compression.writing.writers import check_form, writer_of
from knowledge_compression.corpora.corpus import Corpus
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.suite import Suite
from knowledge_compression.heavy import torch
from knowledge_compression.identity import digest_of, draws, known_identity, plain
from knowledge_compression.models import Target, Targets
from knowledge_compression.models.device import (
    Device,
    check_processes,
    kind_of,
    product_type,
    torch_dtype,
    weight_type,
)
from knowledge_compression.models.held import HeldSource
from knowledge_compression.models.pretrained import check_memory
from knowledge_compression.models.source import ModelSource
from knowledge_compression.models.spread import Spread
from knowledge_compression.progress import underway
from knowledge_compression.recovery.base import Recovery
from knowledge_compression.recovery.none import NoRecovery
from knowledge_compression.results.layout import SAVED
from knowledge_compression.results.secrets import hidden
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.results.tracker import Tracker
from knowledge_compression.results.workplace import discard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """The parts of one run.

    Attributes:
        source: where the model comes from.
        original: the model from which a compressed file was made; its run is then the baseline. None otherwise.
        target: which of its layers are compressed.
        compression, recovery: how it is compressed and recovered.
        corpus: text for calibration and recovery, drawn only if one of them needs it.
        suites: the evaluation suites, by name.
        called: the user's name for a compression or recovery class, e.g. ``{Gptq: "gptq"}``.
        seed: the seed given to the random parts; it has an effect only through their own ``seed`` fields.
        device, dtype: the user's choices; a :class:`~knowledge_compression.models.spread.Spread` divides a model over
            several devices.
        scoring_dtype: dtype of the products in scoring, see ``models.device``.
        distance: whether a model that is not dense is compared with the dense one at every position that a suite reads,
            see ``evaluation/distance.py``.
        save_model: whether and in which form (:data:`~knowledge_compression.compression.writing.writers.WRITERS`) the
            compressed model, before recovery, is saved in the run's folder.
        kept_models: the cache of compressed models for other runs; None compresses in every run.
        holds: whether the model stays in memory for other runs of this process.
        processes: number of processes that share the questions of an evaluation.
    """

    source: ModelSource
    target: Target
    compression: Compression
    recovery: Recovery
    corpus: Corpus
    suites: Mapping[str, Suite]
    original: ModelSource | None = None
    called: Mapping[type, str] = field(default_factory=dict)
    seed: int = 0
    device: str | Spread = "auto"
    dtype: str = "auto"
    scoring_dtype: str = "model"
    distance: bool = False
    save_model: bool | str = False
    kept_models: KeptModels | None = None
    holds: bool = False
    processes: int = 1

    @property
    def is_dense(self) -> bool:
        """Whether this is a baseline: nothing compressed, nothing recovered."""
        untouched = isinstance(self.compression, NoCompression) and isinstance(self.recovery, NoRecovery)
        return untouched and self.original is None

    @property
    def compares(self) -> bool:
        """Whether distances to the dense model are a part of the result."""
        return self.distance and not self.is_dense

    @property
    def streams(self) -> bool:
        """Whether the model is compressed from disk to disk, without being loaded whole."""
        asked = getattr(self.source, "stream", False) or isinstance(self.device, Spread)
        return asked and not isinstance(self.compression, NoCompression)

    @property
    def loads(self) -> bool:
        """Whether the whole model is needed at some point."""
        return bool(self.suites) or self.recovery.trains or not self.streams

    @cached_property
    def loader(self) -> ModelSource:
        """The source from which this run gets its model: its own, or one that holds the loaded model."""
        return HeldSource(self.source) if self.holds and not isinstance(self.device, Spread) else self.source

    @property
    def saved_as(self) -> bool | str:
        """The form in which its compressed model is saved; False if it is not."""
        return self.save_model or self.streams

    @property
    def needs_text(self) -> bool:
        """Whether the corpus affects the result."""
        return self.compression.calibrated or self.recovery.trains

    def dense(self) -> Experiment:
        """The dense baseline of this run."""
        dense = replace(self, compression=NoCompression(), recovery=NoRecovery(), called={}, save_model=False)
        return dense if self.original is None else replace(dense, source=self.original, original=None)

    def __post_init__(self) -> None:
        """Refuse objects that are not parts, and unknown forms of saving."""
        if not isinstance(self.recovery, Recovery):
            raise BadInput(
                f"{type(self.recovery).__module__}.{type(self.recovery).__qualname__} is not a recovery; derive from "
                "knowledge_compression.recovery.base.Recovery and declare restores_by"
            )
        if self.save_model and not writer_of(self.save_model).streams and self.streams:
            raise BadInput(
                f"output.save_model={self.save_model} needs the whole model, but model.stream=true and device_map=auto "
                "compress it from disk to disk; choose output.save_model=true"
            )
        stock = any(getattr(suite, "scoring", None) == "stock" for suite in self.suites.values())
        if self.distance and stock:
            raise BadInput("distance=true works only with our scoring core; choose scoring=fast")
        if self.processes > 1 and stock:
            raise BadInput(f"run.processes={self.processes} works only with our scoring core; choose scoring=fast")

    def check(self) -> None:
        """Refuse settings that contradict the model's configuration, before anything is loaded or computed.

        Raises:
            BadInput: the device or the model is not available, or the model has no layers of the target.
        """
        check_processes(self.processes, self.device)
        skeleton = self.loader.skeleton()
        if self.original is not None:
            self.original.skeleton()
        targets = Targets([], skeleton)
        if not isinstance(self.compression, NoCompression):
            targets = self.target.select(skeleton)
        self.compression.check_budget(targets)
        for part in self.compression.parts:
            if isinstance(part, Method):
                part.check(targets)
            if isinstance(part, Reshaping):
                break  # what follows gets layers of other shapes
        if self.save_model:
            check_form(self.save_model, self.compression, targets)
            writer_of(self.save_model).check(skeleton, self.source)
        if self.streams and (self.loads or self.compares) and isinstance(self.device, str):
            check_memory(skeleton, self.device, self.dtype)

    @cached_property
    def id(self) -> str:
        """Hash of everything that decides the result; paths, names, settings of speed, tracker and launcher do not."""
        return digest_of(self.identity)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the result: the identities of the parts that affect it."""
        deciding = self._of_compressed | {"eval": {name: known_identity(suite) for name, suite in self.suites.items()}}
        if self._scoring_type is not None:
            deciding["scored_in"] = f"torch.{self._scoring_type}"
        if self.original is not None:
            deciding["dense"] = known_identity(self.original)
        if self.compares:
            deciding["distance"] = True
        if not isinstance(self.recovery, NoRecovery):
            deciding["recovery"] = known_identity(self.recovery)
        if self.needs_text:
            deciding["corpus"] = known_identity(self.corpus)
        return deciding

    @property
    def drawn(self) -> bool:
        """Whether anything that decides the result is random, so that another seed is another run."""
        text = [self.corpus] if self.needs_text else []
        return any(map(draws, [self.compression, self.recovery, *text, *self.suites.values()]))

    @property
    def choices(self) -> dict[str, str]:
        """The user's name for each part: its own name or, for compressions and recoveries, that of the chosen file.

        A compressed file with a known original is named after the original, and is itself the first compression.
        """
        done: dict[str, Any] = {"compression": self.compression, "recovery": self.recovery}
        named: dict[str, Any] = {"model": self.original or self.source, "target": self.target, "corpus": self.corpus}
        choices = {group: str(part.name) for group, part in named.items()} | {
            group: self.called.get(type(part)) or str(getattr(part, "name", "none")) for group, part in done.items()
        }
        if self.original is not None:
            file, after = getattr(self.source, "label", self.source.name), choices["compression"]
            choices["compression"] = file if isinstance(self.compression, NoCompression) else f"{file}+{after}"
        return choices

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The parts as plain data: the content of ``config.yaml``, shown by trackers and used in tables.

        ``choices`` holds the names of the parts, ``identity`` what decides the result; a run without randomness has no
        ``seed``. Anything that looks like a secret is left out.
        """
        parts = {"model": self.original or self.source, "target": self.target, "compression": self.compression}
        if self.original is not None:
            parts["file"] = self.source
        parts |= {"recovery": self.recovery, "corpus": self.corpus}
        told = {
            "choices": self.choices,
            **{name: plain(part) for name, part in parts.items()},
            "eval": {name: plain(suite) for name, suite in self.suites.items()},
            "sparsity": _asked_sparsity(self.compression),
            "reading": self.target.reading,
            "seed": self.seed if self.drawn else None,
            **(self.device.told() if isinstance(self.device, Spread) else {"device": self.device}),
            "dtype": self.dtype,
            "scoring_dtype": self.scoring_dtype,
            **({} if self.is_dense else {"distance": self.distance}),
            "identity": self.identity,
        }
        return cast(dict[str, Any], hidden(told))

    @cached_property
    def scored_in(self) -> torch.dtype | None:
        """Dtype of the products in scoring; None for the model's own."""
        return None if self._scoring_type is None else torch_dtype(self._scoring_type)

    @cached_property
    def _scoring_type(self) -> str | None:
        return product_type(
            self.scoring_dtype, "scoring_dtype", lambda: Device.named(self.device).multiplies_bfloat16_faster
        )

    @property
    def compressed_id(self) -> str:
        """Hash of everything that decides the compressed model: runs that share it differ only in later steps."""
        deciding = self._of_compressed | {
            "device": kind_of(self.device),  # another kind of device rounds differently
            "made_with": [code_of(self.compression), torch.__version__],
        }
        if self.compression.calibrated:
            deciding["corpus"] = known_identity(self.corpus)
        return digest_of(deciding)

    @cached_property
    def _of_compressed(self) -> dict[str, Any]:
        """What decides everything up to and including the compression."""
        weights = weight_type(self.dtype, lambda: kind_of(self.device))
        deciding: dict[str, Any] = {
            "model": known_identity(self.source),
            "dtype": weights if weights == "auto" else f"torch.{weights}",
        }
        if not isinstance(self.compression, NoCompression):
            deciding["target"] = known_identity(self.target)
            deciding["compression"] = known_identity(self.compression)
        if self.streams:
            deciding["streamed"] = True  # in the checkpoint's own dtype
        return deciding

    def run(self, store: RunStore, tracker: Tracker, *, force: bool = False) -> Run:
        """Do the run, or return the finished one.

        Raises:
            BadInput: the settings contradict one another; nothing is written.
        """
        if not force and (done := self._done(store)):
            return done
        with underway("starting"):  # this imports everything for computing, which a finished run does not need
            from knowledge_compression.running import do

        self.check()
        with store.claim(self.id, afresh=force) as workplace:
            if not force and (done := self._done(store)):  # by the process that had the claim before
                return done
            if not self.streams:  # an interrupted attempt may have saved half a model, or one in another form
                discard(workplace.folder / SAVED)
            run = store.write(do(self, workplace, tracker, afresh=force))
            if self.saved_as and run.folder is not None:
                log.info("the model is saved in %s", run.folder / SAVED)
            return run

    def is_done(self, store: RunStore) -> bool:
        """Whether the run is in the store, with its model if that is to be saved."""
        return self._found(store) is not None

    def _done(self, store: RunStore) -> Run | None:
        if (done := self._found(store)) is not None:
            log.info("%s %s is already finished", "the dense baseline" if self.is_dense else "run", self.id)
        return done

    def _found(self, store: RunStore) -> Run | None:
        if self.saved_as and not (store.runs_folder / self.id / SAVED).is_dir():
            return None
        found = store.find(self.id)
        if found is not None and self.saved_as and found.report.get("saved_as", self.saved_as) != self.saved_as:
            return None
        return found


def _asked_sparsity(compression: Compression) -> float:
    """The share of weights that a compression was asked to remove; 0 if it removes none."""
    return max((float(getattr(part, "sparsity", 0.0)) for part in compression.parts), default=0.0)
