"""Depth pruning: drop whole blocks that change their input least (Men et al. 2024; Gromov et al. 2024)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from knowledge_compression.compression.base import check_sparsity
from knowledge_compression.compression.reshaping import Cut, Reshaping
from knowledge_compression.compression.walk.statistics import WalkSettings
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import functional, torch
from knowledge_compression.models import Model, Targets
from knowledge_compression.models.families import ENCODER_DECODER, ROUTER, TRANSFORM
from knowledge_compression.models.reshaped import Smaller, changed, filtered_lists, parts_of, source_state
from knowledge_compression.models.targets import linear_layers

if TYPE_CHECKING:
    from torch import LongTensor, Tensor

log = logging.getLogger(__name__)

_DEPTHS: Sequence[str] = ("num_hidden_layers",)
_ENCODER_DEPTHS = ("encoder_layers", "num_layers", "num_hidden_layers")  # the first that exists is used
_DECODER_DEPTHS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")


@dataclass(frozen=True)
class Depth(Reshaping):
    """Drop the blocks whose output is most like their input; what is left is an ordinary, shallower network.

    Attributes:
        sparsity: share of the target's blocks to drop, in [0, 1); ``round(sparsity * blocks)`` of each stack, or one of
            each stack if that rounds to none, which a warning and the reached sparsity show.
        by: ``influence`` drops the blocks of least influence, ``1 - cosine`` of a block's input and output, averaged
            over the tokens of the calibration text (ShortGPT, Men et al. 2024, equation 1); ``angle`` drops the run of
            neighbouring blocks between whose first input and last output the angle ``arccos(cosine) / pi`` is smallest
            (Gromov et al. 2024, equation 7), averaged over all tokens, where the paper reads the last of each sequence.
        forward_dtype: dtype of the products in the calibration passes.
    """

    sparsity: float
    by: Literal["influence", "angle"] = "influence"
    forward_dtype: str = field(default="auto", kw_only=True)
    name = "depth"
    calibrated = True

    def __post_init__(self) -> None:
        """Refuse a share outside [0, 1)."""
        check_sparsity(self.sparsity)

    def multiplies_in(self, model: Model) -> str:
        """The user's choice, as far as the device and the network's dtype allow."""
        settings = WalkSettings(forward_dtype=self.forward_dtype)
        return str(settings.multiplied_in(model) or model.dtype).removeprefix("torch.")

    def plan(self, targets: Targets) -> dict[str, float]:
        """The share of blocks that remain, for every layer of the blocks that may be dropped."""
        left: dict[str, float] = {}
        stacks = _stacks(targets, self.sparsity)
        for stack in stacks:
            share = 1 - stack.goes / len(stack.candidates) if stack.candidates else 1.0
            for layer in targets:
                if any(layer.path.startswith(f"{stack.blocks[i]}.") for i in stack.candidates):
                    left[layer.path] = share
        _smaller(targets.model, [stack.staying(stack.candidates[: stack.goes]) for stack in stacks])
        return left

    def cut(self, model: Model, targets: Targets, calibration: LongTensor | None) -> Cut:
        """Measure the blocks on the text and drop the least important of each stack."""
        from knowledge_compression.compression.walk.passes import checked_windows

        stacks = _stacks(targets, self.sparsity)
        count = max(len(stack.candidates) for stack in stacks)
        if self.sparsity and round(self.sparsity * count) == 0:
            log.warning("sparsity=%g of %d blocks is less than half of one; one is dropped", self.sparsity, count)
        windows = checked_windows(model, calibration)
        measured = _measured(self, model, windows, stacks)
        goes = [self._choose(stack, values) for stack, values in zip(stacks, measured, strict=True)]
        smaller = _smaller(model, [stack.staying(numbers) for stack, numbers in zip(stacks, goes, strict=True)])
        gone = {stack.blocks[i] for stack, numbers in zip(stacks, goes, strict=True) for i in numbers}
        removed = {x.path: x.parameters for x in targets if any(x.path.startswith(f"{block}.") for block in gone)}
        told = {
            stack.blocks[i]: value
            for stack, values in zip(stacks, measured, strict=True)
            for i, value in enumerate(values)
        }
        return Cut(smaller, source_state(model.network, smaller), removed, measured={self.by: told})

    def _choose(self, stack: _Stack, values: Sequence[float]) -> list[int]:
        """The numbers of the blocks to drop; among equals the last."""
        if not stack.goes:
            return []
        if self.by == "influence":
            return sorted(sorted(stack.candidates, key=lambda i: (values[i], -i))[: stack.goes])
        free, length = set(stack.candidates), stack.goes
        runs = [i for i in stack.candidates if free.issuperset(range(i, i + length))]
        if not runs:
            raise BadInput(
                f"compression.by=angle drops {stack.goes} neighbouring blocks, and no {stack.goes} of the blocks in "
                "target.blocks are neighbours; choose compression.by=influence"
            )
        first = min(runs, key=lambda i: (values[i], -i))
        return list(range(first, first + length))


@dataclass(frozen=True)
class _Stack:
    """The blocks of one stack, the numbers of those that may be dropped, and how many are to be dropped."""

    blocks: Sequence[str]
    candidates: Sequence[int]
    goes: int
    encodes: bool

    def staying(self, gone: Sequence[int]) -> tuple[_Stack, list[int]]:
        return self, [i for i in range(len(self.blocks)) if i not in set(gone)]


def _stacks(targets: Targets, sparsity: float) -> list[_Stack]:
    """The stacks of the network, and how many blocks of each are to be dropped.

    Raises:
        BadInput: no block lies wholly in the target, blocks are shared, or a stack would be left without a block.
    """
    model = targets.model
    architecture, layers = model.architecture, linear_layers(model)
    if architecture.shared_depth:
        raise BadInput(f"compression=depth drops blocks, and {model.name} uses one block for its whole depth")
    chosen = {layer.path for layer in targets}
    found = []
    for number, stack in enumerate(architecture.stacks):
        blocks = [path for path in architecture.block_paths(model.network) if stack.is_block(path)]
        whole = []
        for i, block in enumerate(blocks):
            inside = [x.path for x in layers if x.path.startswith(f"{block}.") and x.role not in (ROUTER, TRANSFORM)]
            if inside and chosen.issuperset(inside):
                whole.append(i)
        goes = round(sparsity * len(whole))
        if goes == len(blocks):
            goes = -1
        found.append(_Stack(blocks, whole, goes, encodes=model.family == ENCODER_DECODER and number == 0))
    count = sum(len(stack.candidates) for stack in found)
    if not count:
        raise BadInput(
            "compression=depth drops whole blocks, and the target contains no whole block; choose target=all, or some "
            "of its blocks with target.blocks"
        )
    if any(stack.goes < 0 for stack in found):
        raise BadInput(f"compression=depth sparsity={sparsity} would leave a stack of {model.name} without a block")
    if sparsity and not any(stack.goes for stack in found):  # less than half a block: drop one
        if any(len(stack.blocks) == 1 for stack in found if stack.candidates):
            raise BadInput(f"compression=depth drops whole blocks, and a stack of {model.name} has only one")
        found = [replace(stack, goes=min(1, len(stack.candidates))) for stack in found]
    return found


def _smaller(model: Model, staying: Sequence[tuple[_Stack, Sequence[int]]]) -> Smaller:
    """The architecture with the blocks that remain.

    Raises:
        BadInput: its configuration cannot express it, so that a checkpoint could not be loaded.
    """
    from knowledge_compression.models.reshaped import built

    def change(config: Any) -> None:
        for stack, kept in staying:
            part, names = config, _DEPTHS
            if model.family == ENCODER_DECODER:
                names = _ENCODER_DEPTHS if stack.encodes else _DECODER_DEPTHS
                part = getattr(config, "encoder" if stack.encodes else "decoder", config)
            elif config.get_text_config() in parts_of(config):
                part = config.get_text_config()
            name = next(name for name in names if getattr(part, name, None) == len(stack.blocks))
            if part is not config or model.family != ENCODER_DECODER:
                filtered_lists(part, len(stack.blocks), kept)
            setattr(part, name, len(kept))

    try:
        config = changed(model.network.config, change)
    except StopIteration:
        raise BadInput(f"the configuration of {model.name} does not say how many blocks a stack has") from None
    blocks = {
        f"{stack.blocks[0].rpartition('.')[0]}.{new}": stack.blocks[old]
        for stack, kept in staying
        for new, old in enumerate(kept)
    }
    smaller = Smaller(config, blocks)
    try:
        made = built(model.network, smaller, source_state(model.network, smaller))
        if len(model.architecture.block_paths(made)) != len(blocks):
            lists = " and ".join(stack.blocks[0].rpartition(".")[0] for stack, _ in staying)
            raise BadInput(f"its configuration does not decide the number of blocks in {lists}")
    except BadInput as error:
        raise BadInput(
            f"{model.name} without some blocks could not be loaded by stock transformers: {error}; limit the blocks "
            "that may be dropped with target.blocks"
        ) from None
    return smaller


def _measured(method: Depth, model: Model, windows: Tensor, stacks: Sequence[_Stack]) -> list[list[float]]:
    """How far single blocks, or runs of as many as are dropped, turn the states of their stack, by first block."""
    from knowledge_compression.compression.walk.layer_inputs import finite, first_tensor
    from knowledge_compression.compression.walk.passes import batches, read_text
    from knowledge_compression.models.device import multiplied_in
    from knowledge_compression.progress import shown

    sums = [torch.zeros(len(stack.blocks), dtype=torch.float64) for stack in stacks]
    tokens = [0] * len(stacks)
    states: dict[str, list[Tensor]] = {}

    def entering(block: str, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states[block] = [finite(block, first_tensor(args, kwargs)).detach()]

    def leaving(block: str, _: Any, __: Any, output: Any) -> None:
        states[block].append((output[0] if isinstance(output, tuple) else output).detach())

    def stop(*_: Any) -> None:
        raise _Read

    turned: Callable[[Tensor], Tensor] = (
        (lambda c: 1 - c) if method.by == "influence" else (lambda c: c.clamp(-1, 1).acos() / math.pi)
    )
    narrower = WalkSettings(forward_dtype=method.forward_dtype).multiplied_in(model)
    lengths = [max(stack.goes, 1) if method.by == "angle" else 1 for stack in stacks]
    with ExitStack() as hooks, torch.no_grad():
        for block in (block for stack in stacks for block in stack.blocks):
            module = model.network.get_submodule(block)
            hooks.callback(module.register_forward_pre_hook(partial(entering, block), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(partial(leaving, block)).remove)
        head = model.network.get_submodule(model.architecture.final)
        hooks.callback(head.register_forward_pre_hook(stop).remove)  # the logits are not needed
        for batch in shown(list(batches(windows, model.device.type == "cpu")), "measuring blocks"):
            try:
                with multiplied_in(narrower, model.device):
                    read_text(model, batch)
            except _Read:
                pass
            for number, (stack, length) in enumerate(zip(stacks, lengths, strict=True)):
                edges = [states[block][0] for block in stack.blocks] + [states[stack.blocks[-1]][1]]
                for i in range(len(stack.blocks) - length + 1):
                    first, last = (edges[j].float().flatten(0, -2) for j in (i, i + length))
                    cosines = functional.cosine_similarity(first, last, dim=-1)
                    sums[number][i] += float(turned(cosines).double().sum())
                tokens[number] += edges[0].numel() // edges[0].shape[-1]
            states.clear()
    return [
        [float(value) / max(count, 1) for value in total[: len(total) - length + 1]]
        for total, count, length in zip(sums, tokens, lengths, strict=True)
    ]


class _Read(Exception):
    """Raised once all blocks have been measured, to end the forward pass."""
