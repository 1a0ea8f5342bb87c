"""Jobs for launchers that do no run at all, but end in every way a run may."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from knowledge_compression.results.sweeps import Outcome


@dataclass
class Chore:
    folder: Path
    label: str
    number: int
    what: str

    def __call__(self) -> None:
        start = time.time()
        tried = self.folder / "tried"
        sys.stderr.write("so much to say\n")
        if self.what == "kill" or (self.what == "kill once" and not tried.exists()):
            tried.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "exit":
            sys.exit(3)
        if self.what == "hoard":
            self.hoard = b"x" * 1_000_000_000
            time.sleep(60)
        time.sleep(0.3)
        (self.folder / "span").write_text(f"{start} {time.time()}")
        Outcome("", "done").write(self.folder)
