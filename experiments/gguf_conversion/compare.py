"""Hold GGUF files written here beside those that llama.cpp's own conversion makes of the same models.

Tiny random networks of every architecture are saved by transformers and converted by llama.cpp; the names, values and
settings of both files are compared. Of the conversion, only the choice of a tokenizer is left out.

    git clone https://github.com/ggml-org/llama.cpp
    PYTHONPATH=tests python experiments/gguf_conversion/compare.py --llama-cpp llama.cpp
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

CONVERT = """
import json, logging, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
import gguf
logging.disable(logging.WARNING)
for folder in map(Path, sys.argv[2:]):
    try:
        hparams = ModelBase.load_hparams(folder, False)
        kind = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
        kind.set_vocab, kind.no_mtp = lambda self: None, True
        given = {}
        if hparams["model_type"] in ("nemotron_h", "mimo_v2_flash"):  # transformers adds keys, by which it chooses
            given["hparams"] = json.loads((folder / "config.json").read_text())
        kind(folder, gguf.LlamaFileType.ALL_F32, folder / "theirs.gguf", **given).write()
    except Exception as error:
        (folder / "refused").write_text(f"{type(error).__name__}: {error}")
"""
# What published configurations say otherwise than those that transformers 5.23 writes; the conversion reads the former.
KINDS = {"linear_attention": "mamba", "full_attention": "attention"}
PATTERN = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}


def as_published(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration in the words of published ones."""
    kind = config["model_type"]
    if kind == "granitemoehybrid":
        config["layer_types"] = [KINDS[one] for one in config["layer_types"]]
    if kind == "gemma4_unified_text":  # which is published as a part of the network that reads images too
        config |= {"architectures": ["Gemma4UnifiedForConditionalGeneration"], "moe_intermediate_size": None}
    if kind == "nemotron_h":
        config["hybrid_override_pattern"] = "".join(PATTERN[one] for one in config.pop("layers_block_type"))
        config["num_hidden_layers"] = len(config["hybrid_override_pattern"])
        if "E" not in config["hybrid_override_pattern"]:
            del config["num_experts_per_tok"], config["n_routed_experts"], config["n_group"], config["topk_group"]
    if kind == "kimi_linear":
        full = [place for place, one in enumerate(config["layer_types"], 1) if one == "full_attention"]
        config["linear_attn_config"] = {"full_attn_layers": full, "head_dim": config["linear_head_dim"]}
        config["linear_attn_config"]["short_conv_kernel_size"] = config["linear_conv_kernel_dim"]
        config["first_k_dense_replace"] = config["mlp_layer_types"].count("dense")
    if kind == "mimo_v2_flash":
        bases = config.pop("rope_parameters")
        config |= {f"swa_{name}": config[name] for name in ("head_dim", "v_head_dim", "num_attention_heads")}
        config["swa_num_key_value_heads"] = 2 * config["num_key_value_heads"]
        config["hybrid_layer_pattern"] = [int(one == "sliding_attention") for one in config["layer_types"]]
        config |= {"topk_method": "noaux_tc", "layernorm_epsilon": config["rms_norm_eps"]}
        config |= {"rope_theta": bases["full_attention"]["rope_theta"], "partial_rotary_factor": 0.334}
        config["swa_rope_theta"] = bases["sliding_attention"]["rope_theta"]
    return config


def rename_as_published(weights: Path) -> None:
    """Give Kimi Linear's layers without experts the names of its authors, where transformers 5.23 saves others."""
    tensors = load_file(weights)
    named = {
        re.sub(r"block_sparse_moe\.(gate|up|down)_proj", r"mlp.\1_proj", name): one for name, one in tensors.items()
    }
    if named.keys() != tensors.keys():
        save_file(named, weights)


# Settings that say nothing of the network, or that llama.cpp finds without being told.
IGNORED = ("general.", "GGUF.", "tokenizer.", "vocab_size")

# Settings of theirs that ours state otherwise on purpose, or lack: the longest text, for which theirs have 2^20 in
# these; parts that a network of attention only does not have; an epsilon that theirs do not read; and the width of a
# head that Kimi Linear's layers do not have.
OTHERWISE = ("granitehybrid.context_length", "nemotron_h.context_length", "nemotron_h_moe.context_length")
OTHERWISE += ("granite.ssm.", "granite.expert_shared_feed_forward_length", "chatglm.attention.layer_norm_rms_epsilon")
OTHERWISE += ("kimi-linear.attention.value_length",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; the status is 1 if a tensor or a setting differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a checkout of llama.cpp")
    parser.add_argument(
        "names", nargs="*", help="architectures as tests/helpers/gguf_tiny.py names them; all by default"
    )
    parser.add_argument(
        "--unusual", action="store_true", help="with no setting that a file holds at its default, as far as possible"
    )
    chosen = parser.parse_args(arguments)
    from helpers.gguf_tiny import WRITTEN, tiny, unusual
    from knowledge_compression.compression.formats.gguf import save_gguf

    logging.disable(logging.WARNING)
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        folders = {}
        for number, name in enumerate(chosen.names or WRITTEN):
            folder = folders[name] = Path(place) / f"{number:02d}"
            model = tiny(name, **(unusual(name) if chosen.unusual else {}))
            model.network.save_pretrained(folder)
            config = folder / "config.json"
            config.write_text(json.dumps(as_published(json.loads(config.read_text()))))
            rename_as_published(folder / "model.safetensors")
            model.tokenizer.save_pretrained(folder)
            save_gguf(model, folder / "ours")
        environment = os.environ | {"TQDM_DISABLE": "1"}
        command = [sys.executable, "-c", CONVERT, str(chosen.llama_cpp), *map(str, folders.values())]
        subprocess.run(command, check=True, env=environment)
        for name, folder in folders.items():
            said = compared(folder)
            failed += said.startswith("differs")
            print(f"{name:30s} {said}")
    return min(failed, 1)


def compared(folder: Path) -> str:
    """What the two files of a folder have in common."""
    if (refused := folder / "refused").exists():
        return f"not converted by llama.cpp ({refused.read_text().splitlines()[0]})"
    ours, theirs = (GGUFReader(path) for path in (folder / "ours" / "model.gguf", folder / "theirs.gguf"))
    mine, other = ({tensor.name: tensor.data for tensor in file.tensors} for file in (ours, theirs))
    wrong = [
        f"tensor {name} is only in {'ours' if name in mine else 'theirs'}"
        for name in sorted(mine.keys() ^ other.keys())
        if name not in mine or mine[name].any()  # zeros in the place of what llama.cpp requires without reading it
    ]
    apart = 0.0
    for name in mine.keys() & other.keys():
        if sizes(mine[name]) != sizes(other[name]):
            wrong.append(f"tensor {name} has {mine[name].shape} in ours and {other[name].shape} in theirs")
        elif not np.array_equal(a := mine[name].ravel(), b := other[name].ravel()):
            here = float(np.abs(a - b).max())
            apart = max(apart, here)
            if here > 1e-6:
                wrong.append(f"tensor {name} differs by {here:.2g}")
    told, said = ({key: field.contents() for key, field in file.fields.items()} for file in (ours, theirs))
    said = {key: value for key, value in said.items() if not any(part in key for part in (*IGNORED, *OTHERWISE))}
    for key, value in said.items():
        if key not in told:
            wrong.append(f"{key}={value} is only in theirs")
        elif not alike(told[key], value):
            wrong.append(f"{key} is {told[key]} in ours and {value} in theirs")
    if wrong:
        return "differs: " + "; ".join(wrong)
    equal = "bit for bit" if apart == 0 else f"to {apart:.1g}"
    return f"{len(mine)} tensors equal {equal}, {len(said)} settings equal"


def sizes(tensor: NDArray[Any]) -> tuple[int, ...]:
    """The shape without the leading ones, which a file does not tell from none."""
    return tuple(tensor.shape[next((place for place, size in enumerate(tensor.shape) if size > 1), tensor.ndim) :])


def alike(one: object, other: object) -> bool:
    """Whether two settings are equal, as far as their types can hold them."""
    if isinstance(one, float | int) and isinstance(other, float | int):
        return bool(np.isclose(one, other, rtol=1e-6))
    if isinstance(other, list) and not isinstance(one, list):  # of every block
        return all(alike(one, part) for part in other)
    return one == other


if __name__ == "__main__":
    sys.exit(main())
