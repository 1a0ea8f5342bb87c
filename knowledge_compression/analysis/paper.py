"""For a paper, from any store: all results as one table and one figure; what to cite, with versions and hashes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any

import polars as pl

from knowledge_compression import __version__
from knowledge_compression.analysis.comparisons import Comparisons, Group
from knowledge_compression.analysis.fates import OVERALL, shares_by_setting
from knowledge_compression.analysis.markdown import plain, table
from knowledge_compression.analysis.measures import ANSWERS
from knowledge_compression.analysis.metrics import with_intervals
from knowledge_compression.analysis.tables import PaperTable
from knowledge_compression.results.drawing import drop_figure, literal_text
from knowledge_compression.results.store import Run
from knowledge_compression.results.summary import rows_of

_PERCENT = partial(mul, 0.01)

# The paper of each method, allocation, recovery, suite and corpus, by its name in conf/: authors, title, place.
_IDP = (
    "Hoang et al. (2023)",
    "Do Compressed LLMs Forget Knowledge? An Experimental Study with Practical Implications",
    "arXiv:2310.00867",
)
_HARNESS = ("Gao et al. (2024)", "The Language Model Evaluation Harness", "doi:10.5281/zenodo.12608602")
PAPERS = {
    "gptq": (
        "Frantar et al. (2023)",
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        "arXiv:2210.17323",
    ),
    "sparsegpt": (
        "Frantar and Alistarh (2023)",
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "arXiv:2301.00774",
    ),
    "wanda": (
        "Sun et al. (2024)",
        "A Simple and Effective Pruning Approach for Large Language Models",
        "arXiv:2306.11695",
    ),
    "awq": (
        "Lin et al. (2024)",
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        "arXiv:2306.00978",
    ),
    "smoothquant": (
        "Xiao et al. (2023)",
        "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        "arXiv:2211.10438",
    ),
    "autoround": (
        "Cheng et al. (2024)",
        "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
        "arXiv:2309.05516",
    ),
    "gptaq": (
        "Li et al. (2025)",
        "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration",
        "arXiv:2504.02692",
    ),
    "scales": (
        "Chen et al. (2025)",
        "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models",
        "arXiv:2407.11062",
    ),
    "alps": (
        "Meng et al. (2024)",
        "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
        "arXiv:2406.07831",
    ),
    "rotate": (
        "Ashkboos et al. (2024)",
        "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
        "arXiv:2404.00456",
    ),
    "hqq": (
        "Badri and Shaji (2023)",
        "Half-Quadratic Quantization of Large Machine Learning Models",
        "https://mobiusml.github.io/hqq_blog/",
    ),
    "depth": (
        "Men et al. (2024)",
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        "arXiv:2403.03853",
    ),
    "width": (
        "Kurtic et al. (2023)",
        "ZipLM: Inference-Aware Structured Pruning of Language Models",
        "arXiv:2302.04089",
    ),
    "owl": (
        "Yin et al. (2024)",
        "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
        "arXiv:2310.05175",
    ),
    "fp8": ("Micikevicius et al. (2022)", "FP8 Formats for Deep Learning", "arXiv:2209.05433"),
    "mxfp4": (
        "Open Compute Project (2023)",
        "OCP Microscaling Formats (MX) Specification, version 1.0",
        "https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf",
    ),
    "nf4": ("Dettmers et al. (2023)", "QLoRA: Efficient Finetuning of Quantized LLMs", "arXiv:2305.14314"),
    "lora": ("Hu et al. (2022)", "LoRA: Low-Rank Adaptation of Large Language Models", "arXiv:2106.09685"),
    "prompt": ("Lester et al. (2021)", "The Power of Scale for Parameter-Efficient Prompt Tuning", "arXiv:2104.08691"),
    "prefix": (
        "Li and Liang (2021)",
        "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
        "arXiv:2101.00190",
    ),
    "idp": _IDP,
    "concat": _IDP,
    "lama": ("Petroni et al. (2019)", "Language Models as Knowledge Bases?", "arXiv:1909.01066"),
    "pararel": (
        "Elazar et al. (2021)",
        "Measuring and Improving Consistency in Pretrained Language Models",
        "arXiv:2102.01017",
    ),
    "bear": (
        "Wiland et al. (2024)",
        "BEAR: A Unified Framework for Evaluating Relational Knowledge in Causal and Masked Language Models",
        "arXiv:2404.04113",
    ),
    "popqa": (
        "Mallen et al. (2023)",
        "When Not to Trust Language Models: Investigating Effectiveness of Parametric and Non-Parametric Memories",
        "arXiv:2212.10511",
    ),
    "simpleqa": ("Wei et al. (2024)", "Measuring Short-form Factuality in Large Language Models", "arXiv:2411.04368"),
    "harness": _HARNESS,
    "nine_tasks": _HARNESS,
    "c4": (
        "Raffel et al. (2020)",
        "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
        "arXiv:1910.10683",
    ),
    "wikitext": ("Merity et al. (2017)", "Pointer Sentinel Mixture Models", "arXiv:1609.07843"),
}


def results_table(comparisons: Comparisons) -> PaperTable:
    """One row per setting of every suite with right answers, pooled over its seeds: size, accuracy, losses."""
    rows = []
    for group in comparisons:
        whole = {told["run"]: told for told in shares_by_setting(group) if told["by"] == OVERALL}
        for run in group.settings:
            row = _setting(comparisons, group, run) | {"seeds": len(group.seeds_of(run))}
            row |= {"accuracy": group.accuracies[run.id], "drop": None, "flips": None, "lost_of_known": None}
            if run is not group.dense:
                row |= {"drop": group.drops[run.id].through(_PERCENT), "flips": group.flips[run.id]}
                row["lost_of_known"] = whole[run.id]["lost"]
            rows.append(row)
    caption = (
        "Accuracy, relative drop against the dense model, flips (share of all facts that were lost or gained) and "
        "share lost of the facts that the dense model knew, in percent with 95 % intervals; MB: stored size in 10^6 "
        "bytes."
    )
    return PaperTable("results", caption, rows)


def values_table(comparisons: Comparisons) -> PaperTable:
    """One row per setting of every suite without right answers, with its headline metric, e.g. perplexity."""
    rows = []
    told = with_intervals(comparisons.runs)
    for group in comparisons.measured:
        for run in group.settings:
            value, estimate = told[run.id].get(f"{group.asked.suite}.{group.measure.metric}", (None, None))
            row = _setting(comparisons, group, run) | {"metric": group.measure.metric}
            rows.append(row | {"value": estimate or value})
    caption = (
        "Values with 95 % intervals, of the lowest seed where a setting was run with several; MB: stored size in 10^6 "
        "bytes."
    )
    return PaperTable("values", caption, rows, shares=False)


def draw(comparisons: Comparisons, folder: Path) -> list[Path]:
    """Write the figure that a sweep ends with, over the whole store, as ``results.svg`` and ``.pdf``."""
    groups = [*comparisons.groups, *comparisons.measured]
    rows = rows_of([(run, group.dense, group.asked.suite) for group in groups for run in group.settings])
    of = {(group.dense.id, group.asked.suite): group for group in groups}
    for row in rows:
        row.pop("asked_seed", None)
        group = of[row["baseline"], row["suite"]]
        row["suite"] = group.asked.name
        if group.measure is ANSWERS and row["run"] != row["baseline"]:  # over the items and seeds of the table
            fall = group.drops[row["run"]]
            figures = {"drop_percent": fall.value, "drop_low": fall.low, "drop_high": fall.high}
            row |= {name: None if math.isnan(figure) else figure for name, figure in figures.items()}
    if not rows:
        return []
    with literal_text():
        figure = drop_figure(pl.DataFrame(rows, infer_schema_length=None, strict=False))
        if figure is None:
            return []
        paths = [folder / f"results.{suffix}" for suffix in ("svg", "pdf")]
        for path in paths:
            figure.savefig(path)
    return paths


def how_to_cite(comparisons: Comparisons) -> str:
    """What these results rest on, as Markdown: program, papers, models, data, versions, and each run's hash."""
    runs = comparisons.runs
    chosen = {name for run in runs for name in _names(run)}
    papers = sorted({"{}. {}. {}".format(*PAPERS[name]).replace("?.", "?") for name in chosen & PAPERS.keys()})
    models = {run.config["choices"]["model"]: run.report["model"] for run in runs}
    versions = sorted(
        {f"{name} {found}" for run in runs for name, found in run.environment.get("packages", {}).items()}
    )
    data = sorted(
        {(suite, str(told.get("fingerprint"))) for run in runs for suite, told in run.report["eval"].items()},
    )
    listed = [[f"`{run.id}`", plain(comparisons.names.of(run.id)), _made_by(run)] for run in runs]
    bibtex = [
        "```bibtex",
        "@software{knowledge_compression,",
        "  title = {knowledge\\_compression: what compression does to the knowledge inside a language model},",
        "  author = {{The knowledge\\_compression maintainers}},",
        f"  version = {{{__version__}}},",
        "}",
        "```",
    ]
    sections = {
        "This program": bibtex,
        "Papers of the methods and data that these runs used": [f"- {paper}" for paper in papers],
        "Models": [f"- {plain(name)}: {plain(_origin(told))}" for name, told in sorted(models.items())],
        "Questions, by the digest of their data": [f"- {plain(suite)}: {plain(digest)}" for suite, digest in data],
        "Versions": [plain(", ".join(versions))] if versions else [],
        "Runs: their hashes decide every result": table(["run", "setting", "made"], listed),
    }
    return "\n".join("\n".join([f"## {title}", "", *lines, ""]) for title, lines in sections.items() if lines)


def _setting(comparisons: Comparisons, group: Group, run: Run) -> dict[str, Any]:
    report, size = run.report["compression"], run.stored_mb
    bits = report.get("bits")
    return {
        "model": group.asked.model,
        "suite": group.asked.name,
        "setting": comparisons.names.of(run.id, ("model", "seed", "eval")),
        "sparsity": report.get("sparsity"),
        "bits": f"{bits:.4g}" if bits else None,
        "MB": None if size is None else f"{size:.1f}",
    }


def _names(run: Run) -> Iterable[str]:
    choices = run.config["choices"]
    yield from (choices["compression"], choices["recovery"], choices.get("allocation", ""))
    yield from run.report["eval"]
    used = run.report["compression"].get("calibration") or run.report["recovery"].get("trainable_parameters")
    corpora: Sequence[Any] = [settings.get("corpus") for settings in run.config["eval"].values() if settings]
    yield from map(str, [*corpora, *([choices.get("corpus")] if used else [])])


def _origin(told: dict[str, Any]) -> str:
    where = [f"{told['hub_id']} at {told.get('commit') or told.get('revision')}"] if told.get("hub_id") else []
    return ", ".join([*where, *(str(told[key]) for key in ("package", "file", "fingerprint", "note") if told.get(key))])


def _made_by(run: Run) -> str:
    if run.taken:
        return plain(f"elsewhere, taken from {run.config['taken'].get('by') or 'an unnamed author'}")
    return plain(str(run.environment.get("time", "")))
