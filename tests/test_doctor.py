"""The doctor names what is missing and what to do about it."""

from __future__ import annotations

import pytest
import torch

from knowledge_compression import doctor
from knowledge_compression.models import device


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """A product takes seconds in a type for which a processor has no instructions."""
    monkeypatch.setattr(device, "_SIDE", 128)


def test_every_missing_thing_comes_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    checks = {check.name: check for check in doctor.examine(tmp_path / "outputs", tmp_path)}
    assert checks["model hub"].state == checks["Weights & Biases"].state == doctor.MISSING
    assert all(
        check.remedy for check in checks.values() if check.state == doctor.MISSING and check.name != "local data"
    )
    assert checks["device cpu"].state == doctor.FINE and "GFLOP/s" in checks["device cpu"].found
    assert not (tmp_path / "outputs").exists()


def test_a_type_that_this_processor_hardly_multiplies_is_measured_once_and_not_called_zero(monkeypatch):
    """bfloat16 without instructions for it takes seconds a product, and has a rate all the same."""
    asked = []

    def timed(place, work):
        asked.append(work().dtype)
        return (5.0, None) if asked[-1] == torch.bfloat16 else (0.01, None)

    monkeypatch.setattr(device, "timed", timed)
    (cpu, *_) = doctor._devices()
    assert asked.count(torch.bfloat16) == 1 < asked.count(torch.float32)
    assert "0.00084 GFLOP/s bfloat16" in cpu.found


def test_the_status_tells_whether_a_run_could_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as end:
        doctor.main(["--outputs", str(tmp_path)])
    assert end.value.code == 0 and "smollm2" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)  # a long path would be folded in its cell
    with pytest.raises(SystemExit) as end:
        doctor.main(["--outputs", str(tmp_path), "--data-dir", "nowhere"])
    assert end.value.code == 1 and "nowhere" in capsys.readouterr().out
