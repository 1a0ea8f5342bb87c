"""Every linear layer of every architecture has a role."""

import pytest

from helpers.networks import logits_of
from knowledge_compression.models import Model
from knowledge_compression.models.families import ROLES
from knowledge_compression.models.targets import linear_layers


@pytest.mark.parametrize("reading", ["module", "paper"])
def test_every_linear_layer_has_a_role(any_tiny_model: Model, reading: str) -> None:
    layers = linear_layers(any_tiny_model, reading)
    assert {layer.role for layer in layers} <= set(ROLES)
    assert sum(layer.role == "final" for layer in layers) == 1
    assert logits_of(any_tiny_model).isfinite().all()
