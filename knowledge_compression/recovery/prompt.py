"""Prompt tuning: trained embeddings before the input (Lester et al., 2021); displaced knowledge comes back by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from torch import Tensor, nn

from knowledge_compression.corpora.corpus import Corpus
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER
from knowledge_compression.models.prompts import Prompts
from knowledge_compression.recovery.adapters import Adapter, FrozenBase, Tuning
from knowledge_compression.recovery.bank import bank_of, check_positions, embedding_width
from knowledge_compression.recovery.base import RestoresBy
from knowledge_compression.recovery.joined import join_prompt
from knowledge_compression.recovery.prompted_network import Prompted
from knowledge_compression.recovery.tuned import OneAdapter

INITS = {"vocabulary": PromptTuningInit.SAMPLE_VOCAB, "random": PromptTuningInit.RANDOM}


@dataclass(frozen=True)
class Prompt(OneAdapter):
    """Train one soft prompt; at inference its keys and values are computed once.

    Attributes:
        tokens: its length; the paper's are 26, 50 and 100.
        init: ``vocabulary`` (embeddings of random tokens) or ``random`` (standard normal, peft's default).
    """

    tokens: int = 50
    init: str = "vocabulary"
    name = "prompt"
    restores_by = RestoresBy.REDIRECTION

    def __post_init__(self) -> None:
        """Refuse empty prompts and unknown ways to begin."""
        check_prompt(self.tokens, self.init)

    @property
    def kind(self) -> Mapping[str, Any]:
        """Its length and how it began."""
        return {"tokens": self.tokens, "init": self.init}

    @property
    def positions(self) -> int:
        """Its length."""
        return self.tokens

    def check(self, model: Model) -> None:
        """Refuse a prompt that leaves the input no position."""
        check_positions(model, self.tokens)

    def trainable(self, model: Model) -> nn.Module:
        """The network with an untrained prompt."""
        return _trainable(model, self.tokens, self.init)

    def put(self, model: Model, adapter: Adapter) -> Prompts:
        """Put the prompt before what the model reads."""
        embeddings = prompt_embeddings(adapter)
        prompts = Prompts(self.tokens)
        if model.family == DECODER:
            prompts = Prompted(model, bank_of(model, [embeddings])).prompts
        elif adapter.found:  # else it is in its place since it was trained
            join_prompt(model, embeddings)
        model.network.requires_grad_(False)
        return prompts


def check_prompt(tokens: int, init: str = "vocabulary") -> None:
    """Refuse empty prompts and unknown ways to begin."""
    if tokens < 1:
        raise BadInput(f"a prompt of {tokens} tokens redirects nothing; give at least 1, e.g. 26, 50 or 100")
    if init not in INITS:
        raise BadInput(f"recovery.init={init} does not exist; choose one of {', '.join(INITS)}")


def prompt_adapter(
    model: Model, base: FrozenBase, corpus: Corpus, tuning: Tuning, *, tokens: int, init: str
) -> Adapter:
    """Train one soft prompt for ``model``, or take the one that an earlier run trained; a decoder stays as it was."""
    check_positions(model, tokens)
    kind = {"adapter": Prompt.name, "tokens": tokens, "init": init}
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
