"""AutoAWQ's own files: python write_autoawq.py DENSE OUT SETTINGS ..., in its environment; SETTINGS are JSON."""

import json
import sys

import torch
from awq import AutoAWQForCausalLM
from transformers import PreTrainedTokenizerFast

TEXT = (
    "The capital of France is Paris, and the capital of Japan is Tokyo. Water boils at one hundred degrees. In 1969 "
    "two men walked on the moon; the third stayed in orbit. The author of Hamlet was born in Stratford, in England. "
)


def main(dense: str, out: str, settings: str) -> None:
    """Quantize a model with AutoAWQ and save it."""
    model = AutoAWQForCausalLM.from_pretrained(dense, torch_dtype=torch.float32, device_map="cpu")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(dense)  # older than the class that is named there
    config = {"zero_point": True, "w_bit": 4, "version": "GEMM"} | json.loads(settings)
    model.quantize(tokenizer, quant_config=config, calib_data=[TEXT * 2] * 8, max_calib_seq_len=128)
    model.save_quantized(out)
    tokenizer.save_pretrained(out)


for start in range(1, len(sys.argv), 3):
    main(*sys.argv[start : start + 3])
