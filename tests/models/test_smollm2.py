"""What pruning does to the facts of a real language model."""

from __future__ import annotations

import pytest

import knowledge_compression as kc


@pytest.mark.slow
def test_pruning_by_a_tenth_loses_hardly_a_fact_and_by_four_fifths_nearly_all():
    atlas = kc.choose("eval=atlas", relations=["capital_of", "language"])
    known = kc.ask(kc.load("smollm2"), atlas)
    assert known.metrics["accuracy"] > 0.5

    def drop_at(sparsity: float):
        model = kc.load("smollm2")
        report = kc.compress(model, kc.choose("compression=magnitude", sparsity=sparsity), kc.choose("target=all"))
        assert report.sparsity == pytest.approx(sparsity, abs=1e-6)
        return kc.drop(known, kc.ask(model, atlas))

    assert drop_at(0.1).value < 10
    assert drop_at(0.8).low > 70
