"""auto-round on a CPU, in an environment of its own: see peer.py.

Its default casts the model to bfloat16 (`amp`), which a processor with instructions for it (AMX) multiplies faster.
"""

import shutil

import torch
from auto_round import AutoRound
from peer import ASKED, DENSE, SAVED, left_out, timed, windows
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DENSE, dtype=torch.float32)
text = windows()
with timed("auto-round", "torch", "transformers"):
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(DENSE),
        bits=ASKED["bits"],
        group_size=ASKED["group_size"],
        sym=False,
        iters=ASKED["steps"],
        batch_size=ASKED["batch"],
        nsamples=len(text),
        seqlen=text[0]["input_ids"].shape[1],
        dataset=text,
        layer_config={name: {"bits": 16, "data_type": "float"} for name in left_out(model) if name != "lm_head"},
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounding.quantize_and_save(str(SAVED), format="auto_round")  # by itself, save_quantized fails at asymmetric 4 bits
for written in list(SAVED.glob("*/*")):  # it adds a folder of its own
    shutil.move(written, SAVED)
