"""The family map knows every linear layer of every architecture, and says so when it does not."""

import pytest

from helpers.networks import TINY, logits_of
from knowledge_compression.models import Model
from knowledge_compression.models.families import ARCHITECTURES, ROLES
from knowledge_compression.models.targets import linear_layers


def test_there_is_a_tiny_model_of_every_architecture() -> None:
    assert set(TINY) == set(ARCHITECTURES)


@pytest.mark.parametrize("reading", ["module", "paper"])
def test_every_linear_layer_has_a_role(any_tiny_model: Model, reading: str) -> None:
    layers = linear_layers(any_tiny_model, reading)
    assert {layer.role for layer in layers} <= set(ROLES)
    assert sum(layer.role == "final" for layer in layers) == 1
    assert logits_of(any_tiny_model).isfinite().all()
