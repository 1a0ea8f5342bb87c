"""C4, the cleaned web text that GPTQ, SparseGPT and Wanda are calibrated on [Raffel et al., 2020]."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from knowledge_compression.corpora.corpus import (
    TRAIN,
    Documents,
    TextCorpus,
    digest_file,
    hub_texts,
    read_texts,
)
from knowledge_compression.errors import DataUnavailable

log = logging.getLogger(__name__)

HUB_ID = "allenai/c4"
HUB_FILES = {TRAIN: "en/c4-train.00000-of-01024.json.gz", "held_out": "en/c4-validation.00000-of-00008.json.gz"}
# Only the first documents of a shard are read: about four million tokens, sixteen published calibrations.
HUB_DOCUMENTS = 8000


@dataclass(frozen=True)
class C4(TextCorpus):
    """English C4: its first shard on the hub, or the jsonl files under ``<data_dir>/c4``.

    Attributes:
        data_dir: folder with local data, read instead of the hub.
    """

    name: str = "c4"
    data_dir: str | None = None

    def documents(self, split: str = TRAIN) -> Documents:
        """Documents of the training shard, or of the validation shard for ``validation`` and ``test``."""
        if self.data_dir is not None:
            return Documents(self.name, read_texts(self._file(split)))
        part = TRAIN if split == TRAIN else "held_out"
        texts = hub_texts(HUB_ID, split, files=HUB_FILES[part])
        return Documents(self.name, list(texts[:HUB_DOCUMENTS]))

    def fingerprint(self) -> str:
        """Digest of the local file, or the hub's name of the shard."""
        return digest_file(self._file(TRAIN)) if self.data_dir is not None else f"{HUB_ID}/{HUB_FILES[TRAIN]}"

    def _file(self, split: str) -> Path:
        """The file named after the split, else the only one there is."""
        assert self.data_dir is not None
        folder = Path(self.data_dir).expanduser() / "c4"
        files = sorted(folder.glob("*.jsonl"))
        wanted = (TRAIN,) if split == TRAIN else (split, "validation", "test")
        named = [path for name in wanted for path in files if name in path.name]
        unnamed = [path for path in files if not any(name in path.name for name in (TRAIN, "validation", "test"))]
        if not named and not unnamed:
            raise DataUnavailable(
                f"data_dir={self.data_dir}: no *.jsonl for {split} under {folder}; give one document a line"
            )
        if not named and split != TRAIN:
            log.warning(
                "%s has no file of its own for C4's %s: %s, the calibration text, is read",
                folder,
                split,
                unnamed[0].name,
            )
        return (named or unnamed)[0]
