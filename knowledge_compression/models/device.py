"""What a machine can do that decides how a run computes on it, and what ``auto`` means for a floating-point type.

A run has four choices of type: of the weights (``dtype``), and of the products in scoring (``scoring_dtype``), in
calibration (``compression.forward_dtype``) and in training (``recovery.training.precision``). All of them are settled
here, by one rule each for weights and for products; ``docs/devices.md`` has the table.
"""

from __future__ import annotations

import logging
import platform
import statistics
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from knowledge_compression.cache import kept_finding
from knowledge_compression.errors import BadInput, first_line
from knowledge_compression.timing import timed

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRODUCT_DTYPES = ("auto", "bfloat16", "float32")
_CPU_INFO = Path("/proc/cpuinfo")
_KIND = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")  # lines that tell processors apart
_SIDE, _REPEATS = 1024, 7  # of the matrix product that measures a device's rate
_CLEARLY = 1.25  # times as fast, so that what goes around the products does not eat the gain


@dataclass(frozen=True)
class Device:
    """A place to compute and what it can do.

    :meth:`of` finds this out once for each place; a test that hands in another value with :attr:`known` makes any
    machine take the way of any other.

    Attributes:
        place: where tensors lie, e.g. ``cuda:0``.
        name: of the processor or card, for the record.
        int8_products: whether torch multiplies int8 matrices there; float32 products of the same integers do else.
        onednn_products: whether oneDNN multiplies float32 faster there than torch's first choice, MKL: so measured on
            AMD processors with AVX512 (docs/performance.md).
        bfloat16_gain: how many times faster it multiplies bfloat16 than float32; None is measured when it is asked for.
    """

    place: torch.device
    name: str = ""
    int8_products: bool = False
    onednn_products: bool = False
    bfloat16_gain: float | None = None

    known: ClassVar[dict[torch.device, Device]] = {}

    @classmethod
    def of(cls, place: torch.device) -> Device:
        """What is to be known of a place, found out once."""
        if place not in cls.known:
            cls.known[place] = cls(place, _name(place), _multiplies_int8(place), _onednn_is_faster(place))
        return cls.known[place]

    @classmethod
    def named(cls, choice: str) -> Device:
        """The device that the user typed, see :func:`resolve_device`."""
        return cls.of(resolve_device(choice))

    @property
    def multiplies_bfloat16_faster(self) -> bool:
        """Whether bfloat16 products are clearly faster; measured once for each kind of device and kept in the cache."""
        gain = measured_bfloat16_gain(self) if self.bfloat16_gain is None else self.bfloat16_gain
        return gain > _CLEARLY

    def product_dtype(self, choice: str, stored: torch.dtype, setting: str) -> torch.dtype | None:
        """The type in which products of a network are done here, the one rule for scoring, calibration and training.

        Args:
            choice: ``float32`` (or ``model``: the network's own type), ``bfloat16``, or ``auto``: bfloat16 where the
                device multiplies it clearly faster.
            stored: type of the network's weights; a narrower one than float32 stays as it is.
            setting: what the user calls the choice, for the message.

        Returns:
            ``torch.bfloat16``, or None: the network's own.

        Raises:
            BadInput: there is no such choice.
        """
        if choice not in (*PRODUCT_DTYPES, "model"):
            raise BadInput(f"{setting}={choice} does not exist; choose one of {', '.join(PRODUCT_DTYPES)}")
        if stored != torch.float32 or choice in ("float32", "model"):
            return None
        return torch.bfloat16 if choice == "bfloat16" or self.multiplies_bfloat16_faster else None


def resolve_device(choice: str) -> torch.device:
    """A torch device from what the user typed; ``auto`` is the GPU when there is one.

    Raises:
        BadInput: it is not to be had here.
    """
    if choice == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(choice)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device={choice} is not to be had here ({first_line(error)}); try device=auto") from None
    return resolved


def resolve_dtype(choice: str, place: torch.device) -> torch.dtype | str:
    """The type of the weights; ``auto`` is float32 on a CPU and the checkpoint's own (``"auto"``) elsewhere.

    Raises:
        BadInput: there is no such choice.
    """
    if choice == "auto":
        return torch.float32 if place.type == "cpu" else "auto"
    if choice not in DTYPES:
        raise BadInput(f"dtype={choice} does not exist; choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[choice]


def multiplied_in(dtype: torch.dtype | None, place: torch.device) -> AbstractContextManager[Any]:
    """Products of float32 networks in another type until the end of the context; all else stays as it is.

    Weights are turned anew for each product: they take no memory beside those that are there, and one that was
    compressed in between is not used as it was before.
    """
    return nullcontext() if dtype is None else torch.autocast(place.type, dtype, cache_enabled=False)


def processor() -> dict[str, str]:
    """What Linux tells of the first processor's kind, e.g. ``vendor_id``; elsewhere what Python knows."""
    if not _CPU_INFO.is_file():
        return {"model name": platform.processor() or platform.machine()}
    lines = _CPU_INFO.read_text().split("\n\n")[0].splitlines()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {key: told[key] for key in _KIND if key in told}


def measured_bfloat16_gain(device: Device) -> float:
    """How many times faster than float32 a device multiplies bfloat16; measured once, kept in the user's cache."""
    place = device.place
    kind = device.name if place.type == "cuda" else [place.type, processor()]

    def find() -> float:
        gain = products_a_second(place, torch.bfloat16) / products_a_second(place, torch.float32)
        log.info("products of bfloat16 are %.1f times as fast as those of float32 on this %s", gain, place.type)
        return gain

    return float(kept_finding("bfloat16", [kind, torch.get_num_threads(), torch.__version__, _SIDE], find))


def products_a_second(place: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product, median of a few."""
    a = torch.ones(_SIDE, _SIDE, device=place, dtype=dtype)
    seconds = [timed(place, lambda: a @ a)[0] for _ in range(_REPEATS + 1)]  # the first one warms up
    return 2 * _SIDE**3 / statistics.median(seconds[1:])


def _name(place: torch.device) -> str:
    return torch.cuda.get_device_name(place) if place.type == "cuda" else processor().get("model name", place.type)


def _multiplies_int8(place: torch.device) -> bool:
    if place.type == "meta":
        return False
    ones = torch.ones(32, 32, dtype=torch.int8, device=place)
    try:
        return bool((torch._int_mm(ones, ones) == 32).all())
    except (RuntimeError, NotImplementedError):
        return False


def _onednn_is_faster(place: torch.device) -> bool:
    return (
        place.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and processor().get("vendor_id") == "AuthenticAMD"
    )
