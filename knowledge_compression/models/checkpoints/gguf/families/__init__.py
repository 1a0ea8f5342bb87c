"""The content of GGUF files for each architecture that is read and written here, by transformers' model type.

The keys are those of the GGUF specification that llama.cpp requires; the changes are those of its own conversion.
"""

from __future__ import annotations

from collections.abc import Mapping

from knowledge_compression.models.checkpoints.gguf.architecture import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf.families.dense import DENSE
from knowledge_compression.models.checkpoints.gguf.families.gemma import GEMMAS
from knowledge_compression.models.checkpoints.gguf.families.granite import GRANITES
from knowledge_compression.models.checkpoints.gguf.families.hybrids import HYBRIDS
from knowledge_compression.models.checkpoints.gguf.families.latent import LATENT_ATTENTION
from knowledge_compression.models.checkpoints.gguf.families.linear_attention import LINEAR_ATTENTION
from knowledge_compression.models.checkpoints.gguf.families.mixtures import MIXTURES
from knowledge_compression.models.checkpoints.gguf.families.older import OLDER
from knowledge_compression.models.checkpoints.gguf.families.state_spaces import STATE_SPACES

ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    **DENSE,
    **GEMMAS,
    **OLDER,
    **MIXTURES,
    **LATENT_ATTENTION,
    **LINEAR_ATTENTION,
    **GRANITES,
    **STATE_SPACES,
    **HYBRIDS,
}
