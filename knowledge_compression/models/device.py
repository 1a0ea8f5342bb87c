"""The capabilities of a machine that decide how a run computes on it, and the meaning of ``auto`` for dtypes.

A run has four dtype settings: of the weights (``dtype``), and of the matrix products in scoring (``scoring_dtype``), in
calibration (``compression.forward_dtype``) and in training (``recovery.training.precision``). All of them are resolved
here, by one rule for weights and one for products; ``docs/devices.md`` has the table.
"""

from __future__ import annotations

import ctypes
import logging
import math
import platform
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any, ClassVar

from knowledge_compression.cache import kept_finding
from knowledge_compression.errors import BadInput, first_line
from knowledge_compression.heavy import torch
from knowledge_compression.models.spread import Spread
from knowledge_compression.timing import timed

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
PRODUCT_DTYPES = ("auto", "bfloat16", "float32")
_CPU_INFO = Path("/proc/cpuinfo")
_KIND = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")  # lines that distinguish processors
_SIDE, _REPEATS = 1024, 7  # size of the matrix product that measures a device's rate
_SLOW = 1.0  # seconds; bfloat16 on a processor without it takes several for one product
_INT8_SIDE = 512  # size of the product that shows whether int8 is worth using
_CLEARLY = 1.25  # required speed-up, so that the work around the products does not consume the gain


@dataclass(frozen=True)
class Device:
    """A device and its capabilities.

    :meth:`of` determines them once per device; a test that sets another value in :attr:`known` makes any machine take
    any other's path.

    Attributes:
        place: the torch device, e.g. ``cuda:0``.
        name: name of the processor or card, for the record.
        onednn_products: whether oneDNN multiplies float32 faster there than torch's default, MKL, as measured on AMD
            processors with AVX512 (docs/performance.md).
        bfloat16_gain, int8_gain: speed of bfloat16 and of int8 products relative to float32 products, 0 where torch has
            none that are exact; None until it is first needed and measured.
    """

    place: torch.device
    name: str = ""
    onednn_products: bool = False
    bfloat16_gain: float | None = None
    int8_gain: float | None = None

    known: ClassVar[dict[torch.device, Device]] = {}

    @classmethod
    def of(cls, place: torch.device) -> Device:
        """The capabilities of a device, determined once."""
        if place not in cls.known:
            cls.known[place] = cls(place, _name(place), _onednn_is_faster(place))
        return cls.known[place]

    @classmethod
    def named(cls, choice: str | Spread) -> Device:
        """The device that the user typed, see :func:`resolve_device`."""
        return cls.of(resolve_device(choice))

    @property
    def multiplies_bfloat16_faster(self) -> bool:
        """Whether bfloat16 products are clearly faster; measured once for each kind of device and kept in the cache."""
        gain = measured_bfloat16_gain(self) if self.bfloat16_gain is None else self.bfloat16_gain
        return gain > _CLEARLY

    @cached_property
    def multiplies_int8_faster(self) -> bool:
        """Whether int8 products are faster than float32 products of the same integers, whose results are the same."""
        gain = measured_int8_gain(self) if self.int8_gain is None else self.int8_gain
        return gain > 1

    def product_dtype(self, choice: str, stored: torch.dtype, setting: str) -> torch.dtype | None:
        """The dtype of a network's products on this device: the one rule for scoring, calibration and training.

        Args:
            choice: ``float32`` (or ``model``: the network's own dtype), ``bfloat16``, or ``auto``: bfloat16 if the
                device multiplies it clearly faster.
            stored: dtype of the network's weights; if narrower than float32, it is kept.
            setting: the name of the setting, for the error message.

        Returns:
            ``torch.bfloat16``, or None for the network's own dtype.

        Raises:
            BadInput: there is no such choice.
        """
        narrow = stored != torch.float32
        name = product_type(choice, setting, lambda: not narrow and self.multiplies_bfloat16_faster)
        return None if narrow or name is None else torch_dtype(name)


def product_type(choice: str, setting: str, bfloat16_is_faster: Callable[[], bool]) -> str | None:
    """Name of the type in which products of float32 networks are done, see :meth:`Device.product_dtype`.

    Args:
        choice, setting: as there.
        bfloat16_is_faster: examines the device, if ``auto`` depends on it.
    """
    if choice not in (*PRODUCT_DTYPES, "model"):
        raise BadInput(f"{setting}={choice} does not exist; choose one of {', '.join(PRODUCT_DTYPES)}")
    if choice in ("float32", "model"):
        return None
    return "bfloat16" if choice == "bfloat16" or bfloat16_is_faster() else None


def kind_of(choice: str | Spread) -> str:
    """The kind of device that a setting means, ``cpu``, ``cuda`` or ``mps``; torch is imported only if needed.

    Raises:
        BadInput: it is not available here.
    """
    choice = choice.device if isinstance(choice, Spread) else choice
    return "cpu" if choice == "cpu" or (choice == "auto" and not _may_have_gpu()) else resolve_device(choice).type


@cache
def _may_have_gpu() -> bool:
    """Whether torch may find a GPU here: not if it was built without GPU support, or the driver is missing."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    built = run_path(str(Path(spec.origin).with_name("version.py")))  # torch.version, without importing torch
    if sys.platform != "linux" or built.get("hip"):
        return True
    if not built.get("cuda"):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def resolve_device(choice: str | Spread) -> torch.device:
    """The torch device of the user's setting; ``auto`` is the GPU if there is one, and the first of several.

    Raises:
        BadInput: the device is not available.
    """
    choice = choice.device if isinstance(choice, Spread) else choice
    if choice == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(choice)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device={choice} is not available ({first_line(error)}); try device=auto") from None
    return resolved


def check_processes(count: int, choice: str | Spread) -> None:
    """Refuse to share the questions of a run among processes where they cannot have a device each.

    Args:
        count: how many; on a CPU they divide its threads.
        choice: the device that the user typed.

    Raises:
        BadInput: the device is not available, or there are too few.
    """
    place, asked = resolve_device(choice), f"run.processes={count}"
    if count == 1 or (place.type == "cpu" and not isinstance(choice, Spread)):
        return
    if isinstance(choice, Spread):
        raise BadInput(f"{asked} gives each process the whole model, which device_map=auto divides; choose one of them")
    if place.type != "cuda" or place.index is not None:
        raise BadInput(f"{asked} needs as many GPUs, and device={choice} is one; choose device=cuda or device=cpu")
    if count > (there := torch.cuda.device_count()):
        raise BadInput(
            f"{asked} takes a GPU for each, and this machine has {there}; give run.processes={there} or fewer"
        )


def weight_type(choice: str, device: Callable[[], str]) -> str:
    """Name of the weights' dtype; ``auto`` is float32 on a CPU and the checkpoint's own (``auto``) elsewhere.

    Args:
        choice: what the user typed.
        device: returns the kind of device, on which ``auto`` depends.

    Raises:
        BadInput: there is no such choice.
    """
    if choice == "auto":
        return "float32" if device() == "cpu" else "auto"
    if choice not in DTYPES:
        raise BadInput(f"dtype={choice} does not exist; choose one of auto, {', '.join(DTYPES)}")
    return choice


def resolve_dtype(choice: str, place: torch.device) -> torch.dtype | str:
    """The type of the weights on a device, see :func:`weight_type`.

    Raises:
        BadInput: there is no such choice.
    """
    name = weight_type(choice, lambda: place.type)
    return name if name == "auto" else torch_dtype(name)


def torch_dtype(name: str) -> torch.dtype:
    """The type of one of :data:`DTYPES`."""
    found: torch.dtype = getattr(torch, name)
    return found


def multiplied_in(dtype: torch.dtype | None, place: torch.device) -> AbstractContextManager[Any]:
    """Compute products of float32 networks in another dtype until the end of the context; nothing else changes.

    Weights are cast again for each product: the casts take no lasting memory, and a weight that was compressed in
    between is never used in its old form.
    """
    if dtype is None or dtype == torch.float32:  # their own; autocast only warns about it
        return nullcontext()
    return torch.autocast(place.type, dtype, cache_enabled=False)


@contextmanager
def frozen_kept_in(dtype: torch.dtype | None, network: torch.nn.Module) -> Iterator[None]:
    """Keep the frozen float32 weights of linear layers in the dtype of their products, until the context ends.

    Passes under :func:`multiplied_in` then give the same results without casting each weight anew. Autograd would hold
    as many narrow copies from each forward pass to its backward pass. Weights that other modules share are left alone.
    """
    held: dict[torch.Tensor, torch.Tensor] = {}
    if dtype is not None:
        uses = Counter(id(p) for module in network.modules() for p in module.parameters(recurse=False))
        for module in network.modules():
            if type(module) is torch.nn.Linear and "forward" not in vars(module):
                weight = module.weight
                if not weight.requires_grad and weight.dtype == torch.float32 and uses[id(weight)] == 1:
                    held[weight] = weight.data
    try:
        for weight, values in held.items():
            weight.data = values.to(dtype)
        yield
    finally:
        for weight, values in held.items():
            weight.data = values


@contextmanager
def by_bfloat16_units() -> Iterator[None]:
    """Multiply float32 matrices by a CPU's bfloat16 units, if it has some, until the context ends.

    Only for values that bfloat16 holds exactly: others would be rounded in large products and not in small ones. Sums
    are float32. Other devices, and versions of torch without this choice, multiply in float32.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        yield
        return
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def processor() -> dict[str, str]:
    """What Linux reports about the first processor, e.g. ``vendor_id``; elsewhere what Python reports."""
    if not _CPU_INFO.is_file():
        return {"model name": platform.processor() or platform.machine()}
    lines = _CPU_INFO.read_text().split("\n\n")[0].splitlines()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {key: told[key] for key in _KIND if key in told}


def measured_bfloat16_gain(device: Device) -> float:
    """Speed of a device's bfloat16 products relative to float32; measured once, kept in the user's cache."""

    def find() -> float:
        gain = products_a_second(device.place, torch.bfloat16) / products_a_second(device.place, torch.float32)
        log.info("products of bfloat16 are %.2g times as fast as those of float32 on this %s", gain, device.place.type)
        return gain

    return float(kept_finding("bfloat16", [*_circumstances(device), _SIDE], find))


def measured_int8_gain(device: Device) -> float:
    """Speed of a device's int8 products relative to float32; 0 if torch has none there, or none that are exact.

    Without instructions for it (VNNI), oneDNN adds pairs of products in 16 bits on Intel's processors, which overflow
    silently, and multiplies in loops on others (AVX2 alone), which take twenty times as long as float32. The speed is
    measured on processors, once, and kept in the user's cache; elsewhere int8 is taken to be faster.
    """
    place = device.place
    if place.type == "meta" or not is_exact(lambda left, right: torch._int_mm(left, right.T), place):
        return 0.0
    if place.type != "cpu":
        return math.inf
    ones = torch.ones(_INT8_SIDE, _INT8_SIDE, dtype=torch.int8, device=place)
    return gain_of(device, "int8", lambda: torch._int_mm(ones, ones.T), lambda: ones.float() @ ones.float(), _INT8_SIDE)


def gain_of(
    device: Device, name: str, work: Callable[[], torch.Tensor], other: Callable[[], torch.Tensor], *more: Any
) -> float:
    """How many times faster than another way some work is; measured once for each kind of device, kept in the cache.

    Args:
        device: where both are done.
        name, more: what the measurement is kept under, besides the device.
        work, other: the two ways.
    """

    def seconds(product: Callable[[], torch.Tensor]) -> float:
        return min(timed(device.place, product)[0] for _ in range(3))

    def find() -> float:
        gain = seconds(other) / seconds(work)
        log.info("%s products are %.2g times as fast as the other way on this %s", name, gain, device.place.type)
        return gain

    return float(kept_finding(name, [*_circumstances(device), *more], find))


def is_exact(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], place: torch.device) -> bool:
    """Whether ``product(left, right)`` of int8 matrices is ``left @ right.T``, also for the largest integers.

    Args:
        product: returns ``[rows, columns]`` of any type; a refusal counts as not exact.
        place: the device on which it is tried.
    """
    draw = torch.Generator().manual_seed(0)
    for least, step in ((-128, 1), (-128, 255)):  # all integers, and the two ends
        sides = torch.randint(0, 255 // step + 1, (2, _INT8_SIDE, _INT8_SIDE), generator=draw) * step + least
        left, right = sides.to(torch.int8).to(place)
        try:
            found = product(left, right)
        except (RuntimeError, NotImplementedError, AttributeError):
            return False
        if not torch.equal(found.float(), left.float() @ right.float().T):  # no sum reaches 2^24
            return False
    return True


def _circumstances(device: Device) -> list[Any]:
    """What decides how fast a device multiplies."""
    kind = device.name if device.place.type == "cuda" else [device.place.type, processor()]
    return [kind, torch.get_num_threads(), torch.__version__]


def products_a_second(place: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matrix product, the median of a few (one, if it is slow)."""
    a = torch.ones(_SIDE, _SIDE, device=place, dtype=dtype)
    first = timed(place, lambda: a @ a)[0]  # warms up, which is nothing beside a product that is slow
    seconds = [timed(place, lambda: a @ a)[0] for _ in range(_REPEATS)] if first < _SLOW else [first]
    return 2 * _SIDE**3 / statistics.median(seconds)


def _name(place: torch.device) -> str:
    return torch.cuda.get_device_name(place) if place.type == "cuda" else processor().get("model name", place.type)


def _onednn_is_faster(place: torch.device) -> bool:
    return (
        place.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and processor().get("vendor_id") == "AuthenticAMD"
    )
