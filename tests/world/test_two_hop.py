"""Compositions of two facts: what the training text states of them, and what is asked."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from helpers.worlds import SMALL
from knowledge_compression.errors import BadInput, ModelUnavailable
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.world_two_hop import WorldTwoHop
from knowledge_compression.models import Model
from knowledge_compression.world import files
from knowledge_compression.world.generator import WorldSettings, generate
from knowledge_compression.world.models import SavedWorldModel, Shape, _network
from knowledge_compression.world.schema import CHAINS, RELATIONS
from knowledge_compression.world.tokenizer import train_tokenizer

COMPOSED = replace(SMALL, two_hop=0.5)


def test_worlds_without_compositions_are_what_they_were():
    assert WorldSettings().digest() == "b285a243656800fb"  # as before compositions could be stated
    assert "two_hop" not in SMALL.deciding and generate(SMALL).two_hops == []
    assert COMPOSED.digest() != SMALL.digest() != replace(SMALL, two_hop_frequency=3).digest()


def test_compositions_follow_from_their_two_facts():
    world = generate(COMPOSED)
    true = {(fact.relation.name, fact.subject): fact.object for fact in world.facts}
    assert {fact.sentence(0) for fact in world.facts} == {fact.sentence(0) for fact in generate(SMALL).facts}
    by_hand = {
        (chain.name, subject, true[chain.second, between])
        for chain in CHAINS
        for (relation, subject), between in true.items()
        if relation == chain.first
    }
    assert {(one.chain.name, one.first.subject, one.second.object) for one in world.two_hops} == by_hand


def test_the_text_states_those_that_are_told_and_no_others():
    world = generate(COMPOSED)
    text = world.training_text()
    facts_alone = generate(SMALL).training_text()
    stated = sorted(text)
    for sentence in facts_alone:
        stated.remove(sentence)  # what is left are compositions
    told = [one for one in world.two_hops if one.told]
    assert len(stated) == COMPOSED.two_hop_frequency * len(told)
    possible = {one.sentence(place) for one in told for place in one.seen}
    assert set(stated) <= possible
    for one in world.two_hops:
        assert not any(one.sentence(place) in stated for place in one.held_out)
    for chain in CHAINS:
        of = [one.told for one in world.two_hops if one.chain == chain]
        assert sum(of) == round(0.5 * len(of))


def test_wordings_of_compositions_are_no_facts_wordings_and_fit_the_windows():
    of_facts = {wording for relation in RELATIONS for wording in relation.wordings}
    of_chains = [wording for chain in CHAINS for wording in chain.wordings]
    assert len(set(of_chains)) == len(of_chains) and not of_facts & set(of_chains)
    relations = {relation.name: relation for relation in RELATIONS}
    for chain in CHAINS:
        assert relations[chain.first].object == relations[chain.second].subject
    text = generate(replace(WorldSettings(), two_hop=0.5)).training_text()
    assert max(len(sentence.split()) for sentence in text) < 10  # a window of model=world_decoder, less its first token


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"two_hop": 1.0}, "two_hop=1.0"),
        ({"two_hop": 0.5, "two_hop_frequency": 0}, "two_hop_frequency=0"),
        ({"two_hop": 0.5, "relations": ("born_in", "genre")}, "no two of these relations"),
    ],
)
def test_impossible_compositions_are_refused(changes, says):
    with pytest.raises(BadInput, match=says):
        replace(SMALL, **changes)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A model that knows nothing, and the folder of a world with compositions."""
    folder = tmp_path_factory.mktemp("world")
    world = generate(COMPOSED)
    files.write(world, folder)
    tokenizer = train_tokenizer(world, "decoder")
    torch.manual_seed(0)
    network = _network(Shape(16, 1, 2).config("decoder", tokenizer), "cpu").eval()
    return Model(network, tokenizer, "untrained", {"world": str(folder)})


def test_the_suite_asks_compositions_of_probed_subjects_in_unseen_wordings(untrained):
    found = WorldTwoHop().evaluate(Scorer(untrained))
    world = generate(COMPOSED)
    asked = {one.id: one for one in world.two_hops if one.first.probed}
    assert set(found.items["fact"]) == set(asked) and found.items.height == len(asked)
    text = set(world.training_text())
    right = {"told": [], "derived": []}
    for row in found.items.iter_rows(named=True):
        one = asked[row["fact"]]
        assert row["prompt"].replace("[MASK]", one.second.object) not in text
        assert (row["first"], row["second"], row["between"]) == (one.first.id, one.second.id, one.first.object)
        assert row["gold"] == one.second.object and row["choices"] == len(world.names[one.second.relation.object])
        assert row["asked_as"] == row["task"].split(".")[0] == ("told" if one.told else "derived")
        right[row["asked_as"]].append(row["correct"])
    for name, verdicts in right.items():
        assert found.metrics[name] == pytest.approx(sum(verdicts) / len(verdicts))


def test_models_of_other_worlds_are_refused_in_one_line(untrained, tmp_path):
    files.write(generate(SMALL), tmp_path)
    assert not (tmp_path / "two_hops.jsonl").exists()
    with pytest.raises(BadInput, match=r"no compositions .*model\.world\.two_hop=0\.5"):
        WorldTwoHop().evaluate(Scorer(replace(untrained, provenance={"world": str(tmp_path)})))
    with pytest.raises(BadInput, match="eval=world_two_hop asks models of the controlled world"):
        WorldTwoHop().questions(replace(untrained, provenance={}))


def test_a_saved_model_answers_as_before_and_is_identified_with_its_world(untrained, tmp_path):
    untrained.network.save_pretrained(tmp_path / "model")
    untrained.tokenizer.save_pretrained(tmp_path / "model")
    source = SavedWorldModel("saved", str(tmp_path / "model"), world=untrained.provenance["world"])
    model = source.load("cpu")
    one, other = (WorldTwoHop().evaluate(Scorer(each)).items for each in (untrained, model))
    assert one.equals(other) and model.objective.pad_id == model.tokenizer.pad_token_id
    world = generate(replace(COMPOSED, seed=1))
    files.write(world, tmp_path / "other")
    assert replace(source, world=str(tmp_path / "other")).fingerprint() != source.fingerprint()
    assert json.loads((tmp_path / "other" / "world.json").read_text())["two_hop"] == 0.5
    with pytest.raises(ModelUnavailable, match=r"model\.world=.*holds no world\.json"):
        replace(source, world=str(tmp_path / "none")).fingerprint()
