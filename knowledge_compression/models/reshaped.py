"""A network built again from a smaller configuration, with weights taken from the old one.

Everything that follows from the configuration (numbers of blocks and heads, layer indices, windows of attention, the
groups of a key-value cache) is set by transformers itself when it builds the network, so that a checkpoint of the
result is an ordinary one. Anything that does not fit is refused before the old network is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import BadInput, first_line
from knowledge_compression.heavy import nn, torch
from knowledge_compression.models.model import Model
from knowledge_compression.models.soundness import check_it_runs, check_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_PLAIN = (bool, int, float, str, type(None))
# Attributes that depend on a block's number, and tensors shared by all blocks: T5's bias moves to the new first block.
_OF_ITS_PLACE = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx"}) | {
    "training",
    "has_relative_attention_bias",
}


@dataclass(frozen=True)
class Smaller:
    """A smaller architecture: its configuration, and the old places of its blocks.

    Attributes:
        config: the configuration.
        blocks: path of each block in the old network, by its path in the new one; empty if all keep their places.
    """

    config: Any
    blocks: Mapping[str, str] = field(default_factory=dict)

    def before(self, path: str) -> str:
        """The path that a module or tensor of the new network had in the old one."""
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            if (old := self.blocks.get(".".join(parts[:end]))) is not None:
                return ".".join([old, *parts[end:]])
        return path

    def first_before(self, path: str) -> str:
        """The path that it had in the first block of its stack, which may hold shared tensors (T5's biases)."""
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            if ".".join(parts[:end]) in self.blocks:
                return ".".join([*parts[: end - 1], "0", *parts[end:]])
        return path


def parts_of(config: Any) -> list[Any]:
    """A configuration and all those inside it."""
    inside = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(part for one in inside if one is not None for part in parts_of(one))]


def changed(config: Any, change: Callable[[Any], None]) -> Any:
    """A copy of a configuration after a change.

    Raises:
        BadInput: transformers does not accept the result.
    """
    copy = deepcopy(config)
    try:
        change(copy)
        type(copy).from_dict(copy.to_dict())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        kind = config.model_type
        raise BadInput(f"a configuration of type '{kind}' cannot express it ({first_line(error)})") from None
    return copy


def built(network: PreTrainedModel, smaller: Smaller, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """The network of a smaller architecture.

    Args:
        network: the old one, which is not changed; buffers that are in no checkpoint are taken from it.
        smaller: the new architecture.
        state: its tensors by their names in the new network; they are used, not copied, and may lie on the meta device.

    Raises:
        BadInput: the tensors do not match the configuration, or a block would no longer compute the same.
    """
    empty = _empty(type(network), smaller.config, network.config)
    again = _empty(type(network), type(smaller.config).from_dict(smaller.config.to_dict()), network.config)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for made in (empty, again):
        asked = {name: tensor.shape for name, tensor in made.state_dict().items()}
        if wrong := [name for name in {**asked, **shapes} if asked.get(name) != shapes.get(name)]:
            name = wrong[0]
            raise BadInput(
                f"its configuration requires {name} {_shown(asked.get(name))}, but the pruned tensor is "
                f"{_shown(shapes.get(name))}"
            )
        _check_same_blocks(network, made, smaller)
    empty.load_state_dict(dict(state), strict=True, assign=True)
    _share_as(network, empty, smaller)
    for path, module in empty.named_modules():
        source = None
        for name in [name for name, buffer in module._buffers.items() if buffer is not None]:
            full = f"{path}.{name}" if path else name
            if full in shapes:
                continue
            source = source or network.get_submodule(smaller.before(path))
            there = source._buffers.get(name)
            if there is None or there.shape != module._buffers[name].shape:
                raise BadInput(f"its buffer {full} has another shape and is in no checkpoint")
            module._buffers[name] = there
    if hasattr(network, "generation_config"):  # an encoder's is not copied
        empty.generation_config = network.generation_config
    return empty.eval()


def source_state(network: PreTrainedModel, smaller: Smaller) -> dict[str, Tensor]:
    """The old network's tensors by their names in the new one.

    Raises:
        BadInput: a block of the new network holds a tensor that the old one lacks.
    """
    old, found = network.state_dict(), {}
    for name in _empty(type(network), smaller.config, network.config).state_dict():
        where = next((path for path in (smaller.before(name), smaller.first_before(name)) if path in old), None)
        if where is None:
            raise BadInput(f"its configuration requires {name}, which the network does not have")
        found[name] = old[where]
    return found


def changed_settings(before: Any, after: Any) -> list[dict[str, Any]]:
    """The changed settings of a smaller configuration and of those inside it, in the order of :func:`parts_of`."""
    pairs = zip(parts_of(before), parts_of(after), strict=True)
    return [
        {
            name: value
            for name, value in vars(other).items()
            if not name.startswith("_") and vars(one).get(name) != value and isinstance(value, int | list)
        }
        for one, other in pairs
    ]


def restored(
    network: PreTrainedModel, settings: Sequence[Mapping[str, Any]], blocks: Mapping[str, str]
) -> PreTrainedModel:
    """The network that was made smaller before; tensors whose shape has changed are left to be filled in.

    Args:
        network: the old one.
        settings: settings of the smaller configuration, see :func:`changed_settings`.
        blocks: see :class:`Smaller`.
    """
    config = deepcopy(network.config)
    for part, values in zip(parts_of(config), settings, strict=True):
        for name, value in values.items():
            setattr(part, name, value)
    smaller = Smaller(config, blocks)
    asked = _empty(type(network), config, network.config).state_dict()
    state = {
        name: tensor if tensor.shape == asked[name].shape else torch.empty_like(asked[name], device=tensor.device)
        for name, tensor in source_state(network, smaller).items()
    }
    return built(network, smaller, state)


def put_in_place(model: Model, network: PreTrainedModel) -> None:
    """Give a model its new network, which is checked like a loaded one.

    Raises:
        BadInput: it does not run; the model keeps the old one.
    """
    tied, old = model.head_is_tied, model.network
    model.network = network
    try:
        if not tied:
            model.keep_head_untied()
        if model.device.type != "meta":
            check_it_runs(model)
            check_tokenizer(model)
    except Exception as error:
        model.network = old
        raise BadInput(f"the smaller {model.name} does not run ({first_line(error)})") from error


def _empty(kind: type[PreTrainedModel], config: Any, like: Any) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            made: PreTrainedModel = kind._from_config(config, attn_implementation=like._attn_implementation)
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError) as error:
        raise BadInput(f"transformers cannot build this network ({first_line(error)})") from None
    return made


def _share_as(old: PreTrainedModel, new: PreTrainedModel, smaller: Smaller) -> None:
    """Tie the parameters that are tied in the old network, even if the configuration does not."""
    first: dict[int, nn.Parameter] = {}
    known = dict(old.named_parameters(remove_duplicate=False))
    for name, parameter in list(new.named_parameters(remove_duplicate=False)):
        source = known.get(smaller.before(name))
        if source is None:
            continue
        owner, _, last = name.rpartition(".")
        one = first.setdefault(id(source), parameter)
        if one is not parameter:
            setattr(new.get_submodule(owner), last, one)
        one.requires_grad_(source.requires_grad)


def _check_same_blocks(old: PreTrainedModel, new: PreTrainedModel, smaller: Smaller) -> None:
    """Refuse blocks whose kind depends on their number (an attention window, no rotary positions) and would change."""
    for path, source in smaller.blocks.items():
        known = dict(old.get_submodule(source).named_modules())
        for inside, module in new.get_submodule(path).named_modules():
            if (was := known.get(inside)) is None:  # belongs to the first block, which keeps it
                continue
            for name, value in vars(module).items():
                if name.startswith("_") or name in _OF_ITS_PLACE or not isinstance(value, _PLAIN):
                    continue
                if vars(was).get(name) != value:
                    raise BadInput(
                        f"{source} has {name}={vars(was).get(name)}, and as {path} it would have {name}={value}"
                    )


def filtered_lists(config: Any, depth: int, kept: Sequence[int]) -> None:
    """In every list with an entry for each block, keep the entries of the remaining blocks."""
    for name, value in list(vars(config).items()):
        per_block = any(word in name for word in ("layer", "window", "pattern", "types"))
        if per_block and isinstance(value, list | tuple) and len(value) == depth:
            setattr(config, name, [value[number] for number in kept])


def _shown(shape: Any) -> str:
    return "nothing" if shape is None else f"of shape {list(shape)}"
