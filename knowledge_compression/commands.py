"""The command ``kc``: each subcommand is imported only when it is used."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module

from knowledge_compression.stopping import stoppable

SUBCOMMANDS = {
    "run": ("knowledge_compression.sweeping.cli", "one run, or with -m a sweep"),
    "report": ("knowledge_compression.report", "tables, figures and one page over finished runs"),
    "status": ("knowledge_compression.sweeping.status", "the progress of sweeps"),
    "take": ("knowledge_compression.take", "import results of other tools into a store"),
    "advise": ("knowledge_compression.advise", "the smallest compressed model that keeps a share of the known facts"),
    "doctor": ("knowledge_compression.doctor", "what works on this machine, and how to fix what does not"),
    "dashboard": ("knowledge_compression.dashboard", "a workspace and a report on Weights & Biases for a sweep"),
}


def main() -> int | None:
    """Entry point of ``kc`` and of ``python -m knowledge_compression``."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if name not in SUBCOMMANDS:
        sys.stderr.write(f"error: kc {name} does not exist; choose one of {', '.join(SUBCOMMANDS)}\n")
        return 2
    sys.argv = [f"kc {name}", *rest]
    with stoppable():
        command: Callable[[], int | None] = import_module(SUBCOMMANDS[name][0]).main
        try:
            status = command()
            sys.stdout.flush()
        except BrokenPipeError:
            if name == "run":  # it has pipes of its own
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # its reader has seen enough, such as head
            return 1
        except PermissionError as error:
            sys.stderr.write(f"error: {error.filename}: {error.strerror}\n")
            return 2
        return status


def _help() -> str:
    lines = "".join(f"  {name:<10} {what}\n" for name, (_, what) in SUBCOMMANDS.items())
    return (
        f"usage: kc SUBCOMMAND ...\n\nWhat does compression do to the knowledge inside a language model?\n\n{lines}\n"
        + ("kc SUBCOMMAND --help says more.\n")
    )
