"""The dense model's hidden states at every position of a suite, as its vocabulary head reads them, on disk.

The head computes the dense model's logits from them, at a fraction of the cost of a whole pass and of the size of the
logits (a state of SmolLM2-135M is 85 times smaller than its logits). States are kept in the model's own dtype, so
nothing is rounded. A folder holds ``states.bin`` (a row of bytes per position), ``keys.npy`` (uint8 ``[positions,
16]``, see :mod:`.scoring.positions`), ``about.json``, and ``items.parquet`` (the log-probability of each item's right
answer).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from knowledge_compression.evaluation.scoring.positions import KEY_BYTES
from knowledge_compression.heavy import pl, torch
from knowledge_compression.writing import write_table

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from knowledge_compression.evaluation.scoring.positions import Position
    from knowledge_compression.evaluation.suite import Evaluation

_STATES, _KEYS, _ABOUT, _ITEMS = "states.bin", "keys.npy", "about.json", "items.parquet"
ANSWERS = ("task", "id", "log_prob")  # the columns that are kept of the dense model's items


class Recording:
    """A watcher that writes the state of each position into a folder, once.

    Args:
        folder: exists and is empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys: dict[bytes, None] = {}
        self._about = {"dtype": "float32", "width": 0}
        (folder / _STATES).touch()

    def saw(self, positions: Sequence[Position], states: Tensor, logits: Tensor) -> None:
        """Write the states of new positions that are compared for some item."""
        new = {one.key: i for i, one in enumerate(positions) if one.gold and one.key not in self._keys}
        rows = states[list(new.values())].detach().cpu().contiguous()
        self._about = {"dtype": str(rows.dtype).removeprefix("torch."), "width": rows.shape[1]}
        with (self._folder / _STATES).open("ab") as file:
            file.write(rows.view(torch.uint8).numpy().tobytes())
        self._keys |= dict.fromkeys(new)

    def end(self, evaluation: Evaluation) -> None:
        """Write the rest, once the suite is finished."""
        keys = np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, KEY_BYTES)
        np.save(self._folder / _KEYS, keys)
        (self._folder / _ABOUT).write_text(json.dumps(self._about))
        write_table(evaluation.items.select(ANSWERS), self._folder / _ITEMS)


class DenseStates:
    """The states in a folder that :class:`Recording` wrote; an open file stays readable if the folder is deleted.

    Attributes:
        answers: the columns :data:`ANSWERS` of the dense model's items.
    """

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / _ABOUT).read_text())
        self._dtype, self._width = getattr(torch, about["dtype"]), int(about["width"])
        self._row = {key.tobytes(): row for row, key in enumerate(np.load(folder / _KEYS, allow_pickle=False))}
        self.answers = pl.read_parquet(folder / _ITEMS, glob=False)
        self._file = (folder / _STATES).open("rb")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def rows(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """The row of each key; -1 where the dense model did not read it."""
        return np.array([self._row.get(key, -1) for key in keys], dtype=np.int64)

    def __getitem__(self, rows: NDArray[np.int64]) -> Tensor:
        """The states of rows, ``[rows, hidden]``, on the CPU."""
        width = self._width * self._dtype.itemsize
        there = np.memmap(self._file, np.uint8, "r").reshape(-1, width)  # mapped only while it is read
        return torch.from_numpy(np.ascontiguousarray(there[rows])).view(self._dtype)
