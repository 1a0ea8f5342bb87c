"""What `ask_*.py` share: `python ask_PEER.py FOLDER ...` answers in each folder what `ids.npy` asks of `model`."""

import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def answer(peer: str, logits: Callable[[Path, Any], Any], versions: Callable[[Path], str]) -> None:
    """Write logits and versions beside the files, or why they cannot be read."""
    for place in map(Path, sys.argv[1:]):
        (place / f"{peer}.txt").write_text(versions(place / "model"))
        try:
            np.save(place / f"{peer}.npy", logits(place / "model", np.load(place / "ids.npy")))
            (place / f"{peer}.error").unlink(missing_ok=True)
        except Exception as error:  # one file that cannot be read leaves the others to be asked
            traceback.print_exc()
            told = " ".join(str(error).split())  # some libraries give the reason after the first line
            (place / f"{peer}.error").write_text(f"{type(error).__name__}: {told[:400]}")


def keep_weights(peer: str, place: Path, state: Mapping[str, Any]) -> None:
    """Write the weights of the blocks' linear layers beside the file, as the peer decodes it.

    Args:
        peer: who.
        place: the folder of the file.
        state: of the network, with the decoded weights.
    """
    from safetensors.torch import save_file

    kept = [name for name in state if name.endswith(".weight") and ".layers." in name and "norm" not in name]
    save_file({name: state[name].contiguous() for name in kept}, place.parent / f"{peer}.safetensors")
