"""What `peer_*.py` share, in the peers' environments: `python peer_NAME.py FOLDER`, called by peers.py.

The folder holds `dense/` (the model in float32), `windows.npy` (token ids) and `asked.json` (bits, group_size; steps
and batch, where a peer tunes; or method and sparsity or pattern, where it prunes; the blocks). Written are `saved/`,
the compressed model as the peer saves it, and `told.json`: processor and wall-clock seconds of compressing, versions.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

PLACE = Path(sys.argv[1])
DENSE, SAVED = PLACE / "dense", PLACE / "saved"
ASKED: dict[str, Any] = json.loads((PLACE / "asked.json").read_text())


def windows() -> list[dict[str, torch.Tensor]]:
    """The calibration windows, each as a batch of one."""
    ids = torch.from_numpy(np.load(PLACE / "windows.npy"))
    return [{"input_ids": one[None], "attention_mask": torch.ones_like(one[None])} for one in ids]


def left_out(model: torch.nn.Module) -> list[str]:
    """The linear layers outside the blocks to compress, the head among them."""
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in linears if not name.startswith(tuple(ASKED["blocks"]))]


@contextmanager
def timed(peer: str, *beside: str) -> Iterator[None]:
    """Tell the seconds of what is done inside, and the versions of the peer and of packages beside it."""
    start = time.process_time(), time.perf_counter()
    yield
    seconds = {"processor": time.process_time() - start[0], "clock": time.perf_counter() - start[1]}
    told = {"peer": f"{peer} {version(peer)}", "beside": {name: version(name) for name in beside}}
    settings = {key: ASKED[key] for key in ("method", "bits", "sparsity", "pattern") if key in ASKED}
    (PLACE / "told.json").write_text(json.dumps(told | settings | {"seconds": seconds}))
