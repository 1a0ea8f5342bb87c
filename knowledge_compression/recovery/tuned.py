"""Recoveries that train: their common budget, and the base class of those that train one adapter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from knowledge_compression.building import Positive
from knowledge_compression.corpora.corpus import Corpus, digest_file
from knowledge_compression.identity import PLACE
from knowledge_compression.models import Model
from knowledge_compression.models.prompts import Prompts
from knowledge_compression.recovery.adapters import Adapter, FrozenBase, Tuning, read_adapter
from knowledge_compression.recovery.base import Recovered, Recovery, RecoveryReport
from knowledge_compression.training import LogCallback, TrainingSettings

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Tuned(Recovery):
    """A recovery that trains.

    Attributes:
        training, epochs: see :class:`~knowledge_compression.recovery.adapters.Tuning`.
        name: name of the strategy, e.g. ``lora``.
    """

    training: TrainingSettings
    epochs: Positive = field(default=16, kw_only=True)
    name: ClassVar[str]

    @property
    def budget(self) -> TrainingSettings:
        """The training settings."""
        return self.training

    def tuning(self, report_to: LogCallback | None) -> Tuning:
        """The settings for training its adapters."""
        return Tuning(training=self.training, epochs=self.epochs, report_to=report_to)


@dataclass(frozen=True)
class OneAdapter(Tuned):
    """A recovery that trains one adapter, or uses one that an earlier run trained, and adds it to the model.

    Attributes:
        adapter: file of an adapter written by an earlier run, used instead of training one.
    """

    adapter: str | None = field(default=None, kw_only=True, metadata=PLACE)

    def fingerprint(self) -> str | None:
        """Digest of the given adapter, which enters the run's identity in place of its path."""
        return digest_file(Path(self.adapter)) if self.adapter is not None else None

    def recover(self, model: Model, corpus: Corpus | None, report_to: LogCallback | None = None) -> Recovered:
        """Train or read the adapter and add it to the model."""
        assert corpus is not None
        self.check(model)
        self.prepare(model)
        base = FrozenBase(model.network)
        kind = {"adapter": self.name} | dict(self.kind)
        if self.adapter is None:
            adapter = self.tuning(report_to).adapter(
                model, base, corpus, kind, trainable=lambda: self.trainable(model), reserved=self.positions
            )
        else:
            adapter = read_adapter(Path(self.adapter), base, kind)
        prompts = self.put(model, adapter)
        base.check(model.network)
        return Recovered(RecoveryReport.of(self.name, [adapter], self.kind), prompts)

    @property
    @abstractmethod
    def kind(self) -> Mapping[str, Any]:
        """What identifies the adapter besides the base model, the text and the training, JSON-ready, e.g. its rank."""

    @property
    def positions(self) -> int:
        """Number of positions that it occupies in every input."""
        return 0

    def check(self, model: Model) -> None:
        """Refuse models that this recovery does not fit.

        Raises:
            BadInput: the model is of the wrong family, or has too few positions.
        """

    def prepare(self, model: Model) -> None:
        """Arrange the network's weights so that something can be added to them; they stay as they are from here on."""

    @abstractmethod
    def trainable(self, model: Model) -> nn.Module:
        """Return the network to train, in which only the new parameters require gradients."""

    @abstractmethod
    def put(self, model: Model, adapter: Adapter) -> Prompts:
        """Add the trained parameters to the model; unless ``adapter.found``, :meth:`trainable` has been called.

        Returns:
            The prompts before every input; None if there are none.
        """
