"""The combinations of a sweep, and the settings of each.

Hydra needs a tenth of a second to compose a configuration, too long for ten thousand combinations. So it composes only
one configuration for each choice of files. Combinations with the same files differ in plain values. The places of a
value in the settings are found by trying every value of the sweep; then values are put there directly. A key whose
values have any other effect is left to Hydra.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from knowledge_compression.configuration import GROUPS, settings_of
from knowledge_compression.errors import BadInput
from knowledge_compression.identity import rounded

Place = tuple[str | int, ...]


def combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """The product of all swept overrides, in the order typed, the last varying fastest; repeated values count once.

    Raises:
        BadInput: a sweep over a continuous range, which has no list of values.
    """
    axes: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            axes[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            axes[key] = list(dict.fromkeys(f"{key}={_typed(value)}" for value in override.sweep_string_iterator()))
        else:
            raise BadInput(f"{override.input_line} sweeps over a continuous range; give a list, e.g. {key}=0.2,0.4")
    return [list(job) for job in itertools.product(*axes.values())]


def selected(
    grids: Sequence[Mapping[str, Any]], overrides: Sequence[Override]
) -> Iterator[tuple[Mapping[str, Any], list[str]]]:
    """The grids of a preset that the command line asks for, each with the overrides that apply to it.

    A typed choice of files, e.g. ``recovery=lora``, selects the grids that have it, and in each of these grids only the
    typed files. A choice that no grid has replaces that of every grid.

    Args:
        grids: keys of the sweep and their values.
        overrides: those of the command line.
    """
    typed = {override.key_or_group: _values(override) for override in overrides if override.key_or_group in GROUPS}
    files = [{key: str(grid[key]).split(",") for key in typed if key in grid} for grid in grids]
    selecting = {key for of_grid in files for key in of_grid if set(typed[key]) & set(of_grid[key])}
    for grid, of_grid in zip(grids, files, strict=True):
        chosen = {key: [file for file in typed[key] if file in of_grid.get(key, typed[key])] for key in selecting}
        if all(chosen.values()):
            rest = [str(one.input_line) for one in overrides if one.key_or_group not in selecting]
            yield grid, [*rest, *(f"{key}={','.join(values)}" for key, values in chosen.items())]


def _values(override: Override) -> list[str]:
    swept = override.is_sweep_override() and override.is_discrete_sweep()
    return list(override.sweep_string_iterator()) if swept else [override.get_value_element_as_str()]


def _typed(value: str) -> str:
    """A value as it would be typed: ``range(0.1,0.5,0.1)`` gives 0.3, not 0.30000000000000004."""
    if value.lstrip("+-").isdigit():
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    shorter = str(rounded(number)) if math.isfinite(number) else value
    return shorter if len(shorter) < len(value) else value


@dataclass(frozen=True)
class Composed:
    """A combination, composed.

    Attributes:
        settings: its whole configuration as plain data; shared between combinations and never changed.
        texts: the settings as JSON, by top-level name; equal settings have equal texts.
        choices: the file chosen in each group.
    """

    settings: Mapping[str, Any]
    texts: Mapping[str, str]
    choices: Mapping[str, str]


class Composer:
    """Composes the combinations of a sweep.

    Args:
        loader, master: Hydra's, as a sweeper has them.
        jobs: all combinations, as lists of overrides.
    """

    def __init__(self, loader: ConfigLoader, master: DictConfig, jobs: Sequence[Sequence[str]]) -> None:
        self._loader, self._master = loader, master
        self._bases: dict[tuple[str, ...], _Base] = {}
        self._is_group = cache(self._asked_whether_group)
        common = set(jobs[0]).intersection(*jobs) if jobs else set()
        keys = {key for job in jobs[:1] for one in job if not self._is_group(key := _parsed(one).key_or_group)}
        swept = dict.fromkeys(override for job in jobs for override in job if override not in common)
        self._values = {one: value for one in swept if (value := self._value(one, keys))}

    def __call__(self, overrides: Sequence[str]) -> Composed:
        """Compose a combination.

        Raises:
            BadInput: a required value is missing, or a reference is invalid.
            HydraException: the overrides do not fit the configuration.
        """
        base = self._base(overrides, frozenset())
        if base.derived:
            base = self._base(overrides, base.derived)
        values = dict(self._values[one] for one in overrides if one in self._values)
        return base.composed({key: value for key, value in values.items() if key in base.places})

    def _base(self, overrides: Sequence[str], derived: frozenset[str]) -> _Base:
        """The combinations that differ from this one only in plain values of keys that are not ``derived``."""
        chosen = tuple(one for one in overrides if one not in self._values or self._values[one][0] in derived)
        if chosen not in self._bases:
            keys = {self._values[one][0] for one in overrides if one not in chosen}
            asked: dict[str, list[Any]] = {key: [] for key in keys}
            for key, value in self._values.values():
                if key in asked:
                    asked[key].append(value)
            config = self._loader.load_sweep_config(self._master, list(overrides))
            self._bases[chosen] = _Base(config, asked)
        return self._bases[chosen]

    def _value(self, override: str, keys: set[str]) -> tuple[str, Any] | None:
        """Key and value of an override that only replaces one plain value by another."""
        parsed = _parsed(override)
        key, value = parsed.key_or_group, parsed.value()
        is_plain = isinstance(value, str | int | float | bool | NoneType) and "${" not in str(value)
        puts = parsed.type in (OverrideType.CHANGE, OverrideType.FORCE_ADD)
        if not puts or parsed.is_hydra_override() or not is_plain or self._is_group(key):
            return None
        # Several overrides of the same key take effect in the order typed: these are left to Hydra.
        within = sum(f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in keys)
        return (key, value) if within == 1 else None

    def _asked_whether_group(self, key: str) -> bool:
        hydra = self._master.hydra  # its overrides add search paths
        return bool(self._loader.get_group_options(key, None, hydra.job.config_name, list(hydra.overrides.hydra)))


class _Base:
    """A configuration that Hydra composed once, for all values of some of its keys.

    Args:
        config: composed with any of the values.
        asked: all values of those keys.

    Attributes:
        places: the places of each key's value in the settings.
        derived: keys whose values also have another effect.
    """

    def __init__(self, config: DictConfig, asked: Mapping[str, Sequence[Any]]) -> None:
        self.choices = dict(config.hydra.runtime.choices)
        config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        self._settings = settings_of(config)
        self._filled: dict[Any, tuple[Any, str]] = {}
        self.places: dict[str, list[Place]] = {}
        for key, values in asked.items():
            if (found := _places(config, key, values)) is not None:
                self.places[key] = found
        self.derived = frozenset(asked) - self.places.keys()

    def composed(self, values: Mapping[str, Any]) -> Composed:
        """The settings with these values in place."""
        found = {name: self._part(name, values) for name in self._settings}
        settings, texts = ({name: one[i] for name, one in found.items()} for i in (0, 1))
        return Composed(settings, texts, self.choices)

    def _part(self, name: str, values: Mapping[str, Any]) -> tuple[Any, str]:
        """The settings under one name, built once for all combinations in which they are equal."""
        here = [(place[1:], values[key]) for key in values for place in self.places[key] if place[0] == name]
        key = (name, *(repr(value) for _, value in here))
        if key not in self._filled:
            settings = deepcopy(self._settings[name])
            for place, value in here:
                settings = _put(settings, place, value)
            self._filled[key] = settings, json.dumps(settings, sort_keys=True)
        return self._filled[key]


def _places(config: DictConfig, key: str, values: Sequence[Any]) -> list[Place] | None:
    """The places of a key's values in the settings; None if they have any other effect."""
    before = OmegaConf.select(config, key)
    try:
        tried = []
        for value in values:
            OmegaConf.update(config, key, value)
            tried.append(settings_of(config))
    except (BadInput, OmegaConfBaseException):
        return None
    finally:
        OmegaConf.update(config, key, before)
    places = list(dict.fromkeys(place for other in tried[1:] for place in _differences(tried[0], other)))
    stands = all(
        type(at := _at(settings, place)) is type(value) and repr(at) == repr(value)
        for settings, value in zip(tried, values, strict=True)
        for place in places
    )
    return places if stands else None


def _differences(one: Any, other: Any, place: Place = ()) -> Iterator[Place]:
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        for key in one:
            yield from _differences(one[key], other[key], (*place, key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from _differences(*pair, (*place, i))
    elif type(one) is not type(other) or one != other:
        yield place


def _at(settings: Any, place: Place) -> Any:
    for step in place:
        settings = settings[step]
    return settings


def _put(settings: Any, place: Place, value: Any) -> Any:
    if not place:
        return value
    _at(settings, place[:-1])[place[-1]] = value
    return settings


@cache
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)
