"""Calibration text that states facts of the atlas: python experiments/calibration_text/facts.py FILE

A random half of the facts is *told*, in every wording but those in which the atlas asks; shuffled. The
other half is asked too but never told, so it shows what text of this kind does without the facts. Several relations may
connect the same two names (the capital of a country, a city's country): all such facts are told, or none.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from knowledge_compression.evaluation.atlas import Atlas
from knowledge_compression.evaluation.cloze import MASK, Cloze

SEED = 0


def told_facts() -> frozenset[str]:
    """The facts that the text states, by the ids that items have."""
    questions = Atlas().clozes()
    pairs = sorted({_names(cloze) for cloze in questions})
    told = set(random.Random(SEED).sample(pairs, len(pairs) // 2))
    return frozenset(cloze.fact for cloze in questions if _names(cloze) in told)


def sentences() -> list[str]:
    """Every told fact in the wordings in which nothing is asked, shuffled."""
    told, asked = told_facts(), {_stated(cloze) for cloze in Atlas().clozes()}
    found = {_stated(cloze) for cloze in Atlas(wordings="all").clozes() if cloze.fact in told} - asked
    shuffled = sorted(found)
    random.Random(SEED).shuffle(shuffled)
    return shuffled


def _names(cloze: Cloze) -> tuple[str, ...]:
    return tuple(sorted((cloze.subject, cloze.gold)))


def _stated(cloze: Cloze) -> str:
    return cloze.sentence.replace(MASK, cloze.gold)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python experiments/calibration_text/facts.py FILE")
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(" ".join(sentences()) + "\n", encoding="utf-8")
