"""GPTQModel on a CPU: `python ask_gptqmodel.py MODEL IDS.npy LOGITS.npy`."""

import sys
from importlib.metadata import version

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel

place, ids, logits = sys.argv[1:]
model = GPTQModel.load(place, device="cpu", backend=BACKEND.TORCH, dtype=torch.float32)
with torch.no_grad():
    np.save(logits, model.model(torch.from_numpy(np.load(ids))).logits.float().numpy())
print("versions:", f"gptqmodel {version('gptqmodel')}, torch {version('torch')}")
