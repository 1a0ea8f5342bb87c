"""A checkpoint that is written unit by unit and resumes after an interruption.

There is one shard per unit, under a temporary name until it is complete and on disk, so a shard under its own name is
finished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from knowledge_compression.errors import BadInput
from knowledge_compression.models.saving import check_finite, complete_settings
from knowledge_compression.models.streamed import INDEX, StreamedModel

if TYPE_CHECKING:
    from torch import Tensor

NOTES = "units.json"  # the notes about all units, once all are written


@dataclass(frozen=True)
class ShardedCopy:
    """A model folder being written.

    Attributes:
        folder: where it is written.
        units: names of all units, in the order of their shards.
    """

    folder: Path
    units: Sequence[str]

    def is_finished(self, unit: str) -> bool:
        """Whether the unit has been written."""
        return self._shard(unit).is_file()

    def read(self, unit: str) -> dict[str, Tensor]:
        """The weights of a written unit, by name, memory-mapped from its file."""
        with safe_open(self._shard(unit), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping

    def note(self, unit: str) -> Any:
        """The note written with the unit."""
        whole = self.folder / NOTES
        return json.loads(whole.read_text())[unit] if whole.is_file() else json.loads(self._note(unit).read_text())

    def write(self, unit: str, weights: Mapping[str, Tensor], note: Any) -> None:
        """Write a unit, and a JSON-ready note beside it.

        Raises:
            BadInput: a weight is not finite, or writing fails; the unit then does not exist.
        """
        from safetensors.torch import save_file

        check_finite(weights)
        path, scratch = self._shard(unit), self._shard(unit).with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_text(self._note(unit), json.dumps(note))
            save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, scratch, {"format": "pt"})
            _sync(scratch)
            scratch.rename(path)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path} cannot be written ({error})") from None

    def finish(self, model: StreamedModel) -> None:
        """Add index, configuration and tokenizer once every unit is written, and combine the notes into one file."""
        weight_map: dict[str, str] = {}
        size = 0
        for unit in self.units:
            for name, tensor in self.read(unit).items():
                weight_map[name] = self._shard(unit).name
                size += tensor.numel() * tensor.element_size()
        model.network.config.dtype = model.stored
        model.network.config.save_pretrained(self.folder)
        complete_settings(model.network, self.folder)
        model.tokenizer.save_pretrained(self.folder)
        generation = model.checkpoint.folder / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, self.folder / generation.name)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        _write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        _write_text(self.folder / NOTES, json.dumps({unit: self.note(unit) for unit in self.units}, indent=1) + "\n")
        for unit in self.units:
            self._note(unit).unlink(missing_ok=True)

    def _shard(self, unit: str) -> Path:
        return self.folder / f"model-{self.units.index(unit) + 1:05d}-of-{len(self.units):05d}.safetensors"

    def _note(self, unit: str) -> Path:
        return self._shard(unit).with_suffix(".note")


def _write_text(path: Path, text: str) -> None:
    scratch = path.with_name(f"{path.name}.partial")
    scratch.write_text(text)
    _sync(scratch)
    scratch.rename(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
