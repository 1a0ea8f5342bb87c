"""No recovery: the compressed model itself."""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_compression.corpora.corpus import Corpus
from knowledge_compression.models import Model
from knowledge_compression.recovery.base import Recovered, Recovery, RecoveryReport, RestoresBy
from knowledge_compression.training import LogCallback


@dataclass(frozen=True)
class NoRecovery(Recovery):
    """Leave the compressed model unchanged."""

    restores_by = RestoresBy.NOTHING

    def check_reach(self, model: Model) -> None:
        """It needs no weights."""

    def recover(self, model: Model, corpus: Corpus | None, report_to: LogCallback | None = None) -> Recovered:
        """Do nothing."""
        return Recovered(RecoveryReport("none"))
