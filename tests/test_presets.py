"""Presets of the papers run the published methods; overlays take them to our best ones, and make them small."""

from __future__ import annotations

import pytest
import yaml
from hydra import compose, initialize_config_dir

from helpers.places import CONF, EXHAUSTIVE
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.structured import Structured
from knowledge_compression.configuration import experiment_from
from knowledge_compression.sweeping.cli import settled_by_classes

FOLDER = "forgotten_or_displaced"
OVERLAYS = ("small", "best", "older")
PRESETS = sorted(
    path.stem for path in (CONF / "experiment" / FOLDER).glob("*.yaml") if not path.stem.startswith(OVERLAYS)
)


@pytest.mark.slow
@pytest.mark.parametrize("small", ["small_smollm2", "small_study", "small_world"])
def test_every_preset_has_a_small_form(small):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for preset in PRESETS:
            chosen = f"+experiment=[{FOLDER}/{preset},{FOLDER}/{small}]"
            config = compose("config", [chosen], return_hydra_config=True)
            params = config.hydra.sweeper.params
            assert params.model == ("world_decoder_long" if small == "small_world" else "smollm2")
            grids = config.hydra.sweeper.get("grids") or [{}]
            for grid in grids if EXHAUSTIVE else grids[:1]:
                first = settled_by_classes([f"{key}={_first(str(value))}" for key, value in {**params, **grid}.items()])
                job = compose("config", [chosen, *first, "data_dir=somewhere"], return_hydra_config=True)
                experiment = experiment_from(job, job.hydra.runtime.choices)
                training = getattr(experiment.recovery, "training", None)
                assert training is None or training.tokens <= 100_000


PUBLISHED = {
    "gptq": {
        "clip": "minmax",
        "scale_bits": 32,
        "desc_act": False,
        "true_sequential": False,
        "forward_dtype": "float32",
    },
    "sparsegpt": {"refit": 0, "true_sequential": False, "forward_dtype": "float32"},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_of_the_paper_run_the_methods_as_published_and_say_so(preset):
    text = (CONF / "experiment" / FOLDER / f"{preset}.yaml").read_text()
    params = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    published = PUBLISHED[params["compression"]]
    assert {name: params.get(f"compression.{name}") for name in published} == published
    assert text.splitlines()[1].endswith("as published;")


FIRST = sorted(
    path.stem
    for path in (CONF / "experiment" / "cost_of_compression").glob("*.yaml")
    if not path.stem.startswith("small")
)
OF_THE_FIRST_PAPER = {  # what each of its compressions is, in our settings
    "magnitude": [Magnitude(0.2, scope="global", pattern=None)],
    "structured": [Structured(0.2, dim=0, norm=1)],
    "int8_dynamic": [Int8Dynamic("per_tensor")],
    "prune_int8": [Magnitude(0.2, scope="global", pattern=None), Int8Dynamic("per_tensor")],
}


@pytest.mark.parametrize("preset", FIRST)
def test_presets_of_the_first_paper_run_the_methods_as_published_and_say_so(preset):
    text = (CONF / "experiment" / "cost_of_compression" / f"{preset}.yaml").read_text()
    assert " of The Cost of Compression, as published: " in text.splitlines()[1]
    sweeper = yaml.safe_load(text)["hydra"]["sweeper"]
    grids = [sweeper["params"] | grid for grid in sweeper.get("grids", [{}])]
    assert not [name for grid in grids for name in grid if name.startswith("compression.")]
    for compression in {name for grid in grids for name in grid["compression"].split(",")}:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            chosen = [
                f"+experiment=cost_of_compression/{preset}",
                f"compression={compression}",
                "sparsity=0.2",
                "data_dir=DIR",
            ]
            job = compose("config", chosen, return_hydra_config=True)
        made = experiment_from(job, job.hydra.runtime.choices).compression
        assert list(made.parts) == OF_THE_FIRST_PAPER[compression]


@pytest.mark.parametrize(("preset", "method"), [("table1", "gptq"), ("table2", "sparsegpt")])
def test_the_best_overlay_gives_back_the_methods_own_settings(preset, method):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = f"+experiment=[{FOLDER}/{preset},{FOLDER}/best_{method}]"
        params = compose("config", [chosen], return_hydra_config=True).hydra.sweeper.params
        plain = compose("config", [f"compression={method}"]).compression
    assert {name: plain[name] for name in PUBLISHED[method]} == {
        name: params[f"compression.{name}"] for name in PUBLISHED[method]
    }
    assert {name: plain[name] for name in PUBLISHED[method]} != PUBLISHED[method]


def test_the_older_scoring_of_triviaqa_takes_the_place_of_todays():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        groups = [
            compose("config", [f"+experiment=[{names}]"]).eval.nine_tasks.groups
            for names in (f"{FOLDER}/table1", f"{FOLDER}/table1,{FOLDER}/older_triviaqa")
        ]
    before, after = ([task for group in one.values() for task in group] for one in groups)
    assert [name.replace("triviaqa", "triviaqa_greedy") for name in before] == after and len(after) == 9


def _first(values: str) -> str:
    """The first value of a sweep; a list in brackets is one value."""
    if values.startswith("["):
        return values[: values.index("]") + 1]
    return values.split(",")[0]
