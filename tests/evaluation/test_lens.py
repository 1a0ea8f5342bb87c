"""The logit lens against networks that were cut off at each depth, on every architecture."""

from __future__ import annotations

import pytest
import torch

from helpers.networks import SPECIAL, VOCABULARY
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation import lens
from knowledge_compression.evaluation.atlas import Atlas
from knowledge_compression.evaluation.calibration import Questions
from knowledge_compression.evaluation.cloze import MASK, Cloze
from knowledge_compression.evaluation.lens import LogitLens
from knowledge_compression.evaluation.probe import Probe
from knowledge_compression.evaluation.scoring import Blank, Scorer
from knowledge_compression.models.families import ENCODER, ENCODER_DECODER


def cut(model, depth):
    """The network without its last blocks (of the stack that the head comes after)."""
    architecture, network = model.architecture, model.network
    if architecture.shared_depth:
        network.config.num_hidden_layers = depth
        return
    blocks = architecture.stacks[-1].blocks
    parent, _, name = blocks.rpartition(".")
    setattr(network.get_submodule(parent), name, network.get_submodule(blocks)[:depth])
    network.config.num_hidden_layers = depth


def blanks_for(model):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(len(SPECIAL), VOCABULARY, (n,), generator=generator).tolist() for n in (1, 5, 3, 9, 2)]
    if model.family == ENCODER:
        return [Blank(row, position=len(row) // 2) for row in rows]
    said = [model.network.config.decoder_start_token_id, 5] if model.family == ENCODER_DECODER else []
    return [Blank(row, decoder_ids=said[: 1 + i % 2]) for i, row in enumerate(rows)]


def test_every_depth_says_what_the_network_cut_off_there_says(any_tiny_model, tiny_model):
    name = any_tiny_model.name.removeprefix("tiny-")
    blanks = blanks_for(any_tiny_model)
    seen = {
        i: row
        for batch, rows in Scorer(any_tiny_model, 16).distributions_by_depth(blanks)
        for i, row in zip(batch, rows, strict=True)
    }
    assert {len(row) for row in seen.values()} == {3}  # two blocks
    for depth in (1, 2):
        shorter = tiny_model(name)
        cut(shorter, depth)
        for batch, rows in Scorer(shorter).distributions(blanks):
            for i, row in zip(batch, rows, strict=True):
                assert seen[i][depth] == pytest.approx(row, abs=2e-5)


CAPITALS = {"france": "paris", "germany": "berlin", "italy": "rome", "spain": "madrid"}


class Capitals:
    """Four facts in one wording."""

    def questions(self, model):
        clozes = [
            Cloze("capital", country, country, country, city, f"the capital of {country} is {MASK}", "0")
            for country, city in CAPITALS.items()
        ]
        return Questions(clozes, {"capital": sorted(CAPITALS.values())})


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "t5", "bart", "llama", "opt", "gpt2"])
def test_at_the_last_depth_the_lens_ranks_as_the_probe_does(architecture, calibrate, tiny_model, monkeypatch):
    monkeypatch.setitem(lens.SUITES, "atlas", lambda _: Capitals())
    model = tiny_model(architecture)
    items = LogitLens(calibrate=calibrate).evaluate(Scorer(model)).items
    asked = Probe(calibrate=calibrate).ask("atlas", Scorer(model), Capitals().questions(model)).items
    joined = items.join(asked, on=["task", "id"], suffix="_probe")
    assert joined.height == 4
    assert joined["rank"].to_list() == joined["rank_probe"].to_list() == [r[-1] for r in joined["depth_rank"].to_list()]
    assert joined["log_prob"].to_list() == pytest.approx(joined["log_prob_probe"].to_list(), abs=1e-4)


def test_it_calibrates_as_the_suite_does_unless_told(tiny_model):
    model = tiny_model("llama")
    assert LogitLens(limit=40).evaluate(Scorer(model)).description["calibrate"] is Atlas().calibrate is True
    assert LogitLens(limit=40, calibrate=False).evaluate(Scorer(model)).description["calibrate"] is False


def test_a_suite_that_does_not_calibrate_is_read_without(tiny_model, monkeypatch):
    monkeypatch.setitem(lens.SUITES, "world", lambda _: Capitals())
    assert LogitLens(of="world").evaluate(Scorer(tiny_model("llama"))).description["calibrate"] is False


def test_the_atlas_can_be_looked_into(tiny_model):
    found = LogitLens(limit=40).evaluate(Scorer(tiny_model("llama")))
    assert found.items.height + found.description["left_out"] == 40
    assert found.items["correct"].null_count() == found.items.height
    assert set(found.metrics) == {"first.0", "first.1", "first.2"}


def test_what_has_no_clozes_is_refused():
    with pytest.raises(BadInput, match=r"eval\.lens\.of=latency does not exist; choose one of atlas, world, lama"):
        LogitLens(of="latency")
