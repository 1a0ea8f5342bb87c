"""LoRA: low-rank matrices added to the projections (Hu et al., 2021); forgotten knowledge is relearned by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from knowledge_compression.corpora.corpus import Corpus, digest_file
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model
from knowledge_compression.models.families import CROSS_ATT, DECODER_SELF_ATT, ENCODER_ATT, FF
from knowledge_compression.models.targets import linear_layers
from knowledge_compression.recovery.adapters import FrozenBase, Tuning, read_adapter
from knowledge_compression.recovery.base import RecoveryReport
from knowledge_compression.training import LogCallback, TrainingSettings

ROLES = (ENCODER_ATT, DECODER_SELF_ATT, CROSS_ATT, FF)


@dataclass(frozen=True)
class Lora:
    """Train low-rank additions to every attention and feed-forward projection; they stay beside the base weights.

    Attributes:
        rank: of the additions; the paper's are 2, 3 and 4.
        alpha: they are scaled by ``alpha / rank``.
        dropout: on their input, in training.
        roles: which linear layers get one.
        training, epochs: see :class:`~knowledge_compression.recovery.adapters.Tuning`.
        adapter: file of an adapter that an earlier run wrote, taken instead of training one.
    """

    training: TrainingSettings
    rank: int = 4
    alpha: float = 16.0
    dropout: float = 0.0
    roles: tuple[str, ...] = ROLES
    epochs: int = 16
    adapter: str | None = None
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse ranks below one."""
        if self.rank < 1:
            raise BadInput(f"recovery.rank={self.rank} adds nothing; LoRA needs a rank of at least 1, e.g. 2, 3 or 4")

    def fingerprint(self) -> str | None:
        """Digest of the adapter that is taken, which enters the run's hash in the place of its path."""
        return digest_file(Path(self.adapter)) if self.adapter is not None else None

    def recover(self, model: Model, corpus: Corpus | None, report_to: LogCallback | None = None) -> RecoveryReport:
        """Train the additions and leave them in the network."""
        assert corpus is not None
        base = FrozenBase(model.network)
        kind: Mapping[str, Any] = {
            "adapter": "lora",
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "roles": list(self.roles),
        }
        if self.adapter is None:
            tuning = Tuning(training=self.training, epochs=self.epochs, report_to=report_to)
            adapter = tuning.adapter(model, base, corpus, kind, trainable=lambda: add_lora(model, self))
        else:
            adapter = read_adapter(Path(self.adapter), base, kind)
        if not any(p.requires_grad for p in model.network.parameters()):  # it was found, not trained just now
            add_lora(model, self)
        parameters = dict(model.network.named_parameters())
        for name, tensor in adapter.tensors.items():
            parameters[name].data.copy_(tensor)
            parameters[name].requires_grad_(False)
        model.network.eval()
        base.check(model.network)
        return RecoveryReport.of("lora", [adapter], {"rank": self.rank, "alpha": self.alpha})


def add_lora(model: Model, settings: Lora) -> nn.Module:
    """Put untrained additions into the network; gives the network.

    Raises:
        BadInput: the model has no linear layer of the roles.
    """
    layers = [layer for layer in linear_layers(model) if layer.role in settings.roles]
    if not layers:
        raise BadInput(f"{model.name} has no linear layer of the roles {', '.join(settings.roles)}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=[layer.path for layer in layers],
        fan_in_fan_out=isinstance(layers[0].module, Conv1D),
        bias="none",
    )
    ours = {type(layer.module) for layer in layers if getattr(layer.module, "replaces_linear", False)}
    config._register_custom_module(dict.fromkeys(ours, LoraLinear))
    return inject_adapter_in_model(config, model.network)
