"""Prompt tuning: trained embeddings before the input (Lester et al., 2021), which bring displaced knowledge back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knowledge_compression.corpora.corpus import Corpus
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER
from knowledge_compression.models.prompts import Prompts
from knowledge_compression.recovery.adapters import Adapter, FrozenBase, Tuning
from knowledge_compression.recovery.bank import bank_of, check_decoder, check_positions, embedding_width
from knowledge_compression.recovery.base import RestoresBy
from knowledge_compression.recovery.joined import join_prompt
from knowledge_compression.recovery.prompted_network import Prompted
from knowledge_compression.recovery.tuned import OneAdapter

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

INITS = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}  # and what peft calls them


@dataclass(frozen=True)
class Prompt(OneAdapter):
    """Train one soft prompt; at inference its keys and values are computed once.

    Attributes:
        tokens: length of the prompt; the paper uses 26, 50 and 100.
        init: ``vocabulary`` (embeddings of random tokens) or ``random`` (standard normal, peft's default).
    """

    tokens: int = 50
    init: str = "vocabulary"
    name = "prompt"
    restores_by = RestoresBy.REDIRECTION
    beside_offloaded = True

    def __post_init__(self) -> None:
        """Refuse empty prompts and unknown ways to begin."""
        check_prompt(self.tokens, self.init)

    @property
    def kind(self) -> Mapping[str, Any]:
        """The prompt's length and initialisation."""
        return {"tokens": self.tokens, "init": self.init}

    @property
    def positions(self) -> int:
        """Its length."""
        return self.tokens

    def check(self, model: Model) -> None:
        """Refuse a prompt that leaves no positions for the input, and decoders that cannot read it from a cache."""
        if model.family == DECODER:
            check_decoder(model)
        check_positions(model, self.tokens)

    def trainable(self, model: Model) -> nn.Module:
        """Return the network with an untrained prompt."""
        return _trainable(model, self.tokens, self.init)

    def put(self, model: Model, adapter: Adapter) -> Prompts:
        """Place the prompt before the model's input."""
        embeddings = prompt_embeddings(adapter)
        prompts = Prompts(self.tokens)
        if model.family == DECODER:
            prompts = Prompted(model, bank_of(model, [embeddings])).prompts
        elif adapter.found:  # otherwise it has been in place since training
            join_prompt(model, embeddings)
        model.network.requires_grad_(False)
        return prompts


def check_prompt(tokens: int, init: str = "vocabulary") -> None:
    """Refuse empty prompts and unknown ways to begin."""
    if tokens < 1:
        raise BadInput(f"a prompt needs at least 1 token, not {tokens}; the paper uses 26, 50 and 100")
    if init not in INITS:
        raise BadInput(f"recovery.init={init} does not exist; choose one of {', '.join(INITS)}")


def prompt_adapter(
    model: Model, base: FrozenBase, corpus: Corpus, tuning: Tuning, *, tokens: int, init: str
) -> Adapter:
    """Train one soft prompt for ``model``, or use that of an earlier run; a decoder is left unchanged."""
    check_positions(model, tokens)
    kind = {"adapter": Prompt.name, "tokens": tokens, "init": init}
    return tuning.adapter(model, base, corpus, kind, trainable=lambda: _trainable(model, tokens, init), reserved=tokens)


def prompt_embeddings(adapter: Adapter) -> Tensor:
    """The trained embeddings ``[tokens, width]``."""
    (embeddings,) = adapter.tensors.values()
    return embeddings


def by_peft(model: Model, config: PeftConfig) -> nn.Module:
    """The network of a decoder in peft's wrapper, with untrained parameters as configured."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft asks a network by a name that transformers has replaced, which no user can change.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped: nn.Module = get_peft_model(model.network, config)
    return wrapped


def _trainable(model: Model, tokens: int, init: str) -> nn.Module:
    """The network with an untrained prompt: by peft if it supports the network, otherwise joined inside the stack."""
    from peft import PromptTuningConfig, PromptTuningInit, TaskType

    embeddings = model.network.get_input_embeddings()
    width = embedding_width(model)
    if model.family == DECODER:
        config = PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=tokens,
            token_dim=width,
            prompt_tuning_init=PromptTuningInit[INITS[init]],
        )
        return by_peft(model, config)
    if init == "random":
        return join_prompt(model, torch.randn(tokens, width))
    drawn = torch.randint(len(model.tokenizer), (tokens,), device=model.device)
    return join_prompt(model, embeddings(drawn).detach().float())
