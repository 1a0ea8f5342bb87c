"""Families as data: which linear layers of an architecture are attention, feed-forward, head.

A new architecture is one entry of :data:`ARCHITECTURES`. Patterns are module paths in which ``*`` stands for one path
component; a linear layer that no pattern places is an error that names it, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from knowledge_compression.errors import BadInput

ENCODER, ENCODER_DECODER, DECODER = "encoder", "encoder_decoder", "decoder"

# Roles of a linear layer. `transform` is what lies between the blocks and the head or the embeddings and the blocks.
ENCODER_ATT, DECODER_SELF_ATT, CROSS_ATT = "encoder_att", "decoder_self_att", "cross_att"
FF, TRANSFORM, FINAL = "ff", "transform", "final"
ROLES = (ENCODER_ATT, DECODER_SELF_ATT, CROSS_ATT, FF, TRANSFORM, FINAL)


@dataclass(frozen=True)
class Stack:
    """A pile of like blocks: the path of its ``ModuleList`` and the roles of the linears inside one block."""

    blocks: str
    roles: Mapping[str, str]

    def is_block(self, path: str) -> bool:
        """Whether the module at the full path ``path`` is one of its blocks."""
        return _matches(f"{self.blocks}.*", path)

    def role_of(self, path: str) -> str | None:
        """Role of the linear at the full module path ``path``, or None where it is not of this stack."""
        return next((role for inside, role in self.roles.items() if _matches(f"{self.blocks}.*.{inside}", path)), None)


@dataclass(frozen=True)
class Architecture:
    """One entry of the family map.

    Attributes:
        family: ``encoder``, ``encoder_decoder`` or ``decoder``.
        stacks: its piles of blocks in forward order.
        final: path of the final layer, the projection onto the vocabulary.
        transforms: paths of linears outside the blocks (an MLM head's dense layer, factorised embeddings).
        paper_ff: paths inside a block that the first paper counts as feed-forward though they lie in the attention
            module (Namburi et al., Table 2: the attention output of BERT and RoBERTa).
        shared_depth: name of the configuration value that says how often one block is used (ALBERT), if any.
        pointwise_from: path inside a block of the module from which on, its inputs being all there is, the block treats
            each position by itself; None where a residual goes past every such module (networks that norm first).
        positions_after_padding: whether positions are numbered from the one after the padding token's id (RoBERTa).
    """

    family: str
    stacks: tuple[Stack, ...]
    final: str
    transforms: tuple[str, ...] = ()
    paper_ff: tuple[str, ...] = ()
    shared_depth: str | None = None
    pointwise_from: str | None = None
    positions_after_padding: bool = False

    def role_of(self, path: str, *, reading: str = "module") -> str | None:
        """Role of the linear at ``path``, or None where the map does not know it."""
        if path == self.final:
            return FINAL
        if reading == "paper" and any(_matches(f"{s.blocks}.*.{p}", path) for s in self.stacks for p in self.paper_ff):
            return FF
        for stack in self.stacks:
            if role := stack.role_of(path):
                return role
        return TRANSFORM if any(_matches(pattern, path) for pattern in self.transforms) else None

    def block_paths(self, network: nn.Module) -> list[str]:
        """Module paths of all blocks of ``network``, stack by stack in forward order."""
        return [
            f"{path}.{name}"
            for stack in self.stacks
            for path, module in network.named_modules()
            if _matches(stack.blocks, path)
            for name, _ in module.named_children()
        ]


def _roles(role: str, *paths: str) -> dict[str, str]:
    return dict.fromkeys(paths, role)


def _att(role: str, prefix: str, names: str) -> dict[str, str]:
    return _roles(role, *(f"{prefix}.{name}" for name in names.split()))


_BERT_BLOCK = _att(ENCODER_ATT, "attention", "self.query self.key self.value output.dense") | _roles(
    FF, "intermediate.dense", "output.dense"
)
_LLAMA_BLOCK = _att(DECODER_SELF_ATT, "self_attn", "q_proj k_proj v_proj o_proj") | _att(
    FF, "mlp", "gate_proj up_proj down_proj"
)
_BART_PROJECTIONS = "q_proj k_proj v_proj out_proj"
_BART_FF = _roles(FF, "fc1", "fc2")
_T5_FF = "wi wi_0 wi_1 wo"  # plain T5 has wi, the gated one of Flan-T5 wi_0 and wi_1

_LLAMA = Architecture(DECODER, (Stack("model.layers", _LLAMA_BLOCK),), "lm_head")

ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": Architecture(
        ENCODER,
        (Stack("bert.encoder.layer", _BERT_BLOCK),),
        "cls.predictions.decoder",
        transforms=("cls.predictions.transform.dense",),
        paper_ff=("attention.output.dense",),
        pointwise_from="attention.output",
    ),
    "roberta": Architecture(
        ENCODER,
        (Stack("roberta.encoder.layer", _BERT_BLOCK),),
        "lm_head.decoder",
        transforms=("lm_head.dense",),
        paper_ff=("attention.output.dense",),
        pointwise_from="attention.output",
        positions_after_padding=True,
    ),
    "distilbert": Architecture(
        ENCODER,
        (
            Stack(
                "distilbert.transformer.layer",
                _att(ENCODER_ATT, "attention", "q_lin k_lin v_lin out_lin") | _att(FF, "ffn", "lin1 lin2"),
            ),
        ),
        "vocab_projector",
        transforms=("vocab_transform",),
        pointwise_from="sa_layer_norm",
    ),
    "albert": Architecture(
        ENCODER,
        (
            Stack(
                "albert.encoder.albert_layer_groups.*.albert_layers",
                _att(ENCODER_ATT, "attention", "query key value dense") | _roles(FF, "ffn", "ffn_output"),
            ),
        ),
        "predictions.decoder",
        transforms=("albert.encoder.embedding_hidden_mapping_in", "predictions.dense"),
        shared_depth="num_hidden_layers",
    ),
    "electra": Architecture(
        ENCODER,
        (Stack("electra.encoder.layer", _BERT_BLOCK),),
        "generator_lm_head",
        transforms=("electra.embeddings_project", "generator_predictions.dense"),
        pointwise_from="attention.output",
    ),
    "t5": Architecture(
        ENCODER_DECODER,
        (
            Stack(
                "encoder.block",
                _att(ENCODER_ATT, "layer.0.SelfAttention", "q k v o") | _att(FF, "layer.1.DenseReluDense", _T5_FF),
            ),
            Stack(
                "decoder.block",
                _att(DECODER_SELF_ATT, "layer.0.SelfAttention", "q k v o")
                | _att(CROSS_ATT, "layer.1.EncDecAttention", "q k v o")
                | _att(FF, "layer.2.DenseReluDense", _T5_FF),
            ),
        ),
        "lm_head",
    ),
    "bart": Architecture(
        ENCODER_DECODER,
        (
            Stack("model.encoder.layers", _att(ENCODER_ATT, "self_attn", _BART_PROJECTIONS) | _BART_FF),
            Stack(
                "model.decoder.layers",
                _att(DECODER_SELF_ATT, "self_attn", _BART_PROJECTIONS)
                | _att(CROSS_ATT, "encoder_attn", _BART_PROJECTIONS)
                | _BART_FF,
            ),
        ),
        "lm_head",
    ),
    "llama": _LLAMA,  # also Vicuna, WizardLM and SmolLM2
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "gemma3_text": _LLAMA,
    "opt": Architecture(
        DECODER,
        (
            Stack(
                "model.decoder.layers",
                _att(DECODER_SELF_ATT, "self_attn", _BART_PROJECTIONS) | _BART_FF,
            ),
        ),
        "lm_head",
        transforms=("model.decoder.project_in", "model.decoder.project_out"),
    ),
    "gpt2": Architecture(
        DECODER,
        (Stack("transformer.h", _att(DECODER_SELF_ATT, "attn", "c_attn c_proj") | _att(FF, "mlp", "c_fc c_proj")),),
        "lm_head",
    ),
    "gpt_neox": Architecture(
        DECODER,
        (
            Stack(
                "gpt_neox.layers",
                _att(DECODER_SELF_ATT, "attention", "query_key_value dense")
                | _att(FF, "mlp", "dense_h_to_4h dense_4h_to_h"),
            ),
        ),
        "lm_head",
    ),
}


def architecture_of(config: Any) -> Architecture:
    """The family map's entry for a transformers configuration.

    Raises:
        BadInput: the architecture is not in the map.
    """
    try:
        return ARCHITECTURES[config.model_type]
    except KeyError:
        known = ", ".join(sorted(ARCHITECTURES))
        raise BadInput(
            f"model type '{config.model_type}' is not in the family map; known: {known} (docs/extending.md adds one)"
        ) from None


def _matches(pattern: str, path: str) -> bool:
    return _compiled(pattern).fullmatch(path) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
