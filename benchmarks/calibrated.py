"""GPTQ and SparseGPT, compared with the published algorithms run linear by linear, in one run on one machine.

    python benchmarks/calibrated.py                    six blocks of smollm2, each contestant three times in turn
    python benchmarks/calibrated.py --blocks 30        the whole of it
    OMP_NUM_THREADS=1 python benchmarks/calibrated.py --processor-time    on a machine that others are using
    python benchmarks/calibrated.py --hand-back        peaks without the freed memory that is kept for speed

The reference is written here from the papers' description: float32 forward passes one window at a time, a Hessian for
every linear, each linear by itself with columns in the papers' order, a second forward pass for the outputs. The text
is random token ids, because the time does not depend on it. Prints seconds, ratios round by round and the peak of
resident memory above the loaded model, each in a process of its own; writes them as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import subprocess
import sys
import time
from functools import partial

import torch
from side_by_side import in_turn, ratio, spread, write
from torch import Tensor, nn

import knowledge_compression as kc
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.sparsegpt import SparseGpt
from knowledge_compression.compression.solve.grid import Grid
from knowledge_compression.compression.walk.blocks import compress_blocks
from knowledge_compression.models import Model, Target, Targets

BLOCK, DAMPING = 128, 0.01
M_MMAP_THRESHOLD = -3  # malloc.h
SMOLLM2 = kc.choose("model=smollm2")


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


AS_PUBLISHED = {"true_sequential": False, "forward_dtype": "float32"}
OURS = {
    "gptq": Gptq(bits=4),  # passes in bfloat16 where the device multiplies it faster
    "gptq, float32 passes": Gptq(bits=4, forward_dtype="float32"),
    "gptq, published settings": Gptq(bits=4, clip="minmax", desc_act=False, **AS_PUBLISHED),
    "sparsegpt": SparseGpt(sparsity=0.5),
    "sparsegpt, refit=0": SparseGpt(sparsity=0.5, refit=0),
    "sparsegpt, published settings": SparseGpt(sparsity=0.5, refit=0, **AS_PUBLISHED),
}
REFERENCES = {"gptq": reference_gptq, "sparsegpt": reference_sparsegpt}


def tensors_alive() -> dict[int, int]:
    """Bytes of each storage that a tensor is seen to use."""
    seen = [item.untyped_storage() for item in gc.get_objects() if issubclass(type(item), Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in seen}


def held_by_passes(method: Gptq | SparseGpt, model: Model, targets: Targets, windows: Tensor) -> int:
    """Most bytes of tensors that are there beside the model and a Hessian when linears are about to be compressed."""
    before, held = tensors_alive(), [0]

    class Watched:
        def __getattr__(self, name: str):
            return getattr(method, name)

        def shrink(self, layers, statistics):
            now = tensors_alive() | before | {statistics.matrix.data_ptr(): 0}
            held.append(sum(now.values()) - sum(before.values()))
            return method.shrink(layers, statistics)

    compress_blocks(model, targets, windows, Watched(), method.walk)
    return max(held)


def peak_in_a_process_of_its_own(name: str) -> tuple[int, int]:
    """Peak of a compression above the model, and what its suspended passes hold of it, in bytes."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return int(told[0]), int(told[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6, help="blocks that are compressed (default 6 of 30)")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true", help="count the processor's seconds, not the wall's")
    parser.add_argument("--hand-back", action="store_true", help="peaks where freed memory goes back to the system")
    parser.add_argument("--peak-of", choices=list(OURS), help=argparse.SUPPRESS)
    options = parser.parse_args()

    model = SMOLLM2.load("cpu")
    for parameter in model.network.parameters():  # out of the file's memory map, whose pages come in when first read
        parameter.data = parameter.data.clone()
    targets = in_blocks(model, options.blocks)
    weights = [layer.weight.clone() for layer in targets]
    shape = (options.samples, options.length)
    windows = torch.randint(100, model.network.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    if options.peak_of:
        if options.hand_back:
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17)  # as it is where nobody asks for more
        method = OURS[options.peak_of]
        method.compress(model, in_blocks(model, 1), windows[:3])  # so that the libraries' code and scratch are there
        print(method.compress(model, targets, windows).peak_memory)
        print(held_by_passes(method, model, targets, windows))
        return

    def anew() -> None:
        for layer, weight in zip(targets, weights, strict=True):
            layer.weight.copy_(weight)

    def ours(name: str) -> None:
        anew()
        OURS[name].compress(model, targets, windows)

    def reference(name: str) -> None:
        anew()
        reference_walk(model, windows, options.blocks, REFERENCES[name])

    contestants = {name: partial(ours, name) for name in OURS}
    contestants |= {f"reference {name}": partial(reference, name) for name in REFERENCES}
    clock = time.process_time if options.processor_time else time.perf_counter
    seconds = in_turn(contestants, options.repeats, clock)
    peaks = {name: peak_in_a_process_of_its_own(name) for name in OURS}
    shares = {name: ratio(seconds[name], seconds[f"reference {name.partition(',')[0]}"]) for name in OURS}
    two_blocks = 2 * sum(weight.nbytes for weight in weights) // options.blocks
    for name, times in seconds.items():
        print(f"{name}: {spread(times)['median']:.1f} s", end="\n" if name not in shares else "")
        if name in shares:
            share, (peak, held) = shares[name], peaks[name]
            print(
                f", {share['median']:.2f} ({share['least']:.2f}-{share['most']:.2f}) of the reference's; peak "
                f"{peak / 2**20:.1f} MiB above the model (held by passes {held / 2**20:.1f}, "
                f"with two blocks {(held + two_blocks) / 2**20:.1f})"
            )
    passes = ratio(seconds["gptq"], seconds["gptq, float32 passes"])
    print(
        f"gptq takes {passes['median']:.2f} ({passes['least']:.2f}-{passes['most']:.2f}) of its time by float32 passes"
    )
    result = {"settings": vars(options), "peak_and_held_bytes": peaks, "two_blocks_bytes": two_blocks}
    write("calibrated", result | {"seconds": seconds, "share_of_reference": shares})


if __name__ == "__main__":
    main()
