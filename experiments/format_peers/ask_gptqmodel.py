"""GPTQModel on a CPU, whose modules multiply in float16."""

from importlib.metadata import version

import torch
from ask import answer
from gptqmodel import BACKEND, GPTQModel


def logits(place, ids):
    """As GPTQModel computes them."""
    model = GPTQModel.load(str(place), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    with torch.no_grad():
        return model.model(torch.from_numpy(ids)).logits.float().numpy()


answer("gptqmodel", logits, lambda place: f"gptqmodel {version('gptqmodel')}, torch {version('torch')}")
