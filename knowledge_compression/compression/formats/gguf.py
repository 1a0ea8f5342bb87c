"""GGUF files, which llama.cpp, transformers and this program read.

A layer whose compression put it on a grid that a GGUF type has is stored in that type, with the codes and scales of the
compression, so that the file holds exactly the compressed weights. Everything else is stored in the requested type, by
default in the narrowest floats that hold it exactly.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, dequantize
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor

from knowledge_compression.compression.formats.gguf_blocks import (
    FLOATS,
    Blocks,
    blocks_of,
    encoded,
    fitting,
    narrowest,
)
from knowledge_compression.compression.formats.gguf_expressed import check_expressed
from knowledge_compression.compression.formats.gguf_mixtures import MixedModel
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, TargetLayer
from knowledge_compression.models.checkpoints.gguf.architecture import (
    GgufArchitecture,
    architecture_for,
    further_tensors,
    is_turned,
)
from knowledge_compression.models.checkpoints.gguf.changes import Array
from knowledge_compression.models.checkpoints.gguf.file import GgufFile
from knowledge_compression.models.checkpoints.gguf.vocabulary import GgufVocabulary
from knowledge_compression.models.saving import check_finite, full_state
from knowledge_compression.models.targets import linear_layers
from knowledge_compression.models.tokenizers import read_alike

log = logging.getLogger(__name__)

FILE = "model.gguf"
# llama.cpp has no other type there.
_ALWAYS_FLOAT32 = (
    *("ffn_gate_inp", "position_embd", "ssm_conv1d", "ssm_a", "ssm_d"),
    *("_norm", "attn_rel_b", "shortconv.conv", ".bias"),
)


@dataclass(frozen=True)
class _Part:
    """One tensor of a file.

    Attributes:
        name: its name in the file.
        kind: how it is stored.
        shape: of its values.
        make: returns the stored data, and the values before rounding if it was rounded.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    make: Callable[[], tuple[Array, Array | None]]

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class GgufModel:
    """A model as a GGUF file describes it, without its weights.

    Attributes:
        model: the model, which may be a skeleton.
        architecture: how GGUF describes such networks.
        vocabulary: its tokenizer.
    """

    model: Model
    architecture: GgufArchitecture
    vocabulary: GgufVocabulary

    @classmethod
    def of(cls, model: Model) -> GgufModel:
        """Describe a model.

        Raises:
            BadInput: the files written here cannot hold its architecture, a setting or its tokenizer.
        """
        network: Any = model.network
        architecture = architecture_for(network.config)
        rows = network.get_input_embeddings().weight.shape[0]
        described = cls(model, architecture, GgufVocabulary.of(model.tokenizer, rows))
        described._check()
        return described

    @cached_property
    def names(self) -> Mapping[str, Sequence[str]]:
        """Each weight of the network, and the tensors of the file that hold it.

        Raises:
            BadInput: GGUF has no tensor for one of them.
        """
        network: Any = self.model.network
        found, kept = self.architecture.names(network), network.state_dict().keys()
        # A tied weight is listed once.
        weights = [name for name, _ in network.named_parameters()]
        weights += [name for name, value in network.named_buffers() if name in kept and value.is_floating_point()]
        weights = [name for name in weights if self.architecture.number(name) is None]
        if nameless := [name for name in weights if name not in found]:
            raise BadInput(
                f"output.save_model=gguf: {network.config.model_type} has {nameless[0]}, for which "
                f"{self.architecture.name} has no tensor"
            )
        return {name: found[name] for name in weights}

    @property
    def further(self) -> list[_Part]:
        """Tensors of the file that are not parameters of the network."""
        found = further_tensors(self.model.network.config)
        kinds = {np.dtype(np.float32): Kind.F32, np.dtype(np.float16): Kind.F16}
        return [_Part(name, kinds[one.dtype], one.shape, partial(_as_is, one)) for name, one in found.items()]

    def kept(self, name: str) -> list[Blocks] | None:
        """The blocks of a parameter's layers; None unless all of them have blocks of the same type."""
        layers = self._layers.get(name, [])
        blocks = [one for one in map(blocks_of, layers) if one is not None]
        alike = len(blocks) == len(layers) and len({one.kind for one in blocks}) == 1
        return blocks if alike else None

    @cached_property
    def _layers(self) -> Mapping[str, Sequence[TargetLayer]]:
        """The layers of each parameter, several of a bank of experts."""
        found: dict[str, list[TargetLayer]] = {}
        for layer in linear_layers(self.model):
            found.setdefault(layer.weight_name, []).append(layer)
        return found

    def write(
        self, path: Path, parts: Sequence[_Part], kind: LlamaFileType | None, state: Mapping[str, Tensor]
    ) -> Iterator[tuple[_Part, Array, Array | None]]:
        """Write the file one tensor at a time, and yield each tensor once it is written."""
        writer = GGUFWriter(path, self.architecture.name)
        # Transformers assumes a sliding window if a llama is named mistral.
        writer.add_name(self.model.name.replace("mistral", "Mistral"))
        writer.add_quantized_by("knowledge_compression")
        if kind is not None:
            writer.add_file_type(kind)
        if any(part.kind not in FLOATS for part in parts):
            writer.add_quantization_version(GGML_QUANT_VERSION)
        for key, value in chain(
            self.architecture.values(self.model.network.config), _numbers(self.architecture, state)
        ):
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, list | tuple):
                writer.add_array(key, value)
            else:
                writer.add_uint32(key, int(value))
        self.vocabulary.write(writer)
        for part in parts:
            block, size = GGML_QUANT_SIZES[part.kind]
            writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), part.size // block * size, part.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in parts:
            stored, values = part.make()
            writer.write_tensor_data(stored)
            yield part, stored, values
        writer.close()

    def _check(self) -> None:
        """Refuse a network that a reader of the file would build differently.

        Raises:
            BadInput: a setting has no place in the file and is not the one that readers take for granted.
        """
        with TemporaryDirectory() as folder:
            brief = Path(folder) / FILE
            one = np.zeros(1, dtype=np.float32)
            names = dict.fromkeys(name for names in self.names.values() for name in names)
            parts = [_Part(name, Kind.F32, (1,), lambda: (one, None)) for name in names]
            parts += self.further
            for _ in self.write(brief, parts, LlamaFileType.ALL_F32, self.model.network.state_dict()):
                pass
            read = GgufFile.at(brief)
            assert read is not None
            told = read.configuration()
            if not read_alike(self.model.tokenizer, read.tokenizer()):
                log.warning(
                    "the tokenizer that transformers makes of a GGUF file differs from that of %s for some texts",
                    self.model.name,
                )
        check_expressed(self.model.network, told, self.architecture.covers)


def save_gguf(model: Model, folder: Path, kind: Kind | str | None = None) -> dict[str, Any]:
    """Write a model as one GGUF file in a folder, under a temporary name until it is complete.

    Args:
        model: any whose architecture and tokenizer GGUF describes.
        folder: the folder to write; replaced if it exists.
        kind: the type of all tensors that no compression has put on a grid, or the name of a mixture of types; None
            takes the narrowest floats that hold them exactly.

    Returns:
        A summary of the file, JSON-ready: the number of weights of each type, and the number and relative error of the
        rounded ones.

    Raises:
        BadInput: the architecture or the tokenizer cannot be written, or a weight is not finite; nothing is written.
    """
    described = GgufModel.of(model)
    state = full_state(model.network)
    check_finite(state)
    asked = MixedModel.of(model.network, kind) if isinstance(kind, str) else kind
    parts = [
        part for name, tensors in described.names.items() for part in _parts(described, state, name, tensors, asked)
    ]
    weights = Counter[str]()
    for part in parts:
        weights[part.kind.name] += part.size
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    parts += described.further
    rounded, lost, whole = 0, 0.0, 0.0
    for part, stored, values in described.write(scratch / FILE, parts, _file_type(parts, kind), state):
        if values is not None:
            difference = dequantize(stored, part.kind) - values
            if bool(difference.any()):
                rounded += part.size
                lost, whole = lost + float(np.square(difference).sum()), whole + float(np.square(values).sum())
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    told: dict[str, Any] = {"format": "gguf", "weights": dict(weights), "bytes": (folder / FILE).stat().st_size}
    if rounded:
        told |= {"rounded": rounded, "relative_error": (lost / whole) ** 0.5 if whole else 0.0}
        log.warning(
            "%d of the %d weights of %s were rounded when the GGUF file was written (relative error %.2g), so the "
            "file's answers differ from this run's; output.save_model=gguf rounds nothing",
            rounded,
            sum(weights.values()),
            model.name,
            told["relative_error"],
        )
    return told


def _numbers(architecture: GgufArchitecture, state: Mapping[str, Tensor]) -> Iterator[tuple[str, list[float]]]:
    """The settings that hold one number of each block; zeros of a skeleton, which has no weights."""
    found: dict[str, list[float]] = {}
    for name, value in state.items():
        if (told := architecture.number(name)) is not None:
            found.setdefault(told[0], []).append(0.0 if value.is_meta else float(value))
    yield from found.items()


def _parts(
    described: GgufModel,
    state: Mapping[str, Tensor],
    name: str,
    tensors: Sequence[str],
    asked: Kind | MixedModel | None,
) -> Iterator[_Part]:
    """The tensors of the file that hold one parameter."""
    config = described.model.network.config
    values, kept = _oriented(described.model, state, name), described.kept(name)
    if (place := described.architecture.place(name)) is not None:
        if place:
            return  # in the tensor of the first
        there = [one for one, of in described.names.items() if of == tensors]
        values, kept = torch.stack([_oriented(described.model, state, one) for one in there]), None
    for tensor in tensors:
        change = partial(described.architecture.changed, tensor, config=config)
        moved = described.architecture.change(tensor)
        moved = None if moved is None or moved.idle(config) else moved
        shape = change(np.zeros(values.shape, dtype=np.bool_)).shape
        if kept is not None and (moved is None or moved.rows):
            stored = [blocks.data for blocks in kept]
            bank = values.dim() > 2  # experts
            make = partial(_moved, change, stored, bank=bank)
            yield _Part(tensor, kept[0].kind, shape, make)
            continue
        exact = asked is not None or moved is None or moved.exact
        kind = _kind_for(tensor, values if exact else _changed(change, values), shape, asked)
        yield _Part(tensor, kind, shape, partial(_made, change, values, kind, checks=asked is not None))


def _kind_for(tensor: str, values: Tensor, shape: tuple[int, ...], asked: Kind | MixedModel | None) -> Kind:
    if len(shape) < 2 or any(part in tensor for part in _ALWAYS_FLOAT32):
        return Kind.F32
    if asked is None:
        return narrowest(values)
    if isinstance(asked, MixedModel):
        asked = asked.of_tensor(tensor, shape[-1])
    return asked if asked in FLOATS else fitting(asked, shape[-1]) or Kind.F16


def _changed(change: Callable[[Array], Array], values: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(change(values.detach().cpu().float().numpy())))


def _made(change: Callable[[Array], Array], values: Tensor, kind: Kind, *, checks: bool) -> tuple[Array, Array | None]:
    whole = _changed(change, values)
    stored = encoded(whole, kind)
    return stored, whole.numpy() if checks and kind != Kind.F32 else None


def _moved(change: Callable[[Array], Array], stored: Sequence[NDArray[np.uint8]], *, bank: bool) -> tuple[Array, None]:
    return np.ascontiguousarray(change(np.stack(stored) if bank else stored[0])), None


def _as_is(values: Array) -> tuple[Array, None]:
    return values, None


def _oriented(model: Model, state: Mapping[str, Tensor], name: str) -> Tensor:
    """A parameter's values; matrices as ``[..., out_features, in_features]``."""
    return state[name].transpose(-1, -2) if is_turned(model.network, name) else state[name]


def _file_type(parts: Sequence[_Part], asked: Kind | str | None) -> LlamaFileType | None:
    """llama.cpp's name for a mixture, or for the type of most weights in the blocks; None if it has no name."""
    if isinstance(asked, str):
        return LlamaFileType[f"MOSTLY_{asked.removesuffix('_mixed').upper()}"]
    sizes = Counter[Kind]()
    for part in parts:
        if "blk." in part.name and len(part.shape) > 1:
            sizes[part.kind] += part.size
    most = sizes.most_common(1)[0][0].name if sizes else "F32"
    names = (f"{before}_{most}{after}" for before in ("ALL", "MOSTLY") for after in ("", "_S"))
    return next((LlamaFileType[name] for name in names if name in LlamaFileType.__members__), None)
