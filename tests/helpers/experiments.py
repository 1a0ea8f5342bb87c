"""An experiment on a tiny model, made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from knowledge_compression.compression.kept import KeptModels
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.corpora.text import TextFile
from knowledge_compression.evaluation.atlas import Atlas
from knowledge_compression.experiment import Experiment
from knowledge_compression.models import Target
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.recovery.none import NoRecovery

SUITE = Atlas(limit=150)


def made(folder: Path, suites: dict[str, Any], sparsity: float = 0.5) -> Experiment:
    return Experiment(
        source=LocalModel("tiny", str(folder)),
        target=Target("all", ["encoder_att", "ff"]),
        compression=Magnitude(sparsity),
        recovery=NoRecovery(),
        corpus=TextFile(name="text", path="unused.txt"),
        suites=suites,
        device="cpu",
        kept_models=KeptModels(1.0),
    )
