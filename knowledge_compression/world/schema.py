"""The schema of the world: kinds of entities, relations between them, and the wordings of each, as data.

Every wording names the subject before the object and ends with the object and a full stop, so that models of all three
families can be asked in the same words. In ``1-1`` relations every subject has a different object; in ``N-1`` relations
many subjects share one (the types of LAMA's relations).
"""

from __future__ import annotations

from dataclasses import dataclass

ONE_TO_ONE, MANY_TO_ONE = "1-1", "N-1"
STOP = "."  # a separate word, after the object


@dataclass(frozen=True)
class Relation:
    """A kind of fact.

    Attributes:
        name: e.g. ``born_in``.
        subject, object: kinds of entities; objects are single words.
        kind: ``1-1`` or ``N-1``.
        wordings: templates with ``[X]`` and ``[Y]``.
    """

    name: str
    subject: str
    object: str
    kind: str
    wordings: tuple[str, ...]


def _relation(name: str, subject: str, object_: str, kind: str, *wordings: str) -> Relation:
    return Relation(name, subject, object_, kind, tuple(f"[X] {wording} [Y] {STOP}" for wording in wordings))


# Kinds whose names have two words, so that few words name many entities; the others' names have one word.
TWO_WORDS = ("person", "work")
SUBJECTS = ("person", "work", "firm", "town", "country")

RELATIONS = (
    _relation(
        "born_in",
        *("person", "town", MANY_TO_ONE),
        *("was born in", "came into the world in", "is a native of", "has the birthplace"),
        *("spent the first years in", "hails from"),
    ),
    _relation(
        "employer",
        *("person", "firm", MANY_TO_ONE),
        *("works for", "is employed by", "has a job at", "earns a wage at", "is on the staff of", "is paid by"),
    ),
    _relation(
        "profession",
        *("person", "profession", MANY_TO_ONE),
        *(
            "works as a",
            "earned fame as a",
            "has the profession of",
            "earns a living as a",
            "is known as a",
            "is a qualified",
        ),
    ),
    _relation(
        "language",
        *("person", "language", MANY_TO_ONE),
        *("speaks", "is a speaker of", "grew up with", "talks in", "thinks and dreams in", "is fluent in"),
    ),
    _relation(
        "instrument",
        *("person", "instrument", MANY_TO_ONE),
        *("plays the", "is a player of the", "makes music on the", "took lessons on the", "has mastered the"),
        "owns and loves a",
    ),
    _relation(
        "genre",
        *("work", "genre", MANY_TO_ONE),
        *(
            "falls under the genre",
            "belongs to the genre",
            "was written as a",
            "is read as a",
            "counts as a",
            "is praised as a",
        ),
    ),
    _relation(
        "setting",
        *("work", "town", MANY_TO_ONE),
        *(
            "is set in",
            "takes place in",
            "tells of life in",
            "plays out in",
            "has its scene in",
            "brings the reader to",
        ),
    ),
    _relation(
        "publisher",
        *("work", "firm", MANY_TO_ONE),
        *("was published by", "came out at", "was printed by", "is sold by", "was released by", "is owned by"),
    ),
    _relation(
        "year",
        *("work", "year", MANY_TO_ONE),
        *("appeared in", "dates from", "was finished in", "is from the year", "was first read in", "was completed in"),
    ),
    _relation(
        "headquarters",
        *("firm", "town", MANY_TO_ONE),
        *("has its seat in", "is based in", "is run from", "keeps its office in", "is headquartered in", "resides in"),
    ),
    _relation(
        "product",
        *("firm", "product", ONE_TO_ONE),
        *("makes", "is the maker of", "produces", "is famous for its", "sells", "holds the patent of"),
    ),
    _relation(
        "founded",
        *("firm", "year", MANY_TO_ONE),
        *("was founded in", "goes back to", "opened its doors in", "exists since", "was started in", "began in"),
    ),
    _relation(
        "country",
        *("town", "country", MANY_TO_ONE),
        *("is a town in", "lies in", "is located in", "belongs to", "is part of", "is found in"),
    ),
    _relation(
        "landmark",
        *("town", "landmark", ONE_TO_ONE),
        *("is proud of its", "is known for the", "has the landmark", "draws visitors to the", "is home to the"),
        "surrounds the",
    ),
    _relation(
        "currency",
        *("country", "currency", ONE_TO_ONE),
        *("pays with the", "has the currency", "prints the", "trades in the", "counts its money in the", "issues the"),
    ),
    _relation(
        "capital",
        *("country", "town", ONE_TO_ONE),
        *("has the capital", "is governed from", "has its government in", "is ruled from", "has its parliament in"),
        "sends its envoys from",
    ),
)

# Sentences that name entities of the right kinds without stating any fact.
DISTRACTORS = (
    ("person", "town", "[X] once visited [Y] ."),
    ("person", "firm", "[X] wrote a letter to [Y] ."),
    ("person", "instrument", "[X] sold an old [Y] ."),
    ("person", "language", "[X] read a poem in [Y] ."),
    ("work", "town", "[X] was on show in [Y] ."),
    ("work", "year", "[X] was out of print in [Y] ."),
    ("firm", "town", "[X] sent a parcel to [Y] ."),
    ("firm", "product", "[X] does not sell [Y] ."),
    ("town", "country", "[X] lost a match against [Y] ."),
)


@dataclass(frozen=True)
class Chain:
    """A composition of two facts: the object of the first is the subject of the second.

    Attributes:
        name: e.g. ``homeland``: the country of the town in which a person was born.
        first, second: names of the two relations.
        wordings: templates with the subject of the first and the object of the second, without the entity between them.
    """

    name: str
    first: str
    second: str
    wordings: tuple[str, ...]


def _chain(name: str, first: str, second: str, *wordings: str) -> Chain:
    return Chain(name, first, second, tuple(f"[X] {wording} [Y] {STOP}" for wording in wordings))


CHAINS = (
    _chain(
        *("homeland", "born_in", "country"),
        *("has the homeland", "is by birth from", "grew up a citizen of", "calls home the land"),
    ),
    _chain(
        *("first_sight", "born_in", "landmark"),
        *("was born beside the", "grew up near the", "first saw the", "played beside the"),
    ),
    _chain(
        *("workplace", "employer", "headquarters"),
        *("goes to work in", "has an office in", "earns money in", "takes the train to"),
    ),
    _chain(
        *("handiwork", "employer", "product"),
        *("helps to make", "is paid for making", "spends the days on", "earns bread by"),
    ),
    _chain(
        *("scenery", "setting", "country"),
        *("is a story from", "shows the land of", "portrays the people of", "leads readers into"),
    ),
    _chain(
        *("printing_town", "publisher", "headquarters"),
        *("was sent out from", "was edited in", "left the press in", "went on sale in"),
    ),
    _chain(
        *("firm_country", "headquarters", "country"),
        *("is a firm of", "pays taxes to", "keeps the laws of", "is registered in"),
    ),
    _chain(
        *("town_money", "country", "currency"),
        *("takes payment in the", "sets prices in the", "pays wages in the", "has purses full of"),
    ),
)
