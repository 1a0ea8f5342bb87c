"""What moving AWQ's factors into the layers before costs smollm2, and where: with `fold`, without, and in between.

    python experiments/format_peers/fold.py DATA_DIR --blocks 12 --bits 4

compresses the first blocks, calibrated on 16 x 128 tokens of WikiText-2's validation text, and reads 8 windows of 256
tokens of its test text, with products in bfloat16. In between: nothing is moved, but heads that share values share
their factors for the attention's output, as they must where `v_proj` takes them, or that layer has no factors at all.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import knowledge_compression as kc
from knowledge_compression.compression.calibrated import Solved
from knowledge_compression.compression.methods.awq import Awq, InputSizes

HEADS, SHARING, SIZE = 9, 3, 64  # of smollm2: heads, heads that share values, channels of a head


@dataclass(frozen=True)
class Between(Awq):
    """AWQ without folding, whose factors for the attention's output are those that grouped queries can share, or none.

    Attributes:
        shared: whether there are any.
    """

    shared: bool = True

    def solve(self, weight: torch.Tensor, statistics: InputSizes, heights: Sequence[int]) -> Solved:
        """The factors of `o_proj`, the only layer as wide as the model that reads alone, one for each channel of a
        value.
        """
        solved = super().solve(weight, statistics, heights)
        if len(heights) > 1 or weight.shape[1] != HEADS * SIZE:
            return solved
        channel = torch.arange(HEADS * SIZE)
        entry = channel // SIZE // SHARING * SIZE + channel % SIZE
        factors = self.factors(weight, statistics.matrix, statistics.magnitudes, entry)[entry] if self.shared else 1.0
        return Solved(
            weight=self.grid.nearest(weight * factors) / factors,
            plain=solved.plain,
            bits=solved.bits,
            overhead_bits=solved.overhead_bits,
        )


def main() -> None:
    """Print the losses, their differences with standard errors, and each kind of layer's error on the text seen."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data", type=Path)
    options.add_argument("--blocks", type=int, default=12)
    options.add_argument("--bits", type=int, default=4)
    asked = options.parse_args()
    test, calibration = (asked.data / "wikitext2" / name for name in ("test.raw.txt", "validation.tokens.txt"))
    grid = {"bits": asked.bits, "group_size": 64}
    methods = {
        "not folded": Awq(**grid),
        "not folded, heads share": Between(**grid),
        "not folded, no factors for o_proj": Between(**grid, shared=False),
        "folded": Awq(**grid, fold=True),
    }
    found = {}
    for name, method in methods.items():
        model = kc.load("smollm2")
        ids = torch.tensor(model.tokenizer(test.read_text()[:60000])["input_ids"])[: 8 * 256].view(8, 256)
        seen = torch.tensor(model.tokenizer(calibration.read_text()[:20000])["input_ids"])[: 16 * 128].view(16, 128)
        targets = kc.choose("target=all", blocks=list(range(asked.blocks))).select(model)
        report = method.compress(model, targets, seen)
        errors = defaultdict(list)
        for layer in report.layers:
            errors[layer.path.rpartition(".")[2]].append(layer.error_after)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model.network(ids).logits.float()
        found[name] = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        told = ", ".join(f"{kind} {sum(values) / len(values):.2e}" for kind, values in errors.items())
        print(f"{name}: {float(found[name].mean()):.4f} nats a token; relative errors {told}", flush=True)
        more = found[name] - found["not folded"]
        print(f"  {float(more.mean()):+.4f} (standard error {float(more.std()) / len(more) ** 0.5:.4f})", flush=True)


if __name__ == "__main__":
    main()
