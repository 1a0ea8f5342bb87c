"""Raw WikiText-2 [Merity et al., 2017]: the text of published perplexities, and a second calibration text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from knowledge_compression.corpora.corpus import TRAIN, VALIDATION, PublishedCorpus, hub_texts, read_texts
from knowledge_compression.errors import DataUnavailable
from knowledge_compression.identity import LABEL

log = logging.getLogger(__name__)

HUB_ID, HUB_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"


@dataclass(frozen=True)
class WikiText(PublishedCorpus):
    """WikiText-2 from the hub, or from ``<data_dir>/wikitext2/<split>.raw.txt`` (or ``<split>.*.txt``).

    Its documents are the lines of a split, with an empty string for each empty line, like the hub's rows.
    """

    name: str = field(default="wikitext", metadata=LABEL)
    hub_name = f"{HUB_ID}/{HUB_CONFIG}"

    def from_hub(self, split: str) -> Sequence[str]:
        """The rows of a split."""
        return list(hub_texts(HUB_ID, split, config=HUB_CONFIG))

    def from_file(self, path: Path) -> Sequence[str]:
        """The lines of a file."""
        (content,) = read_texts(path)
        return [line if line.strip() else "" for line in content.splitlines(keepends=True)]

    def choose_file(self, folder: Path, split: str) -> Path:
        """The split's file, preferably raw rather than tokenized; the validation text if there is no training text."""
        folder = folder / "wikitext2"
        for name in (TRAIN, VALIDATION) if split == TRAIN else (split,):
            raw_first = sorted(folder.glob(f"{name}.*"), key=lambda path: ("raw" not in path.name, path.name))
            if raw_first:
                if name != split:
                    log.info("%s has no %s text: reading %s instead", folder, split, raw_first[0].name)
                return raw_first[0]
        raise DataUnavailable(f"data_dir={self.data_dir}: no {split} text of WikiText-2; give {folder}/{split}.raw.txt")
