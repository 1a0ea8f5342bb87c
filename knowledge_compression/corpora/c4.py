"""C4, the cleaned web text used to calibrate GPTQ, SparseGPT and Wanda [Raffel et al., 2020]."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from knowledge_compression.corpora.corpus import TRAIN, PublishedCorpus, hub_texts
from knowledge_compression.errors import DataUnavailable
from knowledge_compression.identity import LABEL

log = logging.getLogger(__name__)

HUB_ID = "allenai/c4"
HUB_FILES = {TRAIN: "en/c4-train.00000-of-01024.json.gz", "held_out": "en/c4-validation.00000-of-00008.json.gz"}
# Only the first documents of a shard are read: about four million tokens, sixteen published calibrations.
HUB_DOCUMENTS = 8000


@dataclass(frozen=True)
class C4(PublishedCorpus):
    """English C4: its first shard on the hub, or the jsonl files under ``<data_dir>/c4``."""

    name: str = field(default="c4", metadata=LABEL)
    hub_name = f"{HUB_ID}/{HUB_FILES[TRAIN]}"

    def from_hub(self, split: str) -> Sequence[str]:
        """Documents of the training shard, or of the validation shard for ``validation`` and ``test``."""
        part = TRAIN if split == TRAIN else "held_out"
        return list(hub_texts(HUB_ID, split, files=HUB_FILES[part])[:HUB_DOCUMENTS])

    def choose_file(self, folder: Path, split: str) -> Path:
        """The file named after the split, or else the only file."""
        files = sorted(folder.glob("c4/*.jsonl"))
        wanted = (TRAIN,) if split == TRAIN else (split, "validation", "test")
        named = [path for name in wanted for path in files if name in path.name]
        unnamed = [path for path in files if not any(name in path.name for name in (TRAIN, "validation", "test"))]
        if not named and not unnamed:
            raise DataUnavailable(
                f"data_dir={self.data_dir}: no *.jsonl for {split} under {folder / 'c4'}; give one document per line"
            )
        if not named and split != TRAIN:
            log.warning(
                "%s has no separate file for C4's %s: reading the calibration text, %s",
                folder / "c4",
                split,
                unnamed[0].name,
            )
        return (named or unnamed)[0]
