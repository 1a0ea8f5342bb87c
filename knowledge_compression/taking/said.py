"""The user's statement about results made elsewhere; what is not stated stays unknown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from knowledge_compression.building import Seed
from knowledge_compression.errors import BadInput, first_line
from knowledge_compression.reading import text_of, yaml_of

UNKNOWN = "unknown"
_CLOSED = ConfigDict(extra="forbid")  # an unknown word is a mistake of the user


@dataclass(frozen=True)
class Made:
    """How the model that gave a set of answers was made.

    Attributes:
        compression: its name; ``none`` for the uncompressed model, with which the others are compared.
        model: the name of the model, the same for the uncompressed one and those made from it.
        target, recovery, family: as in a run's own settings.
        restores_by: how the recovery restores: ``weights`` or ``redirection``.
        bits, sparsity, stored_mb: mean bits of a weight, share of the weights removed, size in 10^6 bytes.
        seed: of the random draws.
    """

    __pydantic_config__ = _CLOSED
    compression: str
    model: str | None = None
    target: str = UNKNOWN
    recovery: str = "none"
    restores_by: str = UNKNOWN
    family: str = UNKNOWN
    bits: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    sparsity: Annotated[float, Field(ge=0, le=1)] | None = None
    stored_mb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: Seed | None = None

    @property
    def dense(self) -> bool:
        """Whether it is stated to be the uncompressed model."""
        return (self.compression, self.recovery) == ("none", "none")


@dataclass(frozen=True)
class Questions:
    """The place of a table's questions, if they are not in the file of the answers.

    Attributes:
        file: path from the folder of the answers.
        columns: item column to column of the file; ``id`` is needed.
        keys: the item column (``task``) that the outermost keys of a JSON file are values of.
    """

    __pydantic_config__ = _CLOSED
    file: str
    columns: dict[str, str]
    keys: str | None = None


@dataclass(frozen=True)
class Statement:
    """The whole statement about a folder of results.

    Attributes:
        by: the author of the results: a person, a publication, an address.
        suite: the name of the set of questions.
        runs: for logs of lm-eval: the folder of each run, relative to the folder taken, and how its model was made.
        files: for tables: the files with answers, as a pattern such as ``answers_*.csv``; all of a folder otherwise.
        columns: for tables: item column to column of the file.
        fixed: for tables: item columns that have one value throughout.
        in_order: for tables: the answers have no ids and follow the order of the questions of their task.
        questions: for tables: where the questions are.
        made: for tables: by the value of the column ``made``, how the model was made.
    """

    __pydantic_config__ = _CLOSED
    by: str = UNKNOWN
    suite: str | None = None
    runs: dict[str, Made] = field(default_factory=dict)
    files: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    in_order: bool = False
    questions: Questions | None = None
    made: dict[str, Made] = field(default_factory=dict)


_STATEMENT = TypeAdapter(Statement)
_MADE = TypeAdapter(Made)


def read_statement(path: Path) -> Statement:
    """The statement in a YAML file.

    Raises:
        BadInput: it is not one; the line names the place.
    """
    text = text_of(path, "a statement in YAML")
    try:
        content = yaml_of(text)
    except (yaml.YAMLError, ValueError) as error:
        raise BadInput(f"{path}: not YAML ({first_line(error)})") from None
    if not isinstance(content, Mapping):
        raise BadInput(f"{path}: no statement; it names {_names(Statement)}")
    return _validated(_STATEMENT, content, f"{path}: ")


def made_of(told: Mapping[str, Any]) -> Made:
    """How a model was made, from options of the command line.

    Raises:
        BadInput: a value is not possible.
    """
    return _validated(_MADE, told, "--")


def plain(made: Made) -> dict[str, Any]:
    """What is known about how a model was made."""
    return {name: value for name, value in asdict(made).items() if value not in (None, UNKNOWN)}


def _validated(adapter: TypeAdapter[Any], content: Mapping[str, Any], where: str) -> Any:
    try:
        return adapter.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        known = ""
        if first["type"] == "unexpected_keyword_argument":
            kind = Statement if len(first["loc"]) == 1 else Questions if first["loc"][0] == "questions" else Made
            known = f"; known are {_names(kind)}"
        raise BadInput(f"{where}{place}: {first['msg']}{known}") from None


def _names(kind: type) -> str:
    return ", ".join(f.name for f in fields(kind))
