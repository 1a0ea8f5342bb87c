"""The published figures under ``experiments/``, found by our names for models, tasks and recoveries."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from knowledge_compression.analysis.naming import recovery_size
from knowledge_compression.results.store import Run

EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"
COST, FORGOTTEN = "cost_of_compression", "forgotten_or_displaced"

# The Cost of Compression: our models and tasks by the names in its tables, and the columns printed in percent.
_MODELS = {
    "bert_base": "BERT-base",
    "bert_large": "BERT-large",
    "roberta_base": "RoBERTa-base",
    "roberta_large": "RoBERTa-large",
    "distilbert": "DistilBERT-base",
    "albert_base": "ALBERT-base",
    "albert_large": "ALBERT-large",
    "vicuna": "Vicuna-7B",
    "wizardlm": "WizardLM-7B",
    "flan_t5_base": "FlanT5-Base",
    "flan_t5_large": "FlanT5-Large",
    "lamini_flan_t5_248m": "Lamini-Flan-T5-248M",
    "lamini_flan_t5_783m": "Lamini-Flan-T5-783M",
}
# Other names of these models: the last part of their ids on the hub, including those of copies.
_ALSO = {
    "bert_base": ("bert-base-uncased",),
    "bert_large": ("bert-large-uncased",),
    "distilbert": ("distilbert-base-uncased",),
    "albert_base": ("albert-base-v2",),
    "albert_large": ("albert-large-v2",),
    "vicuna": ("vicuna-7b-v1.3",),
    "wizardlm": ("WizardLM-7B-V1.0", "WizardLM-7B-HF"),
    "llama_7b": ("llama-7b", "llama-7b-hf"),
    "opt_6_7b": ("opt-6.7b",),
}
_PERCENT = {"TREx": "TRex", "Google_RE": "GoogleRe", "Squad": "Squad", "ConceptNet": "Conceptnet"}
_DATA = _PERCENT | {"boolq": "Boolq", "piqa": "Piqa", "winogrande": "Winogrande"}

# Do Compressed LLMs Forget Knowledge?: the compressions of its tables, and the names of their rows and columns.
_TREATMENTS: Mapping[int, tuple[str, float]] = {1: ("gptq", 3.0), 2: ("sparsegpt", 0.5)}
_RECOVERED_MODELS = {"Llama-7b": "llama_7b", "OPT-6.7b": "opt_6_7b"}
_SIZES: Mapping[str, tuple[str, tuple[tuple[int, ...], ...]]] = {  # those of one type are in ascending order
    "none": ("none", ((),)),
    "lora": ("lora", ((2,), (3,), (4,))),
    "prompt": ("prompt", ((26,), (50,), (100,))),
    "ptune": ("prefix", ((26,), (50,), (100,))),
    "IDP": ("idp", ((50, 100),)),
}
_BOTH_PROMPTS = {"Concat": "concat", "IDP": "idp"}  # Table 3; its prompts alone are rows of Table 1
NINE_TASKS = {  # TriviaQA by either of its scorings
    "arc_easy": "arce",
    "arc_challenge": "arcc",
    "lambada_openai": "lambada",
    "triviaqa_greedy": "triviaqa",
} | {name: name for name in ("sciq", "webqs", "triviaqa", "piqa", "hellaswag", "winogrande")}
AVERAGES = ("world", "common", "language", "average")

Treated = tuple[str, str, float, str, tuple[int, ...]]


def model_of(run: Run) -> str:
    """Our name for a run's model, if its given name or its hub id matches a published model.

    Names are compared by their letters and digits, ids by their last part; other models keep their names.
    """
    given = str(run.config["choices"]["model"])
    hub_id = run.config.get("model", {}).get("hub_id") or run.report["model"].get("hub_id") or ""
    found = (_named().get(_letters(name.rpartition("/")[2])) for name in (given, str(hub_id)))
    return next(filter(None, found), given)


def _named() -> dict[str, str]:
    names = {ours: (ours, theirs) for ours, theirs in _MODELS.items()}
    names |= {ours: (ours, theirs) for theirs, ours in _RECOVERED_MODELS.items()}
    return {_letters(name): ours for ours in names for name in (*names[ours], *_ALSO.get(ours, ()))}


def _letters(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def cost_of(model: str, data_set: str) -> dict[str, float]:
    """Tables 3-5 of The Cost of Compression for one model and data set: column to accuracy; empty if it has no row."""
    scale = 100 if data_set in _PERCENT else 1
    for number in (3, 4, 5):
        for row in _rows(COST, number):
            if (row["model"], row["dataset"]) == (_MODELS.get(model), _DATA.get(data_set)):
                return {key: round(float(row[key]) / scale, 6) for key in row.keys() - {"model", "dataset"}}
    return {}


def parameters_of(model: str) -> dict[str, int]:
    """Table 2 of The Cost of Compression for one model: column to number of weights; empty if it has no row."""
    for row in _rows(COST, 2):
        if row["model"] == model:
            return {key: int(row[key]) * 10**6 for key in row.keys() - {"model"}}
    return {}


def recoveries() -> dict[Treated, dict[str, float]]:
    """Tables 1-3 of Do Compressed LLMs Forget Knowledge?: by what was done (:func:`treated`), column to accuracy."""
    found: dict[Treated, dict[str, float]] = {}
    for number, treatment in _TREATMENTS.items():
        rows = _rows(FORGOTTEN, number)
        for theirs, model in _RECOVERED_MODELS.items():
            for called, (recovery, sizes) in _SIZES.items():
                mine = [row for row in rows if (row["model"], row["type"]) == (theirs, called)]
                found |= {
                    (model, *treatment, recovery, size): _shares(row)
                    for size, row in zip(sizes, mine, strict=bool(mine))
                }
    for row in _rows(FORGOTTEN, 3):
        if row["prompt"] in _BOTH_PROMPTS:
            recovery = _BOTH_PROMPTS[row["prompt"]]
            found[_RECOVERED_MODELS[row["model"]], *_TREATMENTS[1], recovery, (26, 100)] = _shares(row)
    return found


def treated(run: Run) -> Treated:
    """What was done to a run's model: model, compression, its bits or sparsity, recovery, and the recovery's size."""
    choices, settings = run.config["choices"], run.config["compression"]
    how_much = float(settings.get("bits") or settings.get("sparsity") or 0)
    return model_of(run), choices["compression"], how_much, choices["recovery"], recovery_size(run)


def _shares(row: Mapping[str, str]) -> dict[str, float]:
    columns = NINE_TASKS | {name: name for name in AVERAGES}
    return {ours: round(float(row[theirs]) / 100, 6) for ours, theirs in columns.items()}


def _rows(study: str, number: int) -> list[dict[str, str]]:
    path = EXPERIMENTS / study / "published" / f"table{number}.csv"
    if not path.is_file():  # the package is installed without the studies
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
