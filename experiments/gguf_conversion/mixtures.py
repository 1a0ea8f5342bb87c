"""Hold the mixtures of types written here beside those of llama.cpp's own ``llama_model_quantize``, tensor by tensor.

Random networks of several architectures are written in float32 and in every mixture; llama-cpp-python, in an
environment of its own (e.g. that of ``experiments/format_peers``), makes the same mixtures of the first.

    PYTHONPATH=tests python experiments/gguf_conversion/mixtures.py --python ENVIRONMENT/bin/python
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFReader, LlamaFileType

QUANTIZE = """
import ctypes, sys, llama_cpp
for number, path in zip(sys.argv[2::2], sys.argv[3::2]):
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = int(number), 1
    sys.exit(1) if llama_cpp.llama_model_quantize(sys.argv[1].encode(), path.encode(), ctypes.byref(settings)) else None
"""
_WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_HEADS = {"head_dim": 64}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, 17 blocks": ("llama", _WIDE | _HEADS | {"num_hidden_layers": 17}),
    "llama, 4 queries a key": (
        "llama", _WIDE | {"num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    ),
    "qwen2, untied": ("qwen2", _WIDE | {"num_hidden_layers": 3, "tie_word_embeddings": False}),
    "mixtral, 8 experts": ("mixtral", _WIDE | _HEADS | {"num_hidden_layers": 9, "num_local_experts": 8}),
    "falcon": ("falcon", {"hidden_size": 256, "num_hidden_layers": 18, "num_attention_heads": 4, "num_kv_heads": 1}),
    "gpt2": ("gpt2", {"n_embd": 256, "n_layer": 9, "n_head": 4}),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; the status is 1 if a type differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="that of an environment with llama-cpp-python")
    chosen = parser.parse_args(arguments)
    from helpers.gguf_tiny import tiny
    from knowledge_compression.compression.formats.gguf import save_gguf
    from knowledge_compression.compression.solve.mixtures import MIXTURES

    logging.disable(logging.WARNING)
    failed = 0
    for name, (architecture, settings) in NETWORKS.items():
        with tempfile.TemporaryDirectory() as place:
            model = tiny(architecture, **settings)
            folder = Path(place)
            save_gguf(model, folder / "f32")
            command = [str(chosen.python), "-c", QUANTIZE, str(folder / "f32" / "model.gguf")]
            for mixture in MIXTURES:
                number = LlamaFileType[f"MOSTLY_{mixture.removesuffix('_mixed').upper()}"]
                command += [str(int(number)), str(folder / f"{mixture}.gguf")]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            for mixture in MIXTURES:
                save_gguf(model, folder / mixture, mixture)
                ours, theirs = types(folder / mixture / "model.gguf"), types(folder / f"{mixture}.gguf")
                apart = [
                    f"{tensor} is {ours.get(tensor)}, {kind}"
                    for tensor, kind in theirs.items()
                    if ours.get(tensor) != kind
                ]
                failed += bool(apart)
                print(f"{name:25s} {mixture:12s} {'; '.join(apart) or f'{len(theirs)} tensors alike'}", flush=True)
    return min(failed, 1)


def types(path: Path) -> dict[str, str]:
    """The type of each tensor of a file."""
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


if __name__ == "__main__":
    sys.exit(main())
