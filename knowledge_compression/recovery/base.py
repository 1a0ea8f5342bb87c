"""What every recovery strategy is, and what it reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

from knowledge_compression.corpora.corpus import Corpus
from knowledge_compression.models import Model


@dataclass
class RecoveryReport:
    """What a recovery trained and reached.

    Attributes:
        strategy: e.g. ``lora``.
        trainable_parameters: parameters that were trained (or would be carried beside the model).
        tokens: tokens seen in training.
        loss_before, loss_after: mean training loss (nats a token) on the first and last tenth of the budget.
        seconds: wall time.
        details: what else is worth keeping, JSON-ready (rank, prompt lengths, selection, resumed at step ...).
    """

    strategy: str
    trainable_parameters: int = 0
    tokens: int = 0
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)


class Recovery(Protocol):
    """A way to bring lost facts back; one short file beside this one and one YAML under ``conf/recovery/``.

    Attributes:
        trains: whether it needs text to train on.
    """

    trains: ClassVar[bool]

    def recover(self, model: Model, corpus: Corpus | None) -> RecoveryReport:
        """Recover ``model`` in place (its network may be wrapped); the base weights stay as they are, bit for bit."""
        ...
