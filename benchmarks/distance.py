"""The cost of the distance to the dense model: seconds relative to scoring alone, and memory above the two models.

    python benchmarks/distance.py --data-dir DIR

Each suite is scored with a pruned model, without and with its distance to the dense model, whose states were recorded
before; and with the dense model, without and with recording. Memory is the process's peak in each case, above what it
holds with both models loaded (Linux).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side import in_turn, ratio, write

import knowledge_compression as kc
from knowledge_compression.evaluation.atlas import Atlas
from knowledge_compression.evaluation.distance import Beside
from knowledge_compression.evaluation.perplexity import Perplexity
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.suite import ask
from knowledge_compression.memory import peak_memory


def main() -> None:
    beside_it = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("KC_DATA_DIR", beside_it)))
    parser.add_argument("--windows", type=int, default=4, help="windows of perplexity, of 512 tokens")
    parser.add_argument("--relations", nargs="*", default=["capital_of", "currency"], help="of the atlas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processor", action="store_true", help="count the processor's seconds instead of the wall's")
    options = parser.parse_args()
    source = kc.choose("model=smollm2")
    dense, pruned = source.load("cpu", "float32"), source.load("cpu", "float32")
    kc.compress(pruned, kc.choose("compression=magnitude", sparsity=0.3), kc.choose("target=att"))
    suites: dict[str, Any] = {
        "perplexity": Perplexity(window=512, limit=options.windows, data_dir=str(options.data_dir)),
        "atlas": Atlas(relations=options.relations),
    }
    results = {}
    for name, suite in suites.items():
        run = time.time_ns()  # no states of another time are found

        def beside(is_asked: bool = False) -> Beside:
            return Beside(lambda: dense, "benchmark", is_asked=is_asked)

        beside(True).ask(suite, Scorer(dense), run)
        contestants: dict[str, Callable[[], Any]] = {
            "alone": lambda suite=suite: ask(suite, Scorer(pruned)),
            "with distance": lambda suite=suite, run=run: beside().ask(suite, Scorer(pruned), run),
            "dense alone": lambda suite=suite: ask(suite, Scorer(dense)),
            "dense, recorded": lambda suite=suite: beside(True).ask(suite, Scorer(dense), time.time_ns()),
        }
        peaks = {}
        for one, do in contestants.items():
            with peak_memory(dense.device) as peak:
                do()
            peaks[one] = (peak.bytes or 0) / 1e6
        seconds = in_turn(contestants, options.repeats, time.process_time if options.processor else time.perf_counter)
        ratios = {
            "with distance": ratio(seconds["with distance"], seconds["alone"]),
            "recording": ratio(seconds["dense, recorded"], seconds["dense alone"]),
        }
        results[name] = {"seconds": seconds, "ratios": ratios, "peak_mb": peaks}
        told = ", ".join(f"{k} {v['median']:.2f} ({v['least']:.2f}-{v['most']:.2f})" for k, v in ratios.items())
        print(f"{name}: times the seconds of scoring alone: {told}", flush=True)
        print(
            f"{name}: MB at most above both models: {', '.join(f'{k} {v:.0f}' for k, v in peaks.items())}", flush=True
        )
    write("distance", {"options": {**vars(options), "data_dir": str(options.data_dir)}, "results": results})


if __name__ == "__main__":
    main()
