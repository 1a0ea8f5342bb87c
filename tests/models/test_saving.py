"""Saved models read back to the same logits, whatever was done to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.networks import build_network, logits_of
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.corpora.own_samples import OwnSamples
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.suite import Evaluation, item_table
from knowledge_compression.experiment import Experiment
from knowledge_compression.models import Model, Target
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.saving import save_checkpoint
from knowledge_compression.recovery.none import NoRecovery
from knowledge_compression.results.store import RunStore
from knowledge_compression.results.tracker import NoTracker

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def prune_by_half(model: Model) -> None:
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(parameter.abs() > parameter.abs().median())


@pytest.mark.parametrize("untied", [False, True])
def test_round_trip_of_every_architecture(any_tiny_model: Model, untied: bool, tmp_path: Path) -> None:
    model = any_tiny_model
    if untied:
        model.untie_head()
        with torch.no_grad():  # so that a head tied again on the way would be seen
            model.network.get_submodule(model.architecture.final).weight.mul_(1.5).add_(0.1)
    prune_by_half(model)
    before = logits_of(model)
    save_checkpoint(model, tmp_path / "model")

    plain = type(model.network).from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert torch.equal(logits_of(Model(plain, model.tokenizer, "plain")), before)

    ours = LocalModel("ours", str(tmp_path / "model")).load("cpu")
    ours.network.tie_weights()  # lm-eval does
    assert torch.equal(logits_of(ours), before)
    assert ours.head_is_tied == model.head_is_tied


@pytest.mark.parametrize(
    ("architecture", "scaled", "older"),
    [
        ("llama", {}, {"rope_theta": 77777.0}),
        ("llama", LLAMA_3, {"rope_theta": 77777.0, "rope_scaling": LLAMA_3}),
        ("gpt_neox", LLAMA_3, {}),  # beside which version 5 would read another base
        ("bert", None, {}),  # has none
    ],
)
def test_rotary_embeddings_are_also_stated_as_transformers_4_reads_them(
    architecture: str, scaled: dict[str, Any] | None, older: dict[str, Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    told = {} if scaled is None else {"rope_parameters": {"rope_type": "default"} | scaled | {"rope_theta": 77777.0}}
    model = Model(build_network(architecture, **told), tiny_tokenizer, "tiny")
    save_checkpoint(model, tmp_path / "model")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert {key: written[key] for key in ("rope_theta", "rope_scaling") if key in written} == older
    plain = type(model.network).from_pretrained(tmp_path / "model")
    assert getattr(plain.config, "rope_parameters", None) == getattr(model.network.config, "rope_parameters", None)
    assert torch.equal(logits_of(Model(plain.eval(), tiny_tokenizer, "plain")), logits_of(model))


def test_a_t5_with_a_head_of_its_own_keeps_its_scaling(tiny_model: Callable[[str], Model], tmp_path: Path) -> None:
    """Flan-T5 has an untied head and unscaled decoder states; T5 has both the other way round."""
    tokenizer = tiny_model("t5").tokenizer
    model = Model(build_network("t5", tie_word_embeddings=False), tokenizer, "flan")
    with torch.no_grad():
        model.network.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.network.lm_head.weight))
    model.keep_head_untied()
    before = logits_of(model)
    save_checkpoint(model, tmp_path / "model")
    again = LocalModel("again", str(tmp_path / "model")).load("cpu")
    again.network.tie_weights()
    assert torch.equal(logits_of(again), before)


def test_untying_leaves_nothing_else_apart(any_tiny_model: Model) -> None:
    """Parameters that were shared besides the head stay shared: untying costs one matrix, no more."""
    model = any_tiny_model
    before, was_tied = model.parameter_count(), model.head_is_tied
    model.untie_head()
    head = model.network.get_submodule(model.architecture.final)
    assert model.parameter_count() - before == (head.weight.numel() if was_tied else 0)
    assert not model.head_is_tied


def test_nothing_is_written_of_a_model_with_nan(tiny_model: Callable[[str], Model], tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.network.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        save_checkpoint(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
def test_int8_layers_are_saved_as_the_floats_they_stand_for(
    architecture: str, tiny_model: Callable[[str], Model], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(architecture)
    all_layers = Target("all", ["encoder_att", "decoder_self_att", "cross_att", "ff"])
    targets = all_layers.select(model)
    before = logits_of(model)
    Int8Dynamic("per_channel").compress(model, targets, None)
    save_checkpoint(model, tmp_path / "model")
    assert "does not round its activations" in caplog.text
    again = LocalModel("again", str(tmp_path / "model")).load("cpu")
    for layer in all_layers.select(again):
        assert torch.equal(layer.weight, model.network.get_submodule(layer.path).weight)  # type: ignore[arg-type]
    assert 0 < (logits_of(again) - before).norm() < 0.05 * before.norm()


def test_saving_again_replaces(tiny_model: Callable[[str], Model], tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    save_checkpoint(model, tmp_path / "model")
    prune_by_half(model)
    save_checkpoint(model, tmp_path / "model")
    again = LocalModel("again", str(tmp_path / "model")).load("cpu")
    assert torch.equal(logits_of(again), logits_of(model))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_tokenizer_comes_along(tiny_model: Callable[[str], Model], tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_checkpoint(model, tmp_path / "model")
    again = LocalModel("again", str(tmp_path / "model")).load("cpu")
    assert again.tokenizer("the capital of france").input_ids == model.tokenizer("the capital of france").input_ids


@dataclass(frozen=True)
class Tiny:
    """A model source without files."""

    make: Callable[[], Model] = field(compare=False)
    name: str = "tiny"

    def load(self, device: str = "auto", dtype: str = "auto") -> Model:
        return self.make()

    def skeleton(self) -> Model:
        return self.make()

    def tokenizer(self) -> Any:
        return self.make().tokenizer

    def fingerprint(self) -> str:
        return "tiny"


@dataclass(frozen=True)
class OneQuestion:
    """An evaluation suite with one item."""

    def evaluate(self, scorer: Scorer) -> Evaluation:
        return Evaluation({"sum": float(logits_of(scorer.model).sum())}, item_table([{"id": "one", "task": "sum"}]))


def test_a_run_keeps_its_model_where_asked(tiny_model: Callable[[str], Model], tmp_path: Path) -> None:
    experiment = Experiment(
        source=Tiny(lambda: tiny_model("llama")),
        target=Target("final", ["final"]),
        compression=Magnitude(sparsity=0.5),
        recovery=NoRecovery(),
        corpus=OwnSamples(),
        suites={"one": OneQuestion()},
        save_model=True,
    )
    store = RunStore(tmp_path)
    run = experiment.run(store, NoTracker())
    assert run.folder is not None
    saved = LocalModel("saved", str(run.folder / "model")).load("cpu")
    assert float(logits_of(saved).sum()) == run.metrics["one.sum"]
    assert (saved.network.lm_head.weight == 0).float().mean() == 0.5
    assert not (tmp_path / "unfinished").exists()

    shutil.rmtree(run.folder / "model")  # a run that was done without its model is done again
    assert (experiment.run(store, NoTracker()).folder / "model" / "config.json").is_file()  # type: ignore[operator]
    assert not experiment.dense().save_model


def test_a_run_is_done_again_for_another_form(tiny_model: Callable[[str], Model], tmp_path: Path) -> None:
    experiment = Experiment(
        source=Tiny(lambda: tiny_model("llama")),
        target=Target("att", ["decoder_self_att"]),
        compression=Rtn(bits=4, scale_bits=16),
        recovery=NoRecovery(),
        corpus=OwnSamples(),
        suites={"one": OneQuestion()},
        save_model="gptq",
    )
    store, sums = RunStore(tmp_path), set()
    for form in ("gptq", True, "compressed-tensors"):
        asked = replace(experiment, save_model=form)
        assert asked.id == experiment.id and not asked.is_done(store)
        run = asked.run(store, NoTracker())
        assert asked.is_done(store) and run.report["saved_as"] == form
        config = json.loads((run.folder / "model" / "config.json").read_text())  # type: ignore[operator]
        assert config.get("quantization_config", {}).get("quant_method", True) == form
        sums.add(run.metrics["one.sum"])
    assert len(sums) == 1
    with pytest.raises(BadInput, match="compression=magnitude makes no codes that gptq can hold"):
        replace(experiment, compression=Magnitude(sparsity=0.5)).run(RunStore(tmp_path / "other"), NoTracker())
    assert not (tmp_path / "other").exists()
    with pytest.raises(BadInput, match="did you mean gptq"):
        replace(experiment, save_model="gptk")
