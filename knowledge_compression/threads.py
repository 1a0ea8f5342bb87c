"""How long the threads that share products wait awake for the next product."""

from __future__ import annotations

import os

_DECIDE = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_SPINS = "1000"  # some tens of microseconds


def let_idle_threads_sleep() -> None:
    """Let idle threads of GNU OpenMP, which PyTorch uses on Linux, sleep soon; to be called before torch is loaded.

    They would wait in a loop for 300,000 rounds. On a machine that others use too, this spends their share of the
    processor, so that the scheduler lets the others run when there is work again, and each product waits for its
    slowest thread. ``benchmarks/load.py`` measures both sides. If the user's environment decides, it stays as it is.
    """
    if not any(name in os.environ for name in _DECIDE):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
