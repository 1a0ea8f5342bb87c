"""What tells the runs of a sweep from each other: exactly the settings in which they differ, whatever those are."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knowledge_compression.identity import TARGET

CHOSEN = ("model", "target", "compression", "recovery", "corpus")
_AROUND = ("device", "dtype", "scoring_dtype")
ANY = "any"  # the seed of a run in which nothing is drawn by lot
Key = tuple[str, ...]


@dataclass(frozen=True)
class Varied:
    """One setting that is not the same in all runs.

    Attributes:
        name: as short as it is clear, e.g. ``bits``; ``target`` where another file was chosen.
        values: of each run, in their order; None where a run has no such setting.
        chosen: whether it is a choice among files, whose value says what it is by itself.
    """

    name: str
    values: Sequence[Any]
    chosen: bool = False


def varied(configs: Sequence[Mapping[str, Any]]) -> list[Varied]:
    """The settings that vary among runs, choices among files first.

    Where a file was chosen that others did not choose, its own settings vary only among those that chose it. One value
    that several parts hold (the seed, the sparsity) is one setting.

    Args:
        configs: of the runs, as :class:`~knowledge_compression.results.store.Run` holds them.
    """
    choices = [config["choices"] for config in configs]
    chosen = [Varied(group, [_chosen(config, group) for config in configs], chosen=True) for group in CHOSEN]
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
    return found + [Varied(name, values) for name, values in _named(varying, flat)]


def text_of(value: Any) -> str:
    """A value as it is typed; nothing where there is none."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def described(settings: Sequence[Varied], place: int) -> str:
    """One run by what varies, e.g. ``ff gptq bits=3``."""
    told = [(one, one.values[place]) for one in settings]
    words = [text_of(v) if one.chosen else f"{one.name}={text_of(v)}" for one, v in told if v is not None]
    return " ".join(word for word in words if word and word != "none")


def _chosen(config: Mapping[str, Any], group: str) -> str | None:
    return config["choices"].get(group) if group in _decides(config) else None


def _decides(config: Mapping[str, Any]) -> set[str]:
    """The groups that have a say in a run."""
    groups = set(CHOSEN) if (deciding := config.get("identity")) is None else {*deciding, "model"}
    if (config["choices"].get("compression"), config["choices"].get("recovery")) == ("none", "none"):
        return groups - {"target", "compression", "recovery"}
    return groups | {"compression", "recovery"} - ({"target"} if config["choices"]["compression"] == "none" else set())


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
    decides = _decides(config)
    for group in (*CHOSEN, "eval"):
        if group in decides or group == "eval":
            yield from _leaves((group,), config.get(group) or {})
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


def _named(keys: Sequence[Key], flat: Sequence[Mapping[Key, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Settings by their last word where that is one value in each run, else by their whole path."""
    by_word: dict[str, list[Key]] = defaultdict(list)
    for key in keys:
        by_word[key[-1]].append(key)
    for word, alike in by_word.items():
        values = [{repr(of[key]): of[key] for key in alike if key in of} for of in flat]
        if word == "seed" and ("seed",) in alike:  # the parts draw by the run's own
            yield word, [of.get(("seed",), ANY) for of in flat]
        elif all(len(each) < 2 for each in values):
            yield word, [next(iter(each.values()), None) for each in values]
        else:
            for key in alike:
                yield ".".join(key), [of.get(key) for of in flat]
