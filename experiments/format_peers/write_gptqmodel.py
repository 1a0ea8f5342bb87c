"""GPTQModel's own files: python write_gptqmodel.py DENSE OUT SETTINGS ..., in its environment; SETTINGS are JSON."""

import json
import sys

from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import FORMAT, METHOD

TEXT = (
    "The capital of France is Paris, and the capital of Japan is Tokyo. Water boils at one hundred degrees. In 1969 "
    "two men walked on the moon; the third stayed in orbit. The author of Hamlet was born in Stratford, in England. "
)


def main(dense: str, out: str, settings: str) -> None:
    """Quantize a model with GPTQModel and save it."""
    chosen = json.loads(settings)
    for name, kind in (("method", METHOD), ("format", FORMAT)):
        if name in chosen:
            chosen[name] = kind(chosen[name])
    model = GPTQModel.load(dense, QuantizeConfig(group_size=64, **chosen), device="cpu")
    model.quantize([TEXT * 4] * 8, batch_size=1)
    model.save(out)


for start in range(1, len(sys.argv), 3):
    main(*sys.argv[start : start + 3])
