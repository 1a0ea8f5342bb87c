"""Why int8 with ranges fixed by calibration costs more than int8 with a scale per token, on smollm2.

    python experiments/format_peers/static_inputs.py

Printed are divergences from the dense model (KL, nats a token): first of the program's own methods, then with rounded
inputs and weights as they are, where each linear layer of the blocks rounds its inputs over the range that it saw on
calibration text, or with one scale per token. Last come the widest ranges, beside those without the first token of a
text, which is where smollm2 has its massive activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from study import TEXT
from torch import Tensor, nn

import knowledge_compression as kc

Rounding = Callable[[Tensor], Tensor]
METHODS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("int8_dynamic", {"granularity": "per_channel"}, "all"),
    ("smoothquant", {}, "all"),
    ("int8_static", {}, "all"),
    ("int8_static", {}, "att"),
)


def main() -> None:
    """Print one line for each choice of layers."""
    model = kc.load("smollm2", device="cpu")
    corpus = kc.choose("corpus=self", samples=16, length=128)
    windows = corpus.prepared(model).windows(model)
    ids = model.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    dense = _log_probs(model, ids)
    for method, settings, target in METHODS:
        run = kc.load("smollm2", device="cpu")
        kc.compress(run, kc.choose(f"compression={method}", **settings), kc.choose(f"target={target}"), corpus)
        print(f"{f'{method}, target={target}':60s} {_divergence(dense, _log_probs(run, ids)):8.3g}")
    layers = {
        name: one for name, one in model.network.named_modules() if isinstance(one, nn.Linear) and "layers" in name
    }
    whole, later = _ranges(model, layers, windows, 0), _ranges(model, layers, windows, 1)

    def told(what: str, chosen: Callable[[str], bool], rounding: Callable[[str], Rounding]) -> None:
        made = {name: rounding(name) for name in layers if chosen(name)}
        hooks = [
            layers[name].register_forward_pre_hook(lambda _, given, one=one: (one(given[0]),))
            for name, one in made.items()
        ]
        run = _log_probs(model, ids)
        for hook in hooks:
            hook.remove()
        print(f"inputs alone, {what:46s} {_divergence(dense, run):8.3g}")

    def fixed(bits: int, ranges: dict[str, tuple[float, float]] = whole) -> Callable[[str], Rounding]:
        return lambda name: lambda values: _over(values, *ranges[name], 2**bits - 1)

    told("every layer, a scale per token", lambda _: True, lambda _: _per_token)
    for bits in (7, 8, 10, 12):
        told(f"every layer, fixed ranges, {bits} bits", lambda _: True, fixed(bits))
    told("every layer but down_proj, fixed ranges, 7 bits", lambda name: "down_proj" not in name, fixed(7))
    told("down_proj alone, fixed ranges, 7 bits", lambda name: "down_proj" in name, fixed(7))
    told("every layer, ranges without the first token, 7 bits", lambda _: True, fixed(7, later))
    widest = sorted(layers, key=lambda name: whole[name][0] - whole[name][1])[:6]
    told(f"every layer but {len(widest)} with the widest ranges, 7 bits", lambda name: name not in widest, fixed(7))
    for name in widest:
        print(f"{name}: {_width(whole[name]):.4g}, without the first token {_width(later[name]):.4g}")


def _ranges(model: Any, layers: dict[str, nn.Module], windows: Tensor, start: int) -> dict[str, tuple[float, float]]:
    """The least and greatest input of each layer, and zero, from the given position on."""
    found: dict[str, tuple[float, float]] = dict.fromkeys(layers, (0.0, 0.0))

    def seen(name: str) -> Callable[[Any, Any], None]:
        def hook(_: Any, given: tuple[Tensor, ...]) -> None:
            least, greatest = (float(one) for one in torch.aminmax(given[0][:, start:]))
            found[name] = min(found[name][0], least), max(found[name][1], greatest)

        return hook

    hooks = [layer.register_forward_pre_hook(seen(name)) for name, layer in layers.items()]
    for window in windows:
        _log_probs(model, window[None])
    for hook in hooks:
        hook.remove()
    return found


def _divergence(dense: Tensor, run: Tensor) -> float:
    return float((dense.exp() * (dense - run)).sum(-1).mean())


def _width(range_: tuple[float, float]) -> float:
    return range_[1] - range_[0]


def _over(values: Tensor, least: float, greatest: float, steps: int) -> Tensor:
    """Rounded to steps of a range; what lies outside is clipped."""
    step = (greatest - least) / steps
    zero = round(-least / step)
    return ((values / step + zero).round().clamp(0, steps) - zero) * step


def _per_token(values: Tensor) -> Tensor:
    """Rounded to 127 steps between zero and a token's largest magnitude."""
    step = values.abs().amax(-1, keepdim=True) / 127
    return (values / step).round() * step


def _log_probs(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.network(ids).logits[0].double().log_softmax(-1)
    return found


if __name__ == "__main__":
    main()
