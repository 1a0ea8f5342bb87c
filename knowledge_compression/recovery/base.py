"""What every recovery is: it says how it restores, what it trains with, and what it reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import fmean
from typing import TYPE_CHECKING, Any, Self

from knowledge_compression.corpora.corpus import Corpus
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model
from knowledge_compression.models.prompts import NO_PROMPTS, Prompts
from knowledge_compression.training import LogCallback, TrainingSettings

if TYPE_CHECKING:
    from knowledge_compression.recovery.adapters import Adapter


class RestoresBy(StrEnum):
    """How a recovery brings a fact back (Hoang et al., 2024, section 2.2).

    A fact that only comes back by ``WEIGHTS`` was forgotten and is learned again; one that comes back by
    ``REDIRECTION``, with the weights as they are and something else before the input, was displaced.
    """

    NOTHING = "nothing"
    WEIGHTS = "weights"
    REDIRECTION = "redirection"


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

    @classmethod
    def of(cls, strategy: str, adapters: Sequence[Adapter], settings: Mapping[str, Any]) -> RecoveryReport:
        """The report of a strategy that trained these adapters, or found them."""
        reports = [adapter.report for adapter in adapters]
        found = [adapter.file.parent.name for adapter in adapters if adapter.found]
        resumed = [report.resumed_at for report in reports if report.resumed_at is not None]
        smaller = [report.windows_at_once for report in reports if report.windows_at_once is not None]
        return cls(
            strategy,
            trainable_parameters=sum(report.parameters for report in reports),
            tokens=sum(report.tokens for report in reports),
            loss_before=fmean(report.loss_before for report in reports),
            loss_after=fmean(report.loss_after for report in reports),
            seconds=sum(report.seconds for report in reports),
            details=dict(settings)
            | {"adapters_of_earlier_runs": found, "resumed_at": resumed, "windows_at_once_for_memory": smaller}
            | {"multiplied_in": sorted({report.multiplied_in for report in reports})},
        )

    def to_json(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Recovered:
    """What a recovery gives: its report, and how the model is read from now on.

    Attributes:
        report: what was trained and reached.
        prompts: what stands before every input now.
    """

    report: RecoveryReport
    prompts: Prompts = NO_PROMPTS


class Recovery(ABC):
    """A way to bring lost facts back; one short file beside this one and one YAML under ``conf/recovery/``.

    A subclass declares ``restores_by``, which a run writes into its report; the fact ledger files what came back by it.
    One that trains derives from :class:`~knowledge_compression.recovery.tuned.Tuned`.

    Attributes:
        restores_by: by new weights, by redirecting the input, or by nothing.
    """

    restores_by: RestoresBy

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Refuse a recovery that does not say how it restores.

        Raises:
            BadInput: ``restores_by`` is not declared, or is none of :class:`RestoresBy`.
        """
        declared = getattr(cls, "restores_by", None)
        if not isinstance(declared, RestoresBy):
            raise BadInput(
                f"{cls.__module__}.{cls.__qualname__} does not say how it restores (restores_by={declared!r}); declare "
                "restores_by = RestoresBy.WEIGHTS (it changes or adds weights) or RestoresBy.REDIRECTION (it changes "
                "what the model reads)"
            )
        return super().__new__(cls)

    @property
    def budget(self) -> TrainingSettings | None:
        """What it trains with; None where it trains nothing and so needs no text."""
        return None

    @property
    def trains(self) -> bool:
        """Whether it needs text to train on."""
        return self.budget is not None

    @abstractmethod
    def recover(self, model: Model, corpus: Corpus | None, report_to: LogCallback | None = None) -> Recovered:
        """Recover ``model`` in place; the base weights stay as they are, bit for bit.

        The network stays the object it was, with its configuration and module paths: adapters are put inside it,
        prompts before what it reads.

        Args:
            model: what the compression left.
            corpus: text to train on, the same that the compression was calibrated with; None where nothing is trained.
            report_to: is told the training loss as it goes.

        Returns:
            The report, and the prompts that stand before every input where it put some.
        """
