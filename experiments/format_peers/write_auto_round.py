"""auto-round's own files: python write_auto_round.py DENSE OUT SETTINGS ..., in its environment; SETTINGS are JSON."""

import json
import shutil
import sys
from pathlib import Path

from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = (
    "The capital of France is Paris, and the capital of Japan is Tokyo. Water boils at one hundred degrees. In 1969 "
    "two men walked on the moon; the third stayed in orbit. The author of Hamlet was born in Stratford, in England. "
)


def main(dense: str, out: str, settings: str) -> None:
    """Quantize a model with auto-round and save it in the format that it takes by itself."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(dense), AutoTokenizer.from_pretrained(dense)
    text = {"dataset": [TEXT * 4] * 8, "nsamples": 8, "seqlen": 128}
    rounding = AutoRound(model, tokenizer, iters=1, device_map="cpu", **text, **json.loads(settings))
    rounding.quantize_and_save(out, format="auto_round")
    for written in Path(out).glob("*/*"):  # it adds a folder of its own
        shutil.move(written, out)


for start in range(1, len(sys.argv), 3):
    main(*sys.argv[start : start + 3])
