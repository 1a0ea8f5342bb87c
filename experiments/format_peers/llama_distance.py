"""The distances that `distance=true` reports for text, beside those of llama.cpp's own program.

    python experiments/format_peers/llama_distance.py --source DIR --data DIR --outputs DIR

prunes smollm2, saves it and the dense model as GGUF in float32, and has `llama-perplexity --kl-divergence` compare
the two on the beginning of WikiText-2's test text. That program is compiled from `--source`, llama.cpp as it is in
llama-cpp-python's source (`pip download --no-binary :all: --no-deps llama-cpp-python==0.3.36`, `vendor/llama.cpp`),
which takes half an hour on one core. Ours are the statistics of the same positions, the second half of each window. It
ends with status 1 where they differ by more than llama.cpp's own storage explains: it keeps the dense
log-probabilities in 16 bits. It is not run in CI.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl

from knowledge_compression.results.store import Run, RunStore

ROOT = Path(__file__).parents[2]
WINDOW, CHARACTERS = 512, 30_000
CHOICES = ("model=smollm2", "target=all", "dtype=float32", "distance=true", "eval=[perplexity]")
TOLD = {  # what llama.cpp prints, and how far ours may be from it
    "mean": (r"Mean\s+KLD:\s+([\d.]+)", 5e-4),
    "median": (r"Median\s+KLD:\s+([\d.]+)", 5e-4),
    "99.0 %": (r"99\.0%\s+KLD:\s+([\d.]+)", 5e-4),
    "99.9 %": (r"99\.9%\s+KLD:\s+([\d.]+)", 1e-3),
    "same top, %": (r"Same top p:\s+([\d.]+)", 0.05),
    "RMS of the change of the next token's probability, %": (r"RMS Δp\s*:\s+([\d.]+)", 1e-3),
}


def main() -> int:
    """Compress, ask both, compare."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--source", type=Path, required=True, help="the folder of llama.cpp's source")
    options.add_argument("--data", type=Path, required=True, help="the folder that has wikitext2/test.raw.txt")
    options.add_argument("--outputs", type=Path, required=True, help="a folder for the files that are written")
    asked = options.parse_args()
    text = asked.outputs / "data" / "wikitext2" / "test.raw.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text((asked.data / "wikitext2" / "test.raw.txt").read_text()[:CHARACTERS])
    dense, pruned = (run_of(asked.outputs, choice) for choice in ("compression=none", "compression=magnitude"))
    theirs, windows = by_llama_cpp(asked, dense, pruned, text)
    ours = from_second_halves(pruned, windows)
    print(f"{windows} windows of {WINDOW} tokens")
    print("| | here | llama.cpp | difference |\n|---|---|---|---|")
    for name, value in theirs.items():
        print(f"| {name} | {ours[name]:.6g} | {value:.6g} | {abs(ours[name] - value):.1e} |")
    return int(any(abs(ours[name] - value) > TOLD[name][1] for name, value in theirs.items()))


def run_of(outputs: Path, compression: str) -> Run:
    """The finished run of a compression, whose model is saved as GGUF."""
    store = outputs / "store"
    typed = [*CHOICES, compression, "sparsity=0.3", f"eval.perplexity.window={WINDOW}", f"data_dir={outputs / 'data'}"]
    typed += [f"output.dir={store}", "output.save_model=gguf-f32"]
    subprocess.run([sys.executable, str(ROOT / "run.py"), *typed], check=True)
    choice = compression.partition("=")[2]
    (run,) = (run for run in RunStore(store) if run.config["choices"]["compression"] == choice)
    return run


def by_llama_cpp(asked: argparse.Namespace, dense: Run, pruned: Run, text: Path) -> tuple[dict[str, float], int]:
    """What llama.cpp's program prints, and the number of windows that it read."""
    program = asked.outputs / "build" / "bin" / "llama-perplexity"
    if not program.is_file():
        build = [asked.outputs / "build", "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
        subprocess.run(["cmake", "-S", asked.source, "-B", *build], check=True)
        target = ["--target", "llama-perplexity", "--parallel"]
        subprocess.run(["cmake", "--build", asked.outputs / "build", *target], check=True)
    stored = asked.outputs / "dense.kld"
    common = ["-f", str(text), "-c", str(WINDOW), "-b", str(WINDOW), "--kl-divergence-base", str(stored)]
    common += ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]  # else it keeps and multiplies keys and values in 16 bits

    def asking(run: Run, *further: str) -> str:
        assert run.folder is not None
        command = [str(program), "-m", str(run.folder / "model" / "model.gguf"), *common, *further]
        ended = subprocess.run(command, check=True, text=True, capture_output=True)
        return ended.stdout + ended.stderr

    asking(dense)
    said = asking(pruned, "--kl-divergence")
    windows = int(re.search(r"computing over (\d+) chunks", said)[1])  # type: ignore[index]
    return {name: float(re.search(pattern, said)[1]) for name, (pattern, _) in TOLD.items()}, windows  # type: ignore[index]


def from_second_halves(run: Run, windows: int) -> dict[str, float]:
    """Our statistics over the positions that llama.cpp reads: those from the middle of each window on."""
    items = run.items.filter(pl.col("suite") == "perplexity")
    assert len(items) == windows, f"{len(items)} windows here, {windows} there"
    kl, same, change = (
        np.concatenate([np.asarray(one, dtype=np.float64)[WINDOW // 2 :] for one in items[column]])
        for column in ("kl", "same_top", "gold_change")
    )
    assert len(kl) == windows * (WINDOW // 2 - 1)
    middle, high, higher = np.quantile(kl, (0.5, 0.99, 0.999))
    values = (kl.mean(), middle, high, higher, 100 * same.mean(), 100 * np.sqrt((change**2).mean()))
    return dict(zip(TOLD, map(float, values), strict=True))


if __name__ == "__main__":
    raise SystemExit(main())
