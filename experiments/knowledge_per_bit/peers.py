"""What other programs make of the same model, text, bits and groups, asked by the same suites.

    python experiments/knowledge_per_bit/peers.py DATA_DIR --environments DIR --outputs DIR --bits 4,3

makes each peer's environment where it is missing (from `requirements-PEER.txt`; not in CI), hands it smollm2 in float32
and the calibration windows of the preset (32 of 512 tokens of C4, seed 0), takes the decoded weights of the layers that
it quantized, saves them as a plain model, and has `run.py` ask that for the facts of the atlas and for WikiText-2 in 74
windows of 512, as the preset asks ours. Prints a row for each. What is there is not made again.

    python experiments/knowledge_per_bit/peers.py DATA_DIR --environments DIR --outputs DIR --bits 3 --blocks 4

quantizes blocks 0-3 alone and asks the windows of `four_blocks.py` (`--windows`), in float32, without facts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import knowledge_compression as kc
from knowledge_compression.corpora.c4 import C4
from knowledge_compression.evaluation.perplexity import Perplexity
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.models import Model
from knowledge_compression.models.saving import save_checkpoint
from knowledge_compression.results.store import RunStore

HERE = Path(__file__).parent
SMOLLM2 = kc.choose("model=smollm2")
GROUP, BLOCKS = 64, 30


def environment(place: Path, peer: str) -> Path:
    """The Python of a peer's environment, which is made where it is missing."""
    if not (place / ".complete").is_file():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        needs = HERE / f"requirements-{peer}.txt"
        subprocess.run([place / "bin" / "pip", "install", "--quiet", "-r", needs], check=True)
        (place / ".complete").touch()
    return place / "bin" / "python"


def quantized(place: Path, python: Path, peer: str, asked: dict[str, object], dense: Path, windows: np.ndarray) -> None:
    """Have the peer quantize, once."""
    if (place / "told.json").is_file():
        return
    place.mkdir(parents=True, exist_ok=True)
    (place / "asked.json").write_text(json.dumps(asked))
    np.save(place / "windows.npy", windows)
    (place / "dense").unlink(missing_ok=True)
    (place / "dense").symlink_to(dense.resolve())
    apart = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, HERE / f"peer_{peer}.py", place], check=True, env=apart)


def decoded(place: Path) -> Model:
    """smollm2 with the weights that the peer made."""
    model = SMOLLM2.load()
    weights = load_file(place / "weights.safetensors")
    unknown = model.network.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        sys.exit(f"error: {place} has weights of layers that smollm2 lacks: {', '.join(unknown)}")
    return model


def losses(model: Model, data_dir: str, windows: int) -> np.ndarray:
    """Of each window of WikiText-2."""
    items = Perplexity(window=512, limit=windows, data_dir=data_dir).evaluate(Scorer(model, dtype=torch.float32)).items
    return items["nll"].to_numpy()


def facts(place: Path, data_dir: str) -> dict[str, float]:
    """What `run.py` finds of the decoded model, saved as a plain one."""
    if not (place / "model").is_dir():
        save_checkpoint(decoded(place), place / "model")
    typed = ["model=local", f"model.path={place / 'model'}", "compression=none", "eval=[atlas,perplexity]"]
    typed += ["eval.perplexity.window=512", "eval.perplexity.limit=74"]
    typed += [f"data_dir={data_dir}", f"output.dir={place / 'store'}"]
    subprocess.run([sys.executable, HERE.parents[1] / "run.py", *typed], check=True)
    (run,) = list(RunStore(place / "store"))
    return run.metrics


def main() -> None:
    """Quantize, decode, ask, tell."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data_dir", help="local data (docs/data.md)")
    options.add_argument("--environments", type=Path, required=True, help="a folder of one environment a peer")
    options.add_argument("--outputs", type=Path, required=True, help="a folder for what is made")
    options.add_argument("--peers", default="auto_round")
    options.add_argument("--bits", default="4,3")
    options.add_argument("--steps", type=int, default=40, help="of tuning, where a peer tunes")
    options.add_argument("--batch", type=int, default=4, help="windows of a step")
    options.add_argument("--blocks", type=int, default=BLOCKS, help="the first so many")
    options.add_argument("--windows", type=int, default=12, help="asked where only some blocks are quantized")
    options.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    chosen = options.parse_args()
    dense = chosen.outputs / "dense"
    model = SMOLLM2.load()
    if not dense.is_dir():
        save_checkpoint(model, dense)
    windows = C4(samples=32, length=512, seed=chosen.seed, data_dir=chosen.data_dir).windows(model).numpy()
    before = losses(model, chosen.data_dir, chosen.windows) if chosen.blocks < BLOCKS else None
    for peer in chosen.peers.split(","):
        python = environment(chosen.environments / peer, peer)
        for bits in map(int, chosen.bits.split(",")):
            asked = {"bits": bits, "group_size": GROUP, "steps": chosen.steps, "batch": chosen.batch}
            name = f"{peer}_{bits}_steps_{chosen.steps}_by_{chosen.batch}_blocks_{chosen.blocks}_seed_{chosen.seed}"
            place = chosen.outputs / name
            blocks = [f"model.layers.{block}." for block in range(chosen.blocks)]
            quantized(place, python, peer, asked | {"blocks": blocks}, dense, windows)
            told = json.loads((place / "told.json").read_text())
            said = f"{peer} {told['versions']}, {asked}: {told['seconds']['processor']:.0f} processor seconds"
            if before is None:
                found = facts(place, chosen.data_dir)
                said += f", perplexity {found['perplexity.perplexity']:.2f}, facts {found['atlas.accuracy']:.3f}"
            else:
                rise = losses(decoded(place), chosen.data_dir, chosen.windows) - before
                error = rise.std(ddof=1) / len(rise) ** 0.5
                said += f", {rise.mean():.4f} ({error:.4f}) nats above dense"
            print(said, flush=True)


if __name__ == "__main__":
    main()
