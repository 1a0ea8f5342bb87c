"""How protocols that differ are told apart in the words of a reader."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_DIGEST, _BRIEF = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{8,}\b"), r"\1"  # a few digits are enough for a reader
_RECIPE = "model.made.recipe."  # of a model of the controlled world: the settings of its training ...
_OF_TRAINING = ("model.made.", "model.recipe", "model.world")  # ... and what follows from them


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The settings of a protocol, by dotted names."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from flat(part, key if name in ("", "settings") else f"{name}.{key}")
    else:
        yield name, str(value)


def particular(mine: Mapping[str, str], all_of_them: Sequence[Mapping[str, str]]) -> str:
    """The settings of a protocol that differ between runs; of a model trained here, its recipe if that is enough."""
    names = {name for said in all_of_them for name in said}
    unlike = sorted(name for name in names if len({said.get(name) for said in all_of_them}) > 1)
    chosen = [name for name in unlike if name.startswith(_RECIPE) or not name.startswith(_OF_TRAINING)]
    alike = [said for said in all_of_them if all(said.get(name) == mine.get(name) for name in chosen)]
    told = chosen if all(said == mine for said in alike) else unlike
    return ", ".join(
        f"{name.replace(_RECIPE, 'model.', 1)}={_DIGEST.sub(_BRIEF, mine[name])}" for name in told if name in mine
    )
