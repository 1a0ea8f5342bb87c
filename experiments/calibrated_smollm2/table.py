"""Calibrated compression of smollm2 beside the published algorithms, row by row.

    python experiments/calibrated_smollm2/table.py DIR                    # every row that results/ lacks
    python experiments/calibrated_smollm2/table.py DIR --rows gptq3 rtn3  # these only
    python experiments/calibrated_smollm2/table.py DIR --rows             # none; print the table of what is there
    python experiments/calibrated_smollm2/table.py DIR --screen           # eight blocks, less text

DIR holds local data (docs/data.md). Calibration: 32 windows of 512 tokens of C4, seed 0 (or 1, 2 where a row says so);
perplexity: WikiText-2 raw test in windows of 512, 74 evenly spaced. ``run.py target=all corpus=c4 corpus.samples=32
corpus.length=512 eval=[perplexity] eval.perplexity.window=512 eval.perplexity.limit=74 data_dir=DIR compression=gptq
compression.bits=3`` is one row of it. The column *reference* is what reference.py beside this file has measured: the
published algorithms, written out plainly, on the same windows.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import knowledge_compression as kc
from knowledge_compression.analysis import markdown
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.none import NoCompression
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.methods.sparsegpt import SparseGpt
from knowledge_compression.compression.methods.wanda import Wanda
from knowledge_compression.corpora.c4 import C4
from knowledge_compression.evaluation.perplexity import Perplexity
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.models import Model, Target, Targets
from knowledge_compression.statistics import Estimate, mean, mean_difference

CODE = Path(__file__).parents[2] / "knowledge_compression"
REFERENCE = Path(__file__).parent / "reference"
SMOLLM2 = kc.choose("model=smollm2")
EXACT: dict[str, Any] = {"forward_dtype": "float32"}  # forward passes on which the rows do not depend on the machine
NARROW: dict[str, Any] = {"forward_dtype": "bfloat16"}
PUBLISHED: dict[str, Any] = EXACT | {"true_sequential": False}  # the published scripts' walk
GPTQ: dict[str, Any] = PUBLISHED | {"clip": "minmax", "desc_act": False, "scale_bits": 32}
GPTQ_16 = GPTQ | {"scale_bits": 16}


@dataclass(frozen=True)
class Row:
    """One line of the table: what is done, and the row of reference.py to compare it with."""

    label: str
    method: Any
    reference: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Scale:
    """How much is done: which blocks, on how many windows of text, read on how many; and where the results lie."""

    folder: str
    blocks: tuple[int, ...] = tuple(range(30))
    samples: int = 32
    limit: int = 74


WHOLE = Scale("results")
SCREEN = Scale("screened", blocks=(0, 1, 2, 3, 14, 15, 28, 29), samples=8, limit=18)

ROWS = {
    "dense": Row("dense", NoCompression(), "dense"),
    "rtn4": Row("RTN 4 bits", Rtn(4), "rtn4"),
    "gptq4": Row("GPTQ 4 bits", Gptq(4, **EXACT), "gptq4"),
    "gptq4_published": Row("GPTQ 4 bits, as published", Gptq(4, **GPTQ), "gptq4"),
    "rtn4_mse": Row("RTN 4 bits, clip=mse", Rtn(4, clip="mse")),
    "gptq4_published_16": Row("GPTQ 4 bits, published + scale_bits=16", Gptq(4, **GPTQ_16), "gptq4"),
    "gptq4_mse": Row("GPTQ 4 bits, published + scale_bits=16 clip=mse", Gptq(4, **(GPTQ_16 | {"clip": "mse"}))),
    "gptq4_act": Row("GPTQ 4 bits, published + scale_bits=16 desc_act", Gptq(4, **(GPTQ_16 | {"desc_act": True}))),
    "gptq4_sequential": Row(
        "GPTQ 4 bits, published + scale_bits=16 true_sequential", Gptq(4, **(GPTQ_16 | {"true_sequential": True}))
    ),
    "gptq4_bfloat16": Row("GPTQ 4 bits, bfloat16 forward passes", Gptq(4, **NARROW)),
    "rtn4_g128": Row("RTN 4 bits, groups of 128", Rtn(4, 128), "rtn4_g128"),
    "gptq4_g128": Row("GPTQ 4 bits, groups of 128", Gptq(4, 128, **EXACT)),
    "rtn4_g64": Row("RTN 4 bits, groups of 64", Rtn(4, 64), "rtn4_g64"),
    "gptq4_g64": Row("GPTQ 4 bits, groups of 64", Gptq(4, 64, **EXACT), "gptq4_g64"),
    "rtn4_g32": Row("RTN 4 bits, groups of 32", Rtn(4, 32), "rtn4_g32"),
    "gptq4_g32": Row("GPTQ 4 bits, groups of 32", Gptq(4, 32, **EXACT)),
    "rtn3": Row("RTN 3 bits", Rtn(3), "rtn3"),
    "gptq3": Row("GPTQ 3 bits", Gptq(3, **EXACT), "gptq3"),
    "gptq3_published": Row("GPTQ 3 bits, as published", Gptq(3, **GPTQ), "gptq3"),
    "gptq3_seed1": Row("GPTQ 3 bits, seed 1", Gptq(3, **EXACT), "gptq3_seed1", seed=1),
    "gptq3_seed2": Row("GPTQ 3 bits, seed 2", Gptq(3, **EXACT), "gptq3_seed2", seed=2),
    "gptq3_bfloat16": Row("GPTQ 3 bits, bfloat16 forward passes", Gptq(3, **NARROW)),
    "gptq3_bfloat16_seed1": Row("GPTQ 3 bits, bfloat16 forward passes, seed 1", Gptq(3, **NARROW), seed=1),
    "gptq3_bfloat16_seed2": Row("GPTQ 3 bits, bfloat16 forward passes, seed 2", Gptq(3, **NARROW), seed=2),
    "gptq3_act": Row(
        "GPTQ 3 bits, published + scale_bits=16 desc_act", Gptq(3, **(GPTQ_16 | {"desc_act": True})), "gptq3_act"
    ),
    "rtn3_g128": Row("RTN 3 bits, groups of 128", Rtn(3, 128), "rtn3_g128"),
    "gptq3_g128": Row("GPTQ 3 bits, groups of 128", Gptq(3, 128, **EXACT)),
    "rtn3_g64": Row("RTN 3 bits, groups of 64", Rtn(3, 64), "rtn3_g64"),
    "gptq3_g64": Row("GPTQ 3 bits, groups of 64", Gptq(3, 64, **EXACT), "gptq3_g64"),
    "sparsegpt": Row("SparseGPT 50 %", SparseGpt(0.5, **EXACT), "sparsegpt"),
    "sparsegpt_bfloat16": Row("SparseGPT 50 %, bfloat16 forward passes", SparseGpt(0.5, **NARROW)),
    "sparsegpt_seed1": Row("SparseGPT 50 %, seed 1", SparseGpt(0.5, **EXACT), "sparsegpt_seed1", seed=1),
    "sparsegpt_seed2": Row("SparseGPT 50 %, seed 2", SparseGpt(0.5, **EXACT), "sparsegpt_seed2", seed=2),
    "sparsegpt_swept": Row("SparseGPT 50 %, refit=0", SparseGpt(0.5, refit=0, **EXACT), "sparsegpt"),
    "sparsegpt_2_4": Row("SparseGPT 2:4", SparseGpt(0.5, pattern="2:4", **EXACT), "sparsegpt_2_4"),
    "sparsegpt_2_4_swept": Row(
        "SparseGPT 2:4, refit=0", SparseGpt(0.5, pattern="2:4", refit=0, **EXACT), "sparsegpt_2_4"
    ),
    "wanda": Row("Wanda 50 %", Wanda(0.5, **EXACT), "wanda"),
    "wanda_2_4": Row("Wanda 2:4", Wanda(0.5, pattern="2:4", **EXACT), "wanda_2_4"),
    "magnitude_layer": Row("magnitude 50 %, per layer", Magnitude(0.5, scope="layer"), "magnitude_layer"),
    "magnitude": Row("magnitude 50 %, global", Magnitude(0.5), "magnitude"),
}


def measure(row: Row, model: Model, data_dir: str, scale: Scale) -> dict[str, Any]:
    """Compress the model in place and read the test text."""
    windows = C4(samples=scale.samples, length=512, seed=row.seed, data_dir=data_dir).windows(model)
    blocks = tuple(f"model.layers.{block}." for block in scale.blocks)
    layers = [
        layer for layer in Target("all", ["decoder_self_att", "ff"]).select(model) if layer.path.startswith(blocks)
    ]
    report = row.method.compress(model, Targets(layers, model, "module"), windows)
    items = Perplexity(window=512, limit=scale.limit, data_dir=data_dir).evaluate(Scorer(model)).items
    return {
        "nll": items["nll"].to_list(),
        "seconds": report.seconds,
        "method": repr(row.method),
        "commit": commit(),
    }


def commit() -> str:
    """The last commit that changed the package, with which a row was measured; ``+`` where some of it is in none."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=CODE, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    return git("log", "-1", "--format=%h", "--", ".") + "+" * bool(git("status", "--porcelain", "--", "."))


def table(scale: Scale) -> str:
    """What has been measured so far, as Markdown: intervals over windows, paired between two rows."""
    found = {name: json.loads(path.read_text()) for name in ROWS if (path := result_of(name, scale)).is_file()}
    dense = np.array(found["dense"]["nll"])
    heads = ["", "reference", "ours", "ours / reference", "ours / dense", "nats above dense", "commit"]
    rows = []
    for name, result in found.items():
        row, losses = ROWS[name], np.array(result["nll"])
        published, against = "", ""
        if scale is WHOLE and row.reference and (path := REFERENCE / f"{row.reference}.json").is_file():
            theirs = np.array(json.loads(path.read_text())["nll"])
            published = f"{mean(theirs, np.exp).value:.2f}"
            against = told(mean_difference(losses - theirs).through(math.exp), 3)
        rise = mean_difference(losses - dense)
        beside = [told(rise.through(math.exp), 3), told(rise, 3)] if name != "dense" else ["", ""]
        rows.append([row.label, published, told(mean(losses, np.exp), 2), against, *beside, result.get("commit", "")])
    return "\n".join(markdown.table(heads, rows))


def result_of(name: str, scale: Scale) -> Path:
    return Path(__file__).parent / scale.folder / f"{name}.json"


def told(figure: Estimate, digits: int) -> str:
    return f"{figure.value:.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--screen", action="store_true", help="eight of the 30 blocks, on less text")
    arguments = parser.parse_args()
    scale = SCREEN if arguments.screen else WHOLE
    for name in arguments.rows:
        path = result_of(name, scale)
        path.parent.mkdir(exist_ok=True)
        if not path.is_file():
            path.write_text(json.dumps(measure(ROWS[name], SMOLLM2.load("cpu"), arguments.data_dir, scale)) + "\n")
    sys.stdout.write(table(scale) + "\n")


if __name__ == "__main__":
    main()
