"""Presets of the second paper also make experiments with the overlays that make them small."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from knowledge_compression.configuration import experiment_from

CONF = Path(__file__).parent.parent / "conf"
FOLDER = "forgotten_or_displaced"
PRESETS = sorted(
    path.stem for path in (CONF / "experiment" / FOLDER).glob("*.yaml") if not path.stem.startswith("small")
)


@pytest.mark.slow
@pytest.mark.parametrize("small", ["small_smollm2", "small_world"])
def test_every_preset_has_a_small_form(small):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for preset in PRESETS:
            chosen = f"+experiment=[{FOLDER}/{preset},{FOLDER}/{small}]"
            config = compose("config", [chosen], return_hydra_config=True)
            params = config.hydra.sweeper.params
            assert params.model == {"small_smollm2": "smollm2", "small_world": "world_decoder_long"}[small]
            first = [f"{key}={_first(str(value))}" for key, value in params.items()]
            job = compose("config", [chosen, *first, "data_dir=somewhere"], return_hydra_config=True)
            experiment = experiment_from(job, job.hydra.runtime.choices)
            training = getattr(experiment.recovery, "training", None)
            assert training is None or training.tokens <= 100_000


def _first(values: str) -> str:
    """The first value of a sweep; a list in brackets is one value."""
    if values.startswith("["):
        return values[: values.index("]") + 1]
    return values.split(",")[0]
