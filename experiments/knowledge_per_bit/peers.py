"""What other programs make of the same model, text, bits and groups, asked by the same suites.

    python experiments/knowledge_per_bit/peers.py DATA_DIR --environments DIR --outputs DIR --sparsity 0.5,0.6,2:4

makes each peer's environment where it is missing (from `requirements-PEER.txt`; not in CI), hands it smollm2 in float32
and the calibration windows of the preset (32 of 512 tokens of C4, seed 0), and has it save what it quantized to 4, 3
and 2 bits (`--bits`) in its own format. llm-compressor also prunes to each `--sparsity`, and saves floats. What was not
compressed is put back as it was, in float32. Then `run.py` reads the folder as it reads any compressed file and asks it
as the preset asks our methods; the runs are in `DIR/store`, which `study.py` takes by `--peers DIR`. What is there is
not made again.

    python experiments/knowledge_per_bit/peers.py DATA_DIR --environments DIR --outputs DIR --bits 3 --blocks 4

quantizes blocks 0-3 alone and asks the windows of `first_blocks.py` (`--windows`), in float32, without facts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import knowledge_compression as kc
from knowledge_compression.corpora.c4 import C4
from knowledge_compression.evaluation.perplexity import Perplexity
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.models import Model
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.saving import save_checkpoint

HERE = Path(__file__).parent
SMOLLM2 = kc.choose("model=smollm2")
GROUP, BLOCKS = 64, 30
TUNING = "auto_round"  # the peer for which steps and windows a step are chosen
PRUNING = {"llm_compressor": ("sparsegpt", "wanda")}  # the methods of peers that prune


def environment(place: Path, peer: str) -> Path:
    """The Python of a peer's environment, which is made where it is missing."""
    if not (place / ".complete").is_file():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        needs = HERE / f"requirements-{peer}.txt"
        subprocess.run([place / "bin" / "pip", "install", "--quiet", "-r", needs], check=True)
        (place / ".complete").touch()
    return place / "bin" / "python"


def compressed(place: Path, python: Path, peer: str, asked: dict[str, Any], dense: Path, windows: np.ndarray) -> None:
    """Have the peer compress and save, once."""
    if (place / "told.json").is_file() and (place / "saved" / "tokenizer.json").is_file():
        return
    place.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(place / "saved", ignore_errors=True)
    (place / "asked.json").write_text(json.dumps(asked))
    np.save(place / "windows.npy", windows)
    (place / "dense").unlink(missing_ok=True)
    (place / "dense").symlink_to(dense.resolve())
    apart = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if subprocess.run([python, HERE / f"peer_{peer}.py", place], check=False, env=apart).returncode:
        sys.exit(f"error: {peer} made no model of {place.name}; its messages are above")
    layers = as_it_was_elsewhere(place / "saved", dense, tuple(asked["blocks"]))
    if "method" in asked:
        zeros = {"weights": layers.numel(), "removed": int((layers == 0).sum())}
        (place / "told.json").write_text(json.dumps(json.loads((place / "told.json").read_text()) | zeros))


def as_it_was_elsewhere(saved: Path, dense: Path, blocks: tuple[str, ...]) -> torch.Tensor:
    """Put back what the peer did not compress, which some save in 16 bits, and the tokenizer.

    Returns:
        The floats that it left in the layers of the blocks; none where it left codes under other names.
    """
    (file,) = saved.glob("*.safetensors")
    state, before = load_file(file), load_file(dense / "model.safetensors")
    floats = {name: x for name, x in state.items() if name in before and name.startswith(blocks) and x.ndim == 2}
    kept = {name: floats.get(name, before.get(name, tensor)) for name, tensor in state.items()}
    save_file(kept, file, metadata={"format": "pt"})
    for name in dense.glob("tokenizer*"):
        shutil.copy(name, saved)
    return torch.cat([torch.empty(0), *(tensor.flatten() for tensor in floats.values())])


def losses(model: Model, data_dir: str, windows: int) -> np.ndarray:
    """Of each window of WikiText-2."""
    items = Perplexity(window=512, limit=windows, data_dir=data_dir).evaluate(Scorer(model, dtype=torch.float32)).items
    return items["nll"].to_numpy()


def asked_as_ours(places: Sequence[Path], store: Path, data_dir: str) -> None:
    """Have `run.py` ask the saved folders what the presets ask, in one sweep, which evaluates the dense model once."""
    typed = ["+experiment=knowledge_per_bit/asked", "model=local", "model.dense=smollm2", "compression=none"]
    typed += [f"model.path={','.join(str(place / 'saved') for place in places)}"]
    typed += [f"data_dir={data_dir}", f"output.dir={store}"]
    subprocess.run([sys.executable, HERE.parents[1] / "run.py", "-m", *typed], check=True)


def settings_of(peer: str, chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What a peer is asked to do: a quantization for each number of bits, and a pruning by each method and sparsity."""
    for bits in chosen.bits:
        tuning = {"steps": chosen.steps, "batch": chosen.batch} if peer == TUNING else {}
        yield {"bits": bits, "group_size": GROUP} | tuning
    for method in PRUNING.get(peer, ()):
        for sparsity in chosen.sparsity:
            yield {"method": method} | ({"pattern": sparsity} if ":" in sparsity else {"sparsity": float(sparsity)})


def words(text: str) -> list[str]:
    """What commas divide; none of an empty text."""
    return text.split(",") if text else []


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [int(one) for one in words(text)]


def main() -> None:
    """Compress, save, ask, tell."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data_dir", help="local data (docs/data.md)")
    options.add_argument("--environments", type=Path, required=True, help="a folder of one environment a peer")
    options.add_argument("--outputs", type=Path, required=True, help="a folder for what is made")
    options.add_argument("--peers", default=f"{TUNING},gptqmodel,llm_compressor,hqq")
    options.add_argument("--bits", type=numbers, default="4,3,2", help="of quantization; empty: none")
    options.add_argument("--sparsity", type=words, default="", help="shares or n:m, by the peers that prune")
    options.add_argument("--steps", type=int, default=40, help="of tuning, for auto-round")
    options.add_argument("--batch", type=int, default=4, help="windows of a step, for auto-round")
    options.add_argument("--blocks", type=int, default=BLOCKS, help="the first so many")
    options.add_argument("--windows", type=int, default=12, help="asked where only some blocks are quantized")
    options.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    chosen = options.parse_args()
    peers, known = chosen.peers.split(","), sorted(file.stem.removeprefix("peer_") for file in HERE.glob("peer_*.py"))
    if unknown := set(peers) - set(known):
        options.error(f"--peers: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    dense = chosen.outputs / "dense"
    model = SMOLLM2.load()
    if not dense.is_dir():
        save_checkpoint(model, dense)
    windows = C4(samples=32, length=512, seed=chosen.seed, data_dir=chosen.data_dir).windows(model).numpy()
    before = losses(model, chosen.data_dir, chosen.windows) if chosen.blocks < BLOCKS else None
    places: list[Path] = []
    for peer in peers:
        python = environment(chosen.environments / peer, peer)
        for asked in settings_of(peer, chosen):
            called = [peer, *(f"{key}_{value}" for key, value in asked.items())]
            called += [f"blocks_{chosen.blocks}", f"seed_{chosen.seed}"]
            place = chosen.outputs / "_".join(called).replace(":", "_of_")
            blocks = [f"model.layers.{block}." for block in range(chosen.blocks)]
            compressed(place, python, peer, asked | {"blocks": blocks}, dense, windows)
            told = json.loads((place / "told.json").read_text())
            said = f"{told['peer']}, {asked}: {told['seconds']['processor']:.0f} processor seconds"
            places.append(place)
            if before is not None:
                there = LocalModel("peer", str(place / "saved")).load("cpu", "float32")
                rise = losses(there, chosen.data_dir, chosen.windows) - before
                error = rise.std(ddof=1) / len(rise) ** 0.5
                said += f", {rise.mean():.4f} ({error:.4f}) nats above dense"
            print(said, flush=True)
    if before is None:
        asked_as_ours(places, chosen.outputs / "store", chosen.data_dir)


if __name__ == "__main__":
    main()
