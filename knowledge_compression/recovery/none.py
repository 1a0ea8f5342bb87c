"""No recovery: what the compression left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from knowledge_compression.corpora.corpus import Corpus
from knowledge_compression.models import Model
from knowledge_compression.recovery.base import RecoveryReport
from knowledge_compression.training import LogCallback


@dataclass(frozen=True)
class NoRecovery:
    """Leave the compressed model as it is."""

    trains: ClassVar[bool] = False

    def recover(self, model: Model, corpus: Corpus | None, report_to: LogCallback | None = None) -> RecoveryReport:
        """Do nothing."""
        return RecoveryReport("none")
