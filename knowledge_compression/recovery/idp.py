"""Inference-time Dynamic Prompting: several prompts, and the input picks (Hoang et al., section 3.1.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from knowledge_compression.corpora.corpus import Corpus
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model
from knowledge_compression.recovery.adapters import FrozenBase, Tuning
from knowledge_compression.recovery.bank import bank_of, check_decoder, check_positions
from knowledge_compression.recovery.base import RecoveryReport
from knowledge_compression.recovery.prompt import check_prompt, prompt_adapter, prompt_embeddings
from knowledge_compression.recovery.prompted import PER_LAYER, SELECTIONS, Prompted
from knowledge_compression.training import LogCallback, TrainingSettings


@dataclass(frozen=True)
class Idp:
    """Prompts of several lengths, trained one by one as ``recovery=prompt`` trains them; the input picks one.

    The prompts do not attend to each other and their keys and values are computed once. Picked is the prompt to which
    the input pays the most attention (mean over heads, input tokens and the prompt's tokens), never the answer that is
    being scored.

    Attributes:
        prompts: the length of each.
        selection: ``per_layer`` (each attention layer picks, as the paper words it) or ``once`` (the first layer picks
            for all).
        init: how each prompt begins, see :class:`~knowledge_compression.recovery.prompt.Prompt`.
        training, epochs: see :class:`~knowledge_compression.recovery.adapters.Tuning`.
    """

    training: TrainingSettings
    prompts: Sequence[int] = (50, 100)
    selection: str = PER_LAYER
    init: str = "vocabulary"
    epochs: int = 16
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what cannot be picked from."""
        check_prompts(self.prompts, self.init)
        if self.selection not in SELECTIONS:
            raise BadInput(f"recovery.selection={self.selection} does not exist; choose one of {', '.join(SELECTIONS)}")

    def recover(self, model: Model, corpus: Corpus | None, report_to: LogCallback | None = None) -> RecoveryReport:
        """Train the prompts that earlier runs did not, and put them before what the model reads."""
        assert corpus is not None
        check_decoder(model)
        check_positions(model, max(self.prompts))
        base = FrozenBase(model.network)
        tuning = Tuning(training=self.training, epochs=self.epochs, report_to=report_to)
        adapters = [
            prompt_adapter(model, base, corpus, tuning, tokens=tokens, init=self.init) for tokens in self.prompts
        ]
        bank = bank_of(model, [prompt_embeddings(adapter) for adapter in adapters])
        Prompted(model, bank, self.selection)
        base.check(model.network)
        details = {"prompts": list(self.prompts), "selection": self.selection, "init": self.init}
        return RecoveryReport.of("idp", adapters, details)


def check_prompts(prompts: Sequence[int], init: str) -> None:
    """Refuse no prompts, empty ones, and the same one twice."""
    if not prompts:
        raise BadInput("recovery.prompts=[] names no prompt; give their lengths, e.g. recovery.prompts=[26,100]")
    for tokens in prompts:
        check_prompt(tokens, init)
    if len(set(prompts)) < len(prompts):
        raise BadInput(f"recovery.prompts={list(prompts)} names a prompt twice; prompts differ by their lengths")
