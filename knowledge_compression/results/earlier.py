"""The hub models of a store's finished runs, from their settings, to notice that a model has changed on the hub."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from typing import Any

import yaml

from knowledge_compression.identity import CONTENT
from knowledge_compression.reading import yaml_of
from knowledge_compression.results.store import RunStore

# Two sections of config.yaml; the rest is not read, as a store may have ten thousand of these files.
_NAMED = re.compile(r"^model:\n((?:[ ].*\n)+)", re.MULTILINE)
_WAS = re.compile(r"^identity:\n(?:[ ].*\n)*?  model:\n((?:    .*\n)+)", re.MULTILINE)


def contents_of(store: RunStore, hub_id: str, revision: str) -> Counter[str]:
    """The number of finished runs in a store for each content of a hub model, as named in their identities."""
    found: Counter[str] = Counter()
    folders = store.runs_folder.iterdir() if store.runs_folder.is_dir() else []
    for folder in folders:
        try:
            text = (folder / "config.yaml").read_text()
        except (OSError, ValueError):  # the code that reads the run reports what is wrong with it
            continue
        named, was = (_read(match[1]) if (match := of.search(text)) else {} for of in (_NAMED, _WAS))
        if (named.get("hub_id"), named.get("revision")) == (hub_id, revision) and CONTENT in was:
            found[str(was[CONTENT])] += 1
    return found


@lru_cache(1024)
def _read(section: str) -> dict[str, Any]:
    try:
        found = yaml_of(section)
    except (yaml.YAMLError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
