"""Sparse files that compressed-tensors 0.12.2 itself wrote (`experiments/format_peers/write_sparse.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from knowledge_compression.models.checkpoints.folder import QuantizedFolder

FILES = Path(__file__).parent / "files" / "sparse"


@pytest.mark.parametrize("name", ["sparse-24-bitmask", "sparse-bitmask"])
def test_a_file_of_the_library_reads_as_the_weights_it_was_made_from(name: str) -> None:
    folder = QuantizedFolder.at(FILES / name)
    assert folder is not None
    network, _ = folder.network(AutoModelForCausalLM, folder.configuration(), torch.float32)
    state, dense = network.state_dict(), load_file(FILES / f"{name}-dense.safetensors")
    assert len(folder.layers) == 7 and state.keys() == dense.keys()
    for path, weight in dense.items():
        assert torch.equal(state[path], weight.float()), path
    told = folder.record()
    assert (told.format, told.bits) == ("compressed-tensors", 16)
    assert told.bytes < 0.9 * (FILES / f"{name}-dense.safetensors").stat().st_size
