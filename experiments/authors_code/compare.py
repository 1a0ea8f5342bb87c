"""GPTAQ and ALPS, compared with their authors' own code on random layers.

    PYTHONPATH=tests python experiments/authors_code/compare.py --gptaq DIR --alps DIR

The folders are copies of the authors' repositories (Intelligent-Computing-Lab-Yale/GPTAQ, mazumder-lab/ALPS), which are
not part of this one. Their code is made to run on a CPU; both use our grid for GPTAQ's codes. Prints the share of
entries that differ, and the squared output errors of both relative to the output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from helpers.layers import random_layer, relative_error
from knowledge_compression.compression.methods.alps import Alps
from knowledge_compression.compression.methods.gptaq import Gptaq, PairedInputs
from knowledge_compression.compression.walk.blocks import LayerInputs

ROWS, COLUMNS = 96, 128


def theirs(file: Path) -> Any:
    """Their module, on a processor; what it imports beside torch for whole models is left empty."""
    for name in ("utils", "quant_utils", "model_utils", "tqdm"):
        sys.modules.setdefault(name, ModuleType(name))
    text = file.read_text().replace("cuda:0", "cpu").replace("torch.cuda.synchronize()", "pass")
    module = ModuleType(file.stem)
    exec(compile(text, str(file), "exec"), module.__dict__)
    return module


def layer_of(weight: Tensor) -> nn.Linear:
    """A linear layer with this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return layer


class OurGrid:
    """Stands in for the quantizer that their code calls."""

    def __init__(self, method: Gptaq, scales: Tensor, zeros: Tensor) -> None:
        self.method, self.fitted = method, (scales, zeros)

    def ready(self) -> bool:
        """It has been fitted."""
        return True

    def quantize(self, values: Tensor) -> Tensor:
        """The nearest values on it."""
        return self.method.grid.round(values, *self.fitted)


def gptaq(folder: Path) -> None:
    """Codes of one scale a row, with the authors' columns in one block and in blocks of 16."""
    code = theirs(folder / "fake_quant" / "gptaq_utils.py")
    draw = torch.Generator().manual_seed(0)
    there = torch.randn(400, COLUMNS, generator=draw) @ torch.randn(COLUMNS, COLUMNS, generator=draw)
    here = there + 0.3 * torch.randn(400, COLUMNS, generator=draw) @ torch.randn(COLUMNS, COLUMNS, generator=draw)
    weight = torch.randn(ROWS, COLUMNS, generator=draw)
    output = there @ weight.T
    for alpha in (0.25, 1.0):
        for act_order in (False, True):
            method = Gptaq(3, scale_bits=32, alpha=alpha, desc_act=act_order)
            statistics = PairedInputs(COLUMNS, torch.device("cpu"))
            statistics.update(LayerInputs(here, dense=there))
            fitted = method.grid.fit(weight, (here.T @ here / len(here)).diagonal())
            ours = method.solve(weight, statistics, [ROWS]).quantized
            assert ours is not None
            for block in (COLUMNS, 16):
                peer = code.GPTAQ(layer_of(weight))
                peer.quantizer, peer.fp_inp = OurGrid(method, *fitted), [there.T]
                peer.add_batch(here, None)
                peer.fasterquant(blocksize=block, actorder=act_order, alpha=alpha)
                found, wanted = ours.dequantize(), peer.layer.weight.data
                errors = [float((here @ w.T - output).square().sum() / output.square().sum()) for w in (found, wanted)]
                share = float(((found - wanted).abs() > 1e-3).double().mean())
                print(
                    f"GPTAQ alpha={alpha} act_order={act_order}, their blocks of {block}: {share:.2%} of codes differ, "
                    f"errors {errors[0]:.5f} here and {errors[1]:.5f} theirs"
                )


def alps(folder: Path) -> None:
    """Masks and errors at several sparsities."""
    code = theirs(folder / "alps.py")
    for settings, pattern in (
        ({"sparsity": 0.5}, (0, 0)),
        ({"sparsity": 0.7}, (0, 0)),
        ({"sparsity": 0.9}, (0, 0)),
        ({"sparsity": 0.5, "pattern": "2:4"}, (2, 4)),
    ):
        for seed in range(2):
            weight, hessian = random_layer(rows=ROWS, columns=COLUMNS, seed=seed)
            peer = code.ALPS_prune(layer_of(weight), 1, 1)
            peer.XtX = hessian.clone()
            peer.ALPS_admm(settings["sparsity"], *pattern)
            wanted, solved = peer.layer.weight.data, Alps(**settings).prune(weight, hessian)  # type: ignore[arg-type]
            assert solved.removed is not None and solved.weight is not None
            share = float(((wanted == 0) != solved.removed).double().mean())
            errors = [relative_error(weight, one, hessian) for one in (solved.weight, wanted)]
            print(
                f"ALPS {settings}, layer {seed}: {share:.2%} of the mask differ, errors {errors[0]:.6f} here and "
                f"{errors[1]:.6f} theirs"
            )


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gptaq", type=Path, help="a copy of the repository")
    options.add_argument("--alps", type=Path, help="a copy of the repository")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    for folder, compare in ((chosen.gptaq, gptaq), (chosen.alps, alps)):
        if folder:
            compare(folder)
