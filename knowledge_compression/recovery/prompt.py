"""Prompt tuning: trained embeddings before the input (Lester et al., 2021); displaced knowledge comes back by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from torch import Tensor, nn

from knowledge_compression.corpora.corpus import Corpus, digest_file
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER
from knowledge_compression.recovery.adapters import Adapter, FrozenBase, Tuning, read_adapter
from knowledge_compression.recovery.bank import bank_of, check_positions, embedding_width
from knowledge_compression.recovery.base import RecoveryReport
from knowledge_compression.recovery.joined import join_prompt
from knowledge_compression.recovery.prompted_network import Prompted
from knowledge_compression.training import LogCallback, TrainingSettings

INITS = {"vocabulary": PromptTuningInit.SAMPLE_VOCAB, "random": PromptTuningInit.RANDOM}


@dataclass(frozen=True)
class Prompt:
    """Train one soft prompt; at inference its keys and values are computed once.

    Attributes:
        tokens: its length; the paper's are 26, 50 and 100.
        init: ``vocabulary`` (embeddings of random tokens) or ``random`` (standard normal, peft's default).
        training, epochs: see :class:`~knowledge_compression.recovery.adapters.Tuning`.
        adapter: file of an adapter that an earlier run wrote, taken instead of training one.
    """

    training: TrainingSettings
    tokens: int = 50
    init: str = "vocabulary"
    epochs: int = 16
    adapter: str | None = None
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse empty prompts and unknown ways to begin."""
        check_prompt(self.tokens, self.init)

    def fingerprint(self) -> str | None:
        """Digest of the adapter that is taken, which enters the run's hash in the place of its path."""
        return digest_file(Path(self.adapter)) if self.adapter is not None else None

    def recover(self, model: Model, corpus: Corpus | None, report_to: LogCallback | None = None) -> RecoveryReport:
        """Train the prompt and put it before what the model reads."""
        assert corpus is not None
        base = FrozenBase(model.network)
        if self.adapter is None:
            tuning = Tuning(training=self.training, epochs=self.epochs, report_to=report_to)
            adapter = prompt_adapter(model, base, corpus, tuning, tokens=self.tokens, init=self.init)
        else:
            adapter = read_adapter(Path(self.adapter), base, prompt_kind(self.tokens, self.init))
        embeddings = prompt_embeddings(adapter)
        if model.family == DECODER:
            Prompted(model, bank_of(model, [embeddings]))
        elif adapter.found:  # else it is in its place since it was trained
            join_prompt(model, embeddings)
        model.network.requires_grad_(False)
        base.check(model.network)
        return RecoveryReport.of("prompt", [adapter], {"tokens": self.tokens, "init": self.init})


def check_prompt(tokens: int, init: str = "vocabulary") -> None:
    """Refuse empty prompts and unknown ways to begin."""
    if tokens < 1:
        raise BadInput(f"a prompt of {tokens} tokens redirects nothing; give at least 1, e.g. 26, 50 or 100")
    if init not in INITS:
        raise BadInput(f"recovery.init={init} does not exist; choose one of {', '.join(INITS)}")


def prompt_kind(tokens: int, init: str) -> Mapping[str, Any]:
    """What an adapter file says of a soft prompt."""
    return {"adapter": "prompt", "tokens": tokens, "init": init}


def prompt_adapter(
    model: Model, base: FrozenBase, corpus: Corpus, tuning: Tuning, *, tokens: int, init: str
) -> Adapter:
    """Train one soft prompt for ``model``, or take the one that an earlier run trained; a decoder stays as it was."""
    check_positions(model, tokens)
    kind = prompt_kind(tokens, init)
    return tuning.adapter(model, base, corpus, kind, trainable=lambda: _trainable(model, tokens, init), reserved=tokens)


def prompt_embeddings(adapter: Adapter) -> Tensor:
    """The trained embeddings ``[tokens, width]``."""
    (embeddings,) = adapter.tensors.values()
    return embeddings


def _trainable(model: Model, tokens: int, init: str) -> nn.Module:
    """The network with an untrained prompt: peft's where it has a class for it, else joined in the stack itself."""
    embeddings = model.network.get_input_embeddings()
    width = embedding_width(model)
    if model.family == DECODER:
        config = PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=tokens,
            token_dim=width,
            prompt_tuning_init=INITS[init],
        )
        return get_peft_model(model.network, config)
    if init == "random":
        return join_prompt(model, torch.randn(tokens, width))
    drawn = torch.randint(len(model.tokenizer), (tokens,), device=model.device)
    return join_prompt(model, embeddings(drawn).detach().float())
