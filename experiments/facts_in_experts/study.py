"""Are facts kept by few experts or by all? Tables and a figure from the finished runs of the study.

python experiments/facts_in_experts/study.py outputs/facts_in_experts experiments/facts_in_experts

A *removal* is a run in which one set of weights of one block was removed: a single expert, or as many weights
elsewhere. Every fact is one item, asked in a wording that training never used for it, and only facts that the dense
model knows count.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from removals import ATTENTION, BLOCK, EXPERTS, KINDS, READS, SPREAD, WHOLE, Model, Removals, models, reads_of
from scipy import stats

from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.markdown import percent, points
from knowledge_compression.analysis.marks import bars, panels
from knowledge_compression.resampling import CONFIDENCE, SEED
from knowledge_compression.statistics import (
    Estimate,
    accuracy,
    corrected,
    difference_of_means,
    mean,
    mean_difference,
    proportion,
)

MARKER = "<!-- what follows is written by study.py -->"
PERMUTATIONS, RESAMPLES = 1000, 2000


def share_of(values: NDArray[np.float64]) -> Estimate:
    """Mean over facts; if no fact was lost, with the interval of the share that could have been."""
    return mean(values) if values.any() else proportion(0, len(values))


def gini(counts: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """Gini's coefficient: 0 if all removals lose equally many facts, near 1 if one of them loses all."""
    ordered = np.sort(counts, axis=axis)
    n = ordered.shape[axis]
    ranks = 2 * np.arange(1, n + 1) - n - 1
    return (ordered * ranks).sum(axis) / (n * np.maximum(ordered.sum(axis), 1e-12))


def leaned_on(fell: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each fact, over how many removals the fall of its answer is spread: ``(sum d)^2 / sum d^2``."""
    down = np.maximum(fell, 0)
    return down.sum(0) ** 2 / np.maximum((down**2).sum(0), 1e-12)


def resampled(model: Model, statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], value: float) -> Estimate:
    """A statistic of resampled facts ``[resamples, known facts]`` with its percentile interval."""
    n = len(model.bins)
    drawn = np.random.default_rng(SEED).integers(n, size=(RESAMPLES, n))
    low, high = np.quantile(statistic(drawn), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high), n)


def gini_of(model: Model, removals: Removals) -> Estimate:
    """Gini's coefficient of the facts lost by each removal."""
    counts = removals.lost.astype(float)

    def of_drawn(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        weights = np.stack([np.bincount(row, minlength=counts.shape[1]) for row in drawn])
        return gini(weights @ counts.T)

    return resampled(model, of_drawn, float(gini(counts.sum(1))))


def between(values: Sequence[float]) -> str:
    """The range that holds 95 % of these values."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return f"{low:.3f} to {high:.3f}"


def by_one_only(lost: NDArray[np.bool_]) -> float:
    """Of the facts that some removal loses, the share that no other loses."""
    times = lost.sum(axis=0)
    return float((times == 1).sum() / max((times > 0).sum(), 1))


def contingency(removals: NDArray[np.bool_], relations: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Facts lost, ``[removals, relations]``."""
    table = removals.astype(float) @ np.eye(count)[relations]
    return np.asarray(table)


def unevenness(table: NDArray[np.float64]) -> float:
    """Cramer's V of removals and relations of the lost facts."""
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    return float(np.sqrt(((table - expected) ** 2 / expected).sum() / table.sum() / (min(table.shape) - 1)))


def by_relation(model: Model, removals: Removals) -> tuple[float, float, float, float]:
    """Cramer's V, its 95 % range when the relations of the facts are permuted, and its p-value."""
    names, relations = np.unique(model.relations, return_inverse=True)
    ever = removals.times > 0
    lost, relations = removals.lost[:, ever], relations[ever]
    value = unevenness(contingency(lost, relations, len(names)))
    rng = np.random.default_rng(SEED)
    dealt = [unevenness(contingency(lost, rng.permutation(relations), len(names))) for _ in range(PERMUTATIONS)]
    low, high = np.quantile(dealt, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return value, float(low), float(high), (1 + sum(one >= value for one in dealt)) / (1 + PERMUTATIONS)


def favoured(model: Model, removals: Removals) -> list[tuple[tuple[int, int], str, int, int, float, float]]:
    """Removals that lose more facts of a relation than chance, after Holm's correction over all pairs.

    Returns:
        Removal, relation, facts of it lost, facts of it known, facts expected, and the corrected p-value.
    """
    names, relations = np.unique(model.relations, return_inverse=True)
    table = contingency(removals.lost, relations, len(names))
    known, total = np.bincount(relations), len(relations)
    p = stats.hypergeom.sf(table - 1, total, known[None], table.sum(1, keepdims=True))
    adjusted = np.reshape(corrected(list(p.ravel())), p.shape)
    found = [
        (removals.names[one], str(names[other]), int(table[one, other]), int(known[other]),
         float(table[one].sum() * known[other] / total), float(adjusted[one, other]))
        for one, other in zip(*np.nonzero(adjusted < 1 - CONFIDENCE), strict=True)
    ]  # fmt: skip
    return sorted(found, key=lambda row: row[-1])


def head_minus_tail(model: Model, removals: Removals) -> Estimate:
    """Share of known facts that a removal loses, head minus tail."""
    return difference_of_means(removals.each[model.bins == "head"], removals.each[model.bins == "tail"])


def losses(found: Sequence[Model]) -> list[str]:
    """How many facts one removal loses, compared with as many weights elsewhere."""
    rows = []
    for model in found:
        experts = model.removals[EXPERTS]
        for kind in (*KINDS, BLOCK, WHOLE):
            removals = model.removals[kind]
            counts = removals.lost.sum(1)
            same = kind in KINDS and kind != EXPERTS  # number of weights
            against = points(mean_difference(experts.each - removals.each)) if same else ""
            told = [str(model.seed), kind, str(len(removals.names)), percent(share_of(removals.each))]
            rows.append([*told, f"{counts.min()}-{counts.max()}", against, points(head_minus_tail(model, removals))])
    heads = ["training", "removed", "removals", "of the known facts lost by one", "facts, least to most"]
    return markdown.table([*heads, "one expert minus this, points", "head minus tail, points"], rows)


def spread(found: Sequence[Model]) -> list[str]:
    """On how many removals the facts depend."""
    rows = []
    for model in found:
        rng = np.random.default_rng(SEED)
        for kind in (EXPERTS, SPREAD, ATTENTION):
            removals = model.removals[kind]
            by_chance = [by_one_only(rng.permuted(removals.lost, axis=1)) for _ in range(PERMUTATIONS)]
            counts = removals.lost.sum(1)
            alike = gini(rng.multinomial(counts.sum(), np.full(len(counts), 1 / len(counts)), size=PERMUTATIONS))
            n, lost_by = removals.times.size, Counter(np.minimum(removals.times, 2).tolist())
            shares = [proportion(lost_by[times], n) for times in range(3)] + [proportion(lost_by[1], n - lost_by[0])]
            told = [str(model.seed), kind, *map(percent, shares), between(by_chance)]
            rows.append(
                [*told, str(gini_of(model, removals)), between(list(alike)), str(mean(leaned_on(removals.fell)))]
            )
    heads = [
        "training",
        "removed",
        "facts lost by no removal",
        "by one only",
        "by several",
        "of those lost, by one only",
    ]
    heads += ["the same if each removal lost random facts", "Gini over removals", "the same if all lost equally many"]
    heads += ["removals leaned on"]
    return markdown.table(heads, rows)


def specialised(found: Sequence[Model]) -> list[str]:
    """Whether the facts that a removal loses are of few relations."""
    rows = []
    for model in found:
        for kind in (EXPERTS, SPREAD, ATTENTION):
            value, low, high, p = by_relation(model, model.removals[kind])
            pairs = favoured(model, model.removals[kind])
            rows.append(
                [str(model.seed), kind, f"{value:.3f}", f"{low:.3f} to {high:.3f}", f"{p:.2g}", str(len(pairs))]
            )
    heads = ["training", "removed", "Cramer's V", "with permuted relations, 95 %", "p", "pairs beyond chance"]
    return markdown.table(heads, rows)


def pairs_of(found: Sequence[Model], most: int = 12) -> list[str]:
    """The experts that lose facts of one relation most beyond chance."""
    rows = []
    for model in found:
        for (block, expert), relation, lost, known, expected, p in favoured(model, model.removals[EXPERTS])[:most]:
            share = percent(proportion(lost, known))
            rows.append(
                [str(model.seed), f"{block}/{expert}", relation, str(lost), f"{expected:.1f}", share, f"{p:.2g}"]
            )
    heads = ["training", "block/expert", "relation", "lost", "expected", "of the relation's known facts", "p (Holm)"]
    return markdown.table(heads, rows)


def blocks(found: Sequence[Model]) -> list[str]:
    """Block by block: one expert, as many weights elsewhere, and all eight experts at once."""
    rows = []
    for model in found:
        for block in model.blocks:
            of = {kind: removals.of_block(block) for kind, removals in model.removals.items()}
            some, every = accuracy(of[EXPERTS].times > 0), accuracy(of[BLOCK].lost[0])
            each = [share_of(of[kind].each) for kind in KINDS]
            rows.append([str(model.seed), str(block), *map(percent, [*each, some, every])])
    heads = ["training", "block", *KINDS, "lost by some one of the eight", "by all eight at once"]
    return markdown.table(heads, rows)


def routed(found: Sequence[Model]) -> list[str]:
    """Whether the facts that an expert keeps are those whose questions it reads."""
    rows = []
    for model in found:
        lost, reads = model.removals[EXPERTS].lost, reads_of(model)
        for level, name in READS.items():
            these = reads == level
            if not these.any():
                continue
            asked = these.any(axis=0)
            share = (lost & these).sum(0)[asked] / these.sum(0)[asked]
            rows.append(
                [
                    str(model.seed),
                    name,
                    f"{these.sum(0).mean():.1f}",
                    percent(share_of(share)),
                    str((lost & these).sum()),
                ]
            )
    heads = ["training", "tokens of the question that the expert reads", "experts per question, mean"]
    return markdown.table([*heads, "of the facts lost by its removal", "facts lost, all experts"], rows)


def draw(found: Sequence[Model], path: Path) -> None:
    """What each expert keeps by relation, losses by block, and on how many removals facts depend."""
    first = found[0]
    names, relations = np.unique(first.relations, return_inverse=True)
    experts = first.removals[EXPERTS]
    shares = 100 * contingency(experts.lost, relations, len(names)) / np.bincount(relations)
    figure: Figure
    figure, (heat, by_block, times) = panels(3, width=5.4, height=4.4)
    drawn = heat.imshow(shares.T, aspect="auto", cmap="magma_r", vmin=0)
    heat.set_yticks(range(len(names)), names, fontsize=7)
    heat.set_xticks(range(len(experts.names)), [str(expert) for _, expert in experts.names], fontsize=6)
    for place in range(1, len(first.blocks)):
        heat.axvline(place * len(experts.names) / len(first.blocks) - 0.5, color="white", linewidth=1.5)
    heat.set(xlabel="expert removed, block by block", title="known facts of a relation lost (%)")
    figure.colorbar(drawn, ax=heat)
    for place, kind in enumerate(KINDS):
        values = [
            share_of(first.removals[kind].of_block(block).each).through(lambda share: 100 * share)
            for block in first.blocks
        ]
        bars(by_block, kind, values, [block + (place - 1.5) * 0.2 for block in first.blocks], 0.2)
    by_block.set_xticks(first.blocks)
    by_block.set(xlabel="block", ylabel="known facts lost by one removal (%)", title="as many weights elsewhere")
    by_block.legend(fontsize=7)
    for place, kind in enumerate((EXPERTS, SPREAD, ATTENTION)):
        n = first.removals[kind].times
        most = [proportion(int(((n == many) if many < 5 else (n >= many)).sum()), n.size) for many in range(1, 6)]
        percents = [one.through(lambda share: 100 * share) for one in most]
        bars(times, kind, percents, [many + (place - 1) * 0.25 for many in range(1, 6)], 0.25)
    times.set_xticks(range(1, 6), ["1", "2", "3", "4", "5+"])
    times.set(xlabel="lost by how many of the 32 removals", ylabel="known facts (%)", title="few or all?")
    times.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(store: Path, folder: Path) -> None:
    """Read the runs under ``store`` and write the study's files into ``folder``."""
    found = [model for model in models(store) if {*KINDS, BLOCK, WHOLE} <= model.removals.keys()]
    if not found:
        sys.exit(f"error: {store} holds no model with every kind of removal; run the preset first")
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    draw(found, folder / "figures" / "facts_in_experts.png")
    known = ", ".join(f"{percent(model.dense)} (training {model.seed})" for model in found)
    text = [f"Known by the dense models: {known} of the facts in a held-out wording.", ""]
    text += ["![facts in experts](figures/facts_in_experts.png)", ""]
    sections = {
        "How many facts one removal loses": losses,
        "Block by block": blocks,
        "Few or all": spread,
        "Which facts": specialised,
        "Which tokens their experts read": routed,
        "Experts that keep more of a relation than chance": pairs_of,
    }
    for title, section in sections.items():
        text += [f"## {title}", "", *(section(found) or ["None."]), ""]
    markdown.write_below(MARKER, text, folder / "README.md")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/facts_in_experts/study.py STORE FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
