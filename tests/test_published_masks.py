"""The first paper's pruning, carried out by PyTorch on layers named here one by one, against ours, weight by weight."""

from __future__ import annotations

import re
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from knowledge_compression.compression.methods.magnitude import Magnitude
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
