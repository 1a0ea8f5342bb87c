"""The choices made for a device, compared with their alternatives: threads, dtype, torch.compile, pinned memory.

    python benchmarks/device.py                      smollm2's body over 1,024 tokens, on this machine's best device
    python benchmarks/device.py --model bert_tiny

Each line is one choice, with everything else as in a run: how many times faster a pass is than with the alternative.
``torch.compile`` takes the blocks one by one; they are alike, so only one is compiled. The time of that is printed too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from side_by_side import in_turn, ratio, write
from torch import nn

import knowledge_compression as kc
from knowledge_compression.evaluation.scoring.products import linears_for_onednn, multiplied_by_onednn
from knowledge_compression.models import Model
from knowledge_compression.models.families import ENCODER, architecture_of

ROWS, TOKENS = 4, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = kc.load(options.model)
    forward = passes(model)
    cores = torch.get_num_threads()
    choices: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        f"{cores} threads against one": (lambda: on_threads(1, forward), lambda: on_threads(cores, forward)),
        "float32 against bfloat16": (passes(model, torch.bfloat16), passes(model, torch.float32)),
    }
    if linears := linears_for_onednn(model.network):
        choices["float32 by oneDNN against MKL"] = forward, by_onednn(linears, forward)
    compiled, seconds = compiled_passes(model)
    choices["uncompiled against compiled blocks"] = compiled, forward
    if model.device.type == "cuda":
        choices["pageable against pinned ids"] = copies(model.device, pinned=True), copies(model.device, pinned=False)
    results: dict[str, Any] = {"compile_seconds": seconds}
    for name, (other, ours) in choices.items():
        other(), ours()
        rounds = in_turn({"other": other, "ours": ours}, options.repeats)
        found = results[name] = ratio(rounds["other"], rounds["ours"])
        print(f"{name}: {found['median']:.2f}x ({found['least']:.2f}-{found['most']:.2f})", flush=True)
    print(f"compiling took {seconds:.0f} s once")
    write(f"device_{options.model}", results)


def passes(model: Model, dtype: torch.dtype | None = None) -> Callable[[], None]:
    """A forward pass of the network without its head."""
    body: Any = model.network.base_model
    body = deepcopy(body).to(dtype) if dtype not in (None, model.dtype) else body
    ids = torch.randint(model.network.config.vocab_size, (ROWS, TOKENS), device=model.device)
    inputs = {"input_ids": ids} if model.family == ENCODER else {"input_ids": ids, "use_cache": False}

    @torch.inference_mode()
    def forward() -> None:
        body(**inputs)
        if model.device.type != "cpu":
            torch.accelerator.synchronize(model.device)

    return forward


def by_onednn(linears: list[nn.Linear], forward: Callable[[], None]) -> Callable[[], None]:
    """The same with float32 products by the library that scoring takes on this processor."""

    def run() -> None:
        with multiplied_by_onednn(linears):
            forward()

    return run


def compiled_passes(model: Model) -> tuple[Callable[[], None], float]:
    """The same with compiled blocks, and the seconds of its first pass."""
    twin = Model(deepcopy(model.network), model.tokenizer, model.name)
    for path in architecture_of(twin.network).block_paths(twin.network):
        twin.network.get_submodule(path).compile(dynamic=True)
    forward, start = passes(twin), time.perf_counter()
    forward()
    return forward, time.perf_counter() - start


def on_threads(count: int, work: Callable[[], None]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        work()
    finally:
        torch.set_num_threads(before)


def copies(device: torch.device, *, pinned: bool) -> Callable[[], None]:
    """Sending a batch's token ids to the device."""
    tensor = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    tensor = tensor.pin_memory() if pinned else tensor

    def copy() -> None:
        tensor.to(device, non_blocking=pinned)
        torch.cuda.synchronize()

    return copy


if __name__ == "__main__":
    main()
