"""What pruning does to the facts of a real language model."""

from __future__ import annotations

import pytest

import knowledge_compression as kc


@pytest.mark.slow
def test_pruning_by_a_tenth_loses_hardly_a_fact_and_by_four_fifths_nearly_all():
    atlas = kc.choose("eval=atlas", relations=["capital_of"])
    dense = kc.load("smollm2")
    known = kc.ask(dense, atlas)
    assert known.metrics["accuracy"] > 0.6
    assert known.metrics["chance"] < 0.02

    def drop_at(sparsity: float, model):
        report = kc.compress(model, kc.choose("compression=magnitude", sparsity=sparsity), kc.choose("target=all"))
        assert report.sparsity == pytest.approx(sparsity, abs=1e-6)
        return kc.drop(known, kc.ask(model, atlas))

    assert drop_at(0.1, dense).value < 10  # which is not dense any more
    assert drop_at(0.8, kc.load("smollm2")).low > 70
