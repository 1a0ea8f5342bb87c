"""Statistics of the ledger: shares of facts by fate, frequency, relation, recovery and depth, with intervals."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from knowledge_compression.analysis.comparisons import Group, items_of, seedless
from knowledge_compression.analysis.flips import flips_of
from knowledge_compression.analysis.ledger import (
    BY_BOTH,
    BY_NEITHER,
    BY_REDIRECTION,
    BY_WEIGHTS,
    EARLY,
    GAINED,
    KEPT,
    LATE,
    LOST,
    NEVER_KNOWN,
    NEVER_THERE,
    TO_THE_END,
    UNKNOWN,
    depths,
    fates,
    restorations,
    restores_by,
)
from knowledge_compression.analysis.naming import reading_order, recovery_name
from knowledge_compression.results.store import Run
from knowledge_compression.statistics import Estimate, accuracies, accuracy, mean_t, proportion

FATES = (KEPT, LOST, GAINED, NEVER_KNOWN)
WENT = (TO_THE_END, LATE, EARLY, NEVER_THERE)
RESTORED = (BY_REDIRECTION, BY_WEIGHTS, BY_BOTH, BY_NEITHER)
OVERALL = "all facts"
_UNFILED = "unknown whether by weights or by redirection; left out"
# Columns of items by which facts are grouped, and the names of the groupings.
CATEGORIES = {"task": "relation", "bin": "frequency"}

Row = dict[str, Any]


def shares_of_fates(group: Group, run: Run) -> list[Row]:
    """What compression did, for all facts and by each category that the items have.

    Returns:
        Rows with ``by`` (``all facts``, ``relation``, ``frequency``), ``value``, ``counts`` (of each of :data:`FATES`),
        ``wrong_otherwise`` (how many never known are answered differently; None where answers are not known as text),
        ``flips`` and ``all_flips`` (of all facts), ``lost`` (of the facts that the dense model knew) and ``gained`` (of
        those that it did not); and how far the right answers of the lost facts sank: their ``rank`` now (geometric
        mean, because one of a few lost facts may rank in the thousands), and by how many nats their log-probability
        ``fell``. Each is an :class:`Estimate`, or None if there are no such facts.
    """
    extra = [column for column in _categories(group) if column != "task"]
    ledger = fates(group.dense, run, group.asked.suite, by=extra)
    rows = []
    for by, value, facts in _parts(ledger, ["task", *extra]):
        # In numpy: polars would plan a query for each of these columns of a few facts.
        fate = facts["fate"].to_list()
        counts, lost = Counter(fate), np.array(fate) == LOST
        flips = flips_of(facts)
        fell = facts["log_prob_before"].to_numpy()[lost] - facts["log_prob_after"].to_numpy()[lost]
        rank = facts["rank_after"].to_numpy()[lost]  # nan where it is not known
        ranks = mean_t(np.log(rank[~np.isnan(rank)]))
        rows.append(
            {"by": by, "value": value, "counts": [counts[name] for name in FATES]}
            | {name: getattr(flips, name, None) for name in ("wrong_otherwise", "flips", "all_flips")}
            | {"lost": _share(counts[LOST], counts[KEPT]), "gained": _share(counts[GAINED], counts[NEVER_KNOWN])}
            | {"rank": ranks and ranks.through(math.exp), "fell": mean_t(fell[np.isfinite(fell)])}
        )
    return rows


def shares_by_setting(group: Group, restored: Sequence[Row] = ()) -> list[Row]:
    """The fates of the facts under every setting, pooled over its seeds.

    Args:
        group: the runs.
        restored: the rows of :func:`shares_restored`.

    Returns:
        Rows with ``run`` (id of a setting), ``seeds``, ``by``, ``value``, ``counts``, ``wrong_otherwise``, ``flips``,
        ``all_flips``, ``lost`` and ``gained`` as in :func:`shares_of_fates` (counts are means over the seeds), and
        ``restored``: shares as in :func:`shares_restored`, None where no recovery of it is in the store.
    """
    back = {(row["compressed"], row["value"]): row["shares"] for row in restored}
    known = group.correct(group.dense)
    answers = [group.answers(run) for run in group.runs]
    flipped = [group.flipped(run) for run in group.runs]
    changed = [group.changed(run) for run in group.runs]
    rows = []
    for by, value, facts in _subsets(group):
        of_known, of_unknown = facts & known, facts & ~known
        lost, gained = (
            _rates([~right[:, of_known] for right in answers]),
            _rates([right[:, of_unknown] for right in answers]),
        )
        flips = _rates([one[:, facts] for one in flipped])
        all_flips = _rates([None if one is None else one[:, facts] for one in changed])
        for i, (run, right) in enumerate(zip(group.runs, answers, strict=True)):
            kept, new = (float(right[:, part].sum(1).mean()) for part in (of_known, of_unknown))
            counts = [kept, of_known.sum() - kept, new, of_unknown.sum() - new]
            also = changed[i]
            other = None if also is None else float((also & ~flipped[i])[:, facts].sum(1).mean())
            rows.append(
                {"run": run.id, "seeds": len(right), "by": by, "value": value, "counts": [float(n) for n in counts]}
                | {"wrong_otherwise": other, "flips": flips[i], "all_flips": all_flips[i]}
                | {"lost": lost[i], "gained": gained[i], "restored": back.get((run.id, value))}
            )
    return rows


def shares_restored(group: Group) -> list[Row]:
    """Which recoveries restored the facts that each compression lost, if the store has such recoveries.

    Returns:
        Rows with ``compressed`` (run id), ``tried`` (names of the recoveries; one that does not say how it restores is
        named as unknown and counts nowhere, see :func:`~.ledger.restores_by`), ``by``, ``value``, ``lost`` (how many
        facts), and for each of :data:`RESTORED` ``counts`` and ``shares`` (an :class:`Estimate` each).
    """
    extra = [column for column in _categories(group) if column != "task"]
    rows = []
    for compressed, recovered in recoveries(group):
        filed = {name: run for name, run in recovered.items() if restores_by(run) != UNKNOWN}
        tried = [name if name in filed else f"{name} ({_UNFILED})" for name in recovered]
        ledger = restorations(group.dense, compressed, filed, group.asked.suite, by=extra)
        for by, value, facts in _parts(ledger, extra):
            counts = Counter(facts["restored"].to_list())
            lost = sum(counts.values())
            shares = [_share(counts[name], lost - counts[name]) for name in RESTORED]
            rows.append(
                {"compressed": compressed.id, "tried": tried, "by": by, "value": value, "lost": lost}
                | {"counts": [counts[name] for name in RESTORED], "shares": shares}
            )
    return rows


def recoveries(group: Group) -> Iterator[tuple[Run, dict[str, Run]]]:
    """Every compressed run that was recovered, with its recoveries by name."""
    for compressed in sorted(group.members, key=reading_order):
        if compressed.config["choices"]["recovery"] != "none" or compressed in group.seeds.get(group.dense.id, []):
            continue
        recovered = [
            run
            for run in group.members
            if run.config["choices"]["recovery"] != "none" and _treatment(run) == _treatment(compressed)
        ]
        if recovered:
            yield compressed, _named(recovered)


def shares_by_depth(group: Group, run: Run) -> Row | None:
    """The depths at which the answers to a run's lost facts still rank first, in this run and in the dense model.

    Returns:
        ``before`` and ``after``: an :class:`Estimate` a depth, the first before the first block; ``went``: share of
        the lost facts by where they went, deepest first, as in :func:`~.ledger.depths`. None if the lens was not
        applied to both runs, or nothing was lost.
    """
    lost = depths(group.dense, run, group.asked.suite)
    if lost is None or lost.is_empty():
        return None

    def first(column: str) -> list[Estimate]:
        ranks = np.array(lost[column].to_list())
        return [accuracy(at == 1) for at in ranks.T]

    counts = Counter(lost["went"].to_list())
    went = {name: _share(counts[name], lost.height - counts[name]) for name in WENT if counts[name]}
    return {"before": first("ranks_before"), "after": first("ranks_after"), "went": went, "lost": lost.height}


def _categories(group: Group) -> list[str]:
    there = group.dense.scan_items().collect_schema()
    return [column for column in CATEGORIES if column in there]


def _parts(ledger: pl.DataFrame, categories: list[str]) -> Iterator[tuple[str, str, pl.DataFrame]]:
    """All facts, and those of each value of each category."""
    yield OVERALL, OVERALL, ledger
    for category in categories:
        for part in ledger.drop_nulls(category).sort(category).partition_by(category, maintain_order=True):
            yield CATEGORIES[category], part[category][0], part


def _subsets(group: Group) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """All facts, and those of each value of each category, as masks over the group's items."""
    yield OVERALL, OVERALL, np.ones(group.items.height, bool)
    columns = items_of(group.dense, group.asked.suite).select(_categories(group)).collect()
    for category in columns.columns:
        for value in columns[category].drop_nulls().unique().sort():
            yield CATEGORIES[category], value, (columns[category] == value).fill_null(value=False).to_numpy()


def _rates(such: Sequence[NDArray[np.bool_] | None]) -> Sequence[Estimate | None]:
    """The share of each; None if there are no facts, or it is unknown."""
    found = iter(accuracies([one for one in such if one is not None and one.size]))
    return [next(found) if one is not None and one.size else None for one in such]


def _share(such: int, others: int) -> Estimate | None:
    return proportion(such, such + others) if such + others else None


def _treatment(run: Run) -> str:
    """What was done to the model before any recovery."""
    config = run.config
    if (deciding := config.get("identity")) is not None:  # with the seeds of its random draws
        done = {key: deciding.get(key) for key in ("target", "compression")}
    else:
        done = {key: seedless(config.get(key)) for key in ("target", "compression", "sparsity", "reading")}
        done["seed"] = config["seed"]
    done["text"] = run.report["compression"].get("calibration")
    return json.dumps(done | {"names": [config["choices"][k] for k in ("target", "compression")]}, sort_keys=True)


def _named(recovered: list[Run]) -> dict[str, Run]:
    """Runs by recovery, with size, corpus and run id as far as needed to distinguish them."""
    ways: list[Callable[[Run], str]] = [
        lambda run: run.config["choices"]["recovery"],
        recovery_name,
        lambda run: f"{recovery_name(run)} {run.config['choices'].get('corpus', '')}".strip(),
    ]
    counted = [(way, Counter(map(way, recovered))) for way in ways]
    return {
        next((way(run) for way, count in counted if count[way(run)] == 1), f"{ways[-1](run)} {run.id[:8]}"): run
        for run in recovered
    }
