"""The plain script behind the ledger's reference column, and the package's methods with the published settings."""

from __future__ import annotations

from runpy import run_path
from types import SimpleNamespace

import pytest
import torch

from helpers.layers import random_layer, relative_error
from helpers.places import ROOT
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.methods.sparsegpt import SparseGpt
from knowledge_compression.compression.methods.wanda import Wanda
from knowledge_compression.compression.solve.grid import plainly_rounded

SCRIPT = ROOT / "experiments" / "calibrated_smollm2" / "reference.py"


@pytest.fixture(scope="module")
def plain():
    return SimpleNamespace(**run_path(str(SCRIPT)))


def test_it_shares_nothing_with_the_package():
    assert "knowledge_compression" not in SCRIPT.read_text()


@pytest.fixture
def layer():
    """Three blocks of columns, the last of them short."""
    return random_layer(24, 300)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_as_published_is_the_scripts(bits, act_order, layer, plain):
    weight, hessian = layer
    method = Gptq(bits, clip="minmax", scale_bits=32, desc_act=act_order)
    ours = method.quantize(weight, hessian)[0].dequantize()
    theirs = plain.gptq(weight, hessian, bits, act_order=act_order)
    same = (ours - theirs).abs() < 1e-4 * weight.abs().max()
    assert same.all(dim=1).float().mean() > 0.8  # where float32 sees a tie otherwise, the rest of the row moves
    assert relative_error(weight, ours, hessian) == pytest.approx(relative_error(weight, theirs, hessian), rel=0.02)


@pytest.mark.parametrize("group", [None, 60])
def test_rounding_is_the_scripts(group, layer, plain):
    weight, _ = layer
    ours = plainly_rounded(weight, Rtn(3, group, clip="minmax").grid).dequantize()
    assert torch.equal(ours, plain.rtn(weight, None, 3, group))


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_sparsegpt_as_published_is_the_scripts(pattern, layer, plain):
    weight, hessian = layer
    ours = SparseGpt(0.5, pattern, refit=0).prune(weight, hessian).weight
    theirs = plain.sparsegpt(weight, hessian, two_of_four=pattern is not None)
    assert ((ours == 0) == (theirs == 0)).float().mean() > 0.98  # the script removes one more in each block of columns
    assert relative_error(weight, ours, hessian) == pytest.approx(relative_error(weight, theirs, hessian), rel=0.02)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_wanda_is_the_scripts(pattern, layer, plain):
    weight, hessian = layer
    removed = Wanda(0.5, pattern).removes(weight, hessian.diagonal())
    assert torch.equal(weight.masked_fill(removed, 0), plain.wanda(weight, hessian, two_of_four=pattern is not None))
