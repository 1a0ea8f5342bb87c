"""LoRA: low-rank matrices added to the projections (Hu et al., 2021), which relearn forgotten knowledge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model
from knowledge_compression.models.families import (
    CROSS_ATT,
    DECODER_SELF_ATT,
    ENCODER_ATT,
    EXPERTS,
    FF,
    MIXER,
    SHARED_EXPERTS,
)
from knowledge_compression.models.prompts import NO_PROMPTS, Prompts
from knowledge_compression.models.targets import TargetLayer, linear_layers
from knowledge_compression.recovery.adapters import Adapter
from knowledge_compression.recovery.base import RestoresBy
from knowledge_compression.recovery.tuned import OneAdapter

if TYPE_CHECKING:
    from torch import nn

ROLES = (ENCODER_ATT, DECODER_SELF_ATT, CROSS_ATT, FF)
# Types whose kernels multiply by the mixer's last matrix themselves, so that peft refuses to add anything to it.
_BY_KERNEL = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
# As in targets, experts are feed-forward; a mixer counts as attention.
_TAKES = {FF: (FF, EXPERTS, SHARED_EXPERTS), DECODER_SELF_ATT: (DECODER_SELF_ATT, MIXER)}


@dataclass(frozen=True)
class Lora(OneAdapter):
    """Train low-rank additions to every attention and feed-forward projection, in float32, and leave them unmerged.

    Each expert of a mixture gets an addition of its own. Linear attention and state-space mixers, which replace
    attention, count as attention; the last matrix of Mamba's is left out, and so is DeepSeek V4's projection in groups.

    Attributes:
        rank: of the additions; the paper uses 2, 3 and 4.
        alpha: the additions are scaled by ``alpha / rank``.
        dropout: on the additions' input, during training.
        roles: roles of the linear layers that get one.
    """

    rank: int = 4
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    roles: tuple[str, ...] = ROLES
    name = "lora"
    restores_by = RestoresBy.WEIGHTS

    def __post_init__(self) -> None:
        """Refuse ranks below one."""
        if self.rank < 1:
            raise BadInput(f"recovery.rank={self.rank} adds nothing; LoRA needs a rank of at least 1, e.g. 2, 3 or 4")

    @property
    def kind(self) -> Mapping[str, Any]:
        """Its settings."""
        return {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout, "roles": list(self.roles)}

    def layers(self, model: Model) -> list[TargetLayer]:
        """The linear layers that get an addition."""
        roles = {part for role in self.roles for part in _TAKES.get(role, (role,))}
        found = [layer for layer in linear_layers(model) if layer.role in roles and layer.is_replaceable]
        if model.network.config.model_type in _BY_KERNEL:
            return [layer for layer in found if not layer.path.endswith(".out_proj")]
        return found

    def prepare(self, model: Model) -> None:
        """Take banks of experts apart, so that each expert can get an addition of its own."""
        from knowledge_compression.models.replaced import ReplacedExperts

        for layer in self.layers(model):
            if layer.expert:
                ReplacedExperts.in_place_of(layer.module, layer.expert.parameter, layer.expert.transposed)

    def trainable(self, model: Model) -> nn.Module:
        """Return the network with untrained additions."""
        return add_lora(model, self)

    def put(self, model: Model, adapter: Adapter) -> Prompts:
        """Leave the additions in the network, frozen."""
        if adapter.found:
            add_lora(model, self)
        parameters = dict(model.network.named_parameters())
        for name, tensor in adapter.tensors.items():
            parameters[name].data.copy_(tensor)
            parameters[name].requires_grad_(False)
        model.network.eval()
        return NO_PROMPTS


def add_lora(model: Model, settings: Lora) -> nn.Module:
    """Insert untrained additions into the network and return it.

    Raises:
        BadInput: the model has no linear layer with these roles.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    from knowledge_compression.heavy import nn
    from knowledge_compression.recovery.lora_training import LoraLinear

    layers = settings.layers(model)
    if not layers:
        raise BadInput(f"{model.name} has no linear layer with the roles {', '.join(settings.roles)}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=[path for layer in layers for path in (layer.path, *layer.copies)],
        fan_in_fan_out=isinstance(layers[0].module, Conv1D),
        bias="none",
    )
    ours = {type(layer.module) for layer in layers if layer.is_replaced}
    config._register_custom_module(dict.fromkeys((*ours, nn.Linear), LoraLinear))
    network = inject_adapter_in_model(config, model.network)
    for parameter in network.parameters():
        if parameter.requires_grad:  # in a narrower type steps would be lost, and Adam's squares would vanish
            parameter.data = parameter.data.float()
    return network
