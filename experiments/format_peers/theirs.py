"""Files that GPTQModel itself writes, read by this program; GPTQModel's own answers beside ours.

    PYTHONPATH=tests python experiments/format_peers/theirs.py --environments DIR --outputs DIR

makes its environment where it is missing (see `study.py`), has it quantize the first two blocks of smollm2 in each way,
and compares the probabilities. It ends with status 1 where a difference exceeds its bound. It is not run in CI.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from forms import HALF
from study import HEADINGS, HERE, Question, apart, ask, environment

import knowledge_compression as kc
from knowledge_compression.models.saving import save_checkpoint

PEER, BLOCKS = "gptqmodel", 2
WAYS = {
    "GPTQ, 4 bits": {"bits": 4},
    "GPTQ, 4 bits, act-order": {"bits": 4, "desc_act": True},
    "GPTQ, 3 bits, asymmetric": {"bits": 3, "sym": False, "format": "gptq_v2"},
    "GPTQ, 8 bits": {"bits": 8},
    "AWQ, 4 bits": {"bits": 4, "method": "awq", "format": "gemm", "sym": False},
}


def main() -> int:
    """Have them written, read them, compare."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--environments", type=Path, required=True, help="a folder of one environment a peer")
    options.add_argument("--outputs", type=Path, required=True, help="a folder for the files that are written")
    options.add_argument("--only", default="", help="only ways whose name contains this")
    asked = options.parse_args()
    python = asked.environments / PEER / "bin" / "python"
    environment(asked.environments / PEER, PEER)
    dense = asked.outputs / "dense"
    if not dense.is_dir():
        model = kc.load("smollm2", device="cpu")
        network = model.network
        network.model.layers = network.model.layers[:BLOCKS]
        network.config.num_hidden_layers = BLOCKS
        save_checkpoint(model, dense)
    asking = []
    for name, settings in WAYS.items():
        if asked.only not in name:
            continue
        place = asked.outputs / "".join(letter if letter.isalnum() else "_" for letter in name)
        if not (place / "ours.npy").is_file():
            place.mkdir(parents=True, exist_ok=True)
            writing = [python, HERE / f"write_{PEER}.py", dense, place / "model", json.dumps(settings)]
            subprocess.run(writing, check=True, env=apart())
            ask(place, None)
        asking.append(Question(name, PEER, place, HALF))
    if places := [question.place for question in asking if not (question.place / f"{PEER}.npy").is_file()]:
        subprocess.run([python, HERE / f"ask_{PEER}.py", *places], check=False, env=apart())
    rows = [question.row() for question in asking]
    print("\n".join([*HEADINGS, *(row for row, _ in rows)]))
    return int(not all(good for _, good in rows))


if __name__ == "__main__":
    raise SystemExit(main())
