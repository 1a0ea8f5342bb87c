"""From a composed Hydra configuration to the objects of one experiment; nothing below this file knows Hydra."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from typing import Any, cast, get_type_hints

from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from knowledge_compression.compression.kept import KeptModels
from knowledge_compression.errors import BadInput, first_line
from knowledge_compression.experiment import Experiment
from knowledge_compression.results.tracker import Tracker

# What one experiment is made of: the configuration groups, and the plain values that every part may refer to.
GROUPS = ("model", "target", "compression", "recovery", "corpus", "eval")
VALUES = ("sparsity", "reading", "seed", "device", "dtype", "scoring_dtype")


def settings_of(config: DictConfig, name: str) -> Any:
    """What a configuration says under one of its top-level names, as plain data; of a group without choice, nothing.

    Raises:
        BadInput: a value that must be given is missing, or a reference leads nowhere.
    """
    try:
        part = config.get(name)
    except OmegaConfBaseException as error:
        raise BadInput(first_line(error)) from None
    if OmegaConf.is_config(part):
        return plain(part)
    return {} if part is None and name in GROUPS else part


def made_of(group: str, settings: Mapping[str, Any], build: Callable[[str, Mapping[str, Any]], Any]) -> Any:
    """What the settings of one group describe; of ``eval`` all suites by name.

    Args:
        group: one of ``GROUPS``.
        settings: as :func:`settings_of` gives them.
        build: :func:`build`, or what remembers its answers.

    Raises:
        BadInput: a value is missing, of the wrong kind or out of range.
    """
    if group == "eval":
        return {name: build(f"eval.{name}", part) for name, part in settings.items()}
    return build(group, settings)


def experiment_from(config: DictConfig, choices: Mapping[str, str]) -> Experiment:
    """Build the experiment that a composed configuration describes, see :func:`put_together`."""
    settings = cache(partial(settings_of, config))
    return put_together(settings, lambda group: made_of(group, settings(group), build), choices)


def put_together(
    settings_of: Callable[[str], Any], made_of: Callable[[str], Any], choices: Mapping[str, str]
) -> Experiment:
    """The experiment of its parts.

    Args:
        settings_of: the plain data under a top-level name of the configuration.
        made_of: what the settings of a group describe.
        choices: which file was chosen in each group, e.g. ``{"target": "att"}``; kept with the settings.

    Raises:
        BadInput: a value is missing, of the wrong kind or out of range.
    """
    settings: dict[str, Any] = {name: settings_of(name) for name in GROUPS}
    if not settings["eval"] and not settings["model"].get("stream"):
        raise BadInput("eval=[] asks nothing; choose at least one suite, e.g. eval=[atlas]")
    made = {name: made_of(name) for name in GROUPS}
    values = {name: settings_of(name) for name in VALUES}
    chosen = {group: choices[group] for group in GROUPS if group in choices and group != "eval"}
    output = settings_of("output")
    return Experiment(
        source=made["model"],
        target=made["target"],
        compression=made["compression"],
        recovery=made["recovery"],
        corpus=made["corpus"],
        suites=made["eval"],
        settings=settings | values | {"choices": chosen},
        seed=values["seed"],
        device=values["device"],
        dtype=values["dtype"],
        scoring_dtype=values["scoring_dtype"],
        save_model=output["save_model"],
        kept_models=KeptModels(output["compressed_gb"]),
    )


def tracker_from(config: DictConfig, sweep: str | None = None) -> Tracker:
    """The tracker that the configuration names.

    Args:
        config: the composed configuration.
        sweep: the name of the sweep, by which a tracker groups its runs unless the user named a group.
    """
    settings = plain(config.tracker)
    if "group" in settings:
        settings["group"] = settings["group"] or sweep
    return build("tracker", settings)


def plain(part: DictConfig) -> dict[str, Any]:
    """A part of the configuration as plain data, every reference resolved.

    Raises:
        BadInput: a value that must be given is missing, or a reference leads nowhere.
    """
    try:
        return cast(dict[str, Any], OmegaConf.to_container(part, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise BadInput(first_line(error)) from None


def build(name: str, settings: Mapping[str, Any]) -> Any:
    """The object that ``_target_`` names, after its plain fields were checked against their type hints.

    Args:
        name: how messages call it, e.g. ``compression``.
        settings: its fields as plain data, with ``_target_``.

    Raises:
        BadInput: nothing was chosen, a field is missing or unknown, or its value does not fit.
    """
    if "_target_" not in settings:
        raise BadInput(f"{name} has settings ({', '.join(settings)}) but is not chosen; choose it, or take them back")
    try:
        check_types(name, get_class(settings["_target_"]), settings)
        return instantiate(dict(settings), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, BadInput):
            raise cause from None
        if isinstance(cause, TypeError):  # a field too many or too few
            raise BadInput(f"{name}: {first_line(cause).split('__init__() ')[-1]}") from None
        raise
    except HydraException as error:
        raise BadInput(f"{name}: {first_line(error)}") from None


def check_types(name: str, part: type, settings: Mapping[str, Any]) -> None:
    """Refuse values that do not fit a dataclass field made of plain types, naming the setting.

    Raises:
        BadInput: e.g. ``compression.bits=three``.
    """
    if not is_dataclass(part):
        return
    hints = get_type_hints(part)
    for field in fields(part):
        value = settings.get(field.name)
        if field.name not in settings or isinstance(value, Mapping):
            continue
        try:
            adapter = _adapter(hints[field.name])
        except PydanticSchemaGenerationError:  # a part of ours, checked when it is made
            continue
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            raise BadInput(f"{name}.{field.name}={value} does not fit: {error.errors()[0]['msg']}") from None


_adapter = cache(TypeAdapter)
