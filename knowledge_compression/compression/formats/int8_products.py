"""Products of 8-bit integers, exact on every device.

Devices with int8 units (a CPU with VNNI or AMX, CUDA) multiply integers; elsewhere the integers are multiplied as
floats, split so that every sum stays in the range in which float32 is exact.
"""

from __future__ import annotations

from functools import cache, reduce

import torch
from torch import nn

from knowledge_compression.models.device import Device, gain_of, is_exact

_MANY = 256  # rows; below this, oneDNN's product with scales is not worth the copy of the weight that it needs
_TRIED = 1024, 768  # rows and columns of the product that is timed
_WHOLE = 64  # inner columns at a time on AMX; oneDNN 3.12 gets some remainders wrong (findings/)


def integer_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Exact ``left @ right.T`` of int8 matrices ``[rows, inner]`` and ``[columns, inner]``, as int32."""
    if left.shape[1] == 1:  # torch 2.13's product on the CPU misreads matrices of one inner column
        return left.int() * right.T.int()
    if not Device.of(left.device).multiplies_int8_faster:
        return float_product(left, right)
    return _cuda_product(left, right) if left.is_cuda else torch._int_mm(left, right.T)


def suits_scaled_product(left: torch.Tensor) -> bool:
    """Whether :func:`scaled_product` multiplies these rows exactly, and faster than one step after the other.

    Both ways give the same bits, so that the answer may depend on a measurement.
    """
    if left.device.type != "cpu" or len(left) < _MANY or left.shape[1] % _WHOLE:
        return False
    return _scales_faster(Device.of(left.device))


@cache
def _scales_faster(device: Device) -> bool:
    if not device.multiplies_int8_faster:
        return False
    one = torch.ones(1)
    if not is_exact(lambda left, right: scaled_product(left, right, one, None), device.place):
        return False
    left = torch.ones(*_TRIED, dtype=torch.int8)
    right = left[: _TRIED[1]]
    ways = (lambda: scaled_product(left, right, one, None)), (lambda: integer_product(left, right).float().mul_(one))
    return gain_of(device, "int8_scaled", *ways, _TRIED) > 1


def scaled_product(
    left: torch.Tensor, right: torch.Tensor, columns: torch.Tensor, zero_point: torch.Tensor | None
) -> torch.Tensor:
    """``(left - zero_point) @ right.T * columns`` on a CPU, where oneDNN scales each sum before it is stored.

    Args:
        left, right: int8 ``[rows, inner]`` and ``[columns, inner]``; ``inner`` is a multiple of 64. The weight is
            copied for the time of the call; a packed one would be faster still, and as large as all the integers.
        columns: float32 ``[1]`` or ``[columns]``.
        zero_point: int32, or None for 0.

    Returns:
        float32 ``[rows, columns]``.
    """
    packed = right.to_mkldnn().transpose(0, 1)
    zero = torch.zeros((), dtype=torch.int32) if zero_point is None else zero_point
    of_weight = torch.zeros(len(columns), dtype=torch.int32)
    product: torch.Tensor = torch.ops.onednn.qlinear_pointwise.tensor(
        left, torch.ones(()), zero, packed, columns, of_weight, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


def float_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The same as :func:`integer_product` in float32, exact because no partial sum reaches 2^24."""
    step = (1 << 24) // (128 * 128) - 1
    parts = zip(left.split(step, 1), right.split(step, 1), strict=True)
    return reduce(torch.Tensor.add_, ((a.float() @ b.float().T).to(torch.int32) for a, b in parts))


def _cuda_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``torch._int_mm`` on CUDA needs more than 16 rows and other sizes divisible by 8: pad with zeros, then cut."""
    rows, inner = left.shape
    columns = right.shape[0]
    left = nn.functional.pad(left, (0, -inner % 8, 0, max(17 - rows, 0)))
    right = nn.functional.pad(right, (0, -inner % 8, 0, -columns % 8))
    return torch._int_mm(left, right.T)[:rows, :columns]
