"""Prefix tuning: trained keys and values in every layer (Li & Liang, 2021; "ptune" in the paper's tables)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import PrefixTuningConfig, TaskType, get_peft_model
from torch import nn

from knowledge_compression.corpora.corpus import Corpus, digest_file
from knowledge_compression.models import Model
from knowledge_compression.recovery.adapters import Adapter, FrozenBase, Tuning, read_adapter
from knowledge_compression.recovery.bank import PromptBank, check_decoder, check_positions, key_shape
from knowledge_compression.recovery.base import RecoveryReport
from knowledge_compression.recovery.prompt import check_prompt
from knowledge_compression.recovery.prompted_network import Prompted
from knowledge_compression.training import LogCallback, TrainingSettings


@dataclass(frozen=True)
class Prefix:
    """Train the keys and values of a prefix in every layer of a decoder.

    Attributes:
        tokens: its length; the paper's are 26, 50 and 100.
        training, epochs: see :class:`~knowledge_compression.recovery.adapters.Tuning`.
        adapter: file of an adapter that an earlier run wrote, taken instead of training one.
    """

    training: TrainingSettings
    tokens: int = 50
    epochs: int = 16
    adapter: str | None = None
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse empty prefixes."""
        check_prompt(self.tokens)

    def fingerprint(self) -> str | None:
        """Digest of the adapter that is taken, which enters the run's hash in the place of its path."""
        return digest_file(Path(self.adapter)) if self.adapter is not None else None

    def recover(self, model: Model, corpus: Corpus | None, report_to: LogCallback | None = None) -> RecoveryReport:
        """Train the prefix and put it before what the model reads."""
        assert corpus is not None
        check_decoder(model)
        check_positions(model, self.tokens)
        base = FrozenBase(model.network)
        kind: Mapping[str, Any] = {"adapter": "prefix", "tokens": self.tokens}
        if self.adapter is None:
            tuning = Tuning(training=self.training, epochs=self.epochs, report_to=report_to)
            adapter = tuning.adapter(
                model, base, corpus, kind, trainable=lambda: self._trainable(model), reserved=self.tokens
            )
        else:
            adapter = read_adapter(Path(self.adapter), base, kind)
        Prompted(model, prefix_bank(model, adapter))
        base.check(model.network)
        return RecoveryReport.of("prefix", [adapter], {"tokens": self.tokens})

    def _trainable(self, model: Model) -> nn.Module:
        config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=self.tokens)
        return get_peft_model(model.network, config)


def prefix_bank(model: Model, adapter: Adapter) -> PromptBank:
    """The trained keys and values as a bank of one prompt; peft has ``[tokens, layers * 2 * heads * width]``."""
    (trained,) = adapter.tensors.values()
    heads, width = key_shape(model)
    layers = trained.to(model.device, model.dtype).view(len(trained), -1, 2, heads, width).permute(1, 2, 3, 0, 4)
    return PromptBank.stack([[(keys, values) for keys, values in layers]])
