"""Folders written by lm-eval with ``--log_samples``: a file of results, and a file of samples per task."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.samples import answer_of, by_document, extra_columns, judge_of, place
from knowledge_compression.evaluation.suite import item_table
from knowledge_compression.reading import objects, parsed, text_of
from knowledge_compression.taking.answers import Answers, digests
from knowledge_compression.taking.said import Made

KNOWN = re.compile(r"0\.4\.\d+")  # versions whose logs can be read
SUITE = "lm_eval"
_SAMPLES = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.jsonl")
_NEEDED = ("doc_id", "doc_hash", "target", "arguments", "filtered_resps", "filter")
_SHAPE = "expected what lm-eval 0.4.13 writes with --log_samples"
# The entries of the results that say how the questions were asked.
_ASKED = ("system_instruction_sha", "chat_template_sha", "fewshot_as_multiturn")


def log_folders(root: Path) -> list[Path]:
    """The folders under ``root`` that hold samples, each of one model."""
    return sorted({path.parent for path in root.rglob("samples_*.jsonl") if _SAMPLES.fullmatch(path.name)})


def read_log(folder: Path, root: Path, made: Made, suite: str | None) -> Answers:
    """The answers in one folder; several evaluations in it are combined if they asked different tasks.

    Args:
        folder: the folder of the files of results and samples.
        root: the folder that the user named.
        made: what the user says about the model.
        suite: the name of the set of questions; ``lm_eval`` if None.

    Raises:
        BadInput: the files are of another version, are incomplete, or contain a task or a document twice.
    """
    name = suite or SUITE
    rows: list[dict[str, Any]] = []
    read: list[Path] = []
    asked: dict[str, Any] = {}
    found_in: dict[str, Path] = {}
    versions = set()
    dates = {match["date"] for path in folder.iterdir() if (match := _SAMPLES.fullmatch(path.name))}
    for date in sorted(dates):
        path, results = _results(folder, date)
        read.append(path)
        versions.add(results["lm_eval_version"])
        for task, config in _mapping(results, "configs", path).items():
            file = folder / f"samples_{task}_{date}.jsonl"
            if task in found_in:
                raise BadInput(f"{folder}: task {task} was logged twice ({found_in[task].name}, {file.name}); keep one")
            if not file.is_file():
                raise BadInput(f"{path} reports task {task}, but its samples ({file.name}) are missing")
            found_in[task] = file
            read.append(file)
            items = _items(file, config, results, task)
            rows += [{"suite": name, "task": task} | item for item in items]
            asked[task] = {
                "version": _mapping(results, "versions", path).get(task),
                "shots": _mapping(results, "n-shot", path).get(task),
                **{key: results.get(key) for key in _ASKED if results.get(key)},
            }
    told = {"tasks": asked}
    table = item_table(rows, extra_columns())
    return Answers(made, name, table, told, f"lm-eval {', '.join(sorted(versions))}", digests(read, root))


def _results(folder: Path, date: str) -> tuple[Path, Mapping[str, Any]]:
    """The file of results of an evaluation, of a version that is known."""
    files = sorted(folder.glob(f"*_{date}.json"))
    if len(files) != 1:
        there = "no file of results" if not files else f"{len(files)} files of results"
        raise BadInput(f"{folder} has {there} (results_{date}.json) for its samples of {date}; {_SHAPE}")
    found = parsed(text_of(files[0], _SHAPE), str(files[0]), _SHAPE)
    version = found.get("lm_eval_version") if isinstance(found, dict) else None
    if not isinstance(version, str) or not KNOWN.match(version):
        told = version or "(unknown version)"
        raise BadInput(f"{files[0]} was written by lm-eval {told}; logs of versions 0.4 are read")
    return files[0], found


def _mapping(results: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    found = results.get(key)
    if not isinstance(found, Mapping):
        raise BadInput(f"{path} lacks {key}; {_SHAPE}")
    return found


def _items(file: Path, config: Any, results: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """The items of one task."""
    samples, seen = [], set()
    for number, sample in objects(file, _SHAPE):
        if missing := [key for key in _NEEDED if key not in sample]:
            raise BadInput(f"{file}:{number}: {missing[0]} is missing; {_SHAPE}")
        key = (str(sample["doc_id"]), str(sample["filter"]))
        if key in seen:
            raise BadInput(f"{file}:{number}: document {key[0]} appears twice (filter {key[1]})")
        seen.add(key)
        try:
            samples.append(_as_in_memory(sample))
        except (ValueError, TypeError, AttributeError, KeyError, IndexError):
            raise BadInput(f"{file}:{number}: its answers cannot be read; {_SHAPE}") from None
    documents = by_document(samples)
    asked = results.get("n-samples")
    told = asked.get(task) if isinstance(asked, Mapping) else None
    counted = told.get("effective") if isinstance(told, Mapping) else None
    if counted is not None and counted != len(documents):
        raise BadInput(f"{file} holds {len(documents)} of the {counted} documents that were asked; it is truncated")
    output_type = config.get("output_type") if isinstance(config, Mapping) else None
    listed = [one for one in (config.get("metric_list") or []) if isinstance(one, Mapping)] if output_type else []
    means = [str(one.get("metric")) for one in listed if one.get("aggregation", "mean") == "mean"]
    judge = judge_of(means or list(samples[0].get("metrics", [])), samples) if samples else None
    items = []
    for number, of in enumerate(documents, 1):
        try:
            items.append({"id": f"{of[0]['doc_id']}:{str(of[0]['doc_hash'])[:12]}"} | _item(of, output_type, judge))
        except (ValueError, TypeError, AttributeError, KeyError, IndexError):
            raise BadInput(f"{file}: the answers to its document {number} cannot be read; {_SHAPE}") from None
    return items


def _as_in_memory(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample as lm-eval holds it in memory; in the file the target and all numbers of answers are text."""
    arguments = [tuple(one[name] for name in sorted(one)) for one in sample["arguments"].values()]
    answers = [_answer(answer) for answer in sample["filtered_resps"]]
    return {**sample, "arguments": arguments, "filtered_resps": answers, "target": _target(sample["target"])}


def _answer(answer: Any) -> Any:
    if isinstance(answer, list) and len(answer) == 2 and answer[1] in ("True", "False"):
        return float(answer[0]), answer[1] == "True"
    return answer


def _target(target: Any) -> Any:
    if isinstance(target, str) and target.startswith("[") and target.endswith("]"):
        try:
            return ast.literal_eval(target)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # text that only looks like a list
            return target
    return target


def _item(samples: list[Mapping[str, Any]], output_type: str | None, judge: Any) -> dict[str, Any]:
    first = samples[0]
    if output_type != "multiple_choice" or isinstance(first["target"], list):
        return answer_of(samples, str(output_type), judge)
    inputs = [str(arguments[0]) for arguments in first["arguments"]]
    if len(set(inputs)) > 1:  # the choices are in the context; the log does not say which of them is right
        return answer_of(samples, output_type, judge, (inputs, None))
    choices = [str(arguments[1]).strip() for arguments in first["arguments"]]
    return answer_of(samples, output_type, judge, (choices, _gold(first, choices)))


def _gold(sample: Mapping[str, Any], choices: list[str]) -> int | None:
    """The index of the right choice: the target is its text or its index, and the file does not say which.

    If it could be either, the recorded accuracy of the answer decides; if that fits both, the right choice is unknown.
    """
    as_text = place(sample["target"], choices)
    digits = str(sample["target"]).strip()
    as_index = place(int(digits), choices) if digits.isdecimal() else None
    readings = [reading for reading in (as_text, as_index) if reading is not None]
    if len(set(readings)) < 2:
        return readings[0] if readings else None
    scores = [score for score, _ in sample["filtered_resps"]]
    best = max(range(len(scores)), key=scores.__getitem__)
    fitting = [reading for reading in readings if (reading == best) == bool(sample.get("acc"))]
    return fitting[0] if "acc" in sample and len(fitting) == 1 else None
