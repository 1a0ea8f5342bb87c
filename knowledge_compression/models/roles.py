"""The role of a matrix in its block, read from the names and classes of the modules around it.

The rules are data. They are tried from the innermost module outwards, at each module in order, on its own name and on
the name of its class; the first match decides. A matrix that no rule explains is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


# Roles of a matrix. `self_att` becomes the encoder's or the decoder's role; `transform` changes the width of states: in
# a block outside its attention and feed-forward layers, between blocks and head, or between embeddings and blocks.
ENCODER_ATT, DECODER_SELF_ATT, CROSS_ATT = "encoder_att", "decoder_self_att", "cross_att"
FF, EXPERTS, SHARED_EXPERTS, ROUTER, MIXER = "ff", "experts", "shared_experts", "router", "mixer"
TRANSFORM, FINAL = "transform", "final"
ROLES = (ENCODER_ATT, DECODER_SELF_ATT, CROSS_ATT, FF, EXPERTS, SHARED_EXPERTS, ROUTER, MIXER, TRANSFORM, FINAL)
SELF_ATT = "self_att"

# Role, pattern of a module's name, pattern of its class without the family's own name.
_RULES: Sequence[tuple[str, str, str]] = (
    (ROUTER, r".*router.*|shared_expert_gate", r".*router|.*topkgate"),
    (SHARED_EXPERTS, r"shared_experts?|shared_mlp|.*sharedexperts?", r".*sharedexperts?"),
    (EXPERTS, r"experts|.*_experts", r".*experts|.*expertlayer"),
    (
        MIXER,
        r"mamba\d?|ssm|linear_attn|short_?conv|mixer_block|rec|kda|mlstm.*|slstm.*",
        r".*(mixer|mamba\w*|deltanet\w*|deltaattention|linearattention|lightningattention|recurrentblock|shortconv"
        r"|rglru|convolution|lstm\w*|timemix)",
    ),
    (CROSS_ATT, r".*cross_?att\w*|enc\w*_attn|encdecattention", r".*(cross|encdec)\w*att\w*"),
    (SELF_ATT, r".*attn.*|.*attention.*|indexer", r"(?!.*residual).*att(entio)?n.*"),
    (
        FF,
        r"mlp\w*|ffn\w*|feed_?forward\w*|ffw\w*|ff",
        r".*(mlp|ffn|feed_?forward|ffw?|moe\w*|dense(relu|act|gated)\w*)",
    ),
)

# Matrices directly in the block, or in modules whose name does not show the role.
_PLAIN = {
    FF: r"(intermediate|output|ffn|pwff)(\.\w+)*|fc_?\d|lin\d|linear\d|ffn_output|wi(_\d)?|wo|w\d|up_proj|down_proj"
    r"|gate_proj|dense_(h_to_4h|4h_to_h)"
}

# Reasons to leave out a block's parameter that is not a linear layer's matrix, by its module's class or its name.
_REASONS: Sequence[tuple[str, str, str]] = (
    ("convolution", r".*conv(olution)?(\dd?)?", r"conv\w*"),
    ("embedding", r".*embedding\w*", r".*(embed|position|rel_pos|table)\w*"),
    ("norm", r".*norm\w*", r".*norm\w*"),
    ("bias", "", r".*bias(es)?"),
    ("state-space parameter", r".*(mixer|mamba\w*|lstm\w*)", r"a_log|d|a|dt\w*|x_proj\w*|time_\w+"),
)


def role_of(inside: str, classes: Sequence[str], siblings: Sequence[frozenset[str]], own_class: str) -> str | None:
    """The role of a matrix, or None if no rule explains it.

    Args:
        inside: path of its module inside the block.
        classes: class of each module on that path, without the family's own name.
        siblings: names of the siblings of each module on that path.
        own_class: class of the block itself.
    """
    names = inside.split(".")
    for name, kind, beside in reversed(list(zip(names, classes, siblings, strict=True))):
        if name == "gate" and any(_is(r"experts?", other) for other in beside):
            return ROUTER
        if role := _matching(name, kind):
            around = {_matching(*place) for place in zip(names, classes, strict=True)} if role == FF else set()
            return next((part for part in (SHARED_EXPERTS, EXPERTS) if part in around), role)
    for role, pattern in _PLAIN.items():
        if _is(pattern, inside):
            return role
    for role, _, by_class in _RULES:
        if role in (SELF_ATT, FF) and _is(by_class, own_class):
            return role
    return None


def _matching(name: str, kind: str) -> str | None:
    return next((role for role, by_name, by_class in _RULES if _is(by_name, name) or _is(by_class, kind)), None)


def reason_of(name: str, kind: str) -> str | None:
    """The reason to leave out a parameter that is not a linear layer's matrix, by its name and its module's class."""
    return next((reason for reason, classes, names in _REASONS if _is(classes, kind) or _is(names, name)), None)


def class_of(module: nn.Module, family: str) -> str:
    """A module's class name without the prefix shared with ``family``, the name of the configuration's class."""
    name = type(module).__name__
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(name, family, strict=False)))
    return name[common:] if common > 2 else name


def excepted(exceptions: Mapping[str, str], inside: str) -> str | None:
    """The entry for a path in a table whose keys are patterns with ``*`` for one path component."""
    return next((what for pattern, what in exceptions.items() if matches(pattern, inside)), None)


def matches(pattern: str, path: str) -> bool:
    """Whether a module path fits a pattern in which ``*`` stands for one path component."""
    return _compiled(re.escape(pattern).replace(r"\*", r"[^.]+")).fullmatch(path) is not None


def _is(pattern: str, name: str) -> bool:
    return bool(pattern) and _compiled(pattern).fullmatch(name.lower()) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
