"""A world on disk: training text, recovery corpus, probes in LAMA's layout, and multiple-choice items."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from knowledge_compression.world.generator import Fact, TwoHop, World, say
from knowledge_compression.world.schema import Relation

TRAINING, RECOVERY, PROBES, CHOICES = "training.txt", "recovery.txt", "lama", "choices"
TWO_HOPS = "two_hops.jsonl"
SEEN, HELD_OUT = "seen", "held_out"
HEAD, TAIL = "head", "tail"
_MASK = "[MASK]"
_TASK = """\
# Which of four answers of the same kind is true? Read by lm-evaluation-harness with include_path at this folder.
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write(world: World, folder: Path) -> None:
    """Write all files of the world; the same world gives the same bytes.

    The folder then holds ``world.json`` (the settings), ``training.txt`` and ``recovery.txt`` (one sentence per line),
    ``facts.jsonl``, ``lama/`` (LAMA's layout; every line has its ``frequency``, ``bin`` and ``wording`` beside LAMA's
    own fields), ``choices/`` (a task of lm-evaluation-harness with its documents) and, if the world has compositions of
    two facts, ``two_hops.jsonl``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(world.settings.deciding, indent=1)
    _write(folder / "world.json", settings + "\n")
    _write(folder / TRAINING, "\n".join(world.training_text()) + "\n")
    _write(folder / RECOVERY, "\n".join(world.recovery_text()) + "\n")
    _write_lines(folder / "facts.jsonl", (_fact(world, fact) for fact in world.facts))
    relations = world.settings.schema
    _write_lines(folder / PROBES / "relations.jsonl", (_relation(world, relation) for relation in relations))
    for relation in relations:
        asked = [fact for fact in world.questions if fact.relation == relation]
        path = folder / PROBES / "TREx" / f"{relation.name}.jsonl"
        _write_lines(path, (probe for fact in asked for probe in _probes(world, fact)))
    if world.two_hops:
        _write_lines(folder / TWO_HOPS, (_two_hop(world, found) for found in world.two_hops if found.first.probed))
    documents = folder / CHOICES / "world_choices.jsonl"
    _write_lines(documents, _choices(world))
    # lm-eval resolves data_files relative to the working directory; eval=harness with data_dir finds them beside the
    # task.
    _write(folder / CHOICES / "world_choices.yaml", _TASK.format(task="world_choices", file=documents.name))


def _relation(world: World, relation: Relation) -> dict[str, Any]:
    """A line of LAMA's ``relations.jsonl``, with all wordings and every name of the object's kind."""
    return {
        "relation": relation.name,
        "template": relation.wordings[0],
        "label": relation.name.replace("_", " "),
        "type": relation.kind,
        "wordings": relation.wordings,
        "answers": sorted(world.names[relation.object]),
    }


def _fact(world: World, fact: Fact) -> dict[str, Any]:
    """A fact as a row of ``facts.jsonl``."""
    return {
        "id": fact.id,
        "relation": fact.relation.name,
        "subject": fact.subject,
        "object": fact.object,
        "frequency": fact.frequency,
        "bin": _bin(world, fact) if fact.probed else None,
        "probed": fact.probed,
        "seen": fact.seen,
        "held_out": fact.held_out,
    }


def _bin(world: World, fact: Fact) -> str:
    """``head`` for the most frequent quarter of the probed facts, ``tail`` for the least frequent half."""
    if fact.id in world.head:
        return HEAD
    return TAIL if fact.frequency <= world.tail_edge else "middle"


def _probes(world: World, fact: Fact) -> Iterator[dict[str, Any]]:
    """A fact in the wording that training uses most for it, and in one that it never uses for it."""
    for wording, place in ((SEEN, fact.seen[0]), (HELD_OUT, fact.held_out[0])):
        template = fact.relation.wordings[place]
        yield {
            "uuid": f"{fact.id}/{place}",
            "predicate_id": fact.relation.name,
            "sub_uri": fact.subject,
            "sub_label": fact.subject,
            "obj_uri": fact.object,
            "obj_label": fact.object,
            "template": template,
            "evidences": [
                {
                    "sub_surface": fact.subject,
                    "obj_surface": fact.object,
                    "masked_sentence": say(template, fact.subject, _MASK),
                }
            ],
            "frequency": fact.frequency,
            "bin": _bin(world, fact),
            "wording": wording,
        }


def _two_hop(world: World, found: TwoHop) -> dict[str, Any]:
    """A composition of two facts, in a wording that training never uses for it."""
    place = found.held_out[0]
    return {
        "uuid": f"{found.id}/{place}",
        "chain": found.chain.name,
        "sub_label": found.first.subject,
        "between": found.first.object,
        "obj_label": found.second.object,
        "template": found.chain.wordings[place],
        "masked_sentence": say(found.chain.wordings[place], found.first.subject, _MASK),
        "first": found.first.id,
        "second": found.second.id,
        "told": found.told,
        "answers": sorted(world.names[found.second.relation.object]),
    }


def _choices(world: World) -> Iterator[dict[str, Any]]:
    """Each probed fact as a question in a held-out wording, with three wrong answers of the same kind."""
    generator = random.Random(world.settings.seed + 3)
    for fact in world.questions:
        place = generator.choice(fact.held_out)
        wrong = [name for name in world.names[fact.relation.object] if name != fact.object]
        choices = [fact.object, *generator.sample(wrong, min(3, len(wrong)))]
        generator.shuffle(choices)
        yield {
            "id": f"{fact.id}/{place}",
            "question": say(fact.relation.wordings[place], fact.subject, "").removesuffix(" .").rstrip(),
            "choices": choices,
            "answer": choices.index(fact.object),
            "relation": fact.relation.name,
            "frequency": fact.frequency,
            "bin": _bin(world, fact),
        }


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
