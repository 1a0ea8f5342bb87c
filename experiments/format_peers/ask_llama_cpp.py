"""llama.cpp: `python ask_llama_cpp.py MODEL IDS.npy LOGITS.npy`; beside the logits, the token ids of some texts."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from llama_cpp import Llama

place, ids, logits = map(Path, sys.argv[1:])
rows = np.load(ids)
exact = {"type_k": 0, "type_v": 0}  # keys and values in float32
model = Llama(str(place / "model.gguf"), n_ctx=256, n_threads=1, logits_all=True, verbose=False, **exact)
found = []
for row in rows:
    model.reset()
    model.eval(row.tolist())
    found.append(np.array(model.scores[: len(row)]))
np.save(logits, np.stack(found))
texts = place / "texts.json"
if texts.is_file():
    read = [model.tokenize(text.encode(), add_bos=False, special=True) for text in json.loads(texts.read_text())]
    (place / "read.json").write_text(json.dumps(read))
print("versions:", f"llama-cpp-python {version('llama-cpp-python')}")
