"""The project's one training loop: the controlled world's models, LoRA and soft prompts all go through :func:`train`.

Everything random in a step (windows, masks, dropout) is determined by its number and the seed, so a checkpoint needs no
generator states, and an interrupted training resumes to exactly the result of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open

from knowledge_compression.building import Seed
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import nn, torch
from knowledge_compression.identity import ADDED, SPEED
from knowledge_compression.memory import is_out_of_memory
from knowledge_compression.models.compiled import compiled_blocks
from knowledge_compression.models.device import PRODUCT_DTYPES, Device, frozen_kept_in, multiplied_in
from knowledge_compression.objectives import Objective
from knowledge_compression.progress import bars

if TYPE_CHECKING:
    from torch import LongTensor, Tensor

log = logging.getLogger(__name__)

FORMAT = 1  # of a checkpoint; raised whenever an old one would be resumed wrongly
LogCallback = Callable[[Mapping[str, float], int], None]


@dataclass(frozen=True)
class TrainingSettings:
    """The training settings; the budget is given in steps or in tokens.

    Attributes:
        steps: optimizer steps.
        tokens: number of training tokens (window length times windows), rounded up to whole steps; instead of
            ``steps``.
        batch_size: windows per forward pass.
        accumulate: forward passes per optimizer step.
        learning_rate: peak learning rate of AdamW.
        weight_decay: its decoupled weight decay, on matrices only (not on norms and biases).
        betas: its averaging rates.
        warmup: share of the steps over which the learning rate rises linearly.
        schedule: ``linear`` (falls to zero after the warm-up) or ``constant``.
        clip: maximum norm of the gradient; 0 does not clip.
        precision: dtype of the products of a float32 network: ``auto`` (see ``models.device``), ``float32`` or
            ``bfloat16``.
        torch_compile: whether the network's blocks are compiled, which takes 10 to 60 s and speeds up every step
            (:class:`~knowledge_compression.models.compiled.compiled_blocks`); results differ by rounding.
        checkpoint_every: steps between checkpoints.
        seed: determines order, masks and dropout.
    """

    steps: int | None = None
    tokens: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.05
    schedule: str = "linear"
    clip: float = 1.0
    precision: str = "float32"
    torch_compile: bool = field(default=False, metadata=ADDED)
    checkpoint_every: int = field(default=200, metadata=SPEED)
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Refuse invalid settings."""
        if (self.steps is None) == (self.tokens is None):
            given = "neither is" if self.steps is None else f"steps={self.steps} and tokens={self.tokens} are both"
            raise BadInput(f"training: {given} set; give either steps or tokens, and set the other to null")
        for name in ("steps", "tokens", "batch_size", "accumulate", "checkpoint_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise BadInput(f"training: {name}={value} must be at least 1")
        if self.learning_rate <= 0 or self.weight_decay < 0 or self.clip < 0 or not 0 <= self.warmup <= 1:
            raise BadInput("training: learning_rate > 0, weight_decay >= 0, clip >= 0 and 0 <= warmup <= 1 are needed")
        for name, choices in {"schedule": ("linear", "constant"), "precision": PRODUCT_DTYPES}.items():
            if (value := getattr(self, name)) not in choices:
                raise BadInput(f"training: {name}={value} does not exist; choose one of {', '.join(choices)}")

    def to_json(self) -> dict[str, Any]:
        """All settings, JSON-ready; ``torch_compile`` only if it is on, so that digests from before it existed stay."""
        told = asdict(self)
        return told if self.torch_compile else {key: value for key, value in told.items() if key != "torch_compile"}

    def steps_over(self, length: int) -> int:
        """Number of optimizer steps for windows of ``length`` tokens."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return math.ceil(self.tokens / (length * self.batch_size * self.accumulate))

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Learning rate at ``step`` (from 0) of ``steps``."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * ((steps - step) / max(1, steps - warm) if self.schedule == "linear" else 1.0)


@dataclass
class TrainingReport:
    """The report on a training.

    Attributes:
        steps: optimizer steps.
        tokens: number of training tokens.
        parameters: number of trained parameters.
        loss_before, loss_after: mean loss (nats per predicted token) over the first and the last tenth of the steps.
        seconds: wall time, including the time before an interruption.
        resumed_at: step at which it resumed after an interruption; None if there was none.
        multiplied_in: dtype of the products, e.g. ``bfloat16`` (see ``models.device``).
        windows_at_once: windows per forward pass if memory did not suffice for ``batch_size`` of them; otherwise None.
        not_compiled: why the blocks could not be compiled, if they were to be; otherwise None.
    """

    steps: int
    tokens: int
    parameters: int
    loss_before: float
    loss_after: float
    seconds: float
    resumed_at: int | None = None
    windows_at_once: int | None = None
    multiplied_in: str = "float32"
    not_compiled: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """All figures, JSON-ready."""
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


def train(
    network: nn.Module,
    windows: LongTensor,
    objective: Objective,
    settings: TrainingSettings,
    *,
    checkpoint: Path | None = None,
    report_to: LogCallback | None = None,
    label: str = "training",
) -> TrainingReport:
    """Train the parameters of ``network`` that require gradients, in place.

    Args:
        network: on its device already; left in evaluation mode.
        windows: token ids ``[windows, length]`` on the CPU; each epoch uses all of them in a different order.
        objective: returns the summed loss of a batch and the number of tokens that it predicted. Its masks come from
            torch's global generators, which are seeded for every step and restored at the end.
        settings: budget and optimizer.
        checkpoint: file for the training state (safetensors). An existing checkpoint of the same training is resumed;
            any other is overwritten.
        report_to: called every ten steps with loss, learning rate, tokens per second, and the step.
        label: label of the progress bar.

    Raises:
        BadInput: there is nothing to train, there is no window, or the loss is not finite (the last good checkpoint
            stays).
    """
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not parameters:
        raise BadInput(f"{label}: no parameter of the network requires gradients, so there is nothing to train")
    if windows.dim() != 2 or not windows.numel():
        raise BadInput(f"{label}: there is no window of text to train on; give more text or shorter windows")

    device = next(iter(parameters.values())).device
    # Trained parameters may be float32 while the other weights are narrower and stay unchanged.
    floats = [p for p in network.parameters() if p.is_floating_point()]
    stored = next((p.dtype for p in floats if not p.requires_grad), floats[0].dtype)
    narrower = Device.of(device).product_dtype(settings.precision, stored, "training: precision")
    optimizer = _optimizer(parameters, settings, device)
    steps = settings.steps_over(windows.shape[1])
    state = _State(_identity(parameters, windows, settings), settings.batch_size)
    if checkpoint is not None:
        state.resume(checkpoint, parameters, optimizer, label)
    resumed_at = state.step or None
    tokens_a_step = settings.batch_size * settings.accumulate * windows.shape[1]

    network.train()
    with (
        _progress() as bar,
        torch.random.fork_rng(_gpus_of(network)),
        frozen_kept_in(narrower, network),
        compiled_blocks(network, wanted=settings.torch_compile) as blocks,
    ):
        task = bar.add_task(label, total=steps, completed=state.step, note="")
        start = time.perf_counter() - state.seconds
        while state.step < steps:
            rate = settings.learning_rate_at(state.step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            try:
                torch.manual_seed(settings.seed * 1_000_003 + state.step)
                batch = _batch(windows, settings, state.step)
                loss = _step(
                    network, optimizer, objective, batch.split(state.windows_at_once), settings, narrower=narrower
                )
            except RuntimeError as error:
                if state.windows_at_once == 1 or not is_out_of_memory(error):
                    raise
                optimizer.zero_grad()
                state.windows_at_once //= 2
                log.warning("%s: out of memory; from here on %d windows at once", label, state.windows_at_once)
                continue
            if not math.isfinite(loss):
                kept = f"; the state of an earlier step is kept in {checkpoint.name}" if checkpoint else ""
                raise BadInput(
                    f"{label}: the loss of step {state.step + 1} of {steps} is {loss}, so training stopped{kept}; "
                    f"try a learning_rate below {settings.learning_rate:g}"
                )
            state.step += 1
            state.losses.append(loss)
            state.seconds = time.perf_counter() - start
            speed = state.step * tokens_a_step / state.seconds
            bar.update(task, advance=1, note=f"loss {loss:.3f}  {speed:,.0f} tokens/s")
            if report_to is not None and (state.step % 10 == 0 or state.step == steps):
                report_to({"loss": loss, "learning_rate": rate, "tokens_per_second": speed}, state.step)
            if checkpoint is not None and (state.step % settings.checkpoint_every == 0 or state.step == steps):
                state.save(checkpoint, parameters, optimizer)
    network.eval()
    tenth = max(1, steps // 10)
    return TrainingReport(
        steps=steps,
        tokens=steps * tokens_a_step,
        parameters=sum(p.numel() for p in parameters.values()),
        loss_before=sum(state.losses[:tenth]) / tenth,
        loss_after=sum(state.losses[-tenth:]) / tenth,
        seconds=state.seconds,
        resumed_at=resumed_at,
        windows_at_once=state.windows_at_once if state.windows_at_once < settings.batch_size else None,
        multiplied_in=str(narrower or stored).removeprefix("torch."),
        not_compiled=blocks.failure,
    )


def _step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    parts: Sequence[Tensor],
    settings: TrainingSettings,
    *,
    narrower: torch.dtype | None,
) -> float:
    """Take one optimizer step and return the mean loss of its predicted tokens; if that is not finite, take no step.

    Products are computed in ``narrower`` if it is given.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    total, tokens, size = torch.zeros((), device=device), 0, sum(part.numel() for part in parts)
    for part in parts:
        with multiplied_in(narrower, device):
            loss, count = objective(network, cast("LongTensor", part.to(device)))
        (loss / size).backward()  # approximately a mean; corrected below, once all parts have been counted
        total += loss.detach()
        tokens += count
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, size / tokens)
    norm = nn.utils.clip_grad_norm_(parameters, settings.clip) if settings.clip else total
    mean = float(total) / tokens
    if math.isfinite(mean) and not torch.isfinite(norm):
        mean = float(norm)
    if math.isfinite(mean):
        optimizer.step()
    optimizer.zero_grad()
    return mean


def _gpus_of(network: nn.Module) -> list[torch.device]:
    """Several if it is divided."""
    return [place for place in {p.device for p in network.parameters()} if place.type == "cuda"]


def _batch(windows: LongTensor, settings: TrainingSettings, step: int) -> LongTensor:
    """The windows of a step: epoch after epoch, each in a different order."""
    size = settings.batch_size * settings.accumulate
    places = range(step * size, (step + 1) * size)
    count = len(windows)
    rows = [_order(count, settings.seed, place // count)[place % count] for place in places]
    return windows[rows].long()  # type: ignore[return-value]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def _optimizer(
    parameters: Mapping[str, nn.Parameter], settings: TrainingSettings, device: torch.device
) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters.values() if p.dim() > 1]},
        {"params": [p for p in parameters.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=device.type in ("cpu", "cuda") or None,
    )


def _progress() -> Progress:
    return bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )


def _identity(parameters: Mapping[str, nn.Parameter], windows: Tensor, settings: TrainingSettings) -> str:
    """Digest of everything that a checkpoint must share with the training that resumes from it."""
    sha = hashlib.sha256()
    deciding = {key: value for key, value in settings.to_json().items() if key != "checkpoint_every"}
    shapes = {name: [str(p.dtype), *p.shape] for name, p in parameters.items()}
    sha.update(json.dumps([FORMAT, deciding, shapes, list(windows.shape)]).encode())
    sha.update(windows.contiguous().numpy().tobytes())
    return sha.hexdigest()


class _State:
    """The state of a training; on disk, one safetensors file with the figures in its header."""

    def __init__(self, identity: str, windows_at_once: int) -> None:
        self.identity = identity
        self.windows_at_once = windows_at_once  # per forward pass; it affects the masks, so it is kept on resuming
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []

    def save(self, path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Write everything under another name and rename it."""
        from safetensors.torch import save_file

        tensors = {f"parameter/{name}": p.detach() for name, p in parameters.items()}
        for name, p in parameters.items():
            tensors |= {f"{key}/{name}": value for key, value in optimizer.state[p].items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.new")
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, scratch, {"state": json.dumps(vars(self))}
        )
        scratch.replace(path)

    def resume(
        self, path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, label: str
    ) -> None:
        """Restore the state at ``path``, if it exists, is complete, and belongs to the same training."""
        if not path.is_file():
            return
        try:
            with safe_open(path, "pt") as file:
                found = json.loads(file.metadata()["state"])
                if found["identity"] != self.identity:
                    log.warning("%s: %s belongs to another training and is not used", label, path.name)
                    return
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError):
            log.warning("%s: %s cannot be read and is not used", label, path.name)
            return
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(tensors.pop(f"parameter/{name}"))
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            p = parameters[name]
            optimizer.state[p][kind] = value.to(p.device)
        vars(self).update(found)
        log.info("%s: continuing from step %d", label, self.step)
