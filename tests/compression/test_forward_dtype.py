"""Bfloat16 forward passes under every calibrated method, as some devices take them, forced on any machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from helpers.networks import SPECIAL, VOCABULARY, logits_of
from knowledge_compression.compression.calibrated import Calibrated, Solved
from knowledge_compression.compression.methods.awq import Awq
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.int8_static import Int8Static
from knowledge_compression.compression.methods.smoothquant import SmoothQuant
from knowledge_compression.compression.methods.sparsegpt import SparseGpt
from knowledge_compression.compression.methods.wanda import InputPower, Wanda
from knowledge_compression.compression.solve import hessian
from knowledge_compression.compression.walk.statistics import LayerInputs
from knowledge_compression.models import Model, Target
from knowledge_compression.models.device import Device, by_bfloat16_units
from knowledge_compression.models.families import ROLES

CPU = torch.device("cpu")
EVERYTHING = Target("everything", ROLES)
METHODS: dict[str, Calibrated[Any]] = {
    "gptq": Gptq(bits=8),
    "gptq, whole blocks": Gptq(bits=8, true_sequential=False),
    "gptq, by influence": Gptq(bits=8, true_sequential=False, by_influence=True),
    "sparsegpt": SparseGpt(sparsity=0.1),
    "wanda": Wanda(sparsity=0.1),
    "awq": Awq(bits=8, group_size=None),
    "smoothquant": SmoothQuant(),
    "int8_static": Int8Static(),
}


def text() -> torch.Tensor:
    return torch.randint(len(SPECIAL), VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Watching(Calibrated[InputPower]):
    """Changes nothing, and notes in which types it is called."""

    name = "watching"
    seen: list[tuple[Any, ...]] = field(default_factory=list)
    walk_settings: dict[str, bool] = field(default_factory=dict)

    @property
    def walk(self):
        return replace(super().walk, **self.walk_settings)

    def observe(self, in_features: int, device: torch.device) -> InputPower:
        seen = self.seen

        class Watched(InputPower):
            def update(self, inputs):
                seen.append(("update", torch.is_autocast_enabled("cpu"), inputs.values.dtype))
                seen.append(("narrower", inputs.narrower))
                super().update(inputs)

        return Watched(in_features, device)

    def solve(self, weight, statistics, heights) -> Solved:
        product = weight @ weight.T
        self.seen.append(("solve", torch.is_autocast_enabled("cpu"), weight.dtype, product.dtype))
        return Solved(weight=weight)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "t5", "bert", "albert", "gpt2"])
def test_only_forward_passes_are_narrowed(tiny_model, architecture: str, sequential: bool) -> None:
    model = tiny_model(architecture)
    method = Watching(forward_dtype="bfloat16", walk_settings={"true_sequential": sequential})
    before = logits_of(model)
    method.compress(model, EVERYTHING.select(model), text())
    assert torch.equal(logits_of(model), before) and not torch.is_autocast_enabled("cpu")
    updates, solves = ([note[1:] for note in method.seen if note[0] == what] for what in ("update", "solve"))
    assert {autocast for autocast, _ in updates} == {False}
    assert torch.bfloat16 in {dtype for _, dtype in updates}  # the passes themselves were narrowed
    assert set(solves) == {(False, torch.float32, torch.float32)}
    assert {note for note in method.seen if note[0] == "narrower"} == {("narrower", torch.bfloat16)}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "t5", "bert", "albert", "gpt2"])
def test_every_method_stays_close_on_bfloat16_passes(
    tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch, architecture: str, name: str
) -> None:
    exact, narrowed, method = tiny_model(architecture), tiny_model(architecture), METHODS[name]
    dense = logits_of(exact)
    replace(method, forward_dtype="float32").compress(exact, EVERYTHING.select(exact), text())
    monkeypatch.setitem(Device.known, CPU, replace(Device.of(CPU), bfloat16_gain=4.0))
    report = method.compress(narrowed, EVERYTHING.select(narrowed), text())  # auto: as on such a device
    assert len(report.layers) == len(EVERYTHING.select(exact))
    apart = (logits_of(narrowed) - logits_of(exact)).norm()
    assert apart < 0.1 * dense.norm()
    assert apart > 0 or name == "wanda"  # which may choose the very same weights: elsewhere bfloat16 did multiply


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_narrower_networks_keep_their_own_passes(tiny_model, stored: torch.dtype, name: str) -> None:
    """What a GPU loads by default: the network's own type in the passes, float32 in the solver."""
    model, reference, method = tiny_model("llama"), tiny_model("llama"), METHODS[name]
    model.network.to(stored)
    report = method.compress(model, EVERYTHING.select(model), text())
    method.compress(reference, EVERYTHING.select(reference), text())
    assert model.dtype == stored and all(layer.parameters for layer in report.layers)
    found, expected = logits_of(model).float(), logits_of(reference)
    assert (found - expected).norm() < (0.05 if stored == torch.float16 else 0.2) * expected.norm()


@pytest.mark.parametrize("there", [True, False])
def test_bfloat16_units_are_asked_for_within_the_context_alone(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at all by a version of torch without the choice."""
    matmul = SimpleNamespace(fp32_precision="none")
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace(matmul=matmul) if there else SimpleNamespace())
    with pytest.raises(KeyError), by_bfloat16_units():
        assert matmul.fp32_precision == ("bf16" if there else "none")
        raise KeyError
    assert matmul.fp32_precision == "none"


@pytest.mark.parametrize(("narrower", "influence"), [(torch.bfloat16, None), (torch.bfloat16, 1.0), (None, None)])
def test_second_moments_take_bfloat16_units_only_where_they_are_exact(
    narrower: torch.dtype | None, influence: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Mock(wraps=by_bfloat16_units)
    monkeypatch.setattr(hessian, "by_bfloat16_units", taken)
    by = None if influence is None else torch.full((5,), influence)
    hessian.Hessian(8, CPU).update(LayerInputs(torch.randn(5, 8), by, narrower=narrower))
    assert taken.called is (narrower is not None and influence is None)
