"""The settings in which the runs of a sweep differ, whatever they are."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knowledge_compression.identity import TARGET

CHOSEN = ("model", "target", "compression", "recovery", "corpus")
_AROUND = ("device", "dtype", "scoring_dtype", "distance")
ANY = "any"  # the seed of a run without randomness
Key = tuple[str, ...]


@dataclass(frozen=True)
class Varied:
    """A setting that is not the same in all runs.

    Attributes:
        name: the shortest clear name, e.g. ``bits``; ``target`` if another file was chosen.
        values: the value in each run, in order; None if a run has no such setting.
        chosen: whether it is a choice among files, whose values need no name before them.
        parts: the parts of a run that hold it, e.g. ``{"compression"}``.
    """

    name: str
    values: Sequence[Any]
    chosen: bool = False
    parts: frozenset[str] = frozenset()


def varied(configs: Sequence[Mapping[str, Any]]) -> list[Varied]:
    """The settings that vary among runs: choices among files first, the seed last.

    The settings of a chosen file vary only among the runs that chose it. A value shared by several parts (the seed, the
    sparsity) is one setting.

    Args:
        configs: the settings of the runs, as in :class:`~knowledge_compression.results.store.Run`.
    """
    choices = [config["choices"] for config in configs]
    chosen = [
        Varied(group, [_chosen(config, group) for config in configs], True, frozenset({group})) for group in CHOSEN
    ]
    found = [one for one in chosen if len(set(one.values) - {None}) > 1]
    flat = [dict(_flat(config)) for config in configs]
    varying: list[Key] = []
    for key in dict.fromkeys(key for settings in flat for key in settings):
        buckets: dict[Any, set[str]] = defaultdict(set)
        for settings, of in zip(flat, choices, strict=True):
            if key in settings:
                buckets[of.get(key[0])].add(repr(settings[key]))
        if any(len(values) > 1 for values in buckets.values()):
            varying.append(key)
    return found + sorted(_named(varying, flat), key=lambda one: one.name == "seed")


def text_of(value: Any) -> str:
    """A value as it would be typed; empty if there is none."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class Names:
    """What each of several runs is called: the settings that vary among them, and no others.

    A dense run is called ``dense``. A run that differs from the others in nothing has the names of its chosen files.

    Args:
        configs: the settings of all the runs, by id.
    """

    def __init__(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        self._configs = configs
        self._place = {run_id: place for place, run_id in enumerate(configs)}
        self.settings = varied(list(configs.values()))
        suites = ["+".join(config["eval"]) for config in configs.values()]
        if len(set(suites)) > 1:
            self.settings.append(Varied("eval", suites, True, frozenset({"eval"})))

    def values(self, run_id: str) -> dict[str, str]:
        """The values of what varies, as text, by name; settings that the run does not have are left out."""
        found = {one.name: one.values[self._place[run_id]] for one in self.settings}
        return {name: text_of(value) for name, value in found.items() if value is not None}

    def of(self, run_id: str, without: Collection[str] = ()) -> str:
        """What a run is called, e.g. ``ff gptq bits=3``.

        Args:
            run_id: id of one of the runs.
            without: settings to leave out, by name; the name of a part (``recovery``) leaves out what only it holds.
        """
        words = []
        for one in self.settings:
            value = one.values[self._place[run_id]]
            if value in (None, ANY) or one.name in without or one.parts <= {*without}:
                continue
            words.append(text_of(value) if one.chosen else f"{one.name}={text_of(value)}")
        words = [word for word in words if word != "none"]
        choices = self._configs[run_id]["choices"]
        if is_dense(choices):
            model = [choices["model"]] if choices["model"] in words else []
            return " ".join([*model, "dense", *words[len(model) :]])
        return " ".join(words) or called(choices, without)


def called(choices: Mapping[str, str], without: Collection[str] = ()) -> str:
    """A run by itself, called by its chosen files, e.g. ``smollm2 att magnitude``; corpora are not named."""
    if is_dense(choices):
        return f"{choices['model']} dense"
    words = [
        choices.get(part, "none") for part in ("model", "target", "compression", "recovery") if part not in without
    ]
    return " ".join(word for word in words if word != "none")


def is_dense(choices: Mapping[str, str]) -> bool:
    """Whether nothing was done to the model."""
    return choices.get("compression") == "none" and choices.get("recovery") == "none"


def _chosen(config: Mapping[str, Any], group: str) -> str | None:
    return config["choices"].get(group) if group in _decides(config) else None


def _decides(config: Mapping[str, Any]) -> set[str]:
    """The groups that affect a run."""
    groups = set(CHOSEN) if (deciding := config.get("identity")) is None else {*deciding, "model"}
    if is_dense(config["choices"]):
        return groups - {"target", "compression", "recovery"}
    return groups | {"compression", "recovery"} - ({"target"} if config["choices"]["compression"] == "none" else set())


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
    decides = _decides(config)
    for group in (*CHOSEN, "eval"):
        if group in decides or group == "eval":
            settings = dict(config.get(group) or {})
            if settings.get("pattern") is not None:
                settings.pop("sparsity", None)  # the pattern sets it
            yield from _leaves((group,), settings)
    for name in _AROUND:
        if name in config:
            yield (name,), config[name]
    if config.get("seed") is not None:
        yield ("seed",), config["seed"]


def _leaves(key: Key, value: Any) -> Iterator[tuple[Key, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name != TARGET:
                yield from _leaves((*key, str(name)), inner)
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        for place, inner in enumerate(value):
            yield from _leaves((*key, str(place)), inner)
    else:
        yield key, value


def _named(keys: Sequence[Key], flat: Sequence[Mapping[Key, Any]]) -> Iterator[Varied]:
    """Settings by their last word if that has one value in each run, otherwise by their whole path."""
    by_word: dict[str, list[Key]] = defaultdict(list)
    for key in keys:
        by_word[key[-1]].append(key)
    for word, alike in by_word.items():
        values = [{repr(of[key]): of[key] for key in alike if key in of} for of in flat]
        parts = frozenset(key[0] for key in alike)
        if word == "seed" and ("seed",) in alike:  # the parts use the run's own seed
            yield Varied(word, [of.get(("seed",), ANY) for of in flat], parts=parts)
        elif all(len(each) < 2 for each in values):
            yield Varied(word, [next(iter(each.values()), None) for each in values], parts=parts)
        else:
            for key in alike:
                yield Varied(".".join(key), [of.get(key) for of in flat], parts=frozenset({key[0]}))
