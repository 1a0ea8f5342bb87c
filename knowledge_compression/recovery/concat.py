"""Prompts simply joined into one: the naive rival of Inference-time Dynamic Prompting (Hoang et al., Table 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from knowledge_compression.corpora.corpus import Corpus
from knowledge_compression.models import Model
from knowledge_compression.recovery.adapters import FrozenBase, Tuning
from knowledge_compression.recovery.bank import bank_of, check_decoder, check_positions
from knowledge_compression.recovery.base import RecoveryReport
from knowledge_compression.recovery.idp import check_prompts
from knowledge_compression.recovery.prompt import prompt_adapter, prompt_embeddings
from knowledge_compression.recovery.prompted import Prompted
from knowledge_compression.training import LogCallback, TrainingSettings


@dataclass(frozen=True)
class Concat:
    """Prompts trained one by one and put one after the other before every input.

    Attributes:
        prompts: the length of each, in their order.
        init: how each prompt begins, see :class:`~knowledge_compression.recovery.prompt.Prompt`.
        training, epochs: see :class:`~knowledge_compression.recovery.adapters.Tuning`.
    """

    training: TrainingSettings
    prompts: Sequence[int] = (50, 100)
    init: str = "vocabulary"
    epochs: int = 16
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse no prompts, empty ones, and the same one twice."""
        check_prompts(self.prompts, self.init)

    def recover(self, model: Model, corpus: Corpus | None, report_to: LogCallback | None = None) -> RecoveryReport:
        """Train the prompts that earlier runs did not, and put all of them before what the model reads."""
        assert corpus is not None
        check_decoder(model)
        check_positions(model, sum(self.prompts))
        base = FrozenBase(model.network)
        tuning = Tuning(training=self.training, epochs=self.epochs, report_to=report_to)
        adapters = [
            prompt_adapter(model, base, corpus, tuning, tokens=tokens, init=self.init) for tokens in self.prompts
        ]
        joined = torch.cat([prompt_embeddings(adapter) for adapter in adapters])
        Prompted(model, bank_of(model, [joined]))
        base.check(model.network)
        return RecoveryReport.of("concat", adapters, {"prompts": list(self.prompts), "init": self.init})
