"""What hqq decodes: the weights of its own layers, and logits in float32."""

from importlib.metadata import version

import torch
from ask import answer, keep_weights
from hqq.core.quantize import HQQLinear
from transformers import AutoModelForCausalLM


def logits(place, ids):
    """As hqq's layers compute them."""
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, HQQLinear):
            decoded = torch.nn.Linear(*module.meta["shape"][::-1], bias=module.bias is not None)
            decoded.weight.data = module.dequantize()
            if module.bias is not None:
                decoded.bias.data = module.bias
            model.set_submodule(name, decoded)
    keep_weights("hqq", place, model.state_dict())
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


answer("hqq", logits, lambda place: f"hqq {version('hqq')}, transformers {version('transformers')}")
