"""What libraries do when they are first used, done where processes are copied from, and so once for all of them.

Nothing here may start a thread: threads do not survive the copying.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_repository import ConfigRepository
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from helpers.places import CONF

_known: dict[Any, Any] = {}
_read = ConfigRepository.load_config


def _load_config(self: ConfigRepository, config_path: str) -> Any:
    key = config_path, *(source.full_path() for source in self.get_sources())
    found = _known[key] if key in _known else _read(self, config_path)
    if found is not None:  # a file that is not there may still be written
        _known[key] = found
    return deepcopy(found)  # composing changes it


ConfigRepository.load_config = _load_config  # each file is read once, not anew for each of hundreds of compositions
with initialize_config_dir(str(CONF), version_base="1.3"):
    compose("config")
get_checkpoint_conversion_mapping("bert")  # compiles a thousand regular expressions
