"""Compositions of two facts of the controlled world: what a model derives, beside what its training text stated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.calibration import Questions
from knowledge_compression.evaluation.cloze import Cloze
from knowledge_compression.evaluation.probe import Probe
from knowledge_compression.evaluation.suite import Evaluation
from knowledge_compression.evaluation.world_facts import lines_of, world_of
from knowledge_compression.heavy import pl
from knowledge_compression.models import Model

if TYPE_CHECKING:
    from knowledge_compression.evaluation.scoring import Scorer

TOLD, DERIVED = "told", "derived"
_TYPED = Probe(candidates="typed")


@dataclass(frozen=True)
class WorldTwoHop:
    """Compositions of two facts: in which country lies the town in which somebody was born?

    Each is asked once, in a wording that training never used for it, and all answers of the relation's kind are ranked,
    as in the suite of the facts themselves. A *told* one was stated by the training text in other wordings, so that it
    is a fact among others; a *derived* one follows only from its two facts. Tasks are named ``derived.homeland`` and so
    on. Only compositions of subjects whose facts are probed are asked.
    """

    def questions(self, model: Model) -> Questions:
        """The questions for a model of a world with compositions.

        Raises:
            BadInput: the model was not trained on one.
        """
        lines = _compositions_of(model)
        return Questions([_cloze(line) for line in lines], {_task(line): line["answers"] for line in lines})

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Ask every composition.

        Returns:
            Items with the columns ``asked_as`` (``told``, ``derived``), ``between`` (the entity between subject and
            answer), and ``first`` and ``second`` (the ids of the two facts, as the column ``fact`` of ``eval=[world]``
            has them). Metrics as in every cloze suite, and the accuracy of the told and of the derived ones.

        Raises:
            BadInput: the model was not trained on a world with compositions.
        """
        lines = _compositions_of(scorer.model)
        notes = pl.DataFrame(
            {
                "id": [line["uuid"] for line in lines],
                "asked_as": [TOLD if line["told"] else DERIVED for line in lines],
                **{name: [line[name] for line in lines] for name in ("between", "first", "second")},
            }
        )
        found = _TYPED.ask("world_two_hop", scorer, self.questions(scorer.model))
        items = found.items.join(notes, on="id", how="left", maintain_order="left")
        shares = items.group_by("asked_as").agg(pl.col("correct").mean()).sort("asked_as")
        metrics = found.metrics | {name: float(share) for name, share in shares.rows() if share is not None}
        return Evaluation(metrics, items, found.description | {"compositions": notes.height})


def _compositions_of(model: Model) -> list[dict[str, Any]]:
    path = world_of(model, "world_two_hop") / "two_hops.jsonl"
    if not path.is_file():
        raise BadInput(
            f"eval=world_two_hop: the world of {model.name} has no compositions of two facts; "
            "model.world.two_hop=0.5 trains a model on a world that has them"
        )
    return list(lines_of(path))


def _task(line: dict[str, Any]) -> str:
    return f"{TOLD if line['told'] else DERIVED}.{line['chain']}"


def _cloze(line: dict[str, Any]) -> Cloze:
    return Cloze(
        task=_task(line),
        id=line["uuid"],
        fact=f"{line['chain']}/{line['sub_label']}",
        subject=line["sub_label"],
        gold=line["obj_label"],
        sentence=line["masked_sentence"],
        wording=line["template"],
    )
