"""hqq on a CPU, in an environment of its own: see peer.py. It needs no text."""

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peer import ASKED, DENSE, SAVED, left_out, timed
from transformers import AutoModelForCausalLM, HqqConfig

model = AutoModelForCausalLM.from_pretrained(DENSE, dtype=torch.float32)
left = set(left_out(model))
chosen = {"nbits": ASKED["bits"], "group_size": ASKED["group_size"], "axis": 1}
linears = [(name, x) for name, x in model.named_modules() if isinstance(x, torch.nn.Linear) and name not in left]
with timed("hqq", "torch", "transformers"):
    for name, linear in linears:
        layer = HQQLinear(linear, BaseQuantizeConfig(**chosen), compute_dtype=torch.float16, device="cpu")
        model.set_submodule(name, layer)
model.config.quantization_config = HqqConfig(**chosen, skip_modules=sorted(left))
model.save_pretrained(SAVED)
