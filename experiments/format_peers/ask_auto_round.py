"""What auto-round's layers decode in transformers: their answers to unit vectors, and logits in float32."""

from importlib.metadata import version

import torch
from ask import answer, keep_weights
from transformers import AutoModelForCausalLM


def logits(place, ids):
    """As transformers computes them with auto-round."""
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, device_map="cpu").eval()
    with torch.no_grad():
        packed = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
        weights = {f"{name}.weight": layer(torch.eye(layer.infeatures)).T for name, layer in packed.items()}
        keep_weights("auto_round", place, weights)
        return model(torch.from_numpy(ids)).logits.float().numpy()


answer("auto_round", logits, lambda place: ", ".join(f"{n} {version(n)}" for n in ("auto-round", "transformers")))
