"""WikiText-2, unprocessed [Merity et al., 2017]: the text of reported perplexities, and a second calibration text."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from knowledge_compression.corpora.corpus import (
    TRAIN,
    VALIDATION,
    Documents,
    TextCorpus,
    digest_file,
    hub_texts,
    read_texts,
)
from knowledge_compression.errors import DataUnavailable

log = logging.getLogger(__name__)

HUB_ID, HUB_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"


@dataclass(frozen=True)
class WikiText(TextCorpus):
    """WikiText-2 from the hub, or from ``<data_dir>/wikitext2/<split>.raw.txt`` (or ``<split>.*.txt``).

    Attributes:
        data_dir: folder with local data, read instead of the hub.
    """

    name: str = "wikitext"
    data_dir: str | None = None

    def documents(self, split: str = TRAIN) -> Documents:
        """The lines of a split, an empty string for each empty line, as the hub's rows are."""
        if self.data_dir is None:
            return Documents(self.name, list(hub_texts(HUB_ID, split, config=HUB_CONFIG)))
        (content,) = read_texts(self._file(split))
        return Documents(self.name, [line if line.strip() else "" for line in content.splitlines(keepends=True)])

    def fingerprint(self) -> str:
        """Digest of the local training text, or the hub's name for it."""
        return digest_file(self._file(TRAIN)) if self.data_dir is not None else f"{HUB_ID}/{HUB_CONFIG}"

    def _file(self, split: str) -> Path:
        """The split's file, raw before tokenized; the validation text stands in where no training text is."""
        assert self.data_dir is not None
        folder = Path(self.data_dir).expanduser() / "wikitext2"
        for name in (TRAIN, VALIDATION) if split == TRAIN else (split,):
            raw_first = sorted(folder.glob(f"{name}.*"), key=lambda path: ("raw" not in path.name, path.name))
            if raw_first:
                if name != split:
                    log.info("%s has no %s text: %s is read instead", folder, split, raw_first[0].name)
                return raw_first[0]
        raise DataUnavailable(f"data_dir={self.data_dir}: no {split} text of WikiText-2; give {folder}/{split}.raw.txt")
