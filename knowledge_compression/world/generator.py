"""A world of facts from a seed: entities, their facts, and how often and in which words each is stated."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from math import ceil
from typing import Any

from knowledge_compression.building import Seed
from knowledge_compression.errors import BadInput
from knowledge_compression.identity import ADDED
from knowledge_compression.world.schema import (
    CHAINS,
    DISTRACTORS,
    ONE_TO_ONE,
    RELATIONS,
    SUBJECTS,
    TWO_WORDS,
    Chain,
    Relation,
)

FORMAT = 2  # raised whenever a change gives another world for the same settings

_ONSETS = "b br d dr f fl g gr h k kl kr l m n p pl pr r s sk st t tr v w z".split()  # noqa: SIM905
_VOWELS = ["a", "e", "i", "o", "u", "ai", "au", "ei", "io", "oa"]
_CODAS = ["", "", "", "l", "m", "n", "r", "s", "th", "x", "rn", "nd", "sk"]


@dataclass(frozen=True)
class WorldSettings:
    """The size of the world and the distribution of its facts.

    Attributes:
        people, works, firms, towns, countries: numbers of entities that have facts.
        professions, languages, instruments, genres, years: numbers of other answers.
        relations: names of the relations to include; None includes all.
        probed: share of the subjects of each kind whose facts are probed; the facts of the others form the recovery
            corpus.
        held_out: number of wordings of every probed fact that training never uses for it.
        mean_frequency: how often a fact is stated on average in one epoch of the training text.
        exponent: exponent of the Zipf-Mandelbrot law ``1 / (rank + shift) ** exponent`` of fact frequency; 0 makes all
            equal.
        shift: shift of that law as a share of the number of facts; a smaller shift makes the head steeper.
        distractors: number of sentences without a fact, relative to those with one.
        seed: seed of all random draws.
        two_hop: share of the two-hop compositions (the country of somebody's birthplace) that the training text states;
            the others are probed and follow only from their two facts. With 0 there are no compositions.
        two_hop_frequency: how often each of them is stated in one epoch of the training text.
    """

    people: int = 260
    works: int = 130
    firms: int = 40
    towns: int = 40
    countries: int = 12
    professions: int = 30
    languages: int = 20
    instruments: int = 24
    genres: int = 16
    years: int = 40
    relations: tuple[str, ...] | None = None
    probed: float = 0.7
    held_out: int = 2
    mean_frequency: float = 6.0
    exponent: float = 1.0
    shift: float = 0.05
    distractors: float = 0.1
    seed: Seed = 0
    two_hop: float = field(default=0.0, metadata=ADDED)
    two_hop_frequency: int = field(default=6, metadata=ADDED)

    def __post_init__(self) -> None:
        """Refuse impossible worlds."""
        if self.relations is not None:
            object.__setattr__(self, "relations", tuple(self.relations))
            if unknown := set(self.relations) - {relation.name for relation in RELATIONS}:
                known = ", ".join(relation.name for relation in RELATIONS)
                raise BadInput(f"world.relations: there is no {', '.join(sorted(unknown))}; known: {known}")
        for kind, count in self.counts.items():
            if count < 2:
                raise BadInput(f"world: {count} of kind {kind} are too few; choose at least 2")
        if not 0.0 < self.probed < 1.0:
            raise BadInput(
                f"world.probed={self.probed} must lie between 0 and 1: some facts are probed, the others form the "
                "recovery corpus"
            )
        if not 0 < self.held_out < min(len(relation.wordings) for relation in RELATIONS):
            raise BadInput(
                f"world.held_out={self.held_out} must hold out at least one wording and leave at least one for training"
            )
        if self.mean_frequency < 1 or self.exponent < 0 or self.shift <= 0 or self.distractors < 0:
            raise BadInput("world: mean_frequency >= 1, exponent >= 0, shift > 0 and distractors >= 0 are needed")
        if not 0.0 <= self.two_hop < 1.0 or self.two_hop_frequency < 1:
            raise BadInput(
                f"world: two_hop={self.two_hop} must be at least 0 and below 1, so that some compositions are left to "
                f"probe, and two_hop_frequency={self.two_hop_frequency} at least 1"
            )
        if self.two_hop and not self.chains:
            raise BadInput(
                f"world.two_hop={self.two_hop}: no two of these relations form a composition; include e.g. born_in and "
                "country"
            )
        for relation in self.schema:
            if relation.kind == ONE_TO_ONE and self.counts[relation.object] < self.counts[relation.subject]:
                raise BadInput(
                    f"world: every {relation.subject} has a {relation.object} of its own, so "
                    f"{self.counts[relation.subject]} of each are needed, but there are only "
                    f"{self.counts[relation.object]} of kind {relation.object}"
                )

    @property
    def schema(self) -> list[Relation]:
        """The relations of this world."""
        return [relation for relation in RELATIONS if self.relations is None or relation.name in self.relations]

    @property
    def chains(self) -> list[Chain]:
        """The compositions of two relations of this world."""
        there = {relation.name for relation in self.schema}
        return [chain for chain in CHAINS if {chain.first, chain.second} <= there]

    @property
    def counts(self) -> dict[str, int]:
        """Number of entities of each kind; kinds with one owner each are as many as their owners."""
        return {
            "person": self.people,
            "work": self.works,
            "firm": self.firms,
            "town": self.towns,
            "country": self.countries,
            "profession": self.professions,
            "language": self.languages,
            "instrument": self.instruments,
            "genre": self.genres,
            "year": self.years,
            "product": self.firms,
            "landmark": self.towns,
            "currency": self.countries,
        }

    @property
    def deciding(self) -> dict[str, Any]:
        """All settings, except later additions at their defaults, so that older worlds keep their identity."""
        added = {f.name: f.default for f in fields(self) if f.metadata.get("added")}
        return {name: value for name, value in asdict(self).items() if name not in added or value != added[name]}

    def digest(self) -> str:
        """Hash of the settings and of the generator's version, which identifies the world."""
        content = json.dumps([FORMAT, self.deciding], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Fact:
    """A fact of the world.

    Attributes:
        relation: name of the relation.
        subject, object: names of the entities that it relates.
        frequency: how often one epoch of the training text states it.
        probed: whether it is probed; nothing about its subject is then in the recovery corpus.
        seen: indices of the wordings that training uses for it, in order; a rare fact does not appear in all of them.
        held_out: indices of the wordings that training never uses for it by design; empty if it is not probed.
    """

    relation: Relation
    subject: str
    object: str
    frequency: int
    probed: bool
    seen: tuple[int, ...]
    held_out: tuple[int, ...]

    @property
    def id(self) -> str:
        """Stable name of the fact."""
        return f"{self.relation.name}/{self.subject}"

    def sentence(self, wording: int) -> str:
        """The fact in the wording with this index."""
        return say(self.relation.wordings[wording], self.subject, self.object)


@dataclass(frozen=True)
class TwoHop:
    """Two facts of the world as one: a subject, and an object that it is linked to through another entity.

    Attributes:
        chain: the two relations.
        first, second: the facts; the object of the first is the subject of the second.
        told: whether the training text states it; otherwise it follows only from the two facts.
        seen: indices of the wordings that training uses for it, in order; empty if it is not told.
        held_out: indices of the wordings that training never uses for it.
    """

    chain: Chain
    first: Fact
    second: Fact
    told: bool
    seen: tuple[int, ...]
    held_out: tuple[int, ...]

    @property
    def id(self) -> str:
        """Stable name of the composition."""
        return f"{self.chain.name}/{self.first.subject}"

    def sentence(self, wording: int) -> str:
        """The composition in the wording with this index."""
        return say(self.chain.wordings[wording], self.first.subject, self.second.object)


def say(template: str, subject: str, object_: str) -> str:
    """A template with both names filled in."""
    return template.replace("[X]", subject).replace("[Y]", object_)


@dataclass(frozen=True)
class World:
    """Entities and facts, determined by the settings.

    Attributes:
        settings: the settings.
        names: names of the entities of each kind.
        facts: all facts, by relation and subject.
        probed: the subjects whose facts are probed.
    """

    settings: WorldSettings
    names: Mapping[str, Sequence[str]]
    facts: Sequence[Fact]
    probed: frozenset[str] = field(default_factory=frozenset)

    @cached_property
    def questions(self) -> list[Fact]:
        """The probed facts."""
        return [fact for fact in self.facts if fact.probed]

    @cached_property
    def head(self) -> frozenset[str]:
        """Ids of the head facts: the most frequent quarter of the probed facts (ties at its edge are included)."""
        frequencies = sorted((fact.frequency for fact in self.questions), reverse=True)
        edge = frequencies[(len(frequencies) - 1) // 4]
        return frozenset(fact.id for fact in self.questions if fact.frequency >= edge)

    @cached_property
    def tail_edge(self) -> int:
        """The highest frequency of a tail fact; facts up to this frequency are about the least frequent half."""
        frequencies = sorted(fact.frequency for fact in self.questions)
        return frequencies[(len(frequencies) - 1) // 2]

    @cached_property
    def two_hops(self) -> list[TwoHop]:
        """Every composition of two facts, if the settings include any, by chain and subject."""
        settings = self.settings
        if not settings.two_hop:
            return []
        generator = random.Random(settings.seed + 4)
        of = {(fact.relation.name, fact.subject): fact for fact in self.facts}
        found = []
        for chain in settings.chains:
            firsts = [fact for fact in self.facts if fact.relation.name == chain.first]
            told = set(generator.sample(range(len(firsts)), round(settings.two_hop * len(firsts))))
            for place, first in enumerate(firsts):
                order = generator.sample(range(len(chain.wordings)), len(chain.wordings))
                seen = tuple(order[1:]) if place in told else ()
                held_out = tuple(order[:1]) if place in told else tuple(order)
                found.append(TwoHop(chain, first, of[chain.second, first.object], place in told, seen, held_out))
        return found

    def training_text(self) -> list[str]:
        """One epoch of the training text: every fact as often as its frequency, the stated compositions, and
        distractors, shuffled.
        """
        text = self._text(self.facts, self.settings.seed + 1, frozenset())
        if composed := [
            composition.sentence(composition.seen[turn % len(composition.seen)])
            for composition in self.two_hops
            if composition.told
            for turn in range(self.settings.two_hop_frequency)
        ]:
            text += composed
            random.Random(self.settings.seed + 5).shuffle(text)
        return text

    def recovery_text(self) -> list[str]:
        """The recovery corpus: facts and distractors about the other entities; it mentions no probed subject."""
        others = [fact for fact in self.facts if not fact.probed and fact.object not in self.probed]
        return self._text(others, self.settings.seed + 2, self.probed)

    def _text(self, facts: Sequence[Fact], seed: int, avoid: frozenset[str]) -> list[str]:
        generator = random.Random(seed)
        sentences = [
            fact.sentence(fact.seen[turn % len(fact.seen)]) for fact in facts for turn in range(fact.frequency)
        ]
        true = {(fact.subject, fact.object) for fact in self.facts}
        names = {kind: [name for name in names if name not in avoid] for kind, names in self.names.items()}
        wanted = round(len(sentences) * self.settings.distractors)
        while wanted > 0:
            subject_kind, object_kind, template = generator.choice(DISTRACTORS)
            subject, object_ = generator.choice(names[subject_kind]), generator.choice(names[object_kind])
            if (subject, object_) not in true:  # a distractor states no fact and does not contain a true pair
                sentences.append(say(template, subject, object_))
                wanted -= 1
        generator.shuffle(sentences)
        return sentences


def generate(settings: WorldSettings) -> World:
    """The world of these settings; the same settings give the same world, byte for byte."""
    generator = random.Random(settings.seed)
    names = _names(settings, generator)
    probed = frozenset(
        name
        for kind in SUBJECTS
        for name in generator.sample(names[kind], min(len(names[kind]) - 1, ceil(len(names[kind]) * settings.probed)))
    )
    pairs: list[tuple[Relation, str, str]] = []
    for relation in settings.schema:
        subjects, objects = names[relation.subject], names[relation.object]
        if relation.kind == ONE_TO_ONE:
            chosen = generator.sample(objects, len(subjects))
        else:
            chosen = [generator.choice(objects) for _ in subjects]
        pairs += [(relation, subject, object_) for subject, object_ in zip(subjects, chosen, strict=True)]
    frequencies = _frequencies(len(pairs), settings)
    generator.shuffle(frequencies)  # so that frequency is independent of relation and subject
    facts = []
    for (relation, subject, object_), frequency in zip(pairs, frequencies, strict=True):
        asked = subject in probed
        order = generator.sample(range(len(relation.wordings)), len(relation.wordings))
        kept_back = settings.held_out if asked else 0
        seen, held_out = order[kept_back:], order[:kept_back]
        facts.append(Fact(relation, subject, object_, frequency, asked, tuple(seen[:frequency]), tuple(held_out)))
    return World(settings, names, facts, probed)


def _frequencies(count: int, settings: WorldSettings) -> list[int]:
    """Frequencies by rank, by the Zipf-Mandelbrot law, each at least one."""
    shift = settings.shift * count
    weights = [1.0 / (rank + shift) ** settings.exponent for rank in range(1, count + 1)]
    scale = settings.mean_frequency * count / sum(weights)
    return [max(1, round(weight * scale)) for weight in weights]


def _names(settings: WorldSettings, generator: random.Random) -> dict[str, list[str]]:
    """Names of every kind, from syllables; no word, in any letter case, belongs to two names."""
    taken: set[str] = set()

    def word() -> str:
        while True:
            syllables = generator.randint(2, 3)
            made = "".join(generator.choice(_ONSETS) + generator.choice(_VOWELS) for _ in range(syllables))
            made += generator.choice(_CODAS)
            if made not in taken:
                taken.add(made)
                return made

    names: dict[str, list[str]] = {}
    for kind, count in settings.counts.items():
        if kind in TWO_WORDS:
            half = 2 + round(
                (2 * count) ** 0.5
            )  # twice as many pairs as needed, so that one word does not reveal the other
            firsts, lasts = ([word().capitalize() for _ in range(half)] for _ in range(2))
            pairs = [f"{first} {last}" for first in firsts for last in lasts]
            names[kind] = generator.sample(pairs, count)
        elif kind == "year":
            names[kind] = [str(year) for year in generator.sample(range(1500, 1500 + max(500, 2 * count)), count)]
        else:
            lower = kind in ("profession", "instrument", "genre", "currency")
            names[kind] = [word() if lower else word().capitalize() for _ in range(count)]
    return names
