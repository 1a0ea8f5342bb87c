"""The steps in which vLLM's operator rounds a token's inputs to int8, on a CPU: `DIR/vllm/bin/python vllm_steps.py`."""

import torch
from vllm import _custom_ops

inputs = torch.tensor([[127.5, -127.5, 64.0, 0.0] * 16, [3.0, 1.0, -2.0, 0.5] * 16])
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    rounded = inputs.to(dtype)
    codes, steps, _ = _custom_ops.onednn_scaled_int8_quant(rounded)
    ratio = (rounded.float().abs().amax(1, keepdim=True) / steps).flatten().tolist()
    print(dtype, "largest input over step:", ratio, "its code:", codes[:, 0].tolist())
    assert torch.allclose(torch.tensor(ratio), torch.tensor(127.0))
