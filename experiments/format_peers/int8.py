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

EIGHT, STATIC = "compressed_tensors__int8", "compressed_tensors__int8__static_inputs"
DYNAMIC = {"choice": "int8_dynamic", "granularity": "per_channel"}
KINDS: tuple[tuple[str, dict[str, Any], bool], ...] = (
    (EIGHT, DYNAMIC | {"input_steps": 127.0}, False),
    (EIGHT, DYNAMIC | {"input_steps": 127.5}, False),
    (STATIC, {"choice": "int8_static"}, True),
)


def main(outputs: Path) -> None:
    """Print one line for each kind."""
    for folder, chosen, calibrated in KINDS:
        settings = dict(chosen)
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
            f"{folder}, {chosen}: dense to run {_kl(dense, run):.3g}, dense to peer {_kl(dense, peer):.3g}, "
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
