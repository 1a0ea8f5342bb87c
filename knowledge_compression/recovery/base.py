"""The base class of recoveries, which declare how they restore facts, and their report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Self

from knowledge_compression.corpora.corpus import Corpus
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model
from knowledge_compression.models.prompts import NO_PROMPTS, Prompts
from knowledge_compression.training import LogCallback, TrainingSettings

if TYPE_CHECKING:
    from knowledge_compression.recovery.adapters import Adapter


class RestoresBy(StrEnum):
    """The way in which a recovery restores facts (Hoang et al., 2024, section 2.2).

    A fact that comes back only by ``WEIGHTS`` was forgotten and has been relearned. One that comes back by
    ``REDIRECTION``, with the weights unchanged and something placed before the input, was displaced.
    """

    NOTHING = "nothing"
    WEIGHTS = "weights"
    REDIRECTION = "redirection"


@dataclass
class RecoveryReport:
    """The report on a recovery.

    Attributes:
        strategy: e.g. ``lora``.
        trainable_parameters: number of parameters that were trained and are stored in addition to the model.
        tokens: number of training tokens.
        loss_before, loss_after: mean training loss (nats per token) over the first and the last tenth of the budget.
        seconds: wall time.
        details: further facts, JSON-ready (rank, prompt lengths, selection, resumed at step ...).
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
        """The report of a strategy on its adapters, whether it trained or found them."""
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
            | {"multiplied_in": sorted({report.multiplied_in for report in reports})}
            | {"not_compiled": [report.not_compiled for report in reports if report.not_compiled is not None]},
        )

    def to_json(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Recovered:
    """The result of a recovery: its report, and the prompts through which the model is read from now on.

    Attributes:
        report: the report.
        prompts: the prompts before every input; None if there are none.
        restores_by: how it restores, if that is known only afterwards; None takes what the recovery declares.
    """

    report: RecoveryReport
    prompts: Prompts = NO_PROMPTS
    restores_by: RestoresBy | None = None


class Recovery(ABC):
    """A way to bring lost facts back; one short file next to this one and one YAML under ``conf/recovery/``.

    A subclass declares ``restores_by``, which a run writes into its report; the fact ledger sorts recovered facts by
    it. One that trains derives from :class:`~knowledge_compression.recovery.tuned.Tuned`.

    Attributes:
        restores_by: new weights, redirection of the input, or nothing.
        beside_offloaded: whether it also works while weights of a divided network lie in memory or on disk
        (``device_map=auto``).
    """

    restores_by: RestoresBy
    beside_offloaded: ClassVar[bool] = False

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Refuse a recovery class that does not declare how it restores.

        Raises:
            BadInput: ``restores_by`` is not declared, or is not a :class:`RestoresBy`.
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
        """The training settings; None if the recovery trains nothing and so needs no text."""
        return None

    @property
    def trains(self) -> bool:
        """Whether it needs text to train on."""
        return self.budget is not None

    def check_reach(self, model: Model) -> None:
        """Refuse a network whose weights are not all on computing devices, if this recovery needs them there.

        Raises:
            BadInput: weights lie in memory or on disk.
        """
        network = model.network.get_input_embeddings() if self.beside_offloaded else model.network
        if any(weight.is_meta for weight in network.parameters()):
            part = "the embeddings" if self.beside_offloaded else "all weights"
            raise BadInput(
                f"{type(self).__name__} needs {part} on the computing devices, but device_map=auto keeps some in "
                "memory or on disk; choose recovery=prompt, idp or concat, or use larger devices"
            )

    @abstractmethod
    def recover(self, model: Model, corpus: Corpus | None, report_to: LogCallback | None = None) -> Recovered:
        """Recover ``model`` in place; the base weights stay unchanged, bit for bit.

        The network remains the same object, with its configuration and module paths: adapters are inserted into it,
        prompts are placed before its input.

        Args:
            model: the compressed model.
            corpus: text to train on, the same as for calibration; None if nothing is trained.
            report_to: called with the training loss during training.

        Returns:
            The report and, if it placed any before every input, the prompts.
        """
