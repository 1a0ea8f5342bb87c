"""What moving AWQ's factors into the layers before costs smollm2: nats a token, with `fold` and without.

    python experiments/format_peers/fold.py DATA_DIR --blocks 12 --bits 4

compresses the first blocks, calibrated on 16 x 128 tokens of WikiText-2's validation text, and reads 8 windows of 256
tokens of its test text, with products in bfloat16.
"""

import argparse
from pathlib import Path

import torch

import knowledge_compression as kc


def main() -> None:
    """Print both, and the difference with its standard error."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data", type=Path)
    options.add_argument("--blocks", type=int, default=12)
    options.add_argument("--bits", type=int, default=4)
    asked = options.parse_args()
    test, calibration = (asked.data / "wikitext2" / name for name in ("test.raw.txt", "validation.tokens.txt"))
    found = {}
    for fold in (True, False):
        model = kc.load("smollm2")
        ids = torch.tensor(model.tokenizer(test.read_text()[:60000])["input_ids"])[: 8 * 256].view(8, 256)
        seen = torch.tensor(model.tokenizer(calibration.read_text()[:20000])["input_ids"])[: 16 * 128].view(16, 128)
        targets = kc.choose("target=all", blocks=list(range(asked.blocks))).select(model)
        kc.choose("compression=awq", group_size=64, bits=asked.bits, fold=fold).compress(model, targets, seen)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model.network(ids).logits.float()
        found[fold] = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        print(f"fold={fold}: {float(found[fold].mean()):.4f} nats a token")
    more = found[True] - found[False]
    print(f"with fold: {float(more.mean()):+.4f} (standard error {float(more.std()) / len(more) ** 0.5:.4f})")


if __name__ == "__main__":
    main()
