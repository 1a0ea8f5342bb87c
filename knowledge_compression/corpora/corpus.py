"""Calibration, tuning and perplexity text: the interface of a corpus, and how windows are drawn from it."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from knowledge_compression.building import Seed
from knowledge_compression.cache import file_digest
from knowledge_compression.errors import BadInput, DataUnavailable, first_line
from knowledge_compression.heavy import torch
from knowledge_compression.identity import LABEL, PLACE
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER
from knowledge_compression.models.hub import cache_alone_where_no_hub_answers
from knowledge_compression.reading import parsed, text_of

if TYPE_CHECKING:
    from torch import LongTensor

TRAIN, VALIDATION, TEST = "train", "validation", "test"
AUTO = "auto"


class Corpus(Protocol):
    """A source of running text; one file next to this one and one YAML under ``conf/corpus/``.

    Attributes:
        name: what the user types.
        samples: number of calibration windows.
        length: tokens in one window.
        seed: for drawing the windows.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - see Attributes

    @property
    def samples(self) -> int: ...  # noqa: D102

    @property
    def length(self) -> int: ...  # noqa: D102

    @property
    def seed(self) -> int: ...  # noqa: D102

    def windows(self, model: Model) -> LongTensor:
        """Calibration windows ``[samples, length]`` of token ids on the CPU, the same for the same seed."""
        ...

    def token_stream(self, model: Model) -> LongTensor:
        """All its text as one row of token ids ``[tokens]``, for tuning, to be cut into windows of ``length``."""
        ...

    def prepared(self, model: Model) -> Corpus:
        """The corpus after any preparation that needs ``model`` in its uncompressed state."""
        ...

    def fingerprint(self) -> str:
        """A digest that identifies the text; it enters the run's identity in place of the text's path."""
        ...


@dataclass(frozen=True)
class Documents:
    """Texts and how a model reads them; the common part of corpora made of text."""

    name: str
    texts: Sequence[str]

    def stream(self, model: Model) -> LongTensor:
        """The documents joined by an empty line, tokenized once without special tokens: ``[tokens]``."""
        encoded = model.tokenizer("\n\n".join(self.texts), add_special_tokens=False, verbose=False)
        return torch.tensor(encoded["input_ids"], dtype=torch.long)  # type: ignore[return-value]

    def windows_in_turn(self, model: Model, length: int, begin: Sequence[int]) -> LongTensor:
        """The stream cut into windows, each after the tokens of ``begin``; the remainder is dropped.

        Returns:
            Token ids ``[windows, length]``.
        """
        tokens, inside = self.stream(model), max(1, length - len(begin))
        rows = tokens[: len(tokens) // inside * inside].view(-1, inside)
        return torch.cat([torch.tensor(begin, dtype=torch.long).expand(len(rows), -1), rows], 1)  # type: ignore[return-value]

    def draw(self, model: Model, samples: int, length: int, seed: int, begin: Sequence[int] = ()) -> LongTensor:
        """Windows at random starts, drawn as in the published GPTQ and SparseGPT scripts.

        Args:
            model: its tokenizer and its number of positions.
            samples: number of windows.
            length: tokens in a window.
            seed: for the starts.
            begin: the tokens with which each window begins, in place of as many tokens of text.

        Returns:
            Token ids ``[samples, length]``.

        Raises:
            BadInput: a window is longer than the model's positions or than the text.
        """
        check_fits(model, length)
        tokens = self.stream(model)
        if len(tokens) <= length:
            raise BadInput(
                f"corpus={self.name} has {len(tokens)} tokens, too few for windows of {length}; "
                "give more text or a smaller corpus.length"
            )
        generator = random.Random(seed)
        starts = [generator.randint(0, len(tokens) - length - 1) for _ in range(samples)]
        windows = torch.stack([tokens[start : start + length] for start in starts])
        if begin:
            windows = torch.cat([torch.tensor(begin).expand(samples, -1), windows[:, : length - len(begin)]], 1)
        return windows  # type: ignore[return-value]


@dataclass(frozen=True)
class Windowed:
    """The settings of every corpus.

    Attributes:
        name, samples, length, seed: see :class:`Corpus`.
    """

    name: str = field(metadata=LABEL)
    samples: int = 128
    length: int = 512
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Refuse window counts and lengths below one."""
        for name in ("samples", "length"):
            if getattr(self, name) < 1:
                raise BadInput(f"corpus.{name}={getattr(self, name)} is too small; it must be at least 1")


@dataclass(frozen=True)
class TextCorpus(Windowed, ABC):
    """The common part of corpora made of text; subclasses provide the documents.

    Attributes:
        bos: decoders only: whether each window begins with the tokenizer's beginning-of-text token. ``auto`` follows
        what the tokenizer does before every text (see :func:`beginning`): without the token, Gemma has states in
        calibration that it never has in use. The published scripts cut windows out of running text, without it.
    """

    bos: bool | str = field(default=AUTO, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse anything but true, false and ``auto``."""
        super().__post_init__()
        check_bos(self.bos, "corpus.bos")

    @abstractmethod
    def documents(self, split: str = TRAIN) -> Documents:
        """The texts of ``train`` (calibration and tuning), ``validation`` or ``test`` (perplexity).

        Raises:
            DataUnavailable: that split is not available.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of the training text, or its id on the hub."""

    def windows(self, model: Model) -> LongTensor:
        """Calibration windows ``[samples, length]``, drawn by :meth:`Documents.draw`."""
        begin = beginning(model, self.bos, "corpus.bos")
        return self.documents().draw(model, self.samples, self.length, self.seed, begin)

    def token_stream(self, model: Model) -> LongTensor:
        """The training text as one row of token ids; each window of ``length`` tokens begins as ``bos`` says."""
        begin, documents = beginning(model, self.bos, "corpus.bos"), self.documents()
        if not begin:
            return documents.stream(model)
        return documents.windows_in_turn(model, self.length, begin).flatten()  # type: ignore[return-value]

    def prepared(self, model: Model) -> Corpus:
        """Itself: the text does not depend on the model."""
        return self


@dataclass(frozen=True)
class PublishedCorpus(TextCorpus):
    """A published text, from the hub or from local files in its layout.

    Attributes:
        data_dir: folder with local data, read instead of the hub.
    """

    data_dir: str | None = field(default=None, metadata=PLACE)
    hub_name: ClassVar[str]  # of the training text

    def documents(self, split: str = TRAIN) -> Documents:
        """The texts of a split."""
        return Documents(
            self.name, self.from_hub(split) if self.data_dir is None else self.from_file(self._file(split))
        )

    def fingerprint(self, split: str = TRAIN) -> str:
        """Digest of the local file with the text of a split, or the corpus's id on the hub."""
        return self.hub_name if self.data_dir is None else digest_file(self._file(split))

    def check_data(self, split: str = TRAIN) -> None:
        """Refuse a split that is not available, before the hours of work after which it is needed.

        Raises:
            DataUnavailable: neither the data folder nor the hub has it.
        """
        if self.data_dir is None:
            self.from_hub(split)
        else:
            self._file(split)

    def _file(self, split: str) -> Path:
        assert self.data_dir is not None
        return self.choose_file(Path(self.data_dir).expanduser(), split)

    @abstractmethod
    def from_hub(self, split: str) -> Sequence[str]:
        """The texts of a split, from the hub or its local cache."""

    @abstractmethod
    def choose_file(self, folder: Path, split: str) -> Path:
        """The file of a data folder that holds a split."""

    def from_file(self, path: Path) -> Sequence[str]:
        """The texts of a local file."""
        return read_texts(path)


def check_bos(bos: bool | str, setting: str) -> None:
    """Refuse anything but true, false and ``auto``."""
    if bos not in (AUTO, True, False):
        raise BadInput(f"{setting}={bos} does not exist; choose one of auto, true, false")


def beginning(model: Model, bos: bool | str, setting: str) -> list[int]:
    """The tokens before each window of a decoder: the beginning-of-text token, or none.

    Args:
        model: any family.
        bos: ``auto`` does what the tokenizer does before every text: those of Gemma and LLaMA put the token there,
        those of GPT-2 and Qwen do not.
        setting: what the user calls it, for messages.

    Raises:
        BadInput: the token was requested, but the tokenizer has none, or the model is not a decoder.
    """
    token = model.tokenizer.bos_token_id if model.family == DECODER else None
    if bos == AUTO:
        return [int(token)] if token is not None and model.tokenizer("a")["input_ids"][:1] == [token] else []
    if not bos:
        return []
    if token is None:
        why = "is not a decoder" if model.family != DECODER else "has a tokenizer without a beginning-of-text token"
        raise BadInput(f"{setting}=true: {model.name} {why}; choose auto or false")
    return [int(token)]


def check_fits(model: Model, length: int) -> None:
    """Refuse windows that are longer than the model's positions."""
    if model.max_positions is not None and length > model.max_positions:
        raise BadInput(
            f"corpus.length={length} is longer than {model.name}'s {model.max_positions} positions; "
            f"choose corpus.length={model.max_positions} or less"
        )


def read_texts(path: Path) -> list[str]:
    """The documents of a file: the ``text`` of each line of a ``.jsonl``, or the whole of any other file.

    Raises:
        DataUnavailable: the file does not exist or is empty.
        BadInput: it is not UTF-8, or a line is not a JSON object with a ``text``.
    """
    content = text_of(path, "a text file or a .jsonl")
    if path.suffix == ".jsonl":
        texts = [_text_of(line, path, number) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    else:
        texts = [content]
    if not any(text.strip() for text in texts):
        raise DataUnavailable(f"{path} holds no text, which calibration needs")
    return texts


def _text_of(line: str, path: Path, number: int) -> str:
    where, wanted = f"{path} line {number}", 'a JSON object with a string under "text"'
    found = parsed(line, where, f"{wanted} on each line")
    text = found.get("text") if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise BadInput(f"{where} is not {wanted}")
    return text


@lru_cache(maxsize=4)  # read by the check before a run, by the run, and by the next run of a sweep
def hub_texts(repository: str, split: str, *, config: str | None = None, files: str | None = None) -> Any:
    """The ``text`` column of a data set on the hub (or in its local cache), one entry per row.

    Raises:
        DataUnavailable: it is not cached and could not be downloaded.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    files_of = {split: files} if files else None
    try:
        with cache_alone_where_no_hub_answers():
            return load_dataset(repository, config, data_files=files_of, split=split)["text"]
    except (OSError, ValueError, DatasetsError) as error:
        raise DataUnavailable(
            f"the data set '{repository}' is not cached and could not be downloaded ({first_line(error)}); give local "
            "files with data_dir=DIR, a text file with corpus=text corpus.path=FILE, or corpus=self, which needs none"
        ) from None


def digest_file(path: Path) -> str:
    """Hash of every byte of a file.

    Raises:
        DataUnavailable: there is no such file.
    """
    try:
        return file_digest(path)
    except OSError as error:
        raise DataUnavailable(f"{path} cannot be read ({error.strerror}); give a text file or a .jsonl") from None


def digest(windows: LongTensor) -> str:
    """Short hash of token ids; it enters the run's identity."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
