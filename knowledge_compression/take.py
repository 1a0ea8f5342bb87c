"""Import results made by other tools into a store: kc take DIR -o outputs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.progress import underway

if TYPE_CHECKING:
    from knowledge_compression.taking.answers import Answers
    from knowledge_compression.taking.said import Made, Statement

# The fields of Made that the command line can state about one model, and what each of them is.
_SAID = {
    "model": "the name of the model, the same for compressed and uncompressed runs",
    "compression": "what was done to the model; none: this is the uncompressed one",
    "target": "the layers that were compressed, if known",
    "recovery": "what was trained after compression, if anything",
    "restores_by": "how the recovery restores: weights or redirection",
    "family": "encoder, encoder_decoder or decoder, if known",
    "bits": "mean bits of a weight, if known",
    "sparsity": "share of the weights that were removed, if known",
    "stored_mb": "size of the model in 10^6 bytes, if known",
    "seed": "seed of the random draws, if known",
}


def main(arguments: list[str] | None = None) -> None:
    """Import results into a store, and report what does not pair; bad input is one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="kc take", description=__doc__)
    parser.add_argument(
        "results", type=Path, help="a folder of lm-eval --log_samples, a CSV or JSON of answers, or another store"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs"), help="the store (outputs)")
    parser.add_argument("--as", dest="said", type=Path, metavar="FILE", help="a YAML file that describes the results")
    parser.add_argument("--by", help="who made the results")
    for name, what in _SAID.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=what)
    options = parser.parse_args(arguments)
    try:
        take_results(options.results, options.output, options.said, _text("by", options.by), _told(options))
    except BadInput as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


def _told(options: argparse.Namespace) -> dict[str, str]:
    return {name: value for name in _SAID if (value := _text(name, getattr(options, name))) is not None}


def _text(name: str, value: str | None) -> str | None:
    """What an option says, refused if its bytes are no text, which no file of the store could hold."""
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise BadInput(f"--{name.replace('_', '-')} {value!a} is not UTF-8 text; give a name in UTF-8") from None
    return value


def take_results(results: Path, output: Path, said: Path | None, by: str | None, told: dict[str, Any]) -> None:
    """Take results into the store ``output``.

    Args:
        results: what to take.
        output: the outputs folder.
        said: the file with the user's statement, if there is one.
        by: who made the results.
        told: what the command line says about how the one model was made.

    Raises:
        BadInput: the results cannot be read, or the statements about them do not fit.
    """
    from knowledge_compression.results.layout import Layout
    from knowledge_compression.taking.said import Statement, read_statement
    from knowledge_compression.taking.taken import run_of, runs_of, take

    if not results.exists():
        raise DataUnavailable(f"{results} is not there")
    statement = read_statement(said) if said else Statement()
    by = by or statement.by
    if results.is_dir() and Layout(results).runs.is_dir():
        if told or said:
            raise BadInput(f"{results} is a store, and its runs say how they were made; give only --by")
        if results.resolve() == output.resolve():
            raise BadInput(f"{results} is the store itself; give another one with -o")
        with underway(f"reading {results}"):
            runs, notes = runs_of(results, by), []
    else:
        with underway(f"reading {results}"):
            found = _answers(results, statement, said, told)
        runs, notes = [run_of(one, by) for one in found], [note for one in found for note in one.notes]
    taken = take(runs, output, notes)
    for line in taken.notes:
        sys.stdout.write(f"{line}\n")
    there = f"; {taken.already} were there already" if taken.already else ""
    sys.stdout.write(f"{output}: {len(taken.new)} runs taken{there}\n")


def _answers(results: Path, statement: Statement, said: Path | None, told: dict[str, Any]) -> list[Answers]:
    from knowledge_compression.taking.logs import log_folders, read_log
    from knowledge_compression.taking.said import made_of
    from knowledge_compression.taking.tables import read_tables

    if statement.columns or statement.questions:
        if told and "compression" not in told:
            raise BadInput("--compression is missing: what was done to the model; none for the uncompressed one")
        return read_tables(results, statement, str(said), made_of(told) if told else None)
    folders = log_folders(results) if results.is_dir() else []
    if not folders:
        raise BadInput(
            f"{results} holds no known results: a store (runs/), samples of lm-eval --log_samples, or, with a "
            "mapping in --as FILE, a CSV or JSON of answers"
        )
    if told and statement.runs:
        raise BadInput(f"{said} says how the models were made; leave out --{next(iter(told))}")
    if not statement.runs:
        if len(folders) > 1:
            names = ", ".join(str(folder.relative_to(results)) for folder in folders[:4])
            raise BadInput(
                f"{results} holds logs of {len(folders)} models ({names}); take one, or name them in --as FILE"
            )
        return [read_log(folders[0], results, _named(made_of(told), "--"), statement.suite)]
    found = []
    for name, made in statement.runs.items():
        below = [folder for folder in folders if folder.is_relative_to(results / name)]
        if len(below) != 1:
            raise BadInput(f"{said}: runs.{name}: {len(below)} folders of {results} hold its samples; name one")
        found.append(read_log(below[0], results, _named(made, f"{said}: runs.{name}."), statement.suite))
    return found


def _named(made: Made, where: str) -> Made:
    if not made.model:
        raise BadInput(f"{where}model is missing: the name of the model, the same for compressed and uncompressed runs")
    return made


if __name__ == "__main__":
    main()
