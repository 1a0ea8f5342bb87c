"""The combinations of a sweep, and the experiment that each of them stands for.

Hydra composes a configuration in a tenth of a second, which ten thousand combinations cannot wait for. Those that
choose the same files differ in a few values alone: Hydra composes one of them, the values are put into it for the
others, and a part of an experiment is made once for all combinations that have its values in common.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from types import NoneType
from typing import TYPE_CHECKING, Any, cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from knowledge_compression.configuration import GROUPS, experiment_from, made_of, settings_of
from knowledge_compression.errors import BadInput

if TYPE_CHECKING:
    from knowledge_compression.experiment import Experiment


def combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """The product of all swept overrides, in the order they were typed, last one fastest.

    Raises:
        BadInput: a sweep over a continuous range, which has no list of values.
    """
    axes: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            axes[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            axes[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
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
        self._made: dict[tuple[str, str], Any] = {}
        self._is_group = cache(self._asked_whether_group)
        common = set(jobs[0]).intersection(*jobs) if jobs else set()
        keys = {key for job in jobs[:1] for one in job if not self._is_group(key := _parsed(one).key_or_group)}
        swept = {override for job in jobs for override in job if override not in common}
        self._values = {override: value for override in swept if (value := self._value(override, keys))}

    def __call__(self, overrides: Sequence[str]) -> tuple[Experiment, DictConfig]:
        """The experiment of a combination, and its configuration, into which the next call puts other values.

        Raises:
            BadInput: a value is missing, of the wrong kind or out of range.
            HydraException: the overrides do not fit the configuration.
        """
        values = dict(self._values[one] for one in overrides if one in self._values)
        chosen = tuple(one for one in overrides if one not in self._values)
        if chosen not in self._composed:
            self._composed[chosen] = _Composed(self.loader.load_sweep_config(self.master, list(overrides)))
        composed = self._composed[chosen]
        composed.put(values)
        experiment = experiment_from(composed.config, composed.choices, composed.settings_of, self._made_of)
        return experiment, composed.config

    def _made_of(self, group: str, settings: Mapping[str, Any]) -> Any:
        """What settings describe, made once; it answers once too, where that means reading files or a whole network."""
        key = (group, repr(settings))
        if key not in self._made:
            made = made_of(group, settings)
            for part in made.values() if isinstance(made, dict) else [made]:
                for question in ("fingerprint", "select"):
                    if hasattr(part, question):
                        object.__setattr__(part, question, _answered_once(getattr(part, question)))
            self._made[key] = made
        return self._made[key]

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
    """A configuration that Hydra composed; other values are put into it, one combination after the other."""

    def __init__(self, config: DictConfig) -> None:
        self.config, self.choices = config, dict(config.hydra.runtime.choices)
        self._sources = {name: _sources(config, name) for name in GROUPS}
        self._known: dict[Any, dict[str, Any]] = {}
        self._values: Mapping[str, Any] = {}

    def put(self, values: Mapping[str, Any]) -> None:
        """Give the configuration the values of a combination, the same keys each time."""
        self._values = values
        for key, value in values.items():
            OmegaConf.update(self.config, key, value)

    def settings_of(self, config: DictConfig, group: str) -> dict[str, Any]:
        """The settings of a group; they are read once for each set of the values that they depend on."""
        sources = self._sources[group]
        key = (group, *((k, repr(value)) for k, value in self._values.items() if k.partition(".")[0] in sources))
        if key not in self._known:
            self._known[key] = settings_of(config, group)
        return self._known[key]


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
    """The top-level keys that a part's values may come from: itself, and every one whose name occurs in them."""
    raw = cast(dict[str, Any], OmegaConf.to_container(config))
    found: set[str] = set()
    todo = {name}
    while todo:
        found |= todo
        text = " ".join(str(raw[key]) for key in todo)
        if re.search(r"\$\{[^}]*\$\{", text):  # what is referred to is itself referred to
            return set(raw)
        todo = (set(re.findall(r"\w+", text)) & set(raw)) - found
    return found


def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)
