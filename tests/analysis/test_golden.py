"""The golden report: findings and fates of the controlled world study's real answers, word for word."""

from __future__ import annotations

import pytest

from golden import controlled_world
from knowledge_compression.analysis import markdown, tables
from knowledge_compression.analysis.findings import CONTRADICTED, SUPPORTED


@pytest.fixture(scope="module")
def judged():
    return controlled_world.judged()


@pytest.mark.slow
def test_the_report_on_the_controlled_world_is_the_one_that_was_read_and_kept(judged):
    """Made anew with ``python tests/golden/controlled_world.py STORE``; a change of it is a change of what we say."""
    report = markdown.report(*judged)
    assert report == controlled_world.REPORT.read_text(encoding="utf-8")
    assert "What brought lost facts back" not in report


@pytest.mark.slow
def test_the_world_supports_what_it_should(judged):
    comparisons, verdicts = judged
    assert [group.asked.model for group in comparisons] == ["world_decoder", "world_encoder", "world_encoder_decoder"]
    assert comparisons.skipped == []
    by_name = {verdict.claim.name: verdict.status for verdict in verdicts}
    assert by_name["pruning_all_hurts_more_than_ff"] == by_name["decline_steepens_past_half"] == SUPPORTED
    assert CONTRADICTED not in by_name.values()
    assert tables.cost_table(comparisons).frame().height == 3 * 16  # a row a relation
