"""auto-round on a CPU, in an environment of its own: called by peers.py with a folder of what is asked.

The folder holds `dense/` (the model in float32), `windows.npy` (token ids) and `asked.json` (bits, group_size, steps,
batch in windows, the blocks to quantize); written are `weights.safetensors`, the decoded weights of the quantized
layers in float32, and `told.json` (processor and wall-clock seconds of quantizing, versions).
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(place: Path) -> None:
    """Quantize and decode."""
    asked = json.loads((place / "asked.json").read_text())
    dense = place / "dense"
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    windows = torch.from_numpy(np.load(place / "windows.npy"))
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    inside = {name for name in linears if name.startswith(tuple(asked["blocks"]))}
    left = {name: {"bits": 16, "data_type": "float"} for name in linears - inside if name != "lm_head"}
    batches = [{"input_ids": window[None], "attention_mask": torch.ones_like(window[None])} for window in windows]
    clocks = time.process_time(), time.perf_counter()
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(dense),
        bits=asked["bits"],
        group_size=asked["group_size"],
        sym=False,
        iters=asked["steps"],
        batch_size=asked["batch"],
        nsamples=len(windows),
        seqlen=windows.shape[1],
        dataset=batches,
        layer_config=left,
        amp=False,  # bfloat16 products are slow on a processor without instructions for them
        device_map="cpu",
        enable_torch_compile=False,
    )
    quantized, _ = rounding.quantize()
    seconds = {"processor": time.process_time() - clocks[0], "clock": time.perf_counter() - clocks[1]}
    state = quantized.state_dict()
    save_file(
        {f"{name}.weight": state[f"{name}.weight"].float().contiguous() for name in sorted(inside)},
        place / "weights.safetensors",
    )
    versions = {name: version(name) for name in ("auto-round", "torch", "transformers")}
    (place / "told.json").write_text(json.dumps({"seconds": seconds, "versions": versions}))


main(Path(sys.argv[1]))
