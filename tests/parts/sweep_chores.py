"""A task for launchers that does no run at all, but ends in every way a run may."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from knowledge_compression.sweeping.plan import Outcome


def chore(config: Any) -> Outcome:
    start = time.time()
    folder = Path(HydraConfig.get().runtime.output_dir)
    tried = folder / "tried"
    sys.stderr.write("so much to say\n")
    if config.what == "kill" or (config.what == "kill_once" and not tried.exists()):
        tried.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if config.what == "exit":
        sys.exit(3)
    if config.what == "hoard":
        hoard = b"x" * 1_000_000_000
        time.sleep(60)
        del hoard
    time.sleep(0.3)
    (folder / "span").write_text(f"{start} {time.time()}")
    outcome = Outcome("", "done")
    outcome.write(folder)
    return outcome
