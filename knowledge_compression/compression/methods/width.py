"""Width pruning: remove feed-forward channels and groups of heads, and refit the matrices that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from knowledge_compression.building import Positive
from knowledge_compression.compression.base import check_sparsity
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.reshaping import Cut, Reshaping
from knowledge_compression.compression.solve.columns import damped, least_missed, refitted
from knowledge_compression.compression.solve.hessian import Hessian, relative_errors
from knowledge_compression.compression.walk.statistics import BlockMethod, LayerInputs, WalkSettings
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.identity import SPEED
from knowledge_compression.models import Model, TargetLayer, Targets
from knowledge_compression.models.channels import ATTENTION, Part, narrower, parts
from knowledge_compression.models.families import EXPERTS, FF
from knowledge_compression.models.reshaped import Smaller, built, changed
from knowledge_compression.models.soundness import check_finite, weights_of

if TYPE_CHECKING:
    from torch import LongTensor, Tensor

REFIT, BIAS, NOTHING = "refit", "bias", "none"


class Moments(Hessian):
    """Second moments of a layer's inputs and their mean."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self._total = torch.zeros(in_features, device=device)
        self._tokens = 0

    def update(self, inputs: LayerInputs) -> None:
        """Add a batch."""
        super().update(inputs)
        self._total += inputs.values.float().sum(0)
        self._tokens += len(inputs.values)

    @property
    def mean(self) -> Tensor:
        """Float32 ``[in_features]``."""
        return self._total / max(self._tokens, 1)


@dataclass(frozen=True)
class Width(Reshaping):
    """Remove feed-forward channels and attention heads, the same number in every block.

    Heads are removed in whole groups: a key-value head with all query heads that read it. Their number is the one
        nearest to the share that the configuration can express. If the target has both parts, the number of
        feed-forward channels makes up the difference, so that the sparsity of the target is exact to within one channel
        per block. The matrix that reads a narrower layer is refitted to compensate.

    Attributes:
        sparsity: share of the target's weights to remove, in [0, 1).
        importance: ``error`` removes the units whose removal raises the layer's output error on the calibration text
            least, after the best refit of the others (optimal brain surgeon for groups, as in ZipLM, Kurtic et al.);
            ``wanda`` those with the smallest sum of ``|w| ‖x‖`` (An et al. 2024 compare with it); ``fluctuation`` those
            with the smallest product of variance of the inputs and squared norm of the weights (FLAP, An et al. 2024,
            equation 5).
        compensation: ``refit`` fits the remaining columns, and the bias if the layer has one, by least squares to the
            outputs of the whole layer; ``bias`` adds the average contribution of the removed inputs to the bias (FLAP,
            equation 4); ``none`` leaves the columns as they are.
        damping: constant added to the diagonal of the inputs' second moments, relative to its mean.
        multiple: the number of remaining channels is a multiple of this, e.g. of the group size of a later
            quantization.
        forward_dtype: dtype of the products in the calibration passes.
        device: where blocks are computed, one at a time; None computes them where they are stored.
    """

    sparsity: float
    importance: Literal["error", "wanda", "fluctuation"] = "error"
    compensation: Literal["refit", "bias", "none"] = "refit"
    damping: Annotated[float, Field(gt=0)] = 0.01
    multiple: Positive = 1
    forward_dtype: str = field(default="auto", kw_only=True)
    device: str | None = field(default=None, metadata=SPEED, kw_only=True)
    name = "width"
    calibrated = True

    def __post_init__(self) -> None:
        """Refuse a share outside [0, 1)."""
        check_sparsity(self.sparsity)

    @property
    def walk(self) -> WalkSettings:
        """Each layer reads the outputs of the layers that were narrowed before it."""
        return WalkSettings(true_sequential=True, device=self.device, forward_dtype=self.forward_dtype)

    def multiplies_in(self, model: Model) -> str:
        """The user's choice, as far as the device and the network's dtype allow."""
        return str(self.walk.multiplied_in(model) or model.dtype).removeprefix("torch.")

    def plan(self, targets: Targets) -> dict[str, float]:
        """The share of each layer that remains; also refuses a network whose units cannot be removed one by one."""
        check_finite(weights_of(targets.model), targets.model.name)  # otherwise the trial below would blame the network
        chosen, goes = self._going(targets)
        order = torch.Generator().manual_seed(0)
        kept = {
            part.writer.path: torch.randperm(part.units, generator=order)[: part.units - goes[part.role == FF]].sort()[
                0
            ]
            for part in chosen
        }
        try:
            made = self._narrowed(targets.model, chosen, goes, kept)
        except BadInput as error:
            raise BadInput(
                f"compression=width cannot turn {targets.model.name} into a checkpoint that other programs load: "
                f"{error}; "
                "choose target=ff, or compression=depth"
            ) from None
        _check_equal(targets.model, made, chosen, kept)
        return {x.path: 1 - goes[part.role == FF] / part.units for part in chosen for x in part.layers}

    def cut(self, model: Model, targets: Targets, calibration: LongTensor | None) -> Cut:
        """Walk through the blocks, decide and compensate; the matrices become smaller at the end."""
        from knowledge_compression.compression.walk.blocks import compress_blocks

        chosen, goes = self._going(targets)
        cutter = _Cutter(self, {part.writer.path: part for part in chosen}, goes)
        writers = Targets([part.writer for part in chosen], model)
        reports = {report.path: report for report in compress_blocks(model, writers, calibration, cutter, self.walk)}
        smaller, state = self._smaller(model, chosen, goes, cutter.kept)
        removed = {x.path: x.parameters // part.units * goes[part.role == FF] for part in chosen for x in part.layers}
        return Cut(smaller, state, removed, reports)

    def _going(self, targets: Targets) -> tuple[list[Part], Mapping[bool, int]]:
        """The parts to be narrowed, and by how much."""
        chosen = self._parts(targets)
        goes = self._counts(targets.model, chosen)
        return [part for part in chosen if goes[part.role == FF]], goes

    def _parts(self, targets: Targets) -> list[Part]:
        """The parts of blocks that the target contains.

        Raises:
            BadInput: the target has experts, or only some blocks, or only some layers of a part; or biases are to
                compensate and a layer has none.
        """
        if any(layer.role == EXPERTS for layer in targets):
            raise BadInput("compression=width cannot narrow experts; choose target=att, or compression=depth")
        paths = {layer.path for layer in targets}
        everything = parts(targets.model, _roles(targets))
        chosen = [part for part in everything if paths.issuperset(x.path for x in part.layers)]
        covered = {x.path for part in chosen for x in part.layers}
        if missing := [layer.path for layer in targets if layer.path not in covered]:
            raise BadInput(
                "compression=width narrows the complete feed-forward layers and attention of all blocks, and "
                f"{missing[0]} does not belong to a complete one; choose target=att, ff or all"
            )
        for role in {part.role for part in chosen}:
            alike = [part for part in everything if (part.role == FF) == (role == FF)]
            if len(alike) != sum((part.role == FF) == (role == FF) for part in chosen):
                raise BadInput(
                    "compression=width narrows all blocks equally, because a configuration has one width for all of "
                    "them, and the target contains only some blocks; choose target=att, ff or all, without "
                    "target.blocks"
                )
            if len({part.units for part in alike}) > 1:
                raise BadInput(
                    f"the blocks of {targets.model.name} have different widths, and compression=width takes equal ones"
                )
        if self.compensation == BIAS and (bare := [part.writer for part in chosen if part.writer.bias is None]):
            raise BadInput(
                f"compression.compensation=bias: {bare[0].path} has no bias, and a checkpoint of this model type "
                "cannot hold one; choose refit or none"
            )
        return chosen

    def _counts(self, model: Model, chosen: Sequence[Part]) -> Mapping[bool, int]:
        """How many units of each part to remove: channels under True, groups of heads under False.

        Raises:
            BadInput: the number is less than one.
        """
        channels, heads = ([part for part in chosen if (part.role == FF) == ff] for ff in (True, False))
        wanted = self.sparsity * sum(part.parameters for part in chosen)
        groups = _sayable(model, heads[0].units, self.sparsity) if heads else 0
        goes = 0
        if channels:
            left = wanted - groups * sum(part.parameters / part.units for part in heads)
            units = channels[0].units
            stays = units - left / sum(part.parameters / part.units for part in channels)
            goes = units - min(units, max(1, round(stays / self.multiple)) * self.multiple)
            if goes == units - self.multiple and stays < 0:
                raise BadInput(f"compression=width sparsity={self.sparsity} would leave {model.name} without a channel")
        if self.sparsity and not goes and not groups:
            least_share = self.multiple / channels[0].units if channels else 1 / heads[0].units
            least = f"that is sparsity={least_share:.3g}" if least_share < 1 else "the model has one, which stays"
            raise BadInput(
                f"compression=width sparsity={self.sparsity} of {model.name} is less than half of the smallest "
                f"removable unit, one {'channel' if channels else 'group of heads'}; {least}"
            )
        return {True: goes, False: groups}

    def _smaller(
        self, model: Model, chosen: Sequence[Part], goes: Mapping[bool, int], kept: Mapping[str, Tensor]
    ) -> tuple[Smaller, dict[str, Tensor]]:
        """The narrower architecture, and its tensors."""
        sizes = {part.role == FF: (part.units, part.units - goes[part.role == FF]) for part in chosen}
        config = changed(model.network.config, partial(narrower, channels=sizes.get(True), heads=sizes.get(False)))
        state = dict(model.network.state_dict())
        for part in chosen:
            state |= part.cut(kept[part.writer.path])
        return Smaller(config), state

    def _narrowed(
        self, model: Model, chosen: Sequence[Part], goes: Mapping[bool, int], kept: Mapping[str, Tensor]
    ) -> Any:
        return built(model.network, *self._smaller(model, chosen, goes, kept))


@dataclass(frozen=True)
class _Cutter(BlockMethod[Moments]):
    """Decides for one writer after the other during the walk; columns to be removed are zero until all are decided.

    Attributes:
        kept: the remaining units, by the writer's path; grows during the walk.
    """

    method: Width
    parts: Mapping[str, Part]
    goes: Mapping[bool, int]
    kept: dict[str, Tensor] = field(default_factory=dict)

    def observe(self, in_features: int, device: torch.device) -> Moments:
        """Second moments and mean."""
        return Moments(in_features, device)

    def shrink(self, layers: Sequence[TargetLayer], statistics: Moments) -> list[LayerReport]:
        """Decide for a writer, and refit it."""
        (layer,) = layers
        part = self.parts[layer.path]
        method, mean, moments = self.method, statistics.mean, statistics.matrix
        old = layer.weight.float()
        centred = moments - torch.outer(mean, mean) if layer.bias is not None else moments
        within = damped(centred, method.damping)
        gone = self._choose(old, moments, mean, within, part)
        stays = torch.ones(part.units, dtype=torch.bool)
        stays[gone.cpu()] = False
        units = stays.nonzero().flatten()
        self.kept[layer.path] = units
        columns = part.columns(units).to(old.device)
        plain, new = torch.zeros_like(old), torch.zeros_like(old)
        plain[:, columns] = old[:, columns]
        new[:, columns] = old[:, columns]
        if method.compensation == REFIT and len(gone):
            new[:, columns] = refitted(old.double(), within, columns).float()
        report = LayerReport.of(layer)
        report.error_before, report.error_after = relative_errors(old, [plain, new], moments)
        if layer.bias is not None and method.compensation != NOTHING:
            layer.bias.add_(((old - new) @ mean).to(layer.bias))
            report.error_after = relative_errors(old, [new], moments - torch.outer(mean, mean))[0]
        report.damping = method.damping
        layer.weight.copy_(new)
        return [report]

    def _choose(self, weight: Tensor, moments: Tensor, mean: Tensor, within: Tensor, part: Part) -> Tensor:
        """The units to remove."""
        count = self.goes[part.role == FF]
        if self.method.importance == "error":
            return least_missed(weight.double(), within, part.width, count)
        if self.method.importance == "wanda":
            scores = weight.abs().sum(0) * moments.diagonal().sqrt()
        else:
            scores = weight.square().sum(0) * (moments.diagonal() - mean.square())
        return scores.view(part.units, part.width).sum(1).argsort(stable=True)[:count].sort().values


def _sayable(model: Model, groups: int, sparsity: float) -> int:
    """How many groups of heads to remove: the number nearest to the share that the configuration can express.

    LLaMA's, for example, takes only numbers of heads that divide the width of the hidden states.
    """
    for goes in sorted(range(groups), key=lambda goes: (abs(goes - sparsity * groups), goes)):
        try:
            changed(model.network.config, partial(narrower, channels=None, heads=(groups, groups - goes)))
        except BadInput:
            continue
        return goes
    return 0


def _roles(targets: Targets) -> set[str]:
    """The roles of all layers of the target's kinds: all attention in a network has the same number of heads."""
    roles = {layer.role for layer in targets}
    return (set(ATTENTION) if roles & set(ATTENTION) else set()) | (roles & {FF})


def _check_equal(model: Model, made: Any, chosen: Sequence[Part], kept: Mapping[str, Tensor]) -> None:
    """Compare the narrower network, on a few tokens, with the whole one whose removed units are set to zero.

    Raises:
        BadInput: they differ, so the network uses a unit in a way that this method does not know.
    """
    from knowledge_compression.compression.walk.passes import read_text

    if model.device.type == "meta":
        return
    ids = torch.arange(8).remainder(model.text_config.vocab_size)[None]
    with ExitStack() as hooks, torch.no_grad():
        for part in chosen:
            silent = torch.ones(part.units, dtype=torch.bool)
            silent[kept[part.writer.path]] = False
            columns = part.columns(silent.nonzero().flatten())
            hook = partial(_silence, columns.to(model.device))
            hooks.callback(part.writer.module.register_forward_pre_hook(hook).remove)
        whole = read_text(model, ids)
    narrow = Model(made, model.tokenizer, model.name)
    with torch.no_grad():
        difference = float((read_text(narrow, ids) - whole).abs().max())
    scale = float(whole.abs().max())
    if not difference <= 0.02 * scale + 1e-4:
        raise BadInput(
            f"compression=width does not know the layers of {model.name}: removing units changes its logits by "
            f"{difference:.2g}; choose compression=depth"
        )


def _silence(columns: Tensor, _: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].index_fill(-1, columns, 0), *inputs[1:])
