"""The choices that are shipped under ``conf/``."""

from __future__ import annotations

import json
from typing import Any

import yaml

from helpers.places import EXHAUSTIVE
from knowledge_compression.sweeping.cli import CONF

# What a user must give beside the choice itself.
NEEDED = {"model=local": ["model.path=somewhere"], "corpus=text": ["corpus.path=somewhere.txt"]}
NEEDED["model=world_local"] = ["model.path=somewhere", "model.world=somewhere"]
NEEDED["recovery=adapter"] = ["recovery.path=somewhere"]
NEEDED |= {f"eval={name}": [f"eval.{name}.data_dir=null"] for name in ("popqa", "simpleqa")}  # not in the real data


def shipped(*groups: str) -> list[str]:
    """``group=name`` for every shipped file that a user can choose."""
    return sorted(
        f"{group}={path.relative_to(CONF / group).with_suffix('')}"
        for group in groups
        for path in (CONF / group).rglob("*.yaml")
        if not path.stem.startswith("_")
    )


def one_of_each_kind(group: str) -> list[str]:
    """As :func:`shipped`; of files that Hydra treats alike only the first, unless tests are to be exhaustive."""
    first: dict[str, str] = {}
    for choice in shipped(group):
        text = (CONF / group / f"{choice.partition('=')[2]}.yaml").read_text()
        kind = "_global_" in text, _kind(yaml.safe_load(text))
        first.setdefault(choice if EXHAUSTIVE else json.dumps(kind, sort_keys=True), choice)
    return list(first.values())


def _kind(value: Any, key: str = "") -> Any:
    """Settings with the types of plain values in place of the values."""
    if isinstance(value, dict):
        return {name: _kind(inner, name) for name, inner in value.items()}
    if isinstance(value, list) and key != "defaults":
        return [_kind(inner) for inner in value]
    decides = key in ("_target_", "defaults") or value == "???" or "${" in str(value)
    return value if decides else type(value).__name__
