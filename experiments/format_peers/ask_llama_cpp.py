"""llama.cpp, with keys and values in float32; beside the logits, the token ids of some texts."""

import json
from importlib.metadata import version

import numpy as np
from ask import answer
from llama_cpp import Llama


def logits(place, ids):
    """As llama.cpp computes them."""
    exact = {"type_k": 0, "type_v": 0}
    model = Llama(str(place / "model.gguf"), n_ctx=256, n_threads=1, logits_all=True, verbose=False, **exact)
    found = []
    for row in ids:
        model.reset()
        model.eval(row.tolist())
        found.append(np.array(model.scores[: len(row)]))
    texts = json.loads((place.parent / "texts.json").read_text())
    read = [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    (place.parent / "read.json").write_text(json.dumps(read))
    return np.stack(found)


answer("llama_cpp", logits, lambda place: f"llama-cpp-python {version('llama-cpp-python')}")
