"""CUDA devices for machines that have none: memory of the processor that says it lies on ``cuda:N``.

:func:`begin` gives the process some. From then on ``device=cuda`` and ``device_map=auto`` do here what they do on a
machine with GPUs, but that the processor's kernels do the work: so what mixes devices, or asks a GPU for what it has
not, fails as it would there. Speed, rounding and kernels of a real GPU are not tried.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import warnings
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

SOURCE = Path(__file__).with_name("stand_in_gpu.cpp")
kernels = torch.library.Library("aten", "IMPL", "CUDA")  # those of which a processor has none
NAME = "stand-in for a GPU"


@cache
def library() -> Path:
    """The compiled stand-in; compiled once for each version of it and of torch. Needs g++."""
    folder = Path(torch.__file__).parent
    known = sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    made = SOURCE.parent / "__pycache__" / f"stand_in_gpu-{known}.so"  # where nobody else may put one
    if not made.is_file():
        made.parent.mkdir(exist_ok=True)
        scratch = made.with_suffix(f".{os.getpid()}")
        headers = [f"-I{folder / 'include' / part}" for part in ("", "torch/csrc/api/include")]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O1", "-w", abi, *headers, str(SOURCE), "-o", str(scratch)]
        subprocess.run([*command, f"-L{folder / 'lib'}", "-lc10", "-ltorch_cpu"], check=True)
        scratch.rename(made)
    return made


def _efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    sums: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """CUDA's kernel of this name by its definition; it takes a bias whose rows begin at multiples of 16 bytes."""
    assert sums and not dropout and (bias is None or not causal)
    if bias is not None and any(stride * bias.element_size() % 16 for stride in bias.stride()[:-1]):
        raise RuntimeError("attn_bias is not correctly aligned")
    scores = (query @ key.transpose(-1, -2)).float() * scale + (0.0 if bias is None else bias)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    padded = torch.nn.functional.pad(scores.logsumexp(-1), (0, -query.shape[2] % 32), value=torch.inf)
    number = torch.zeros((), dtype=torch.int64, device=query.device)
    return scores.softmax(-1).to(value.dtype) @ value, padded, number, number


def begin(count: int = 1, memory: int = 4 << 30) -> None:
    """Give this process so many, each with so many bytes of memory; it keeps them."""
    gpus = ctypes.CDLL(str(library()))
    for counted in (gpus.stand_in_used, gpus.stand_in_peak):
        counted.restype = ctypes.c_int64
    gpus.stand_in_begin(count, ctypes.c_int64(memory))

    def index(device: Any = None) -> int:
        if device is None:
            return int(gpus.stand_in_selected())
        found = device if isinstance(device, int) else torch.device(device).index
        return int(gpus.stand_in_selected()) if found is None else int(found)

    def exchange(device: int) -> int:
        before = index()
        gpus.stand_in_select(device)
        return before

    def free(device: Any = None) -> tuple[int, int]:
        return memory - gpus.stand_in_used(index(device)), memory

    properties = SimpleNamespace(name=NAME, total_memory=memory, major=8, minor=0, multi_processor_count=1)
    for name, made in {
        "_initialized": True,
        "_lazy_init": lambda: None,
        "_exchange_device": exchange,
        "_maybe_exchange_device": lambda device: index() if device < 0 else exchange(device),
        "current_device": index,
        "device_count": lambda: count,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_name": lambda device=None: NAME,
        "get_device_properties": lambda device=None: properties,
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "max_memory_allocated": lambda device=None: gpus.stand_in_peak(index(device)),
        "mem_get_info": free,
        "memory_allocated": lambda device=None: gpus.stand_in_used(index(device)),
        "memory_reserved": lambda device=None: gpus.stand_in_used(index(device)),
        "reset_peak_memory_stats": lambda device=None: gpus.stand_in_forget_peak(index(device)),
        "set_device": lambda device: gpus.stand_in_select(index(device)),
        "synchronize": lambda device=None: None,
    }.items():
        for module in (torch.cuda, torch.cuda.random):  # which has some of them under its own names
            if hasattr(module, name):
                setattr(module, name, made)

    def copied(tensor: torch.Tensor, memo: dict[int, Any]) -> Any:
        if not tensor.is_cuda:
            return as_it_is(tensor, memo)
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it takes the place of a kernel that only says there is none
        kernels.impl("_scaled_dot_product_efficient_attention", _efficient_attention)
    as_it_is = torch.Tensor.__deepcopy__
    torch.Tensor.__deepcopy__ = copied  # the storage of a GPU is not made in builds of torch for processors
    torch.cuda.default_generators = tuple(torch.Generator(f"cuda:{device}") for device in range(count))
