"""The speed of this machine for a kind of network: multiply-adds per second of one block, timed."""

from __future__ import annotations

from copy import deepcopy
from statistics import median
from typing import Any

import torch

from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.scoring.ways import FASTEST
from knowledge_compression.experiment import Experiment
from knowledge_compression.memory import reuse_freed_memory
from knowledge_compression.models import Model
from knowledge_compression.models.device import resolve_device, resolve_dtype
from knowledge_compression.models.families import ENCODER_DECODER
from knowledge_compression.models.pretrained import auto_class
from knowledge_compression.sweeping.rehearsal import counting, multiply_adds
from knowledge_compression.timing import timed

_DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
_VOCABULARY = 256  # of the measured block
_PROBED = (8, 128)  # rows and tokens of the measured pass, which fill a CPU's batch
_PASSES, _PROBING = 3, 2.0  # minimum of both, passes and seconds, because other work comes and goes


def measured_rate(experiment: Experiment, skeleton: Model) -> float:
    """Multiply-adds per second of one uncompressed block of true width, on the run's device and in its precision."""
    device = resolve_device(experiment.device)
    if device.type == "cpu":
        reuse_freed_memory()  # as the run will
    config = deepcopy(skeleton.network.config)
    _cut_to_one_block(config)
    with torch.random.fork_rng([]):
        network = auto_class(config).from_config(config, dtype=weights_dtype(experiment, skeleton)).to(device).eval()
    ids = torch.randint(_VOCABULARY, _PROBED, device=device)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if skeleton.family == ENCODER_DECODER else {})
    block = Model(network, skeleton.tokenizer, skeleton.name)
    with counting(block) as tokens, torch.inference_mode():
        network.base_model(**inputs)
    macs = multiply_adds(block, tokens)
    passes: list[float] = []
    with torch.inference_mode(), Scorer(block, dtype=experiment.scored_in, ways=FASTEST).products():
        while sum(passes) < _PROBING or len(passes) < _PASSES:
            passes.append(timed(device, lambda: network.base_model(**inputs))[0])
    return macs / median(passes)


def _cut_to_one_block(config: Any) -> None:
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            _cut_to_one_block(getattr(config, name))
    config.update({name: 1 for name in _DEPTHS if getattr(config, name, None)})
    if getattr(config, "vocab_size", None):
        config.update({"vocab_size": _VOCABULARY, "pad_token_id": 0})
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]


def weights_dtype(experiment: Experiment, skeleton: Model) -> torch.dtype:
    """The dtype in which a run holds the weights of its model."""
    chosen: Any = resolve_dtype(experiment.dtype, resolve_device(experiment.device))
    own: Any = skeleton.network.config.dtype
    return chosen if isinstance(chosen, torch.dtype) else own or torch.float32
