"""Products with int8 weights of which two in every four are zero, on GPUs with units for this pattern.

cuSPARSELt skips the zeros on GPUs of compute capability 8.0 and newer. The first large product with each weight is
computed both ways, and the sparse way is used only if it gave the same integers in less time.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from knowledge_compression.errors import first_line
from knowledge_compression.timing import timed

log = logging.getLogger(__name__)

WORTH_TRYING = 64  # rows; smaller products do not predict the time of larger ones
_ROUNDS = 5
_SIDES, _ROWS = 32, 16  # the sides of a weight and the number of rows must be multiples of this


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at least two of every four consecutive inputs of ``[out_features, in_features]`` are zero."""
    return weight.shape[1] % 4 == 0 and bool((weight.unflatten(1, (-1, 4)).count_nonzero(2) <= 2).all())


class SparseProduct:
    """Exact ``rows @ weight.T`` of int8 matrices as int32, skipping the zeros of a 2:4 weight on a GPU.

    Args:
        weight: int8 ``[out_features, in_features]``, both multiples of 32.
    """

    def __init__(self, weight: Tensor) -> None:
        self.packed = torch._cslt_compress(weight.contiguous())

    def __call__(self, rows: Tensor) -> Tensor:
        """``[rows, in_features]`` to ``[rows, out_features]``."""
        padded = pad(rows, (0, 0, 0, -len(rows) % _ROWS))
        return torch._cslt_sparse_mm(self.packed, padded.T, out_dtype=torch.int32).T[: len(rows)].contiguous()


def can_skip_zeros(weight: Tensor) -> bool:
    """Whether this device has such units and the weight has the pattern and a suitable shape."""
    return (
        weight.is_cuda
        and torch.backends.cusparselt.is_available()
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        and all(side % _SIDES == 0 for side in weight.shape)
        and is_two_of_four(weight)
    )


def faster_product(weight: Tensor, rows: Tensor, dense: Callable[[Tensor], Tensor]) -> SparseProduct | None:
    """The sparse product with a weight, if for these rows it equals ``dense`` and takes less time; otherwise None."""
    try:
        sparse = SparseProduct(weight)
        same = torch.equal(sparse(rows), dense(rows))  # this call also warms both up
    except RuntimeError as error:
        log.warning("2:4 sparse products do not work on this GPU (%s); dense ones are used", first_line(error))
        return None
    if not same:
        log.warning("2:4 sparse products are wrong on this GPU; dense ones are used")
        return None
    seconds: dict[Callable[[Tensor], Tensor], list[float]] = {sparse: [], dense: []}
    for _ in range(_ROUNDS):
        for product, taken in seconds.items():
            taken.append(timed(rows.device, partial(product, rows))[0])
    times = statistics.median(seconds[dense]) / statistics.median(seconds[sparse])
    log.info("2:4 sparse products of a weight %s take 1/%.2f of the time of dense ones", tuple(weight.shape), times)
    return sparse if times > 1 else None
