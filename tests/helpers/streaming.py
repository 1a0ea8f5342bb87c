"""Streamed compressions, for the tests and for the processes that they kill."""

from __future__ import annotations

from pathlib import Path

from helpers.layers import windows
from knowledge_compression.compression.base import Compression
from knowledge_compression.compression.methods.awq import Awq
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.methods.sparsegpt import SparseGpt
from knowledge_compression.compression.methods.wanda import Wanda
from knowledge_compression.compression.walk.streaming import compress_streamed
from knowledge_compression.models import Target
from knowledge_compression.models.loading import LocalModel

METHODS: dict[str, Compression] = {
    "magnitude": Magnitude(sparsity=0.4),
    "gptq": Gptq(bits=3, forward_dtype="float32"),
    "sparsegpt": SparseGpt(sparsity=0.5),
    "wanda": Wanda(sparsity=0.5),
    "awq": Awq(group_size=16, fold=True),
    "rtn": Rtn(group_size=16),
}


def streamed(source: LocalModel, compression: Compression, target: Target, folder: Path, dtype: str = "auto"):
    model = source.streamed("cpu", dtype)
    text = windows(6, 16) if compression.calibrated else None
    return compress_streamed(compression, model, target.select(model), text, folder)  # type: ignore[arg-type]
