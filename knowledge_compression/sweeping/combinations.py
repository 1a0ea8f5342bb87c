"""The combinations of a sweep, and the experiment that each of them stands for.

Hydra composes a configuration in a tenth of a second, which ten thousand combinations cannot wait for. Those that
choose the same files differ in a few values alone: Hydra composes one of them, the values are put into it for the
others, and a part of an experiment is made once for all combinations that have its values in common.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import is_dataclass, replace
from functools import cache, partial
from types import NoneType
from typing import TYPE_CHECKING, Any, cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from knowledge_compression.configuration import build, check_types, made_of, put_together, settings_of
from knowledge_compression.errors import BadInput

if TYPE_CHECKING:
    from knowledge_compression.experiment import Experiment


def combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """The product of all swept overrides, in the order they were typed, last one fastest; a value named twice is one.

    Raises:
        BadInput: a sweep over a continuous range, which has no list of values.
    """
    axes: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            axes[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            axes[key] = list(dict.fromkeys(f"{key}={value}" for value in override.sweep_string_iterator()))
        else:
            raise BadInput(f"{override.input_line} sweeps over a continuous range; give a list, e.g. {key}=0.2,0.4")
    return [list(job) for job in itertools.product(*axes.values())]


class Assembler:
    """Makes the experiments of a sweep's combinations.

    Args:
        loader, master: Hydra's, as a sweeper has them.
        jobs: all combinations, each as its overrides.
    """

    def __init__(self, loader: ConfigLoader, master: DictConfig, jobs: Sequence[Sequence[str]]) -> None:
        self.loader, self.master = loader, master
        self._composed: dict[tuple[str, ...], _Composed] = {}
        self._parts = _Parts()
        self._is_group = cache(self._asked_whether_group)
        common = set(jobs[0]).intersection(*jobs) if jobs else set()
        keys = {key for job in jobs[:1] for one in job if not self._is_group(key := _parsed(one).key_or_group)}
        swept = {override for job in jobs for override in job if override not in common}
        self._values = {override: value for override in swept if (value := self._value(override, keys))}

    def __call__(self, overrides: Sequence[str]) -> tuple[Experiment, Callable[[str], Any]]:
        """The experiment of a combination, and what its configuration says under a top-level name, as plain data.

        Raises:
            BadInput: a value is missing, of the wrong kind or out of range.
            HydraException: the overrides do not fit the configuration.
        """
        values = dict(self._values[one] for one in overrides if one in self._values)
        chosen = tuple(one for one in overrides if one not in self._values)
        if chosen not in self._composed:
            config = self.loader.load_sweep_config(self.master, list(overrides))
            self._composed[chosen] = _Composed(config, values, self._parts)
        composed = self._composed[chosen]
        settings = partial(composed.settings_of, values)
        return put_together(settings, partial(composed.made_of, values), composed.choices), settings

    def _value(self, override: str, keys: Collection[str]) -> tuple[str, Any] | None:
        """Key and value of an override that puts one plain value in another's place, and does nothing else."""
        parsed = _parsed(override)
        key, value = parsed.key_or_group, parsed.value()
        is_plain = isinstance(value, (str, int, float, bool, NoneType)) and "${" not in str(value)
        if parsed.type != OverrideType.CHANGE or parsed.is_hydra_override() or not is_plain or self._is_group(key):
            return None
        # Overrides of one and the same thing come in the order that they were typed in: those are Hydra's.
        within = sum(f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in keys)
        return (key, value) if within == 1 else None

    def _asked_whether_group(self, key: str) -> bool:
        hydra = self.master.hydra  # its overrides name places where more files lie
        return bool(self.loader.get_group_options(key, None, hydra.job.config_name, list(hydra.overrides.hydra)))


class _Composed:
    """A configuration that Hydra composed once, for all values that some of its keys take.

    Args:
        config: with some values or other.
        keys: of the values.
        parts: makes the parts.
    """

    def __init__(self, config: DictConfig, keys: Collection[str], parts: _Parts) -> None:
        self.choices = dict(config.hydra.runtime.choices)
        self._config, self._marked, self._marks = config, deepcopy(config), {_mark(key): key for key in keys}
        for mark, key in self._marks.items():
            OmegaConf.update(self._marked, key, mark)
        self._parts = parts
        self._sources = cache(partial(_sources, config))
        self._deciding = cache(lambda name: [key for key in keys if key.partition(".")[0] in self._sources(name)])
        self._form = cache(self._form_of)
        self._settings: dict[Any, Any] = {}
        self._made: dict[Any, Any] = {}

    def settings_of(self, values: Mapping[str, Any], name: str) -> Any:
        """What the configuration says under a top-level name with these values; read once for those that decide it."""
        key = self._key(values, name)
        if key not in self._settings:
            if (form := self._form(name)) is not None:
                self._settings[key] = _filled(form, {mark: values[of] for mark, of in self._marks.items()})
            else:
                for place, value in values.items():
                    OmegaConf.update(self._config, place, value)
                self._settings[key] = settings_of(self._config, name)
        return self._settings[key]

    def made_of(self, values: Mapping[str, Any], group: str) -> Any:
        """What the settings of a group describe."""
        key = self._key(values, group)
        if key not in self._made:
            self._made[key] = made_of(group, self.settings_of(values, group), self._parts)
        return self._made[key]

    def _key(self, values: Mapping[str, Any], name: str) -> tuple[Any, ...]:
        return name, *(repr(values[key]) for key in self._deciding(name))

    def _form_of(self, name: str) -> Any:
        """The settings with marks where values go; None where they are more than values put into places."""
        if self._sources(name) == set(self._config):
            return None
        try:
            form = settings_of(self._marked, name)
        except BadInput:
            return None
        left = repr(_filled(form, dict.fromkeys(self._marks)))
        return None if any(mark in left for mark in self._marks) else form  # a mark inside a longer text


class _Parts:
    """Makes the parts of experiments, each once; one that differs from another in plain fields alone is made from it.

    A part answers once too, where that means reading files or a whole network.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[str, str], Any] = {}
        self._first: dict[tuple[str, ...], tuple[Mapping[str, Any], Any]] = {}

    def __call__(self, name: str, settings: Mapping[str, Any]) -> Any:
        """As :func:`~knowledge_compression.configuration.build`."""
        key = (name, repr(settings))
        if key not in self._made:
            kind = (name, *settings, str(settings.get("_target_")))
            if kind not in self._first:
                made = build(name, settings)
                self._first[kind] = settings, made
            else:
                made = _made_like(*self._first[kind], name, settings)
            self._made[key] = _answering_once(made)
        return self._made[key]


def _made_like(known: Mapping[str, Any], made: Any, name: str, settings: Mapping[str, Any]) -> Any:
    """The part that ``settings`` describe, from one that was made of the same fields with other values."""
    changed = {field: value for field, value in settings.items() if repr(value) != repr(known[field])}
    if not is_dataclass(made) or any(isinstance(value, (Mapping, list)) for value in changed.values()):
        return build(name, settings)
    check_types(name, type(made), changed)
    return replace(cast(Any, made), **changed)


def _answering_once(part: Any) -> Any:
    for question in ("fingerprint", "select"):
        if hasattr(part, question):
            object.__setattr__(part, question, _answered_once(getattr(part, question)))  # parts are frozen
    return part


def _answered_once(question: Callable[..., Any]) -> Callable[..., Any]:
    """The question, with its answer kept for each object that it was asked about."""
    answers: dict[tuple[int, ...], Any] = {}

    def ask(*about: Any) -> Any:
        key = tuple(map(id, about))
        if key not in answers:
            answers[key] = question(*about), about  # kept too, so that no other object gets its id
        return answers[key][0]

    return ask


def _sources(config: DictConfig, name: str) -> set[str]:
    """The top-level keys that a part's values may come from: itself, and every one whose name occurs in them.

    All of them, where a resolver computes something, or what is referred to is itself referred to.
    """
    raw = cast(dict[str, Any], OmegaConf.to_container(config))
    found: set[str] = set()
    todo = {name}
    while todo:
        found |= todo
        text = " ".join(str(raw[key]) for key in todo)
        if re.search(r"\$\{[^}]*(\$\{|:)", text):
            return set(raw)
        todo = (set(re.findall(r"\w+", text)) & set(raw)) - found
    return found


def _mark(key: str) -> str:
    return f"<the value of {key}>"


def _filled(form: Any, values: Mapping[str, Any]) -> Any:
    """Plain data with the value of every mark in its place."""
    if isinstance(form, dict):
        return {key: _filled(value, values) for key, value in form.items()}
    if isinstance(form, list):
        return [_filled(value, values) for value in form]
    return values.get(form, form) if isinstance(form, str) else form


def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)
