"""The first paper's compressions, by PyTorch on layers named here one by one, against ours, weight by weight."""

from __future__ import annotations

import re
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from helpers.networks import logits_of, model_inputs
from knowledge_compression.compression.formats.int8_linear import Int8Linear
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.pipeline import Pipeline
from knowledge_compression.models.targets import Target

# What the paper's Table 2 counts as attention, and as feed-forward, in each architecture.
PUBLISHED = {
    "bert": (r"attention\.self\.(query|key|value)$", r"layer\.\d+\.(attention\.output|intermediate|output)\.dense$"),
    "roberta": (r"attention\.self\.(query|key|value)$", r"layer\.\d+\.(attention\.output|intermediate|output)\.dense$"),
    "distilbert": (r"attention\.(q_lin|k_lin|v_lin|out_lin)$", r"ffn\.lin[12]$"),
    "t5": (r"Attention\.[qkvo]$", r"DenseReluDense\.w\w+$"),
    "llama": (r"self_attn\.[qkvo]_proj$", r"mlp\.(gate|up|down)_proj$"),
    "opt": (r"self_attn\.(q|k|v|out)_proj$", r"\.fc[12]$"),
    "albert": (r"attention\.(query|key|value|dense)$", r"(ffn|ffn_output)$"),
}


@pytest.mark.parametrize("sparsity", [0.2, 0.4, 0.9])
@pytest.mark.parametrize("part", ["att", "ff"])
@pytest.mark.parametrize("architecture", PUBLISHED)
def test_masks_are_those_of_torch_on_the_layers_that_the_paper_names(architecture, part, sparsity, tiny_model):
    model = tiny_model(architecture)
    theirs = deepcopy(model.network)
    wanted = re.compile(PUBLISHED[architecture][("att", "ff").index(part)])
    linears = {name: module for name, module in theirs.named_modules() if isinstance(module, nn.Linear)}
    named = [(module, "weight") for name, module in linears.items() if wanted.search(name)]
    assert named
    prune.global_unstructured(named, prune.L1Unstructured, amount=sparsity)

    roles = ["encoder_att", "decoder_self_att", "cross_att"] if part == "att" else ["ff"]
    Magnitude(sparsity).compress(model, Target(part, roles, reading="paper").select(model), None)
    for name, module in model.network.named_modules():
        if isinstance(module, nn.Linear):
            assert torch.equal(module.weight, linears[name].weight), name


# The final layer of each: left out where everything is pruned, and quantized with the rest.
FINAL = {"bert": "cls.predictions.decoder", "roberta": "lm_head.decoder", "distilbert": "vocab_projector"} | {
    "albert": "predictions.decoder"
}


@pytest.mark.parametrize("part", ["att", "ff", "overall"])
@pytest.mark.parametrize("architecture", PUBLISHED)
def test_pruned_and_then_quantized_is_torchs_to_the_integer(architecture, part, tiny_model):
    model = tiny_model(architecture)
    theirs = deepcopy(model.network).requires_grad_(requires_grad=False)
    final = FINAL.get(architecture, "lm_head")
    linears = {name: module for name, module in theirs.named_modules() if isinstance(module, nn.Linear)}
    assert final in linears
    if part == "overall":
        to_prune, to_quantize = linears.keys() - {final}, linears.keys()
    else:
        wanted = re.compile(PUBLISHED[architecture][("att", "ff").index(part)])
        to_prune = to_quantize = {name for name in linears if wanted.search(name)}
    in_order = [(linears[name], "weight") for name in linears if name in to_prune]
    prune.global_unstructured(in_order, prune.L1Unstructured, amount=0.4)
    for module, name in in_order:
        prune.remove(module, name)
    theirs = torch.ao.quantization.quantize_dynamic(
        theirs, dict.fromkeys(to_quantize, torch.ao.quantization.default_dynamic_qconfig), dtype=torch.qint8
    )

    roles = {"att": ["encoder_att", "decoder_self_att", "cross_att"], "ff": ["ff"]}
    everything = [*roles["att"], *roles["ff"], "transform"]
    target = Target(part, roles.get(part, everything), final_when_quantized=part == "overall", reading="paper")
    Pipeline([Magnitude(0.4), Int8Dynamic("per_tensor")]).compress(model, target.select(model), None)
    ours = dict(model.network.named_modules())
    assert {name for name, module in ours.items() if isinstance(module, Int8Linear)} == set(to_quantize)
    for name in to_quantize:
        weight = theirs.get_submodule(name).weight()
        assert torch.equal(ours[name].weight_int8, weight.int_repr()), name
        assert float(ours[name].weight_scale) == pytest.approx(weight.q_scale()), name
    with torch.no_grad():
        difference = logits_of(model) - theirs(**model_inputs(model)).logits
    assert difference.abs().lt(1e-4).float().mean() > 0.9  # one flipped integer of an activation moves a whole token
