"""vLLM on a CPU, in float16, which holds the scales of the files; in float32 where it rounds inputs to int8.

It tells the log-probability of every word at each token of the prompt but the first, and at one token more.
"""

import json
import os
from importlib.metadata import version

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else the reason why a file is not read stays in the other process
    "VLLM_NO_USAGE_STATS": "1",
}

import numpy as np
from ask import answer
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def logits(place, ids):
    """As vLLM computes them, up to a constant at each token."""
    try:
        return asked(place, ids)
    finally:
        cleanup_dist_env_and_memory()  # what is left of a file that was not read is in the way of the next


def asked(place, ids):
    """Log-probabilities, float32 ``[texts, tokens, words]``."""
    told = json.loads((place / "config.json").read_text())["quantization_config"]
    model = LLM(
        str(place),
        dtype="float32" if told.get("format") == "int-quantized" else "float16",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=ids.shape[1] + 1,
        max_num_seqs=1,
        max_logprobs=-1,
    )
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=-1, logprobs=-1, flat_logprobs=True, detokenize=False)
    answers = model.generate([{"prompt_token_ids": row} for row in ids.tolist()], wanted)
    return np.stack([all_of(found.prompt_logprobs, found.outputs[0].logprobs) for found in answers])


def all_of(of_prompt, of_next):
    """Log-probabilities ``[tokens, words]``: each list has, token by token, words in any order; the first has none."""
    rows = []
    for found in (of_prompt, of_next):
        for start, end in zip(found.start_indices, found.end_indices, strict=True):
            words, values = found.token_ids[start:end], found.logprobs[start:end]
            rows.append(dict(zip(words, values, strict=True)))
    asked = [row for row in rows if row]
    return np.array([[row[word] for word in range(len(row))] for row in asked], dtype=np.float32)


answer("vllm", logits, lambda place: f"vllm-cpu {version('vllm-cpu')}, torch {version('torch')}")
