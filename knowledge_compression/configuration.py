"""From a composed Hydra configuration to the objects of one experiment; nothing below this file knows Hydra."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
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
VALUES = ("sparsity", "reading", "seed", "device", "dtype")


def settings_of(config: DictConfig, group: str) -> dict[str, Any]:
    """What the configuration says of one group, as plain data.

    Raises:
        BadInput: a value that must be given is missing, or a reference leads nowhere.
    """
    return plain(config[group]) if config.get(group) else {}


def made_of(group: str, settings: Mapping[str, Any]) -> Any:
    """What the settings of one group describe; of ``eval`` all suites by name.

    Raises:
        BadInput: a value is missing, of the wrong kind or out of range.
    """
    if group == "eval":
        return {name: build(f"eval.{name}", part) for name, part in settings.items()}
    return build(group, settings)


def experiment_from(
    config: DictConfig,
    choices: Mapping[str, str],
    settings_of: Callable[[DictConfig, str], dict[str, Any]] = settings_of,
    made_of: Callable[[str, Mapping[str, Any]], Any] = made_of,
) -> Experiment:
    """Build the experiment that a configuration describes.

    Args:
        config: the composed configuration, without its ``hydra`` node.
        choices: which file was chosen in each group, e.g. ``{"target": "att"}``; kept with the settings.
        settings_of, made_of: those of this module, or what remembers their answers.

    Raises:
        BadInput: a value is missing, of the wrong kind or out of range.
    """
    if not config.get("eval") and not config.model.get("stream"):
        raise BadInput("eval=[] asks nothing; choose at least one suite, e.g. eval=[atlas]")
    settings: dict[str, Any] = {name: settings_of(config, name) for name in GROUPS}
    made = {name: made_of(name, settings[name]) for name in GROUPS}
    settings |= {name: config[name] for name in VALUES}
    settings["choices"] = {group: choices[group] for group in GROUPS if group in choices and group != "eval"}
    return Experiment(
        source=made["model"],
        target=made["target"],
        compression=made["compression"],
        recovery=made["recovery"],
        corpus=made["corpus"],
        suites=made["eval"],
        settings=settings,
        seed=config.seed,
        device=config.device,
        dtype=config.dtype,
        save_model=config.output.save_model,
        kept_models=KeptModels(config.output.compressed_gb),
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
