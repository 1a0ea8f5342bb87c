"""The architecture of a network: its family, its blocks and its final layer, read from the network itself.

Where the structure is ambiguous, :data:`EXCEPTIONS` decides: one entry per model type. The role of each matrix of a
block is determined in ``roles.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import nn
from knowledge_compression.models.roles import (
    CROSS_ATT,
    DECODER_SELF_ATT,
    ENCODER_ATT,
    EXPERTS,
    FF,
    FINAL,
    MIXER,
    ROLES,
    ROUTER,
    SELF_ATT,
    SHARED_EXPERTS,
    TRANSFORM,
    class_of,
    excepted,
    matches,
    reason_of,
    role_of,
)

__all__ = [
    "CROSS_ATT",
    "DECODER",
    "DECODER_SELF_ATT",
    "ENCODER",
    "ENCODER_ATT",
    "ENCODER_DECODER",
    "EXCEPTIONS",
    "EXPERTS",
    "FF",
    "FINAL",
    "MIXER",
    "ROLES",
    "ROUTER",
    "SHARED_EXPERTS",
    "TRANSFORM",
    "Architecture",
    "Exceptions",
    "Stack",
    "architecture_of",
    "family_of",
]

ENCODER, ENCODER_DECODER, DECODER = "encoder", "encoder_decoder", "decoder"


@dataclass(frozen=True)
class Exceptions:
    """The facts about one model type that its structure does not show; in paths, ``*`` matches one path component.

    Attributes:
        roles: role of a matrix, by its path inside a block.
        reasons: why a parameter is left out, by its path inside a block.
        blocks: paths of the lists of blocks, in forward order, if they are not the outermost lists.
        outside: paths of parts that are not the language model.
        paper_ff: paths inside a block that the first paper counts as feed-forward although they are in the attention
            module (Namburi et al., Table 2: the attention output of BERT and RoBERTa).
        shared_depth: name of the configuration value for how often a block is used (ALBERT), if any.
        pointwise_from: path inside a block of the module from which on the block is pointwise: it treats each position
            separately and depends only on that module's inputs. None if a residual bypasses every such module (networks
            that normalise first).
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    paper_ff: tuple[str, ...] = ()
    shared_depth: str | None = None
    pointwise_from: str | None = None


_BERT = Exceptions(paper_ff=("attention.output.dense",), pointwise_from="attention.output")

_GEMMA = {"per_layer_input_gate": TRANSFORM, "per_layer_projection": TRANSFORM}
_HYPER = {"attn_hc.fn": "hyper-connection", "ffn_hc.fn": "hyper-connection"}
_RECURRENT = {f"temporal_block.rg_lru.{gate}_gate_weight": "state-space parameter" for gate in ("input", "recurrent")}
_KERNEL = "projection of three dimensions"
_INKLING = {
    "self_attn.rel_logits_proj.proj": "relative positions",
    "self_attn.q_l2_clip.scale": "learned scale",
    "self_attn.rel_l2_clip.scale": "learned scale",
    "attention_input.query": "residual query",
    "mlp_input.query": "residual query",
}

EXCEPTIONS: dict[str, Exceptions] = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": Exceptions(pointwise_from="attention.output"),
    "distilbert": Exceptions(pointwise_from="sa_layer_norm"),
    "albert": Exceptions(
        blocks=("albert.encoder.albert_layer_groups.*.albert_layers",), shared_depth="num_hidden_layers"
    ),
    "dbrx": Exceptions(reasons={f"ffn.experts.mlp.{name}": "all experts in one matrix" for name in ("w1", "v1", "w2")}),
    "deepseek_v4": Exceptions(reasons=_HYPER),
    "hy_v4": Exceptions(reasons=_HYPER),
    "funnel": Exceptions(reasons={"attention.r_kernel": _KERNEL, "attention.seg_embed": "embedding"}),
    "gemma3n_text": Exceptions(
        roles=_GEMMA
        | {"laurel.linear_left": TRANSFORM, "laurel.linear_right": TRANSFORM, "altup.correction_coefs": TRANSFORM}
        | {"altup.prediction_coefs": TRANSFORM}
    ),
    "gemma4": Exceptions(roles=_GEMMA),
    "gemma4_text": Exceptions(roles=_GEMMA),
    "git": Exceptions(outside=("git.image_encoder",)),
    "inkling_text": Exceptions(reasons=_INKLING),
    "inkling2_text": Exceptions(reasons=_INKLING),
    "mobilebert": Exceptions(
        roles=dict.fromkeys(
            ("bottleneck.input.dense", "bottleneck.attention.dense", "output.bottleneck.dense"), TRANSFORM
        )
    ),
    "phi4_multimodal": Exceptions(outside=("model.embed_tokens_extend",)),
    "recurrent_gemma": Exceptions(reasons=_RECURRENT),
    "rwkv": Exceptions(roles={"attention.*": MIXER}),
    "voxtral_realtime": Exceptions(roles={"ada_rms_norm.linear1": TRANSFORM, "ada_rms_norm.linear2": TRANSFORM}),
    "xlnet": Exceptions(reasons={f"rel_attn.{name}": _KERNEL for name in "qkvor"}),
    "zamba": Exceptions(roles={"linear": TRANSFORM}),
    "zamba2": Exceptions(roles={"linear": TRANSFORM}),
}

_NONE = Exceptions()


@dataclass(frozen=True)
class Stack:
    """A stack of blocks: the path of its ``ModuleList`` and the role of self-attention in it."""

    blocks: str
    attention: str

    def is_block(self, path: str) -> bool:
        """Whether the module at the full path ``path`` is one of its blocks."""
        return matches(f"{self.blocks}.*", path)


@dataclass(frozen=True)
class Architecture:
    """The architecture of a network.

    Attributes:
        family: ``encoder``, ``encoder_decoder`` or ``decoder``.
        stacks: its stacks of blocks in forward order.
        final: path of the final layer, the projection to the vocabulary.
        exceptions: the facts that its structure does not show.
    """

    family: str
    stacks: tuple[Stack, ...]
    final: str
    exceptions: Exceptions = _NONE

    @property
    def shared_depth(self) -> str | None:
        """Name of the configuration value for how often a block is used, if any."""
        return self.exceptions.shared_depth

    @property
    def pointwise_from(self) -> str | None:
        """See :class:`Exceptions`."""
        return self.exceptions.pointwise_from

    def block_paths(self, network: nn.Module) -> list[str]:
        """Module paths of all blocks of ``network``, stack by stack in forward order."""
        return [
            f"{path}.{name}"
            for stack in self.stacks
            for path, module in network.named_modules()
            if matches(stack.blocks, path)
            for name, _ in module.named_children()
        ]

    def roles(self, network: nn.Module, reading: str = "module") -> Roles:
        """The roles of this network's current matrices."""
        return Roles(self, network, reading)


class Roles:
    """Determines the role of each matrix of a network, and why other parameters of its blocks are left out."""

    def __init__(self, architecture: Architecture, network: nn.Module, reading: str) -> None:
        self._architecture = architecture
        self._network = network
        self._paper = reading == "paper"
        self._config = type(network.config).__name__
        self._blocks = {
            block: stack
            for stack in architecture.stacks
            for path, module in network.named_modules()
            if matches(stack.blocks, path)
            for block in (f"{path}.{name}" for name, _ in module.named_children())
        }

    def block_of(self, path: str) -> str | None:
        """The block that contains a module or parameter, or None."""
        parts = path.split(".")
        places = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return next((place for place in places if place in self._blocks), None)

    def is_outside(self, path: str) -> bool:
        """Whether it belongs to a part of the network that is not the language model."""
        return any(f"{path}.".startswith(f"{part}.") for part in self._architecture.exceptions.outside)

    def of(self, path: str) -> str | None:
        """Role of the matrix at a module path, or None if nothing explains it."""
        architecture, exceptions = self._architecture, self._architecture.exceptions
        if path == architecture.final:
            return FINAL
        block = self.block_of(path)
        if block is None:
            return TRANSFORM
        inside = path[len(block) + 1 :]
        if self._paper and any(matches(pattern, inside) for pattern in exceptions.paper_ff):
            return FF
        role = excepted(exceptions.roles, inside) or self._read(block, inside)
        return self._blocks[block].attention if role == SELF_ATT else role

    def reason(self, path: str, name: str) -> str | None:
        """Why parameter ``name`` of the module at ``path`` in a block is left out; None if nothing explains it."""
        block = self.block_of(path) or path
        full = f"{path}.{name}"[len(block) + 1 :]
        kind = class_of(self._network.get_submodule(path), self._config)
        return excepted(self._architecture.exceptions.reasons, full) or reason_of(name, kind)

    def _read(self, block: str, inside: str) -> str | None:
        module = self._network.get_submodule(block)
        own, classes, siblings = class_of(module, self._config), [], []
        for name in inside.split(".") if inside else ():
            siblings.append(frozenset(module._modules) - {name})
            module = module.get_submodule(name)
            classes.append(class_of(module, self._config))
        return role_of(inside, classes, siblings, own) if inside else None


_READ: WeakKeyDictionary[nn.Module, Architecture] = WeakKeyDictionary()


def architecture_of(network: nn.Module) -> Architecture:
    """The architecture of a network; determined once, because compression and recovery do not change it.

    Raises:
        BadInput: it has no final layer or no blocks.
    """
    if network not in _READ:
        unwrap = getattr(network, "get_base_model", None)  # a method of peft's wrapper
        _READ[network] = _read(unwrap() if callable(unwrap) else network)
    return _READ[network]


def family_of(config: Any) -> str:
    """The family of language models to which a transformers configuration belongs.

    By the class from which the checkpoint was saved, if transformers' tables contain it, otherwise by the model type.

    Raises:
        BadInput: transformers has no language model of that type.
    """
    tables = _tables()
    for name in getattr(config, "architectures", None) or ():
        for family, table in tables.items():
            if name in table.values():
                return family
    for family, table in tables.items():
        if config.model_type in table:
            return family
    raise BadInput(
        f"model type '{config.model_type}' is not one of transformers' causal, masked or sequence-to-sequence "
        "language models"
    )


def _tables() -> dict[str, Mapping[str, str]]:
    """Names of transformers' classes of language models by model type, for each family."""
    from transformers.models.auto import modeling_auto as auto

    return {
        ENCODER_DECODER: auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        ENCODER: auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        DECODER: auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }


def _read(network: Any) -> Architecture:
    config, kind = network.config, type(network).__name__
    family = next((f for f, table in _tables().items() if kind in table.values()), None) or family_of(config)
    exceptions = EXCEPTIONS.get(config.model_type, _NONE)
    paths = {module: path for path, module in network.named_modules()}
    head = network.get_output_embeddings()
    if head is None:
        raise BadInput(f"a network of type '{config.model_type}' has no projection to the vocabulary")
    if family == ENCODER_DECODER and network.get_encoder() is network:  # an audio decoder, listed under its task
        family = DECODER
    halves = [network.get_encoder(), network.get_decoder()] if family == ENCODER_DECODER else [network]
    bodies, outside = tuple(_body(half, paths) for half in halves), exceptions.outside
    lists = exceptions.blocks or tuple(
        path
        for path in _lists(network)
        if f"{path}.".startswith(bodies) and not any(f"{path}.".startswith(f"{part}.") for part in outside)
    )
    others = {part for part in _lists(network) if not f"{part}.".startswith(bodies)} if not exceptions.blocks else set()
    encoder = f"{paths[halves[0]]}." if family == ENCODER_DECODER else None
    of_encoder = {path: encoder is not None and f"{path}.".startswith(encoder) for path in lists}
    if not lists or (family == ENCODER_DECODER and len(set(of_encoder.values())) < 2):
        raise BadInput(
            f"a network of type '{config.model_type}' has no list of blocks{' in one of its halves' if lists else ''}"
        )
    stacks = [
        Stack(path, ENCODER_ATT if family == ENCODER or of_encoder[path] else DECODER_SELF_ATT)
        for path in sorted(lists, key=lambda path: not of_encoder[path])  # an encoder runs first
    ]
    known = Exceptions(**vars(exceptions) | {"outside": (*outside, *sorted(others))})
    return Architecture(family, tuple(stacks), paths[head], known)


def _lists(network: nn.Module) -> Iterator[str]:
    """Paths of the outermost lists of modules that contain matrices and have submodules."""
    found: list[str] = []
    for path, module in network.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in found):
            continue
        if any(_is_list_of_lists(child) for child in module):
            continue
        if any(list(child.children()) and any(p.dim() > 1 for p in child.parameters()) for child in module):
            found.append(path)
            yield path


def _is_list_of_lists(child: nn.Module) -> bool:
    return isinstance(child, nn.ModuleList)


def _body(half: Any, paths: Mapping[nn.Module, str]) -> str:
    """Prefix of the paths of the text-reading part of a network, or of one half of an encoder-decoder.

    It is the nearest module around the input embeddings that holds blocks; the whole network if there is none.
    """
    whole = paths[half]
    lists = [".".join(filter(None, (whole, path))) for path in _lists(half)]
    try:
        around = paths.get(half.get_input_embeddings(), "")
    except (AttributeError, NotImplementedError):  # a half without this method, or one that reads no text (speech)
        around = ""
    while around.startswith(f"{whole}." if whole else "") and around:
        around = around.rpartition(".")[0]
        if around and any(path.startswith(f"{around}.") for path in lists):
            return f"{around}."
    return f"{whole}." if whole else ""
