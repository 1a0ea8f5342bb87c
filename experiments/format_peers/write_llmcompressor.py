"""llm-compressor's own files: python write_llmcompressor.py DENSE OUT SETTINGS ..., in its environment.

SETTINGS are JSON: a list of modifiers, each a mapping with its class as `is` and its other settings.
"""

import json
import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import gptq, pruning, quantization
from llmcompressor.modifiers.transform import awq, quip, smoothquant, spinquant
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = (
    "The capital of France is Paris, and the capital of Japan is Tokyo. Water boils at one hundred degrees. In 1969 "
    "two men walked on the moon; the third stayed in orbit. The author of Hamlet was born in Stratford, in England. "
)
MODULES = (gptq, pruning, quantization, awq, quip, smoothquant, spinquant)
if (
    not torch.accelerator.is_available()
):  # AWQModifier pins memory for an accelerator without asking whether there is one
    IntermediatesCache.pin_memory = lambda cache, index: None


def modifier(settings: dict):
    """A modifier from its class and settings."""
    name = settings.pop("is")
    (kind,) = {getattr(module, name) for module in MODULES if hasattr(module, name)}
    usual = {"targets": ["Linear"], "ignore": ["lm_head"]}
    return kind(**{key: value for key, value in usual.items() if key in kind.model_fields} | settings)


def main(dense: str, out: str, settings: str) -> None:
    """Compress a model with llm-compressor and save it as its examples do."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(dense), AutoTokenizer.from_pretrained(dense)
    text = tokenizer(TEXT * 4)["input_ids"]
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=[modifier(one) for one in json.loads(settings)],
        dataset=Dataset.from_dict({"input_ids": [text] * 8, "attention_mask": [[1] * len(text)] * 8}),
        num_calibration_samples=8,
        max_seq_length=len(text),
    )
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


for start in range(1, len(sys.argv), 3):
    main(*sys.argv[start : start + 3])
