"""Rotate the residual stream into a basis in which no channel stands out (QuaRot, Ashkboos et al. 2024)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from knowledge_compression.building import Seed
from knowledge_compression.compression.base import Compression, memory_bytes
from knowledge_compression.compression.layer_reports import CompressionReport, followed_by
from knowledge_compression.compression.methods.none import NoCompression
from knowledge_compression.compression.solve.coding import Coding
from knowledge_compression.compression.solve.hadamard import hadamard
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models import Model, Targets
from knowledge_compression.models.soundness import check_finite, weights_of

if TYPE_CHECKING:
    from torch import LongTensor, Tensor


@dataclass(frozen=True)
class Rotate(Compression):
    """Turn the residual stream by a random orthogonal matrix that is fused into the weights, then compress them.

    The matrix is ``D H / sqrt(n)``, a Hadamard matrix with random signs (QuaRot, section 4, stage 1a). It spreads every
    channel of the stream over all of them, so that weights that read or write it have no outlying columns or rows. The
    factors of the norms move into the layers that read them. The network computes the same as before: its logits on a
    few tokens are checked to 1e-4 in float32, whatever the dtype of its weights, and the network is left unchanged if
    they differ. A tied head gets a weight of its own, as its norm's factors are not those of the embeddings; its size
    counts.

    Attributes:
        then: the compression of the rotated model.
        seed: seed of the random signs.
    """

    then: Compression = field(default_factory=NoCompression)
    seed: Seed = 0
    beyond_targets = True
    streams = False  # every weight is changed before the first is compressed

    @property
    def name(self) -> str:  # type: ignore[override]
        """``rotate`` and what follows, e.g. ``rotate+gptq``."""
        return "rotate" if isinstance(self.then, NoCompression) else f"rotate+{self.then.name}"

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        """Whether the compression that follows is calibrated."""
        return self.then.calibrated

    @property
    def coding(self) -> Coding | None:
        """The coding of the compression that follows."""
        return self.then.coding

    @property
    def parts(self) -> Sequence[Compression]:
        """This method, and the parts of the compression that follows."""
        return [self, *self.then.parts]

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None = None) -> CompressionReport:
        """Rotate the model and compress it."""
        from knowledge_compression.compression.walk.residual import rotate_stream

        start = time.perf_counter()
        check_finite(weights_of(model), model.name)
        model.untie_head()
        rotate_stream(model, self.matrix(model.text_config.hidden_size, model.name))
        rotated = CompressionReport("rotate", model_parameters=model.parameter_count())
        rotated.model_bytes_before = rotated.model_bytes_after = memory_bytes(model.network)
        rotated.seconds = time.perf_counter() - start
        report = followed_by(rotated, self.then.compress(model, targets, calibration))
        return replace(report, method=self.name)

    def matrix(self, size: int, model: str) -> Tensor:
        """The rotation, float64 ``[size, size]``.

        Raises:
            BadInput: there is no Hadamard matrix of this size, or none that can be built.
        """
        signs = hadamard(size)
        if signs is None:
            raise BadInput(
                f"compression=rotate has no Hadamard matrix for the {size} channels of {model}; it needs a multiple of "
                "4 such as 576, 768 or 4096"
            )
        generator = torch.Generator().manual_seed(self.seed)
        flips = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
        return flips * torch.from_numpy(signs).double() / size**0.5
