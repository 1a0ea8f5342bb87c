"""Global magnitude pruning and ``torch.nn.utils.prune.global_unstructured`` on the same model: seconds and memory.

    python benchmarks/threshold.py --sparsity 0.5 --repeats 3

Each contestant prunes in a process of its own, in turn. Memory is the peak of the resident set above the loaded model
(Linux), so what ``global_unstructured`` keeps (the masks and the original weights, until ``prune.remove``) counts too.
Both must remove the same number of weights and the same sum of magnitudes. Of two equal weights, either may go.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from side_by_side import ratio, spread, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contestant", choices=["ours", "torch"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(prune(options)))
        return
    outcomes: dict[str, list[dict[str, Any]]] = {"ours": [], "torch": []}
    for turn in range(options.repeats):
        for name in list(outcomes)[:: 1 if turn % 2 else -1]:
            command = [sys.executable, __file__, *sys.argv[1:], "--contestant", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            outcomes[name].append(json.loads(done.stdout.splitlines()[-1]))
    ours, theirs = outcomes["ours"], outcomes["torch"]
    assert {o["removed"] for o in ours} == {o["removed"] for o in theirs}, "different numbers of weights went"
    sums = [o["sum_removed"] for o in [*ours, *theirs]]
    assert max(sums) - min(sums) <= 1e-9 * max(sums), "weights of different magnitudes went"

    def column(rows: list[dict[str, Any]], key: str) -> list[float]:
        return [row[key] for row in rows]

    result = {
        "model": "smollm2, all attention and feed-forward weights",
        "weights": ours[0]["weights"],
        "sparsity": options.sparsity,
        "dtype": options.dtype,
        "weight_bytes": ours[0]["weight_bytes"],
        "removed": ours[0]["removed"],
        "seconds": {name: spread(column(rows, "seconds")) for name, rows in outcomes.items()},
        "peak_bytes": {name: spread(column(rows, "peak_bytes")) for name, rows in outcomes.items()},
        "times_faster": ratio(column(theirs, "seconds"), column(ours, "seconds")),
        "times_less_memory": ratio(column(theirs, "peak_bytes"), column(ours, "peak_bytes")),
        "peak_share_of_weights": {
            name: spread([row["peak_bytes"] / row["weight_bytes"] for row in rows]) for name, rows in outcomes.items()
        },
    }
    for key in ("seconds", "peak_bytes", "times_faster", "times_less_memory", "peak_share_of_weights"):
        print(key, json.dumps(result[key]))
    write("threshold", result)


def prune(options: argparse.Namespace) -> dict[str, Any]:
    from torch.nn.utils import prune as torch_prune

    import knowledge_compression as kc
    from knowledge_compression.compression.methods.magnitude import Magnitude
    from knowledge_compression.models import Target

    model = kc.choose("model=smollm2").load("cpu", options.dtype)
    targets = Target("all", ["decoder_self_att", "ff"]).select(model)
    for parameter in model.network.parameters():  # out of the file's memory map, so that writing does not add pages
        parameter.data = parameter.data.clone()
    dense = [layer.weight.clone() for layer in targets]
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = time.perf_counter()
    if options.contestant == "ours":
        Magnitude(options.sparsity).compress(model, targets, None)
    else:
        modules = [(layer.module, "weight") for layer in targets]
        torch_prune.global_unstructured(modules, torch_prune.L1Unstructured, amount=options.sparsity)
        for module, name in modules:
            torch_prune.remove(module, name)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before
    # Weights that were zero before are gone too when they are among the smallest: count by rank, not by looking.
    gone = [(layer.weight == 0) & (was != 0) for layer, was in zip(targets, dense, strict=True)]
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "weights": targets.parameters,
        "weight_bytes": sum(was.numel() * was.element_size() for was in dense),
        "removed": sum(int(mask.sum()) for mask in gone),
        "sum_removed": float(sum(was.abs()[mask].double().sum() for was, mask in zip(dense, gone, strict=True))),
    }


def resident(key: str) -> int:
    """Bytes of this process by ``/proc/self/status``: ``VmRSS`` now, ``VmHWM`` at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {key} in /proc/self/status")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
