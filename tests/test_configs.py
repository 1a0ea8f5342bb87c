"""Every file under conf/ composes and instantiates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from helpers.shipped import NEEDED, one_of_each_kind, shipped
from knowledge_compression.configuration import experiment_from, tracker_from
from knowledge_compression.errors import BadInput
from knowledge_compression.models.loading import HubModel
from knowledge_compression.sweeping.cli import CONF


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=list(overrides), return_hydra_config=True)
    return config, config.hydra.runtime.choices


@pytest.mark.slow
@pytest.mark.parametrize(  # for the other groups, and for presets, see test_combinations.py
    "choice", [*one_of_each_kind("model"), *shipped("target")]
)
def test_every_choice_makes_an_experiment(choice):
    experiment = experiment_from(*composed(choice, *NEEDED.get(choice, [])))
    group, name = choice.split("=")
    assert experiment.choices[group] == name


def test_every_model_of_the_hub_is_named_and_trusted_with_nothing():
    """Read without Hydra, for which one of them stands for all."""
    files = {path.name: yaml.safe_load(path.read_text()) for path in (CONF / "model").glob("*.yaml")}
    from_the_hub = [settings for name, settings in files.items() if "hub_id" in settings and name != "_hub.yaml"]
    assert len(from_the_hub) > 40
    for settings in from_the_hub:
        bases = [files[f"{base}.yaml"] for base in settings.pop("defaults", []) if base != "_self_"]
        source = instantiate({name: value for part in (*bases, settings) for name, value in part.items()})
        assert isinstance(source, HubModel) and source.name and source.revision
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.hub_id)
        assert not source.allow_pickle and not source.trust_remote_code


@pytest.mark.parametrize("choice", shipped("eval"))
def test_every_suite_makes_an_experiment(choice, data_dir):
    name = choice.split("=")[1]
    config, choices = composed(f"eval=[{name}]", f"data_dir={data_dir}", *NEEDED.get(choice, []))
    assert list(experiment_from(config, choices).suites)


@pytest.mark.slow
@pytest.mark.parametrize("choice", shipped("tracker"))
def test_every_tracker_can_be_made(choice, monkeypatch):
    monkeypatch.setattr("wandb.login", lambda **_: True)  # which starts W&B's own process; see test_tracker.py
    config, _ = composed(choice)
    tracker_from(config)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sparsity=1.0"], "[0, 1)"),
        (["sparsity=-0.1"], "[0, 1)"),
        (["sparsity=much"], "compression.sparsity=much"),
        (["reading=aloud"], "module, paper"),
        (["eval=[]"], "at least one suite"),
        (["+compression.colour=red"], "colour"),
    ],
)
def test_values_out_of_range_are_refused_with_what_would_be_accepted(overrides, said):
    config, choices = composed(*overrides)
    with pytest.raises(BadInput, match=said.replace("[", r"\[").replace(")", r"\)")) as refusal:
        experiment_from(config, choices)
    assert "\n" not in str(refusal.value)


def test_the_settings_that_decide_change_the_hash_and_places_do_not():
    def run_id(*overrides: str) -> str:
        return experiment_from(*composed("model=bert_tiny", *overrides)).id

    assert run_id() == run_id("output.dir=elsewhere", "tracker=none", "run.force=true")
    assert len({run_id(), run_id("sparsity=0.3"), run_id("target=ff"), run_id("reading=paper")}) == 4
    assert run_id() == run_id("seed=1") and run_id("compression=none") == run_id("compression=none", "seed=1")
    drawn = ["compression=random", "compression=rtn recovery=lora", "compression=gptq", "eval=[latency]"]
    assert all(run_id(*lot.split()) != run_id(*lot.split(), "seed=1") for lot in drawn)
    dense = [run_id("compression=none", *rest) for rest in ([], ["sparsity=0.7"], ["target=ff"])]
    assert len(set(dense)) == 1
    assert len({run_id(), run_id("scoring_dtype=bfloat16"), run_id("compression=none", "scoring_dtype=bfloat16")}) == 3
    assert Path(CONF).is_dir()
