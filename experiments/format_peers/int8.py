"""int8 with rounded inputs: how far a run, its file in a peer, and the dense model lie from one another.

    python experiments/format_peers/int8.py DIR

reads what `study.py --outputs DIR --peers transformers --only int8` left there, compresses smollm2 again, and prints
mean divergences (KL, nats a token).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import knowledge_compression as kc

KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "compressed_tensors__int8": ({"choice": "int8_dynamic", "granularity": "per_channel"}, False),
    "compressed_tensors__int8__static_inputs": ({"choice": "int8_static"}, True),
}


def main(outputs: Path) -> None:
    """Print one line for each kind."""
    for folder, (settings, calibrated) in KINDS.items():
        settings = dict(settings)
        ids = torch.as_tensor(np.load(outputs / folder / "ids.npy")).long().reshape(1, -1)
        model = kc.load("smollm2", device="cpu")
        dense = _log_probs(model, ids)
        text = kc.choose("corpus=self", samples=16, length=128) if calibrated else None
        kc.compress(
            model, kc.choose(f"compression={settings.pop('choice')}", **settings), kc.choose("target=all"), text
        )
        run = _log_probs(model, ids)
        peer = torch.as_tensor(np.load(outputs / folder / "transformers.npy")).reshape(run.shape).double()
        peer = peer.log_softmax(-1)
        print(
            f"{folder}: dense to run {_kl(dense, run):.3g}, dense to peer {_kl(dense, peer):.3g}, "
            f"run to peer {_kl(run, peer):.3g}"
        )


def _log_probs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.network(ids).logits[0].double().log_softmax(-1)
    return found


def _kl(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.exp() * (one - other)).sum(-1).mean())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
