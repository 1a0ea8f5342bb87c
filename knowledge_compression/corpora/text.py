"""A user's own text: any text file, or a jsonl file with a ``text`` in each line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from knowledge_compression.corpora.corpus import TRAIN, Documents, TextCorpus, digest_file, read_texts
from knowledge_compression.identity import LABEL, PLACE


@dataclass(frozen=True)
class TextFile(TextCorpus):
    """One file, used for every split.

    Attributes:
        path: a ``.jsonl`` (one document per line) or any other UTF-8 file (one document).
    """

    name: str = field(default="text", metadata=LABEL)
    path: str = field(default="", metadata=PLACE)

    def documents(self, split: str = TRAIN) -> Documents:
        """The file's documents, whichever split is asked for."""
        return Documents(self.name, read_texts(Path(self.path).expanduser()))

    def fingerprint(self) -> str:
        """Digest of the file."""
        return digest_file(Path(self.path).expanduser())
