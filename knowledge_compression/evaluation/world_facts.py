"""What a model knows about the controlled world on which it was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.calibration import Questions
from knowledge_compression.evaluation.cloze import Cloze
from knowledge_compression.evaluation.probe import Probe
from knowledge_compression.evaluation.suite import Evaluation
from knowledge_compression.heavy import pl
from knowledge_compression.models import Model

if TYPE_CHECKING:
    from knowledge_compression.evaluation.scoring import Scorer

_TYPED = Probe(candidates="typed")
_NATIVE = Probe(candidates="full")
_BINS, _WORDINGS = ("head", "middle", "tail"), ("seen", "held_out")


@dataclass(frozen=True)
class WorldProbes:
    """Recall of the world's facts, by relation, by frequency in the training text, and by wording.

    The headline metric ranks all answers of the relation's kind, which is the same question for all three families. The
    ``native`` metrics let the model answer with any token of its vocabulary in its family's own way: an encoder fills
    its mask, an encoder-decoder its sentinel, a decoder continues.

    Attributes:
        native: whether to ask in the family's own way as well.
    """

    native: bool = True

    def questions(self, model: Model) -> Questions:
        """The questions for a model of the world; the answers of a relation are all of its kind.

        Raises:
            BadInput: the model was not trained on a controlled world.
        """
        answers = {line["relation"]: line["answers"] for line in lines_of(_probes_of(model) / "relations.jsonl")}
        return Questions([_cloze(line) for line in _facts_of(model)], answers)

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Ask every probed fact in seen and in held-out wordings.

        Returns:
            Items with the columns ``frequency`` (sentences in one reading of the training text), ``bin`` (``head``,
            ``middle``, ``tail``), ``asked_as`` (``seen``, ``held_out``) and, if asked, ``native_correct`` and
            ``native_prediction``. Metrics as in every cloze suite, and recall by bin and wording:
            ``head``, ``held_out``, ``head.held_out`` and so on; all of them again under ``native``.

        Raises:
            BadInput: the model was not trained on a controlled world.
        """
        lines = _facts_of(scorer.model)
        questions = self.questions(scorer.model)
        notes = pl.DataFrame(
            {
                "id": [line["uuid"] for line in lines],
                "frequency": [line["frequency"] for line in lines],
                "bin": [line["bin"] for line in lines],
                "asked_as": [line["wording"] for line in lines],
            }
        )
        typed = _TYPED.ask("world", scorer, questions)
        items = typed.items.join(notes, on="id", how="left", maintain_order="left")
        metrics = typed.metrics | _recall(items, "correct")
        if self.native:
            native = _NATIVE.ask("world", scorer, questions).items
            answered = native.select("id", native_correct="correct", native_prediction="prediction")
            items = items.join(answered, on="id", how="left", maintain_order="left")
            native_metrics = {"accuracy": native["correct"].mean() or 0.0} | _recall(items, "native_correct")
            metrics |= {f"native.{name}": float(value) for name, value in native_metrics.items()}  # type: ignore[arg-type]
        return Evaluation(metrics, items, typed.description | {"facts": notes.height})


def _facts_of(model: Model) -> list[dict[str, Any]]:
    return [line for path in sorted((_probes_of(model) / "TREx").glob("*.jsonl")) for line in lines_of(path)]


def _probes_of(model: Model) -> Path:
    """The probes of the world on which a model was trained."""
    return world_of(model, "world") / "lama"


def world_of(model: Model, suite: str) -> Path:
    """The folder of the world on which a model was trained.

    Raises:
        BadInput: it was trained on none; the message names the suite.
    """
    folder = model.provenance.get("world")
    if folder is None:
        raise BadInput(
            f"eval={suite} asks models of the controlled world, and {model.name} is none; "
            "take model=world_encoder, world_encoder_decoder, world_decoder or world_moe"
        )
    return Path(folder)


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file with one JSON object a line."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _cloze(line: Mapping[str, Any]) -> Cloze:
    relation, subject = line["predicate_id"], line["sub_label"]
    return Cloze(
        task=relation,
        id=line["uuid"],
        fact=f"{relation}/{subject}",
        subject=subject,
        gold=line["obj_label"],
        sentence=line["evidences"][0]["masked_sentence"],
        wording=line["template"],
    )


def _recall(items: pl.DataFrame, column: str) -> dict[str, float]:
    """Share of right answers by bin, by wording, and by both; empty combinations are left out."""
    choices = {name: pl.col("bin") == name for name in _BINS} | {name: pl.col("asked_as") == name for name in _WORDINGS}
    choices |= {f"{b}.{w}": (pl.col("bin") == b) & (pl.col("asked_as") == w) for b, w in product(_BINS, _WORDINGS)}
    shares = {name: items.filter(choice)[column].mean() for name, choice in choices.items()}
    return {name: float(share) for name, share in shares.items() if share is not None}  # type: ignore[arg-type]
