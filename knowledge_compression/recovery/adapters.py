"""Training of a recovery's adapters; each is cached under everything that decides it, and belongs to one base model."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from xxhash import xxh3_128

from knowledge_compression.cache import cache_folder, cached_folder
from knowledge_compression.corpora.corpus import Corpus, digest
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models import Model
from knowledge_compression.models.families import ENCODER_DECODER
from knowledge_compression.models.spread import at_hand
from knowledge_compression.models.targets import is_linear
from knowledge_compression.objectives import objective_for
from knowledge_compression.training import LogCallback, TrainingReport, TrainingSettings, train

if TYPE_CHECKING:
    from torch import LongTensor, Tensor, nn

log = logging.getLogger(__name__)

FORMAT = 2  # of an adapter; raised whenever an old one would be misread
_CHUNK = 1 << 26  # bytes hashed at a time


class FrozenBase:
    """The frozen weights of a network before anything is added to it, so that they can be verified later.

    Args:
        network: its parameters stop requiring gradients.

    Attributes:
        digest: SHA-256 over the names, shapes and bytes of all parameters and buffers.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._tensors = dict(chain(network.named_parameters(), network.named_buffers()))
        network.requires_grad_(False)
        self.digest = self._digest()

    def check(self, network: nn.Module) -> None:
        """Verify that every weight is still in ``network``, bit for bit: zeros stay zero, integers stay integers.

        Raises:
            RuntimeError: a weight was replaced or changed, which no recovery may do.
        """
        there = {id(tensor) for tensor in chain(network.parameters(), network.buffers())}
        gone = [name for name, tensor in self._tensors.items() if id(tensor) not in there and not tensor.is_meta]
        if gone:
            raise RuntimeError(f"recovery took {gone[0]} and {len(gone) - 1} more weights from the compressed model")
        if self._digest() != self.digest:
            raise RuntimeError("recovery changed weights of the compressed model, which must stay unchanged")

    def _digest(self) -> str:
        sha = hashlib.sha256()
        for name, tensor in self._tensors.items():
            sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
            for part in at_hand(self._network, name, tensor).detach().reshape(-1).view(torch.uint8).split(_CHUNK):
                sha.update(part.cpu().numpy())
        return sha.hexdigest()


@dataclass(frozen=True)
class Adapter:
    """Trained parameters, kept separate from the model that they belong to.

    Attributes:
        tensors: by name.
        report: the report of their training.
        file: where they are stored.
        found: whether an earlier run trained them.
    """

    tensors: dict[str, Tensor]
    report: TrainingReport
    file: Path
    found: bool


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The settings for training the adapters of a run.

    Attributes:
        training: budget and optimizer.
        epochs: maximum number of passes over the corpus that the budget may take.
        report_to: called with the training loss during training.
    """

    training: TrainingSettings
    epochs: int = 16
    report_to: LogCallback | None = field(default=None, compare=False)

    def adapter(
        self,
        model: Model,
        base: FrozenBase,
        corpus: Corpus,
        kind: Mapping[str, Any],
        *,
        trainable: Callable[[], nn.Module],
        reserved: int = 0,
    ) -> Adapter:
        """Train the parameters that ``trainable`` adds, or use those that an earlier run trained in the same way.

        Args:
            model: the model that they are added to.
            base: its frozen weights.
            corpus: the training text.
            kind: what is trained, JSON-ready, e.g. ``{"adapter": "lora", "rank": 2}``; together with the base, the text
                and the settings it identifies the adapter.
            trainable: returns the network to train, in which only the new parameters require gradients; they are
                initialised from the seed.
            reserved: number of positions that a prompt occupies in every window.

        Raises:
            BadInput: too little text, windows that are too long, layers without gradients, or a loss that is not
                finite.
        """
        check_gradients(model)
        windows = self._windows(model, corpus, reserved)
        deciding = {"format": FORMAT, "base": base.digest, "text": digest(windows), "training": self.training.to_json()}
        if model.dtype != torch.float32:  # earlier, some were trained in the network's own type
            deciding["parameters"] = "float32"
        identity = json.dumps(deciding | dict(kind), sort_keys=True)
        key = hashlib.sha256(identity.encode()).hexdigest()[:16]
        label = " ".join(str(value) for value in kind.values())
        found = True

        def make(folder: Path) -> None:
            nonlocal found
            found = False
            with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(self.training.seed)
                network = trainable()
            checkpoint = cache_folder() / "adapters" / f".{key}.checkpoint"
            report = train(
                network,
                windows,
                objective_for(model),
                self.training,
                checkpoint=checkpoint,
                report_to=self.report_to,
                label=label,
            )
            from safetensors.torch import save_file

            tensors = {n: p.detach().cpu().contiguous() for n, p in network.named_parameters() if p.requires_grad}
            about = {"base": base.digest, "kind": json.dumps(dict(kind)), "report": json.dumps(asdict(report))}
            save_file(tensors, folder / "adapter.safetensors", about | {"content": _content(tensors)})
            checkpoint.unlink(missing_ok=True)

        file = cached_folder(f"adapters/{key}", make) / "adapter.safetensors"
        if found:
            log.info("%s: trained by an earlier run (%s)", label, file)
        return read_adapter(file, base, kind, found=found)

    def _windows(self, model: Model, corpus: Corpus, reserved: int) -> LongTensor:
        length, limit = corpus.length, model.max_positions
        if limit is not None and reserved + length > limit:
            beside = f" after a prompt of {reserved}" if reserved else ""
            raise BadInput(
                f"windows of corpus.length={length} tokens{beside} do not fit the {limit} positions of {model.name}; "
                f"choose corpus.length={max(limit - reserved, 0)} or less"
            )
        tokens = corpus.token_stream(model)
        windows = tokens[: len(tokens) // length * length].view(-1, length)
        settings = self.training
        budget = settings.steps_over(length) * settings.batch_size * settings.accumulate * length
        if windows.numel() * self.epochs < budget:
            raise BadInput(
                f"corpus={corpus.name} has {windows.numel():,} tokens in windows of {length}, too few for a budget of "
                f"{budget:,} in at most {self.epochs} passes; give more text, a smaller recovery.training.tokens or at "
                f"least recovery.epochs={math.ceil(budget / max(windows.numel(), 1))}"
            )
        return windows  # type: ignore[return-value]


def read_adapter(file: Path, base: FrozenBase, kind: Mapping[str, Any], *, found: bool = True) -> Adapter:
    """Read an adapter that was trained for this base.

    Args:
        file: a file written by :meth:`Tuning.adapter`.
        base: the weights of the model that it is added to.
        kind: the expected kind.
        found: whether an earlier run trained it.

    Raises:
        BadInput: the file cannot be read, is of another kind, or was trained for another base model.
    """
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"the adapter {file} cannot be read ({str(error).splitlines()[0]})") from None
    if not {"base", "kind", "report", "content"} <= about.keys():
        raise BadInput(f"{file} is not an adapter of this project; give an adapter.safetensors that a run has written")
    if about["content"] != _content(tensors):
        raise BadInput(f"the adapter {file} has changed since it was written; leave recovery.adapter out to train one")
    if about["base"] != base.digest:
        raise BadInput(
            f"the adapter {file} was trained for another base model (weights {about['base'][:12]}, here "
            f"{base.digest[:12]}); leave recovery.adapter out to train one for this model"
        )
    if json.loads(about["kind"]) != dict(kind):
        raise BadInput(f"the adapter {file} is {about['kind']}, but {json.dumps(dict(kind))} was asked for")
    return Adapter(tensors, TrainingReport(**json.loads(about["report"])), file, found)


def _content(tensors: Mapping[str, Tensor]) -> str:
    """Digest of tensors with their names, dtypes and shapes, with which an adapter file is verified."""
    digest = xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        raw: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(raw)
    return digest.hexdigest()


def check_gradients(model: Model) -> None:
    """Refuse networks with a linear layer that passes no gradient back, such as other libraries' integer kernels.

    Raises:
        BadInput: there is such a layer; the message names it and an alternative with gradients.
    """
    without: list[str] = []
    network = model.network

    def watch(path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not inputs or not inputs[0].requires_grad:
                return
            first = output[0] if isinstance(output, tuple) else output  # Llama 4's router returns scores and logits
            passed = first.requires_grad and torch.autograd.grad(
                first.sum(), inputs[0], retain_graph=True, allow_unused=True
            )
            if not passed or passed[0] is None:
                without.append(path)

        return hook

    hooks = [
        module.register_forward_hook(watch(path))
        for path, module in network.named_modules()
        if is_linear(module) or hasattr(module, "in_features")
    ]
    hooks.append(network.get_input_embeddings().register_forward_hook(lambda _, __, out: out.detach().requires_grad_()))
    ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    decoder = {"decoder_input_ids": ids} if model.family == ENCODER_DECODER else {}
    try:
        with torch.enable_grad():
            network(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder)
    finally:
        for handle in hooks:
            handle.remove()
    if without:
        raise BadInput(
            f"{len(without)} layers of {model.name} run on kernels without gradients ({without[0]}, ...), so "
            "nothing can be trained through them; compression=int8_dynamic rounds in the same way and has gradients"
        )
