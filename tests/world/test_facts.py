"""The controlled world's facts and texts, and what is asked of them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.worlds import SMALL
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.harness import Harness
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.world import files
from knowledge_compression.world.generator import WorldSettings, generate
from knowledge_compression.world.schema import ONE_TO_ONE, RELATIONS
from knowledge_compression.world.tokenizer import train_tokenizer

worlds = st.builds(
    WorldSettings,
    people=st.integers(4, 30),
    works=st.integers(3, 20),
    firms=st.integers(3, 10),
    towns=st.integers(5, 12),
    countries=st.integers(3, 5),
    professions=st.integers(2, 8),
    probed=st.floats(0.1, 0.9),
    held_out=st.integers(1, 4),
    mean_frequency=st.floats(1, 12),
    exponent=st.floats(0, 1.5),
    distractors=st.floats(0, 0.5),
    seed=st.integers(0, 2**20),
)


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_seed_gives_the_same_world_byte_for_byte(tmp_path):
    for name in ("one", "two"):
        files.write(generate(SMALL), tmp_path / name)
    files.write(generate(replace(SMALL, seed=1)), tmp_path / "other")
    assert written(tmp_path / "one") == written(tmp_path / "two")
    assert written(tmp_path / "one")["training.txt"] != written(tmp_path / "other")["training.txt"]


def test_the_same_world_gives_the_same_tokenizer(tmp_path):
    for name in ("one", "two"):
        train_tokenizer(generate(SMALL), "encoder").save_pretrained(tmp_path / name)
    assert written(tmp_path / "one") == written(tmp_path / "two")


@given(worlds)
@settings(max_examples=25)
def test_no_probed_fact_is_in_the_recovery_corpus(world_settings):
    """Checked on entity and on text: no sentence of it names a subject that is asked about, in any wording."""
    world = generate(world_settings)
    recovery = world.recovery_text()
    assert recovery
    padded = [f" {sentence} " for sentence in recovery]
    assert {fact.subject for fact in world.questions} == set(world.probed)
    for subject in world.probed:
        assert not any(f" {subject} " in sentence for sentence in padded), subject
    stated = {fact.sentence(place) for fact in world.questions for place in range(len(fact.relation.wordings))}
    assert not stated & set(recovery)


@given(worlds)
@settings(max_examples=25)
def test_training_says_each_fact_as_often_as_its_frequency_and_never_in_a_held_out_wording(world_settings):
    world = generate(world_settings)
    said = Counter(world.training_text())
    for fact in world.facts:
        counts = [said[fact.sentence(place)] for place in range(len(fact.relation.wordings))]
        assert sum(counts) == fact.frequency
        assert all(counts[place] == 0 for place in fact.held_out)
        assert len(fact.held_out) == (world_settings.held_out if fact.probed else 0)
    stated = sum(fact.frequency for fact in world.facts)
    assert said.total() == stated + round(stated * world_settings.distractors)


def test_relations_are_functional_and_one_to_one_ones_share_no_object():
    world = generate(SMALL)
    by_relation = defaultdict(list)
    for fact in world.facts:
        by_relation[fact.relation].append(fact)
    assert set(by_relation) == set(RELATIONS)
    for relation, facts in by_relation.items():
        subjects, objects = [fact.subject for fact in facts], {fact.object for fact in facts}
        assert len(set(subjects)) == len(subjects)
        assert objects <= set(world.names[relation.object])
        assert (len(objects) == len(facts)) == (relation.kind == ONE_TO_ONE) or len(facts) <= len(
            world.names[relation.object]
        )


def test_frequencies_follow_the_law_that_was_asked_for():
    world = generate(replace(SMALL, people=400, mean_frequency=8.0))
    frequencies = sorted((fact.frequency for fact in world.facts), reverse=True)
    assert sum(frequencies) / len(frequencies) == pytest.approx(8.0, rel=0.05)
    shift = 0.05 * len(frequencies)
    for rank in (1, len(frequencies) // 10, len(frequencies) // 2):
        expected = frequencies[0] * (1 + shift) / (rank + shift)
        assert frequencies[rank - 1] == pytest.approx(expected, rel=0.1, abs=1.0)
    flat = generate(replace(SMALL, exponent=0.0))
    assert len({fact.frequency for fact in flat.facts}) == 1


def test_distractors_state_nothing():
    world = generate(SMALL)
    stated = {fact.sentence(place) for fact in world.facts for place in range(len(fact.relation.wordings))}
    pairs = {(fact.subject, fact.object) for fact in world.facts}
    for sentence in set(world.training_text()) - stated:
        assert not any(f"{s} " in sentence and f" {o} " in sentence for s, o in pairs), sentence


def test_every_wording_names_the_subject_first_and_ends_with_the_object():
    for relation in RELATIONS:
        assert len(set(relation.wordings)) == len(relation.wordings) == 6
        for wording in relation.wordings:
            assert wording.startswith("[X] ") and wording.endswith(" [Y] .")


def test_probes_are_in_lamas_layout_and_complete(tmp_path):
    world = generate(SMALL)
    files.write(world, tmp_path)
    probes = [row for path in (tmp_path / "lama" / "TREx").glob("*.jsonl") for row in lines(path)]
    assert len(probes) == 2 * len(world.questions)
    assert len({row["uuid"] for row in probes}) == len(probes)
    assert {"uuid", "obj_uri", "obj_label", "sub_uri", "sub_label", "predicate_id", "evidences"} <= probes[0].keys()
    said = set(world.training_text())
    facts = {fact.id: fact for fact in world.facts}
    for row in probes:
        masked = row["evidences"][0]["masked_sentence"]
        assert masked.count("[MASK]") == 1
        sentence = masked.replace("[MASK]", row["obj_label"])
        assert (sentence in said) == (row["wording"] == "seen")
        assert row["frequency"] == facts[f"{row['predicate_id']}/{row['sub_label']}"].frequency
    bins = Counter(row["bin"] for row in probes)
    assert 0.2 < bins["head"] / len(probes) < 0.45
    assert bins["tail"] / len(probes) >= 0.5 - 0.01
    low = max(row["frequency"] for row in probes if row["bin"] == "tail")
    assert low < min(row["frequency"] for row in probes if row["bin"] == "head")


def test_multiple_choice_items_are_a_task_of_the_harness(tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    files.write(generate(SMALL), tmp_path)
    monkeypatch.chdir(tmp_path / "choices")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    manager = TaskManager(include_path=str(tmp_path / "choices"), include_defaults=False)
    task = manager.load(["world_choices"])["tasks"]["world_choices"]
    documents = list(task.validation_docs())
    assert len(documents) == len(generate(SMALL).questions)
    for document in documents[:20]:
        gold = task.doc_to_choice(document)[task.doc_to_target(document)]
        relation, subject, _ = document["id"].split("/")
        assert gold == next(f.object for f in generate(SMALL).facts if f.id == f"{relation}/{subject}")
        assert task.doc_to_text(document).startswith(subject) and gold not in task.doc_to_text(document)


def test_the_harness_asks_a_worlds_choices_from_its_folder(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    files.write(generate(SMALL), tmp_path / "world")
    suite = Harness(["world_choices"], limit=20, data_dir=str(tmp_path / "world"))
    evaluation = suite.evaluate(Scorer(tiny_model("llama")))
    assert evaluation.items.height == 20 and set(evaluation.items["task"]) == {"world_choices"}
    before = suite.fingerprint()
    with (tmp_path / "world" / "choices" / "world_choices.jsonl").open("a") as file:
        file.write("\n")
    assert suite.fingerprint() != before
    with pytest.raises(BadInput, match=r"a file world_choice\.yaml under data_dir"):
        Harness(["world_choice"], data_dir=str(tmp_path / "world")).fingerprint()
    definition = tmp_path / "world" / "choices" / "world_choices.yaml"
    definition.write_text(definition.read_text().replace("world_choices.jsonl", "../../elsewhere.jsonl"))
    with pytest.raises(BadInput, match="lie beside it"):
        suite.fingerprint()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"people": 1}, "too few"),
        ({"probed": 1.0}, "probed=1.0"),
        ({"held_out": 6}, "held_out=6"),
        ({"relations": ("born_in", "colour")}, "there is no colour"),
        ({"countries": 20, "towns": 10}, "town of its own"),
    ],
)
def test_worlds_that_cannot_be_are_refused(changes, says):
    with pytest.raises(BadInput, match=says):
        replace(SMALL, **changes)
