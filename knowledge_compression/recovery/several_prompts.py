"""The base of strategies with several prompts; each prompt is trained separately, as by ``recovery=prompt``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knowledge_compression.corpora.corpus import Corpus
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model
from knowledge_compression.models.prompts import Prompts
from knowledge_compression.recovery.adapters import FrozenBase
from knowledge_compression.recovery.bank import check_decoder, check_positions
from knowledge_compression.recovery.base import Recovered, RecoveryReport, RestoresBy
from knowledge_compression.recovery.prompt import check_prompt, prompt_adapter, prompt_embeddings
from knowledge_compression.recovery.tuned import Tuned
from knowledge_compression.training import LogCallback

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SeveralPrompts(Tuned):
    """Prompts of several lengths before a decoder's input; subclasses decide how they are placed.

    Attributes:
        prompts: the length of each, in order.
        init: the initialisation of each prompt, see :class:`~knowledge_compression.recovery.prompt.Prompt`.
    """

    prompts: Sequence[int] = (50, 100)
    init: str = "vocabulary"
    restores_by = RestoresBy.REDIRECTION
    beside_offloaded = True

    def __post_init__(self) -> None:
        """Refuse an empty list, empty prompts, and duplicates."""
        if not self.prompts:
            raise BadInput("recovery.prompts=[] names no prompt; give their lengths, e.g. recovery.prompts=[26,100]")
        for tokens in self.prompts:
            check_prompt(tokens, self.init)
        if len(set(self.prompts)) < len(self.prompts):
            raise BadInput(
                f"recovery.prompts={list(self.prompts)} names a prompt twice; prompts differ by their lengths"
            )

    def recover(self, model: Model, corpus: Corpus | None, report_to: LogCallback | None = None) -> Recovered:
        """Train the prompts that no earlier run has trained, and place all of them before the model's input."""
        assert corpus is not None
        check_decoder(model)
        check_positions(model, self.positions)
        base = FrozenBase(model.network)
        tuning = self.tuning(report_to)
        adapters = [
            prompt_adapter(model, base, corpus, tuning, tokens=tokens, init=self.init) for tokens in self.prompts
        ]
        prompts = self.put(model, [prompt_embeddings(adapter) for adapter in adapters])
        base.check(model.network)
        settings = {"prompts": list(self.prompts), "init": self.init} | self.details()
        return Recovered(RecoveryReport.of(self.name, adapters, settings), prompts)

    @property
    @abstractmethod
    def positions(self) -> int:
        """Number of positions that the prompts occupy before an input."""

    @abstractmethod
    def put(self, model: Model, prompts: Sequence[Tensor]) -> Prompts:
        """Place the trained prompts ``[tokens, width]`` before the input of ``model``, and return them as placed."""

    def details(self) -> dict[str, Any]:
        """Details for the report besides the prompts."""
        return {}
