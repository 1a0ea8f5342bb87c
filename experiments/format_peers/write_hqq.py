"""HQQ's files: python write_hqq.py DENSE OUT SETTINGS ..., in its environment; SETTINGS are JSON, of HqqConfig."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, HqqConfig, PreTrainedTokenizerFast


def main(dense: str, out: str, settings: str) -> None:
    """Quantize a model with transformers' HqqConfig and save it."""
    config = HqqConfig(**json.loads(settings))
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(dense).save_pretrained(out)


for start in range(1, len(sys.argv), 3):
    main(*sys.argv[start : start + 3])
