"""The units that can be removed from a block to make its matrices smaller: feed-forward channels and groups of heads.

A *unit* is a channel of a feed-forward layer, or a key-value head together with the query heads that read it. It is a
run of rows in each matrix that reads the block's states (the *readers*) and a run of columns in the one that writes to
them (the *writer*): the last matrix of its part, in every network that is placed here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models.families import CROSS_ATT, DECODER_SELF_ATT, ENCODER_ATT, FF
from knowledge_compression.models.layers import TargetLayer
from knowledge_compression.models.model import Model
from knowledge_compression.models.reshaped import parts_of
from knowledge_compression.models.targets import linear_layers

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = (ENCODER_ATT, DECODER_SELF_ATT, CROSS_ATT)
# Names of a feed-forward layer's width, and of the numbers of heads, in transformers' configurations.
_WIDTHS = ("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "n_inner")
_HEADS = ("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads", "n_head", "n_heads")
_KEY_VALUE_HEADS = "num_key_value_heads"


@dataclass(frozen=True)
class Part:
    """The matrices of one part of a block that share their inner width.

    Attributes:
        role: role of the part.
        readers, writer: its matrices.
        units: number of channels, or of groups of heads.
    """

    role: str
    readers: Sequence[TargetLayer]
    writer: TargetLayer
    units: int

    @property
    def layers(self) -> Sequence[TargetLayer]:
        """All of its matrices."""
        return [*self.readers, self.writer]

    @property
    def parameters(self) -> int:
        """Number of its weights."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def width(self) -> int:
        """Columns of the writer that belong to one unit."""
        return int(self.writer.weight.shape[1]) // self.units

    def columns(self, units: Tensor) -> Tensor:
        """The writer's columns that belong to these units, int64."""
        return _runs(units, self.width)

    def rows(self, reader: TargetLayer, units: Tensor) -> Tensor:
        """A reader's rows that belong to these units; a reader of twice the width holds gates first, then values."""
        height = int(reader.weight.shape[0])
        if self.role == FF and height == 2 * self.units:
            return torch.cat([units, units + self.units])
        return _runs(units, height // self.units)

    def cut(self, units: Tensor) -> dict[str, Tensor]:
        """Its tensors with only these units, by their names in the network."""
        cut: dict[str, Tensor] = {}
        for reader in self.readers:
            rows = self.rows(reader, units).to(reader.weight.device)
            cut[reader.weight_name] = _stored(reader, reader.weight[rows])
            if reader.bias is not None:
                cut[f"{reader.path}.bias"] = reader.bias[rows]
        columns = self.columns(units).to(self.writer.weight.device)
        cut[self.writer.weight_name] = _stored(self.writer, self.writer.weight[:, columns])
        return cut


def _runs(units: Tensor, length: int) -> Tensor:
    return (units[:, None] * length + torch.arange(length)).flatten()


def _stored(layer: TargetLayer, weight: Tensor) -> Tensor:
    """A weight ``[out_features, in_features]`` as the layer's module stores it."""
    from transformers.pytorch_utils import Conv1D

    return (weight.T if isinstance(layer.module, Conv1D) else weight).contiguous()


def parts(model: Model, roles: Collection[str]) -> list[Part]:
    """The parts of every block that have these roles of feed-forward and attention layers, in order.

    Raises:
        BadInput: the matrices of a part do not share an inner width, e.g. because they are stored as one.
    """
    blocks = model.architecture.block_paths(model.network)
    groups: dict[tuple[str, str], list[TargetLayer]] = {}
    for layer in linear_layers(model):
        if layer.role in roles and layer.role in (FF, *ATTENTION):
            block = next((path for path in blocks if layer.path.startswith(f"{path}.")), None)
            if block is not None:
                groups.setdefault((block, layer.role), []).append(layer)
    heads = _groups_of_heads(model)
    return [_part(model, role, layers, heads) for (_, role), layers in groups.items()]


def _part(model: Model, role: str, layers: Sequence[TargetLayer], heads: int) -> Part:
    *readers, writer = layers
    inner = int(writer.weight.shape[1])
    if role == FF:
        fits = bool(readers) and {int(layer.weight.shape[0]) for layer in readers} <= {inner, 2 * inner}
        if not fits or not _alike(readers, writer):
            raise BadInput(f"the feed-forward layers of {model.name} ({writer.path}) do not share one inner width")
        return Part(role, readers, writer, inner)
    if len(layers) != 4 or not _alike(readers, writer) or any(layer.weight.shape[0] % heads for layer in readers):
        raise BadInput(
            f"the attention of {model.name} ({writer.path}) is not four matrices for queries, keys, values and outputs"
        )
    return Part(role, readers, writer, heads)


def _alike(readers: Sequence[TargetLayer], writer: TargetLayer) -> bool:
    """Whether all readers read, and the writer writes, states of one width."""
    into = {int(layer.weight.shape[1]) for layer in readers}
    return len(into) == 1 and (into == {int(writer.weight.shape[0])} or writer.role == CROSS_ATT)


def _groups_of_heads(model: Model) -> int:
    config = model.text_config
    heads = getattr(config, _KEY_VALUE_HEADS, None) or getattr(config, "num_attention_heads", None)
    return int(heads or 1)  # Mamba has none


def narrower(config: Any, channels: tuple[int, int] | None, heads: tuple[int, int] | None) -> None:
    """Write smaller widths into a configuration.

    Args:
        config: changed in place.
        channels: the inner width of the feed-forward layers, before and now.
        heads: the number of groups of heads, before and now.

    Raises:
        BadInput: the configuration does not have such a number.
    """
    if channels is not None and not _set(config, _WIDTHS, *channels):
        raise BadInput(f"a configuration of type '{config.model_type}' does not have the inner width {channels[0]}")
    if heads is not None:
        before, now = heads
        for part in parts_of(config):
            queries = next((getattr(part, name) for name in _HEADS if getattr(part, name, None)), None)
            if queries is None:
                continue
            if getattr(part, _KEY_VALUE_HEADS, None) == before:
                setattr(part, _KEY_VALUE_HEADS, now)
            _set(part, _HEADS, queries, queries // before * now)


def _set(config: Any, names: Sequence[str], before: int, now: int) -> bool:
    found = False
    for part in parts_of(config):
        maps: Mapping[str, str] = getattr(part, "attribute_map", {})
        for name in names:
            if name in maps or not hasattr(part, name):
                continue
            value = getattr(part, name)
            if value == before or (value is None and before == 4 * part.hidden_size):  # GPT-2's and GPT-Neo's default
                setattr(part, name, now)
                found = True
    return found
