"""What an experiment refuses before it reads text, loads weights or computes anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from helpers.experiments import made
from knowledge_compression.compression.base import Compression
from knowledge_compression.compression.methods.alps import Alps
from knowledge_compression.compression.methods.awq import Awq
from knowledge_compression.compression.methods.depth import Depth
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.hqq import Hqq
from knowledge_compression.compression.methods.pipeline import Pipeline
from knowledge_compression.compression.methods.wanda import Wanda
from knowledge_compression.errors import BadInput
from knowledge_compression.models.loading import LocalModel


@pytest.mark.parametrize(
    ("compression", "said"),
    [
        (Gptq(group_size=4096), "group_size=4096 does not divide the 16 inputs"),
        (Awq(group_size=4096), "group_size=4096 does not divide the 16 inputs"),
        (Hqq(group_size=10), "group_size=10 does not divide the 16 inputs"),
        (Alps(0.5, pattern="3:7"), "pattern=3:7 does not divide the 16 inputs of .*; choose n:m"),
        (Pipeline([Wanda(sparsity=0.5), Gptq(group_size=4096)]), "group_size=4096 does not divide"),
        (Pipeline([Depth(0.5), Gptq(group_size=8)]), None),  # what fits is known only once the layers are smaller
        (Gptq(group_size=8), None),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_anything_is_loaded(
    compression: Compression, said: str | None, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalModel, "load", lambda *_: pytest.fail("loaded"))
    experiment = replace(made(tiny_folder, {}), compression=compression)
    if said is None:
        experiment.check()
    else:
        with pytest.raises(BadInput, match=said):
            experiment.check()
