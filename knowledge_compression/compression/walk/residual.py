"""The residual stream of a network: which norms and matrices read it, which write it, and its rotation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, TargetLayer
from knowledge_compression.models.families import DECODER, ENCODER, FINAL
from knowledge_compression.models.targets import linear_layers

CLOSE = 1e-4  # difference of logits, relative to the largest
_TOKENS = 12


@dataclass
class Norm:
    """A norm of the residual stream.

    Attributes:
        path, module: the norm.
        offset: its factors are its weight plus this: 1 for Gemma's, otherwise 0.
        output: its output, kept so that no other tensor takes its place in memory.
        readers: the matrices that read its output.
    """

    path: str
    module: Any
    offset: float
    output: Tensor
    readers: list[TargetLayer] = field(default_factory=list)

    @property
    def factors(self) -> Tensor:
        """Float64 ``[hidden]``."""
        return self.module.weight.detach().double() + self.offset


def rotate_stream(model: Model, rotation: Tensor) -> None:
    """Rotate the residual stream of a network by an orthogonal matrix, by changing only its weights.

    Everything is computed and checked in float32; narrower weights are rounded to their own types at the end.

    Args:
        model: the model, whose head is not tied.
        rotation: ``Q``, float64 ``[hidden, hidden]``; a state ``x`` of the stream becomes ``x Q``.

    Raises:
        BadInput: the network does more with its stream than RMS norms, matrix products and sums; the model is
            unchanged.
    """
    embeddings: Any = model.network.get_input_embeddings()
    ids = torch.arange(_TOKENS, device=model.device)[None] % len(embeddings.weight)
    with torch.no_grad(), _in_float32(model.network) as own:
        norms, before = _traced(model, ids)
        readers = {layer.path for norm in norms for layer in norm.readers}
        hidden = len(rotation)
        writers = [
            layer for layer in linear_layers(model)
            if layer.path not in readers and layer.role != FINAL and len(layer.weight) == hidden
        ]  # fmt: skip
        changed = [embeddings.weight, *(norm.module.weight for norm in norms)]
        changed += [layer.parameter for norm in norms for layer in norm.readers] + [w.parameter for w in writers]
        changed += [layer.bias_parameter for layer in writers if layer.bias_parameter is not None]
        kept = {parameter: parameter.detach().to(own.get(parameter), copy=True) for parameter in changed}
        turn = rotation.to(model.device)

        _write(embeddings.weight, lambda weight: weight @ turn)
        for norm in norms:
            for layer in norm.readers:
                _write(layer.weight, partial(_folded, factors=norm.factors, turn=turn))
            norm.module.weight.fill_(1 - norm.offset)
        for layer in writers:
            _write(layer.weight, lambda weight: turn.T @ weight)
            if layer.bias is not None:
                _write(layer.bias, lambda bias: bias @ turn)
        after = _logits(model, ids)
        if not float((after - before).abs().max()) <= CLOSE * float(before.abs().max().clamp(min=1.0)):
            for parameter, values in kept.items():
                parameter.copy_(values)
            raise BadInput(
                f"compression=rotate cannot rotate the residual stream of {model.name} "
                f"({model.network.config.model_type}): its answers would not stay the same"
            )


@contextmanager
def _in_float32(network: nn.Module) -> Iterator[dict[Tensor, torch.dtype]]:
    """Keep narrower parameters and buffers in float32 until the context ends; yields their own types."""
    floats = (tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point())
    own = {tensor: tensor.dtype for tensor in floats if tensor.itemsize < torch.float32.itemsize}
    try:
        for tensor in own:
            tensor.data = tensor.data.float()
        yield own
    finally:
        for tensor, dtype in own.items():
            tensor.data = tensor.data.to(dtype)


def _write(weight: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    weight.copy_(change(weight.double()))


def _folded(weight: Tensor, factors: Tensor, turn: Tensor) -> Tensor:
    return (weight * factors) @ turn


def _logits(model: Model, ids: Tensor) -> Tensor:
    network: Any = model.network
    if model.family == ENCODER:
        logits = network(input_ids=ids).logits
    elif model.family == DECODER:
        logits = network(input_ids=ids, use_cache=False).logits
    else:
        logits = network(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits
    return torch.as_tensor(logits).detach().float().clone()


def _traced(model: Model, ids: Tensor) -> tuple[list[Norm], Tensor]:
    """The norms of the stream, each with its readers, and the logits.

    A norm is recognised by what it computes. A matrix reads a norm if its input is the norm's output, the same tensor
    in memory; the head reads the last norm, whose output some networks scale first.
    """
    hidden = model.text_config.hidden_size
    layers = linear_layers(model)
    holders: dict[str, list[TargetLayer]] = {}
    for layer in layers:
        holders.setdefault(layer.holder, []).append(layer)
    norms: list[Norm] = []
    alive: list[Tensor] = []  # kept alive, so that no address is used twice
    hooks = []

    def norm_ran(path: str, module: nn.Module, args: Any, output: Any) -> None:
        alive.extend([args[0], output])
        norms.append(Norm(path, module, _offset(path, module, args[0], output, model), output))

    def matrix_ran(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        values = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if values is None:
            return
        alive.append(values)
        for norm in norms:
            if norm.output.data_ptr() == values.data_ptr() and norm.output.numel() == values.numel():
                norm.readers += [layer for layer in holders[path] if layer.weight.shape[1] == hidden]

    for path, module in model.network.named_modules():
        weight = module._parameters.get("weight")
        if path in holders:
            hooks.append(module.register_forward_hook(_with(matrix_ran, path), with_kwargs=True))
        elif weight is not None and weight.dim() == 1 and len(weight) == hidden:
            hooks.append(module.register_forward_hook(_with(norm_ran, path)))
    try:
        logits = _logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    heads = [layer for layer in layers if layer.role == FINAL]
    found = {layer.path for norm in norms for layer in norm.readers}
    if norms and not norms[-1].readers:
        norms[-1].readers += [layer for layer in heads if layer.path not in found]
    idle = next((norm for norm in norms if not norm.readers), None)
    if idle is not None or not norms:
        what = f"the output of {idle.path} is not read only by matrices" if idle else "it has no norms of that width"
        raise BadInput(f"compression=rotate cannot rotate the residual stream of {model.name}: {what}")
    return norms, logits


def _with(function: Callable[..., None], path: str) -> Callable[..., None]:
    return lambda *args: function(path, *args)


def _offset(path: str, module: Any, values: Tensor, output: Tensor, model: Model) -> float:
    """The constant that is added to a norm's weight.

    Raises:
        BadInput: it is not an RMS norm.
    """
    if getattr(module, "bias", None) is None:
        scaled = values.double() / values.double().square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt()
        for offset in (0.0, 1.0):
            if torch.allclose(scaled * (module.weight.double() + offset), output.double(), rtol=1e-2, atol=1e-3):
                return offset
    raise BadInput(
        f"compression=rotate cannot rotate the residual stream of {model.name} ({model.network.config.model_type}): "
        f"{path} subtracts the mean or adds a bias; it takes networks with RMS norms before their "
        "matrices, such as LLaMA, Qwen, Mistral and T5"
    )
