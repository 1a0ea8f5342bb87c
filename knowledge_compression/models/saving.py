"""Saving a model so that plain ``from_pretrained`` restores the same logits."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.recognised import CONFIGURATION
from knowledge_compression.models.failures import quiet
from knowledge_compression.models.model import Model
from knowledge_compression.models.replaced import ReplacedExperts, ReplacedLinear

log = logging.getLogger(__name__)

SHARD_SIZE = "2GB"


def save_checkpoint(model: Model, folder: Path) -> None:
    """Save network, configuration and tokenizer as safetensors, under a temporary name until complete.

    Pruned and rounded weights are stored as floats, in the network's own dtype.

    Args:
        model: any family, with a tied or untied head.
        folder: the folder to write; replaced if it exists.

    Raises:
        BadInput: a weight is not finite; nothing is written.
    """
    if ours := sum(isinstance(part, ReplacedLinear) for part in model.network.modules()):
        log.warning(
            "saving float weights for %d layers of rounded numbers; the saved model does not round its activations",
            ours,
        )
    write_checkpoint(model, folder, full_state(model.network))


def write_checkpoint(
    model: Model,
    folder: Path,
    state: dict[str, Tensor],
    settings: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a model folder under a temporary name, then rename it.

    Args:
        model: the model whose configuration and tokenizer are written.
        folder: the folder to write; replaced if it exists.
        state: the tensors by name.
        settings: entries of ``config.json`` to add or replace.
        files: further text files by name.

    Raises:
        BadInput: a tensor is not finite; nothing is written.
    """
    check_finite(state)
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with quiet():
        model.network.save_pretrained(scratch, state_dict=state, max_shard_size=SHARD_SIZE)
    model.tokenizer.save_pretrained(scratch)
    complete_settings(model.network, scratch)
    if settings:
        _write_settings(scratch, json.loads((scratch / CONFIGURATION).read_text()) | dict(settings))
    for name, text in (files or {}).items():
        (scratch / name).write_text(text)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def complete_settings(network: nn.Module, folder: Path) -> None:
    """Complete the settings that transformers has saved in a folder."""
    written = json.loads((folder / CONFIGURATION).read_text())
    _write_settings(folder, written | _scaling(network) | _rotation(network, folder, written))


def _scaling(network: nn.Module) -> dict[str, Any]:
    """T5 scales the decoder's states by ``tie_word_embeddings``, but ties the head according to the weights."""
    scaled = getattr(network.config, "scale_decoder_outputs", None)
    return {} if scaled is None else {"tie_word_embeddings": scaled}


def _rotation(network: nn.Module, folder: Path, written: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary embeddings in the keys that transformers 4 reads: without them it takes its defaults and says nothing.

    Empty where transformers 5 would read other settings beside these keys (a scaled GPT-NeoX), and where it has some
    for each kind of attention, for which version 4 had no common keys.
    """
    told = written.get("rope_parameters")
    if not isinstance(told, Mapping) or "rope_theta" not in told:
        return {}
    apart = ("rope_theta", "partial_rotary_factor")
    older = {key: told[key] for key in apart if key in told}
    if told.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in told.items() if key not in apart}
    kind: type[PreTrainedConfig] = type(network.config)  # type: ignore[assignment]

    def read(more: Mapping[str, Any]) -> Any:  # from the file, which spells infinities in a way of its own
        _write_settings(folder, {**written, **more})
        with quiet():
            return kind.from_pretrained(folder).to_dict().get("rope_parameters")

    return older if read({}) == read(older) else {}


def _write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    (folder / CONFIGURATION).write_text(json.dumps(settings, indent=2) + "\n")


def full_state(network: PreTrainedModel) -> dict[str, Tensor]:
    """Every weight by name, as in a plain checkpoint.

    If the head is untied, no two entries share memory, so that saving leaves none of them out: transformers ties an
    untied head's bias, or an encoder's and a decoder's embeddings, only if it also ties the head.
    """
    state = _with_float_weights(network)
    if not _ties_head(network):
        seen: set[int] = set()
        for name, tensor in state.items():
            if tensor.data_ptr() in seen:
                state[name] = tensor.clone()
            seen.add(tensor.data_ptr())
    return state


def _with_float_weights(network: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict, with float weights in place of the tensors of int8 modules."""
    state: dict[str, Tensor] = dict(network.state_dict())
    modules = network.named_modules(remove_duplicate=False)  # one may be in several blocks
    ours = {path: module for path, module in modules if isinstance(module, ReplacedLinear)}
    banks = {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, ReplacedExperts) and all(isinstance(e, nn.Linear | ReplacedLinear) for e in module)
    }
    if not ours and not banks:
        return state
    of_banks = {f"{path}.{number}" for path, bank in banks.items() for number in range(len(bank))}
    with torch.device("meta"):
        plain = type(network)(network.config)
    for path, module in ours.items():
        for name in module.state_dict():
            if name != "bias":
                del state[f"{path}.{name}"]
        if path not in of_banks:
            weight: Tensor = module.weight
            state[f"{path}.weight"] = weight.T.contiguous() if isinstance(plain.get_submodule(path), Conv1D) else weight
    for path, bank in banks.items():
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{path}.")}
        state[path] = bank.weight
    return state


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse a state that contains NaN or infinity."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(_wide(tensor)).all()):
            raise BadInput(f"{name} holds values that are not finite, so the model is not saved; use dtype=float32")


def _wide(tensor: Tensor) -> Tensor:
    """A tensor of 8-bit floats in a type for which there are more functions."""
    return tensor.float() if tensor.element_size() == 1 else tensor


def _ties_head(network: nn.Module) -> bool:
    head = network.get_output_embeddings()  # type: ignore[operator]
    embeddings = (module for module in network.modules() if isinstance(module, nn.Embedding))
    return head is not None and any(head.weight is module.weight for module in embeddings)
