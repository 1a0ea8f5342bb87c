"""``PYTHONPATH=tests python -m trials``: try all inputs, print how they ended, status 1 if one ended badly."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from trials.inputs import KINDS
from trials.materials import prepare
from trials.trying import ACCEPT, ACCEPTED, HANG, ONE_LINE, STACK_TRACE, WRONG, Ending, Tester

BAD = (STACK_TRACE, WRONG, HANG)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trials", description=__doc__)
    parser.add_argument("--only", default="", help="try those whose name has this in it")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"which of {', '.join(KINDS)}")
    parser.add_argument("--every", type=int, default=1, help="try one in so many")
    parser.add_argument("--at-once", type=int, default=os.cpu_count())
    parser.add_argument("--verbose", action="store_true", help="show how each ended")
    options = parser.parse_args()
    trials = [trial for kind in options.kinds.split(",") for trial in KINDS[kind]() if options.only in trial.name]
    chosen = [one for one in trials if one.must != ACCEPT][:: options.every]
    used = {(one.command, *one.arguments) for one in chosen}
    every = (one for make in KINDS.values() for one in make() if one.must == ACCEPT)
    sound = [one for one in every if (one.command, *one.arguments) in used]
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder) / "good"
        prepare(good)
        Path(folder).chmod(0o755)
        endings = []
        for ending in Tester(good, Path(folder)).all([*sound, *chosen], options.at_once):
            endings.append(ending)
            if options.verbose or ending.how in BAD:
                show(ending)
    print(summary(endings))
    sys.exit(any(ending.how in BAD for ending in endings))


def show(ending: Ending) -> None:
    """One ending, in full."""
    print(f"--- {ending.how} ({ending.seconds:.1f} s): {ending.trial.name}\n    {' '.join(ending.trial.arguments)}")
    print("\n".join(f"    {line}" for line in ending.said.splitlines()[-6:]), flush=True)


def summary(endings: list[Ending]) -> str:
    """The figures."""
    count = Counter(ending.how for ending in endings if ending.trial.must != ACCEPT)
    sound = [ending for ending in endings if ending.trial.must == ACCEPT]
    kinds = (ONE_LINE, ACCEPTED, STACK_TRACE, WRONG, HANG)
    return (
        f"tried {sum(count.values())}: "
        + ", ".join(f"{kind} {count[kind]}" for kind in kinds)
        + f"; with nothing wrong {len(sound)}, of them accepted {sum(one.how == ACCEPTED for one in sound)}"
    )


if __name__ == "__main__":
    main()
