"""Every recovery, short enough for tiny models."""

from __future__ import annotations

from knowledge_compression.recovery.concat import Concat
from knowledge_compression.recovery.idp import Idp
from knowledge_compression.recovery.lora import Lora
from knowledge_compression.recovery.prefix import Prefix
from knowledge_compression.recovery.prompt import Prompt
from knowledge_compression.training import TrainingSettings

SHORT = TrainingSettings(steps=30, batch_size=4, learning_rate=0.02, checkpoint_every=5, schedule="constant")
STRATEGIES = {
    "lora": Lora(SHORT, rank=2),
    "prompt": Prompt(SHORT, tokens=5),
    "prefix": Prefix(SHORT, tokens=5),
    "idp": Idp(SHORT, prompts=(3, 5)),
    "concat": Concat(SHORT, prompts=(3, 5)),
}
