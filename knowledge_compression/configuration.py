"""From a composed Hydra configuration to the objects of one experiment; nothing below this module depends on Hydra."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from knowledge_compression.building import Seed, build, nearest
from knowledge_compression.errors import BadInput, first_line
from knowledge_compression.models.spread import Spread

if TYPE_CHECKING:
    from knowledge_compression.experiment import Experiment
    from knowledge_compression.models.source import ModelSource
    from knowledge_compression.results.tracker import Tracker

# The configuration groups, from which an experiment is built.
GROUPS = ("model", "target", "compression", "allocation", "recovery", "corpus", "eval")


@dataclass(frozen=True)
class Output:
    """Where results go, see ``conf/config.yaml``."""

    dir: Annotated[str, Field(min_length=1)]
    save_model: bool | str = False
    compressed_gb: Annotated[float, Field(ge=0)] = 32.0


@dataclass(frozen=True)
class Doing:
    """How runs are carried out, see ``conf/config.yaml``."""

    force: bool = False
    retries: Annotated[int, Field(ge=0)] = 0
    plan: bool = False
    rate: Annotated[float, Field(gt=0)] | None = None
    detach: bool = False
    processes: Annotated[int, Field(ge=1)] = 1


@dataclass(frozen=True)
class Budget:
    """The budget of a compression (``allocation=``), and the training budget of every recovery."""

    bits: Annotated[float, Field(gt=0)] | None = None
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[int, Field(ge=1)] | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Values:
    """The plain values of ``conf/config.yaml``, to which the files of every group may refer."""

    output: Output
    run: Doing
    sparsity: Annotated[float, Field(ge=0, lt=1)]
    reading: str
    seed: Seed
    device: str
    dtype: str
    scoring: Literal["fast", "stock"]
    scoring_dtype: str
    distance: bool
    limit: Annotated[int, Field(ge=1)] | None
    data_dir: Annotated[str, Field(min_length=1)] | None
    device_map: Literal["auto"] | None = None
    max_memory: dict[str, int | str] | None = None
    budget: Budget = field(default_factory=Budget)


def settings_of(config: DictConfig) -> dict[str, Any]:
    """A configuration as plain data, with every reference resolved.

    Raises:
        BadInput: a required value is missing, a reference is invalid, or a value is not used by anything.
    """
    raw = cast(dict[str, Any], OmegaConf.to_container(config))
    own = {name for name in raw if name != "hydra"}
    text = " ".join(re.findall(r"\$\{.*?}", str(raw)))
    known = {*GROUPS, "tracker", *Values.__dataclass_fields__}
    for name in sorted(own - known):
        if not re.search(rf"\b{re.escape(name)}\b", text) and "${${" not in str(raw):
            raise BadInput(f"{name} is not used; there are {', '.join(sorted(known))}")
    try:
        plain = cast(
            dict[str, Any],
            OmegaConf.to_container(OmegaConf.masked_copy(config, [*own]), resolve=True, throw_on_missing=True),
        )
    except OmegaConfBaseException as error:
        raise BadInput(_what_is_missing(error)) from None
    return plain


def _what_is_missing(error: OmegaConfBaseException) -> str:
    message = first_line(error)
    if found := re.match(r"Missing mandatory value: (\S+)", message):
        return f"{error.full_key or found[1]} must be given"
    return message


def values_of(settings: Mapping[str, Any]) -> Values:
    """The plain values, checked.

    Raises:
        BadInput: a value has the wrong type or is out of range.
    """
    named = {name: settings[name] for name in Values.__dataclass_fields__ if name in settings}
    for name, kind in (("output", Output), ("run", Doing), ("budget", Budget)):
        if not isinstance(named.get(name, {}), Mapping):
            raise BadInput(
                f"{name}={named[name]} does not fit: it has settings: {', '.join(kind.__dataclass_fields__)}"
            )
    made: Values = _at_top(build, named)
    return made


def _at_top(make: Callable[..., Any], named: Mapping[str, Any]) -> Any:
    try:
        return make("", named, Values)
    except BadInput as error:
        raise BadInput(re.sub(r"(^|\s)\.(?=\w)", r"\1", str(error))) from None


def made_of(group: str, settings: Any) -> Any:
    """The part that the settings of one group describe; for ``eval``, all suites by name.

    Raises:
        BadInput: nothing was chosen, or a value is missing, of the wrong kind or out of range.
    """
    if group == "eval":
        return {name: _built(f"eval.{name}", part) for name, part in (settings or {}).items()}
    return _built(group, settings or {})


def _built(where: str, settings: Any) -> Any:
    if not isinstance(settings, Mapping):
        raise BadInput(f"{where}={settings} does not fit: it has settings, and is chosen among files")
    return build(where, settings)


def experiment_from(config: DictConfig, choices: Mapping[str, str]) -> Experiment:
    """Build the experiment that a composed configuration describes, see :func:`put_together`."""
    settings = settings_of(config)
    return put_together(settings, lambda group: made_of(group, settings.get(group)), choices)


def put_together(settings: Mapping[str, Any], made_of: Callable[[str], Any], choices: Mapping[str, str]) -> Experiment:
    """Build the experiment from its parts.

    Args:
        settings: the whole configuration as plain data.
        made_of: the part that the settings of a group describe.
        choices: the file chosen in each group, e.g. ``{"compression": "gptq"}``.

    Raises:
        BadInput: a value is missing, of the wrong kind or out of range.
    """
    from knowledge_compression.compression.allocation.allocated import Allocated
    from knowledge_compression.compression.allocation.base import Allocation
    from knowledge_compression.compression.kept import KeptModels
    from knowledge_compression.experiment import Experiment

    made = {name: made_of(name) for name in GROUPS}
    values = values_of(settings)
    if not made["eval"] and not getattr(made["model"], "stream", False):
        raise BadInput("eval=[] evaluates nothing; choose at least one suite, e.g. eval=[atlas]")
    called = {type(made[group]): choices[group] for group in ("compression", "recovery") if choices.get(group)}
    if isinstance(made["allocation"], Allocation):
        made["compression"] = Allocated(made["compression"], made["allocation"])
        named = [choices.get(group, "") for group in ("compression", "allocation")]
        called[Allocated] = "+".join(filter(None, named))
    elif values.budget.bits is not None or values.budget.sparsity is not None:
        raise BadInput("a budget needs an allocation; choose allocation=uniform, owl, sensitivity or kl")
    return Experiment(
        source=made["model"],
        original=_original(getattr(made["model"], "dense", None)),
        target=made["target"],
        compression=made["compression"],
        recovery=made["recovery"],
        corpus=made["corpus"],
        suites=made["eval"],
        called=called,
        seed=values.seed,
        device=_place(values),
        dtype=values.dtype,
        scoring_dtype=values.scoring_dtype,
        distance=values.distance,
        save_model=values.output.save_model,
        kept_models=KeptModels(values.output.compressed_gb),
        processes=values.run.processes,
    )


def _place(values: Values) -> str | Spread:
    """One device, or the choice to divide the model over several.

    Raises:
        BadInput: there are limits for a model that is not divided, or an invalid limit.
    """
    if values.device_map is not None:
        return Spread.over(values.device, values.max_memory)
    if values.max_memory is not None:
        raise BadInput("max_memory limits a divided model's weights on each device; choose device_map=auto as well")
    return values.device


@cache
def _original(dense: str | None) -> ModelSource | None:
    """The model that a file was compressed from: a folder or file, or a name under ``conf/model/``.

    Raises:
        BadInput: it is neither.
    """
    if dense is None:
        return None
    if Path(dense).expanduser().exists():
        source: ModelSource = part("model", "local", path=dense)
        return source
    names = sorted(path.stem for path in (conf_folder() / "model").glob("[!_]*.yaml") if path.stem != "local")
    if dense not in names:
        raise BadInput(
            f"model.dense={dense} is neither a path nor a model{nearest(dense, names)}; give a path, or one of "
            f"{', '.join(names)}"
        )
    named: ModelSource = part("model", dense)
    if not hasattr(named, "provenance"):
        raise BadInput(f"model.dense={dense} is a model that is trained here, so there are no published files of it")
    return named


def tracker_from(config: DictConfig, sweep: str | None = None, names: Mapping[str, str] | None = None) -> Tracker:
    """The tracker that the configuration names.

    Args:
        config: the composed configuration.
        sweep: the name of the sweep, by which a tracker groups its runs unless the user sets a group.
        names: what runs are called, by id; for a tracker that shows names.
    """
    settings = dict(settings_of(config)["tracker"])
    if "group" in settings:
        settings["group"] = settings["group"] or sweep
    tracker: Any = build("tracker", settings)
    return replace(tracker, names=names or {}) if "names" in tracker.__dataclass_fields__ else tracker


def part(group: str, name: str, /, **values: Any) -> Any:
    """The part that ``conf/<group>/<name>.yaml`` describes, with some of its settings changed.

    Args:
        group, name: as on the command line, e.g. ``recovery`` and ``lora``; for ``eval``, one suite.
        values: settings of the part, nested ones as mappings, e.g. ``training={"tokens": 100}``; or values of
            ``conf/config.yaml`` such as ``sparsity`` and ``data_dir``. A setting exists where its class has the field.

    Raises:
        BadInput: there is no such file or setting, or a value is missing, of the wrong kind or out of range.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import get_gh_backup, restore_gh_from_backup

    before = get_gh_backup()  # Hydra's state of the calling run, or of a notebook
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            config = compose("config", overrides=[f"eval=[{name}]" if group == "eval" else f"{group}={name}"])
    finally:
        restore_gh_from_backup(before)
    where = f"eval.{next(iter(config.eval))}" if group == "eval" else group
    for key, value in values.items():
        of_part = key not in config or key in OmegaConf.select(config, where)
        with open_dict(config):
            try:
                OmegaConf.update(config, f"{where}.{key}" if of_part else key, value, merge=True, force_add=True)
            except OmegaConfBaseException:
                raise BadInput(
                    f"{where}.{key}={value} does not fit: {type(value).__name__} is not a plain value"
                ) from None
    try:
        settings = OmegaConf.to_container(OmegaConf.select(config, where), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise BadInput(_what_is_missing(error)) from None
    return _built(where, settings)


def conf_folder() -> Path:
    """The folder of configuration files: that of the installed package, or else the repository's."""
    inside = Path(__file__).with_name("conf")
    return inside if inside.is_dir() else Path(__file__).parents[1] / "conf"
