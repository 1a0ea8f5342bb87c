"""Folders of tiny networks whose layers are stored in a format of ``stored_layers.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from helpers.networks import build_network
from helpers.stored_layers import Made

Maker = Callable[..., Made]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "tie_word_embeddings": False}
WEIGHTS = "model.safetensors"


def write_folder(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    maker: Maker,
    architecture: str = "llama",
    apart: Mapping[str, Maker | None] | None = None,
    **wide: Any,
) -> dict[str, Made]:
    """Save a network whose block linears are stored in one format, with its settings.

    Args:
        folder: where to.
        tokenizer: its tokenizer.
        maker: of a layer in the format.
        architecture: of ``networks.py``.
        apart: layers stored by another maker, by their paths; None leaves them as floats.
        **wide: sizes of the network, by default :data:`WIDE`.

    Returns:
        The layers in the format, by their paths.
    """
    network = build_network(architecture, **(wide or WIDE))
    network.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    state = load_file(folder / WEIGHTS)
    rng, layers, others = np.random.default_rng(3), {}, apart or {}
    for name in list(state):
        path = name.removesuffix(".weight")
        block = ".layers." in name or ".h." in name
        make = others.get(path, maker)
        if block and name.endswith(".weight") and state[name].dim() == 2 and make is not None:
            shape = tuple(state.pop(name).shape)
            made = make(rng, *(shape[::-1] if architecture == "gpt2" else shape))
            state |= {path + end: tensor.contiguous() for end, tensor in made.tensors.items()}
            if path not in others:
                layers[path] = made
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    describe(folder, quantization_config=next(iter(layers.values())).settings)
    return layers


def describe(folder: Path, **changes: Any) -> None:
    """Change a folder's configuration; None removes an entry."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
