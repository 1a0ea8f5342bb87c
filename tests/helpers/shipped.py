"""The choices that are shipped under ``conf/``."""

from __future__ import annotations

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
