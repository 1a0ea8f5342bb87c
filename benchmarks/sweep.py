"""The time of a whole sweep, compared with that of the compression and the scoring in it.

    python benchmarks/sweep.py --data-dir DIR              dense and eight runs of smollm2, atlas and 300 BoolQ items
    python benchmarks/sweep.py --data-dir DIR --limit 20   to see it run

The whole is the wall time of ``python run.py -m ...``, from the start of the interpreter to its end: imports,
composing, loading, making requests, item tables, pictures, W&B's files. The others are the times that the same process
spends in a method's ``compress`` and in the scoring core, which turns token ids into log-probabilities.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from side_by_side import spread, write

ROOT = Path(__file__).resolve().parents[1]
MODEL = "model=smollm2"
SWEEP = ["-m", MODEL, "target=att,ff", "sparsity=0.2,0.4,0.6,0.8", "eval=[atlas,harness]", "eval.harness.tasks=[boolq]"]


class Share:
    """Seconds that pass inside some functions, none of which calls another of them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its seconds counted."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return counted

    def of_each(self, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """The generator, the seconds counted until each of what it yields is there."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Iterator[Any]:
            steps, end = function(*args, **kwargs), object()
            while True:
                with self:
                    step = next(steps, end)
                if step is end:
                    return
                yield step

        return counted


def main() -> None:
    beside = ROOT.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get("KC_DATA_DIR", str(beside)))
    parser.add_argument("--limit", type=int, default=300, help="items of BoolQ")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--inside", metavar="FILE", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.inside:
        inside(Path(options.inside), rest)
        return
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    rounds = [whole_and_parts(options) for _ in range(options.repeats)]
    for one in rounds:
        print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in one.items()))
    shares = spread([one["whole"] / (one["compression"] + one["scoring"]) for one in rounds])
    print(f"whole over compression and scoring {shares['median']:.3f} ({shares['least']:.3f}-{shares['most']:.3f})")
    write("sweep", {"options": vars(options), "rounds": rounds, "whole_over_parts": shares})


def whole_and_parts(options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        parts = Path(folder) / "parts.json"
        kept = os.environ | {"KC_CACHE_DIR": folder}  # so that nothing was compressed or tokenized before
        first = [MODEL, "compression=none", "eval=[atlas]", "limit=1", f"output.dir={folder}/first"]
        subprocess.run([sys.executable, ROOT / "run.py", *first], env=kept, check=True)  # converts the packaged model
        where = [f"output.dir={folder}/outputs", f"data_dir={Path(options.data_dir).resolve()}"]
        asked = [*SWEEP, f"eval.harness.limit={options.limit}", *where]
        start = time.perf_counter()
        subprocess.run([sys.executable, __file__, "--inside", str(parts), *asked], env=kept, check=True)
        return {"whole": time.perf_counter() - start} | json.loads(parts.read_text())


def inside(file: Path, arguments: list[str]) -> None:
    """The command itself, with a clock on its parts."""
    from knowledge_compression.compression.methods.magnitude import Magnitude
    from knowledge_compression.evaluation.scoring.scorer import Scorer
    from knowledge_compression.sweeping.cli import main as command

    compression, scoring = Share(), Share()
    Magnitude.compress = compression.of(Magnitude.compress)  # type: ignore[method-assign]
    Scorer.log_likelihoods = scoring.of(Scorer.log_likelihoods)  # type: ignore[method-assign]
    Scorer.generate = scoring.of(Scorer.generate)  # type: ignore[method-assign]
    Scorer.distributions = scoring.of_each(Scorer.distributions)  # type: ignore[method-assign]
    sys.argv[1:] = arguments
    try:
        command()
    finally:
        file.write_text(json.dumps({"compression": compression.seconds, "scoring": scoring.seconds}))


if __name__ == "__main__":
    main()
