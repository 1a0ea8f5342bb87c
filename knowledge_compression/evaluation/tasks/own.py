"""A user's own task files, and the files that they include, are data: code in them is refused unless allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from knowledge_compression.errors import BadInput, DataUnavailable, first_line
from knowledge_compression.reading import text_of

_ALLOWED = "code is off unless eval.harness.allow_code=true"
_DEEPEST = 20  # the largest depth of nested includes
# Keys by which lm-eval imports code from elsewhere: a class, or a dataset's or prompt's own program.
_CODE_KEYS = ("class", "custom_dataset", "use_prompt", "unsafe_code")


class _CodeInYaml(yaml.YAMLError):
    """A ``!function``, or another tag that constructs objects."""


class _Data(yaml.SafeLoader):
    """A YAML loader that refuses code."""


class _DataAndCode(yaml.SafeLoader):
    """A YAML loader that reads code as text; lm-eval imports it later."""


def _refuse(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    raise _CodeInYaml(f"!{suffix} {node.value if isinstance(node, yaml.ScalarNode) else '...'}")


_Data.add_multi_constructor("!", _refuse)
_Data.add_multi_constructor("tag:yaml.org,2002:python/", _refuse)
_DataAndCode.add_constructor("!function", lambda loader, node: str(node.value))


def files_of(definition: Path, *, allow_code: bool) -> tuple[dict[str, Any], list[Path]]:
    """The settings of a task file with everything it includes, and the files that were read.

    Files shipped with lm-eval may be included and are trusted like any installed package.

    Args:
        definition: the task file.
        allow_code: whether it may name functions, which are then executed.

    Raises:
        BadInput: a file is not a YAML mapping, includes itself, or holds code that is not allowed.
        DataUnavailable: an included file is missing.
    """
    files: list[Path] = []
    merged = _merged(definition, files, (), allow_code)
    if not allow_code:
        _check_settings(definition, merged)
    return merged, files


def _merged(path: Path, files: list[Path], above: tuple[Path, ...], allow_code: bool) -> dict[str, Any]:
    import lm_eval

    resolved = path.resolve()
    if resolved in above or len(above) > _DEEPEST:
        raise BadInput(f"{path} includes itself, or nests more than {_DEEPEST} includes")
    trusted = resolved.is_relative_to(Path(lm_eval.__file__).resolve().parent)
    if not trusted:
        files.append(path)
    settings = _read(path, _DataAndCode if trusted or allow_code else _Data)
    included = settings.pop("include", None) or []
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        merged |= _merged(path.parent / str(name), files, (*above, resolved), allow_code)
    return merged | settings


def _read(path: Path, loader: type[yaml.SafeLoader]) -> dict[str, Any]:
    try:
        settings = yaml.load(text_of(path, "a task file"), Loader=loader)
    except _CodeInYaml as error:
        raise BadInput(f"{path} holds code ({error}); a task file is data, and {_ALLOWED}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, (BadInput, DataUnavailable)):
            raise
        raise BadInput(f"{path} is not YAML ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        kind = "a list" if isinstance(settings, list) else "no mapping"
        raise BadInput(f"{path} is {kind}; a task file is a mapping of lm-eval's settings (task:, doc_to_text:, ...)")
    return settings


def _check_settings(definition: Path, settings: Mapping[str, Any]) -> None:
    """Refuse settings that make lm-eval import, or download and run, code from elsewhere."""
    import lm_eval.api.metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import metric_registry

    for key in _CODE_KEYS:
        if settings.get(key):
            raise BadInput(f"{definition} holds code ({key}: {settings[key]}); a task file is data, and {_ALLOWED}")
    metrics = settings.get("metric_list")
    if metrics is not None and not (isinstance(metrics, list) and all(isinstance(one, Mapping) for one in metrics)):
        raise BadInput(f"{definition}: metric_list is not a list of mappings, e.g. [{{metric: acc}}]")
    for metric in metrics or []:
        name = metric.get("metric")
        if metric.get("hf_evaluate") or not isinstance(name, str) or name not in metric_registry:
            raise BadInput(
                f"{definition}: metric {name} is not one of lm-eval's own, so its program would be loaded from "
                f"elsewhere; {_ALLOWED}"
            )


@contextmanager
def sandboxed() -> Iterator[None]:
    """Make lm-eval render templates in jinja2's sandbox, where they can access documents but not Python."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    theirs = utils.env
    utils.env = ImmutableSandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )
    utils.env.filters |= {name: f for name, f in theirs.filters.items() if name not in utils.env.filters}
    try:
        yield
    finally:
        utils.env = theirs


@contextmanager
def of_the_task(name: str) -> Iterator[None]:
    """Turn every error of a task's own templates, documents or metrics into one line."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # the user's templates and documents can raise anything
        raise BadInput(f"task {name} cannot be evaluated ({type(error).__name__}: {first_line(error)})") from error
