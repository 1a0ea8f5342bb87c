"""Plain transformers: `python ask_transformers.py MODEL IDS.npy LOGITS.npy`."""

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

place, ids, logits = map(Path, sys.argv[1:])
file = {"gguf_file": "model.gguf"} if (place / "model.gguf").is_file() else {}
model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **file).eval()
with torch.no_grad():
    np.save(logits, model(torch.from_numpy(np.load(ids))).logits.float().numpy())
names = ("transformers", "gguf") if file else ("transformers", "compressed-tensors")
print("versions:", ", ".join(f"{name} {version(name)}" for name in names))
