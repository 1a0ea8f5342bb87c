"""Transformer blocks compiled by ``torch.compile``, so that what lies between matrix products becomes few loops.

Norms, rotary embeddings, gates and additions take more time than the products where a processor multiplies narrow
matrices by units of their own. Equal blocks share their compiled code, and it is kept on the disk in the cache folder;
what remains in each process is tracing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from knowledge_compression.cache import cache_folder
from knowledge_compression.errors import first_line
from knowledge_compression.heavy import torch
from knowledge_compression.models.bodies import without_adapters
from knowledge_compression.models.families import architecture_of

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

_BACKEND: Any = "inductor"  # makes loops of C++, or kernels on a GPU
_FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # the variable that names the folder of generated code; if unset, torch sets it
_MOST_KINDS = 64  # versions of a block's code: layers that are compressed in part differ, as do shapes


class Blocks:
    """Calls compiled blocks. If compiling fails, they run as they are from then on.

    Attributes:
        failure: why they do not run compiled, in one line; None as long as they do.
    """

    def __init__(self) -> None:
        self.failure: str | None = None

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(_forward, backend=_BACKEND)

    def run(self, block: nn.Module, *inputs: Any, **named: Any) -> Any:
        """The outputs of a block."""
        if self.failure is None:
            try:
                return self._compiled(block, *inputs, **named)
            except torch._dynamo.exc.TorchDynamoException as error:
                self.failure = first_line(getattr(error, "inner_exception", error))
                log.warning("blocks are not compiled from here on: %s", self.failure)
        return _forward(block, *inputs, **named)


def _forward(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    return type(block).forward(block, *inputs, **named)


@contextmanager
def compiled_blocks(network: nn.Module, *, wanted: bool = True) -> Iterator[Blocks]:
    """Let the blocks of a network run compiled until the end of the context, if it is wanted."""
    blocks, inner = Blocks(), without_adapters(network)
    with ExitStack() as ends:
        if wanted:
            ends.enter_context(_settings())
            for path in architecture_of(inner).block_paths(inner):
                block = inner.get_submodule(path)
                if "forward" not in vars(block):  # otherwise part of a divided network, or another program's
                    block.forward = partial(blocks.run, block)
                    ends.callback(delattr, block, "forward")
        yield blocks


@contextmanager
def _settings() -> Iterator[None]:
    """The settings of torch's compiler, until the end of the context."""
    import torch._dynamo
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    chosen = os.environ.get(_FOLDER, default_cache_dir())
    folder = str(cache_folder() / "compiled") if chosen == default_cache_dir() else chosen
    with (
        _variable(_FOLDER, folder),
        torch._dynamo.config.patch(cache_size_limit=_MOST_KINDS),
        # The backward pass is compiled with the forward pass, where a failure is caught.
        functorch.patch(force_non_lazy_backward_lowering=True),
        # One thread, because others would be processes that outlive the compiling; dropout as without compiling.
        inductor.patch(compile_threads=1, fallback_random=True),
    ):
        yield


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment until the end of the context."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
