"""int8 layers, compared with float32 and with ``torch.ao.quantization.quantize_dynamic`` on the same work.

    python benchmarks/int8.py --repeats 7

Three pieces of work: the linear layers of a BERT-base (12 blocks; 32 x 32 tokens) one after the other, the forward
pass of a BERT-base-shaped encoder with random weights, and a forward pass of smollm2 with all its linears but the head.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from side_by_side import in_turn, ratio, spread, write
from torch import nn
from transformers import BertConfig, BertForMaskedLM

import knowledge_compression as kc
from knowledge_compression.compression.formats.int8_linear import Int8Linear
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.memory import reuse_freed_memory
from knowledge_compression.models import Model, Target

ROLES = ["encoder_att", "decoder_self_att", "cross_att", "ff"]
ENGINES = ("onednn", "x86")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--work", nargs="+", default=["linears", "bert_base", "smollm2"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    reuse_freed_memory()  # as loading a model does
    torch.manual_seed(0)
    makers = {"linears": linears, "bert_base": bert_base, "smollm2": smollm2}
    result: dict[str, Any] = {}
    for work in options.work:
        contestants = makers[work]()
        with torch.inference_mode():
            in_turn(contestants, 1)  # warms up
            seconds = in_turn(contestants, options.repeats)
        result[work] = {
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "times_float32": {name: ratio(seconds["float32"], v) for name, v in seconds.items() if name != "float32"},
        }
        print(work)
        for name, values in seconds.items():
            faster = ratio(seconds["float32"], values)
            times = f"{faster['median']:.2f}x float32 (rounds {faster['least']:.2f}-{faster['most']:.2f})"
            print(f"  {name:28} {json.dumps(spread(values))}  {times}")
    write("int8", result)


def linears() -> dict[str, Callable[[], Any]]:
    shapes = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    layers = nn.ModuleList(nn.Linear(*shape) for _ in range(12) for shape in shapes)
    inputs = {width: torch.randn(32 * 32, width) for width in (768, 3072)}

    def run(stack: Any) -> Callable[[], Any]:
        return lambda: [layer(inputs[shape[0]]) for layer, shape in zip(stack, shapes * 12, strict=True)]

    ours = {f"ours {g}": run([Int8Linear.of(layer, g) for layer in layers]) for g in ("per_tensor", "per_channel")}
    theirs = {f"quantize_dynamic {e}": run(quantize_dynamic(layers, e)) for e in ENGINES}
    return {"float32": run(layers), **ours, **theirs}


def bert_base() -> dict[str, Callable[[], Any]]:
    network = BertForMaskedLM(BertConfig()).eval()
    ids = torch.randint(1000, 30000, (32, 32))
    return contestants_of(Model(network, None, "bert_base"), lambda net: lambda: net.bert(ids))  # type: ignore[arg-type]


def smollm2() -> dict[str, Callable[[], Any]]:
    model = kc.choose("model=smollm2").load("cpu")
    ids = torch.randint(1000, 30000, (8, 128))
    return contestants_of(model, lambda net: lambda: net.model(ids, use_cache=False))


def contestants_of(model: Model, run: Callable[[Any], Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    contestants = {"float32": run(model.network)}
    for granularity in ("per_tensor", "per_channel"):
        twin = Model(copy.deepcopy(model.network), model.tokenizer, model.name)
        Int8Dynamic(granularity).compress(twin, Target("all", ROLES).select(twin), None)
        contestants[f"ours {granularity}"] = run(twin.network)
    targets = {layer.path for layer in Target("all", ROLES).select(model)}
    for engine in ENGINES:
        network = copy.deepcopy(model.network)
        for path in targets:
            quantized = quantize_dynamic(nn.Sequential(network.get_submodule(path)), engine)[0]
            network.set_submodule(path, quantized)
        contestants[f"quantize_dynamic {engine}"] = run(network)
    return contestants


def quantize_dynamic(layers: nn.Module, engine: str) -> Any:
    torch.backends.quantized.engine = engine  # decides how the weights are packed, and that who multiplies them
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(layers), {nn.Linear}, dtype=torch.qint8)


if __name__ == "__main__":
    main()
