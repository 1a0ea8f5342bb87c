"""Models of today by name: each has its published sizes, and is planned from them without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig

from helpers.every_type import make
from helpers.experiments import made
from helpers.places import CONF, EXHAUSTIVE, TESTS
from knowledge_compression.evaluation.atlas import Atlas
from knowledge_compression.evaluation.perplexity import Perplexity
from knowledge_compression.models import Model, Target
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.targets import linear_layers
from knowledge_compression.results.store import RunStore
from knowledge_compression.sweeping.forecast import Forecaster
from knowledge_compression.sweeping.rehearsal import multiply_adds, reached

FROM_THE_HUB = sorted(path.stem for path in (CONF / "model").glob("[a-z]*.yaml") if "hub_id:" in path.read_text())
SIZES: dict[str, dict[str, Any]] = yaml.safe_load((TESTS / "published_sizes.yaml").read_text())
QUICK = ("qwen3_0_6b", "olmoe")
# Networks of the same type are planned alike: the smallest stands for all of them.
SMALLEST = {
    of["config"]["model_type"]: name for name, of in sorted(SIZES.items(), key=lambda item: -item[1]["parameters"])
}


def written(name: str, folder: Path, blocks: int | None = None) -> LocalModel:
    """The published configuration with a tokenizer, and no weights; with so many blocks, if it says how many."""
    kinds = {"mt5": "pieces_ended", "modernbert": "bytes_masked"}
    tokenizer = make(kinds.get(SIZES[name]["config"]["model_type"], "bytes"))
    config = dict(SIZES[name]["config"])
    if blocks and "num_hidden_layers" in config:
        config["num_hidden_layers"] = blocks
    ids = {"pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    AutoConfig.for_model(config.pop("model_type"), **config, **ids).save_pretrained(folder / name)
    told = json.loads((folder / name / "config.json").read_text())
    (folder / name / "config.json").write_text(json.dumps(told | config))  # transformers drops some of it
    tokenizer.save_pretrained(folder / name)
    return LocalModel(name, str(folder / name))


@pytest.mark.parametrize("name", SIZES)
def test_its_network_has_as_many_numbers_as_published(name: str, tmp_path: Path) -> None:
    skeleton = written(name, tmp_path).skeleton()
    assert skeleton.parameter_count() == SIZES[name]["parameters"]
    experts = sum(layer.parameters for layer in linear_layers(skeleton) if layer.role == "experts")
    assert experts == SIZES[name].get("experts", 0)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in (SIZES if EXHAUSTIVE else SMALLEST.values())
    ],
)
def test_it_is_planned_without_a_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    # One block is planned as the next, and eight hold a whole round of any pattern that they follow.
    source, sizes = written(name, tmp_path, None if EXHAUSTIVE else 8), SIZES[name]
    skeleton: Model = source.skeleton()
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.raw.txt").write_text("The capital of France is Paris. " * 40)
    text = Perplexity(window=64, limit=2, data_dir=str(tmp_path))
    masked = sizes["config"]["model_type"] == "modernbert"
    asked = Atlas(relations=["capital_of"], limit=2)
    experiment = made(tmp_path / name, {"atlas": asked} if masked else {"perplexity": text})
    target = Target("all", ["encoder_att", "decoder_self_att", "cross_att", "ff", "experts"])
    experiment = type(experiment)(**vars(experiment) | {"target": target, "dtype": "bfloat16"})
    first, *_ = Forecaster(RunStore(tmp_path / "runs"), rate=1e12).of(experiment, name)
    assert not first.unknown and first.memory > 2 * skeleton.parameter_count()  # all weights, two bytes each
    layers = linear_layers(skeleton)
    idle = 1 - sizes["active"] / sizes["of"] if "of" in sizes else 0.0
    active = sum(layer.parameters * (1 - idle * (layer.role == "experts")) for layer in layers)
    assert multiply_adds(skeleton, reached(skeleton)(1)) == pytest.approx(active, rel=1e-6)
    assert first.macs > 0
    if not masked:
        assert first.macs < 1.1 * 2 * 64 * active  # two windows; only scored tokens pass the head
    assert torch.device("meta") == next(skeleton.network.parameters()).device


def test_the_list_of_today_is_there() -> None:
    assert len(SIZES) >= 35 and SIZES.keys() <= set(FROM_THE_HUB)
