"""Mixtures of GGUF types on a network: which type each of its weights gets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGMLQuantizationType as Kind

from knowledge_compression.compression.solve.mixtures import MIXTURES, Mixed
from knowledge_compression.errors import BadInput
from knowledge_compression.models import TargetLayer
from knowledge_compression.models.checkpoints.gguf.architecture import architecture_for

_OF_70B = ("llama", "qwen2")


@dataclass(frozen=True)
class MixedModel:
    """The types that a mixture gives to the weights of a network.

    Attributes:
        mixture: the name of the mixture.
        rules: the facts about the model that the rules use.
        names: each parameter, and the tensors of GGUF files that hold it.
        tied: whether the final layer uses the embeddings.
    """

    mixture: str
    rules: Mixed
    names: Mapping[str, Sequence[str]]
    tied: bool

    @classmethod
    def of(cls, network: Any, mixture: str) -> MixedModel:
        """Read a network, which may be on the meta device.

        Raises:
            BadInput: llama.cpp has no names for its tensors, or it is not a decoder.
        """
        config = network.config
        try:
            architecture = architecture_for(config)
        except BadInput:
            architecture = None
        if architecture is None or config.is_encoder_decoder:
            raise BadInput(
                f"the mixture {mixture} uses llama.cpp's names for the tensors of decoders, and llama.cpp has none "
                f"for {config.model_type}; choose a single type, e.g. compression.type={MIXTURES[mixture]}"
            )
        told = {key.partition(".")[2]: value for key, value in architecture.values(config)}
        heads = int(told.get("attention.head_count") or 1)
        keys = int(told.get("attention.head_count_kv") or heads)
        blocks = int(config.num_hidden_layers)
        rules = Mixed(
            blocks=blocks,
            queries=heads // keys,
            experts=int(told.get("expert_count") or 0),
            falcon=architecture.name == "falcon",
            seventy=architecture.name in _OF_70B and blocks == 80 and keys < heads,
        )
        return cls(mixture, rules, architecture.names(network), bool(config.tie_word_embeddings))

    def type_of(self, layer: TargetLayer) -> str:
        """The type of a layer."""
        tensor = self.names.get(layer.weight_name, ("",))[0]
        return self.of_tensor(tensor, layer.weight.shape[1]).name.lower()

    def of_tensor(self, tensor: str, width: int) -> Kind:
        """The type of a tensor with rows of some width, before it falls back on another."""
        if (block := re.match(r"blk\.(\d+)\.", tensor)) is not None:
            found = self.rules.type_of(self.mixture, tensor, int(block[1]))
        elif tensor == "output.weight" or (self.tied and tensor == "token_embd.weight"):
            found = self.rules.head(width)
        else:
            found = MIXTURES[self.mixture]
        return Kind[found.upper()]
