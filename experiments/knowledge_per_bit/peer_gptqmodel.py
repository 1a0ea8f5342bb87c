"""GPTQModel on a CPU, in an environment of its own: see peer.py.

Its default casts the model to bfloat16. In float32 four blocks took 1.7 times as long, for the same loss.
"""

import os
import re

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # by itself it has one on two processors, and then loads nothing

from gptqmodel import GPTQModel, QuantizeConfig
from peer import ASKED, DENSE, SAVED, left_out, timed, windows

config = QuantizeConfig(bits=ASKED["bits"], group_size=ASKED["group_size"], sym=False, format="gptq_v2")
model = GPTQModel.load(str(DENSE), config, device="cpu")
model.quantize_config.dynamic = {f"-:^{re.escape(name)}$": {} for name in left_out(model.model)}
with timed("gptqmodel", "torch", "transformers"):
    model.quantize([{name: ids[0].tolist() for name, ids in one.items()} for one in windows()], batch_size=1)
model.save(str(SAVED))
