"""Ledger, statistics and findings on small stores built by hand, whose answers are known."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy import stats

from helpers.stores import bits, made_run
from knowledge_compression import statistics
from knowledge_compression.analysis import ledger
from knowledge_compression.analysis.claims import CLAIMS
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.analysis.findings import CONTRADICTED, SUPPORTED, UNDECIDED, check
from knowledge_compression.results.store import Run, RunStore


def test_fates_of_facts_by_hand():
    dense, small = made_run(bits("110010"), compression="none"), made_run(bits("101010"))
    fates = ledger.fates(dense, small, "atlas").sort("id")["fate"].to_list()
    assert fates == ["kept", "lost", "gained", "never known", "kept", "never known"]


def test_what_restored_each_lost_fact_by_hand():
    dense, small = made_run(bits("11111"), compression="none"), made_run(bits("00001"))
    back = {"prompt": made_run(bits("11000"), recovery="prompt"), "lora": made_run(bits("10100"), recovery="lora")}
    restored = ledger.restorations(dense, small, back, "atlas").sort("id")["restored"].to_list()
    assert restored == ["by both", "by redirection", "by weights", "by neither"]


def test_the_ledger_reads_a_stored_run_as_it_reads_one_in_memory(tmp_path):
    store = RunStore(tmp_path)
    runs = [made_run(bits("1100"), compression="none", id="dense"), made_run(bits("1010"), id="small")]
    in_memory = ledger.fates(*runs, "atlas").sort("id")
    for run in runs:
        store.write(run)
    assert ledger.fates(store.find("dense"), store.find("small"), "atlas").sort("id").equals(in_memory)


def store_where_att_beats_ff(family: str, att: float, ff: float, n: int = 400):
    rng = np.random.default_rng(3)
    luck = rng.random(n)
    runs = [made_run(luck < 0.8, compression="none", family=family)]
    for sparsity in (0.3, 0.4, 0.5):
        runs.append(made_run(luck < att, target="att", sparsity=sparsity, family=family))
        runs.append(made_run(luck < ff, target="ff", sparsity=sparsity, family=family))
    return runs


@pytest.mark.parametrize(
    ("att", "ff", "expected"), [(0.7, 0.4, SUPPORTED), (0.4, 0.7, CONTRADICTED), (0.6, 0.6, UNDECIDED)]
)
def test_a_claim_is_supported_contradicted_or_undecided_as_built(att, ff, expected):
    claim = next(c for c in CLAIMS if c.name == "encoders_medium_ff_hurts_more")
    verdict = check(compare(store_where_att_beats_ff("encoder", att, ff)), [claim])[0]
    assert verdict.status == expected
    assert len(verdict.findings[0].pairs) == 3
    assert verdict.findings[0].effect.value == pytest.approx(att - ff, abs=0.06)


def test_a_claim_about_encoders_says_nothing_of_decoders():
    claim = next(c for c in CLAIMS if c.name == "encoders_medium_ff_hurts_more")
    assert check(compare(store_where_att_beats_ff("decoder", 0.7, 0.4)), [claim])[0].findings == ()


def test_every_claim_can_be_checked_on_a_store_that_has_nothing_for_it():
    verdicts = check(compare([made_run(bits("1010"), compression="none")]))
    assert [verdict.status for verdict in verdicts] == [UNDECIDED] * len(CLAIMS)
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)


def test_runs_asked_differently_are_never_compared():
    runs = [
        made_run(bits("1100"), compression="none"),
        made_run(bits("1000"), fingerprint="other data"),
        made_run(bits("1000"), settings={"protocol": "paper"}),
    ]
    comparisons = compare(runs)
    assert [len(group.runs) for group in comparisons] == [0]
    assert len(comparisons.skipped) == 2 and all("no dense run" in why for _, why in comparisons.skipped)


def sized(run: Run, megabytes: float) -> Run:
    run.report["compression"] = {**run.report["compression"], "stored_bytes": megabytes * 1e6}
    return run


def test_advice_names_the_smallest_setting_that_surely_keeps_enough():
    from knowledge_compression.analysis.advice import front, kept, smallest

    known = np.ones(1000, bool)
    dense = sized(made_run(known, compression="none"), 100)
    safe, small, wasteful = (np.arange(1000) >= n for n in (10, 200, 300))
    runs = [dense, *(sized(made_run(c), mb) for c, mb in ((safe, 60), (small, 30), (wasteful, 70)))]
    group = compare(runs).groups[0]
    rows = kept(group)
    assert [round(row.share, 2) for row in rows] == [1.0, 0.7, 0.99, 0.8]
    assert [row.size_mb for row in front(rows)] == [100, 60, 30]
    assert smallest(rows, 0.95).size_mb == 60
    assert smallest(rows, 0.999).size_mb == 100


def test_advise_prints_a_front_and_refuses_nonsense(tmp_path, capsys):
    from knowledge_compression.advise import main

    store = RunStore(tmp_path)
    for run in (sized(made_run(bits("1" * 60), compression="none"), 10), sized(made_run(bits("1" * 50 + "0" * 10)), 5)):
        store.write(run)
    main([str(tmp_path), "--keep", "70%"])
    said = capsys.readouterr().out
    assert "Smallest that keeps 70% with 95 % confidence: att magnitude (5.0 MB)" in said
    assert "fewer_bits_hurt" not in said and "untested – " in said and "--claims names the runs they need" in said
    main([str(tmp_path), "--claims"])
    said = capsys.readouterr().out
    assert re.search(r"fewer_bits_hurt: \".+\"; no runs here test it; python run.py", said) and "untested" not in said
    main([str(tmp_path), "--keep", "72.5%", "--flips", "0.125"])
    assert "keeps 72.5% and flips at most 12.5% " in capsys.readouterr().out  # not rounded
    for nonsense in ("lots", "0", "120%"):
        with pytest.raises(SystemExit) as end:
            main([str(tmp_path), "--keep", nonsense])
        assert end.value.code == 2 and "--keep" in capsys.readouterr().err


def test_advise_on_a_model_that_knows_nothing_is_one_line(tmp_path, capsys):
    from knowledge_compression.advise import main

    for run in (sized(made_run(bits("00"), compression="none"), 10), sized(made_run(bits("10")), 5)):
        RunStore(tmp_path).write(run)
    main([str(tmp_path)])
    said = capsys.readouterr().out
    assert said.startswith("m answers no atlas item right") and "the front" not in said


def seeded(correct, seed, **settings):
    made = made_run(correct, **settings)
    made.config["seed"] = seed
    return made


def test_seeds_of_one_setting_are_one_point_and_widen_its_interval():
    rng = np.random.default_rng(5)
    dense = seeded(np.ones(400, bool), 0, compression="none")
    lost = [rng.random(400) < share for share in (0.55, 0.6, 0.8)]  # three draws of calibration text that differ much
    group = compare([dense, *(seeded(correct, seed) for seed, correct in enumerate(lost))]).groups[0]
    (setting,) = group.runs
    assert group.seeds_of(setting) == [0, 1, 2]
    pooled = statistics.drop(group.dense_answers(setting), group.answers(setting))
    alone = statistics.drop(group.correct(group.dense), lost[1])
    assert pooled.value == pytest.approx(100 * (1 - np.mean(lost)))
    assert pooled.high - pooled.low > 1.5 * (alone.high - alone.low)
    assert statistics.accuracy(group.answers(setting)).value == pytest.approx(np.mean(lost))


def test_a_claim_is_checked_over_the_seeds_that_its_runs_share():
    rng = np.random.default_rng(6)
    runs = [seeded(np.ones(200, bool), 0, compression="none", family="encoder")]
    for seed in range(3):
        runs.append(seeded(rng.random(200) < 0.8, seed, target="att", sparsity=0.4, family="encoder"))
        runs.append(seeded(rng.random(200) < 0.3, seed, target="ff", sparsity=0.4, family="encoder"))
    claim = next(c for c in CLAIMS if c.name == "encoders_medium_ff_hurts_more")
    finding = check(compare(runs), [claim])[0].findings[0]
    assert (finding.seeds, finding.status, len(finding.pairs)) == (3, SUPPORTED, 1)
    assert check(compare(runs[:3]), [claim])[0].findings[0].seeds == 1


def test_where_in_the_depth_lost_facts_went():
    def looked_into(run, ranks):
        rows = [{"suite": "lens", "task": f"r{i % 3}", "id": str(i), "depth_rank": r} for i, r in enumerate(ranks)]
        run.report["eval"]["lens"] = {"of": "atlas"}
        run._items = pl.concat([run.items, pl.DataFrame(rows)], how="diagonal")
        return run

    dense = looked_into(made_run(bits("11111"), compression="none"), [[5, 2, 1, 1]] * 5)
    small = looked_into(made_run(bits("00001")), [[5, 3, 1, 2], [1, 1, 4, 4], [9, 9, 9, 2], [3, 1, 2, 1], [1, 1, 1, 1]])
    found = ledger.depths(dense, small, "atlas").sort("id")
    assert found["went"].to_list() == ["late", "early", "never there", "to the end"]
    assert found["first_until"].to_list() == [2, 1, None, 3]
    assert found["ranks_before"].to_list() == [[5, 2, 1, 1]] * 4
    assert ledger.depths(dense, made_run(bits("00001")), "atlas") is None


def test_groups_of_one_suite_say_what_is_particular_about_them():
    runs = [made_run(bits("11"), compression="none", settings={"limit": n}, id=f"d{n}") for n in (2, 3)]
    runs += [made_run(bits("10"), settings={"limit": n}) for n in (2, 3)]
    runs += [made_run(bits("10"), fingerprint="other", settings={"limit": 3}, id="alone")]
    comparisons = compare(runs)
    assert sorted(group.asked.name for group in comparisons) == ["atlas (data=f, limit=2)", "atlas (data=f, limit=3)"]
    assert comparisons.skipped == [("alone", "no dense run of m with the same atlas settings (data=other, limit=3)")]


def test_trainings_of_one_world_are_told_apart_by_their_recipe():
    runs = []
    for seed, loss, machine in ((0, 1.5, "a"), (1, 1.25, "a"), (1, 1.125, "b")):
        made = {"recipe": {"training": {"seed": seed}}, "training": {"loss_after": loss}}
        model = {
            "name": "m",
            "family": "decoder",
            "recipe": f"recipe{seed}",
            "world": f"/{machine}/w{seed}",
            "made": made,
        }
        for compression in ("none", "magnitude"):
            run = made_run(bits("1100"), compression=compression)
            run.report["model"] = model
            runs.append(run)
    assert [group.asked.differs for group in compare(runs[:2])] == [""]
    told = sorted(group.asked.differs for group in compare(runs[:4]))
    assert told == ["model.training.seed=0", "model.training.seed=1"]
    again = sorted(group.asked.differs for group in compare(runs))  # one recipe, trained on two machines
    assert again[0] == "model.training.seed=0"
    assert "loss_after=1.125" in again[1] and "loss_after=1.25" in again[2]


def test_a_run_that_lacks_items_is_left_out_by_name():
    comparisons = compare([made_run(bits("1111"), compression="none"), made_run(bits("11"), id="short")])
    assert comparisons.groups[0].runs == []
    assert comparisons.skipped == [("short", "2 items that its baseline answers are missing")]


def claim_named(name):
    return next(claim for claim in CLAIMS if claim.name == name)


def recovered(correct, recovery, trained, compression="gptq", **size):
    run = made_run(correct, compression=compression, recovery=recovery)
    run.report["recovery"]["trainable_parameters"] = trained
    run.config["recovery"] = size
    return run


def test_being_as_good_counts_only_where_far_fewer_parameters_were_trained():
    half = np.arange(1000) < 500
    dense, lora = made_run(half, compression="none"), recovered(half, "lora", 1000, rank=4)
    claim = claim_named("idp_at_least_equals_lora")
    (cheap,) = check(compare([dense, lora, recovered(half, "idp", 250, prompts=[50, 100])]), [claim])
    (dear,) = check(compare([dense, lora, recovered(half, "idp", 251, prompts=[50, 100])]), [claim])
    assert (cheap.status, dear.status, dear.findings) == (SUPPORTED, UNDECIDED, ())


@pytest.mark.parametrize(("longer", "expected"), [(500, SUPPORTED), (560, CONTRADICTED), (440, CONTRADICTED)])
def test_alike_is_contradicted_by_a_difference_either_way(longer, expected):
    facts = np.arange(1000)
    runs = [made_run(facts < 600, compression="none"), recovered(facts < 500, "idp", 100, prompts=[10, 30])]
    runs.append(recovered(facts < longer, "idp", 500, prompts=[50, 150]))
    (verdict,) = check(compare(runs), [claim_named("idp_is_stable_over_sizes")])
    assert (verdict.status, len(verdict.findings[0].pairs)) == (expected, 1)


def test_gains_are_compared_not_what_is_kept():
    facts = np.arange(1000)
    runs = [made_run(facts < 900, compression="none")]
    for compression, bare, after in (("gptq", 300, 500), ("sparsegpt", 600, 620)):  # gptq keeps less and gains more
        runs += [made_run(facts < bare, compression=compression), made_run(facts < after, compression=compression)]
        runs[-1].config["choices"]["recovery"] = "lora"
        for run in runs[-2:] if compression == "gptq" else ():
            run.config["compression"] = {"bits": 3}
    kept, gained = check(
        compare(runs),
        [claim_named("quantization_keeps_more_than_pruning"), claim_named("quantization_recovers_more_than_pruning")],
    )
    assert (kept.status, gained.status) == (CONTRADICTED, SUPPORTED)
    assert gained.findings[0].effect.value == pytest.approx(0.2 - 0.02)


def test_bits_of_one_compression_are_told_apart():
    facts = np.arange(1000)
    runs = [made_run(facts < 900, compression="none")]
    for bits_kept, kept in ((8, 900), (4, 800), (3, 500)):
        runs.append(made_run(facts < kept, compression="gptq"))
        runs[-1].config["compression"] = {"bits": bits_kept}
        runs[-1].report["compression"] = {"calibration": {"digest": "text"}}
    verdicts = check(compare(runs), [claim_named("gptq_8_bits_is_harmless"), claim_named("fewer_bits_hurt")])
    assert [verdict.status for verdict in verdicts] == [SUPPORTED, SUPPORTED]
    assert [len(verdict.findings[0].pairs) for verdict in verdicts] == [1, 1]


@pytest.mark.parametrize(("known", "expected"), [(0.34, SUPPORTED), (0.8, CONTRADICTED)])
def test_what_is_left_of_a_model_is_held_against_the_majority(known, expected):
    luck = np.random.default_rng(8).random(3000)
    runs = [made_run(luck < 0.9, compression="none"), made_run(luck < known, target="final", sparsity=0.2)]
    for run in runs:  # a third of the answers are the most frequent one
        run.report["compression"] = {"sparsity": 0.2}
        run._items = run.items.with_columns(gold=pl.Series(["a", "b", "c", "a", "d", "e"] * 500), task=pl.lit("r"))
    (verdict,) = check(compare(runs), [claim_named("final_at_20_leaves_the_majority")])
    assert verdict.status == expected
    assert verdict.findings[0].pairs == (("majority", runs[1].id),)


def test_every_undecided_claim_has_a_command_that_names_what_it_compares():
    from knowledge_compression.analysis.advice import run_next

    comparisons = compare([made_run(bits("10"), compression="none")])
    advice = dict(line.split(": ", 1) for line in run_next(check(comparisons), comparisons))
    assert set(advice) == {claim.name for claim in CLAIMS}
    assert all(advice[claim.name].startswith(f'"{claim.text}"; ') for claim in CLAIMS)  # a name alone says little
    assert "compression.bits=4,3" in advice["fewer_bits_hurt"]
    assert "recovery=idp 'recovery.prompts=[10,30],[50,100]'" in advice["idp_is_stable_over_sizes"]
    assert "sparsity=0.1,0.2" in advice["decline_steepens_past_half"]
    assert advice["low_pruning_is_harmless"].endswith(
        "python run.py -m model=m eval=[atlas] compression=magnitude sparsity=0.1,0.2,0.3"
    )
    assert "model=m eval=[nine_tasks]" in advice["weights_win_language"]
    assert advice["final_unstructured_hurts_less"].endswith("target=final, with an encoder as the model")
    of_decoders = replace(claim_named("fewer_bits_hurt"), families=("decoder",))
    none_there = compare([made_run(bits("10"), compression="none", family="encoder")])
    assert run_next(check(none_there, [of_decoders]), none_there)[0].endswith("with a decoder as the model")


def test_where_no_item_differs_the_interval_is_of_the_share_that_could():
    few, many = np.arange(10) < 5, np.arange(4000) < 2000
    upper = stats.binomtest(0, 10).proportion_ci(method="wilson").high
    fall, gap = statistics.drop(few, few), statistics.mean_difference(np.zeros(10))
    assert (fall.value, fall.low, fall.high) == pytest.approx((0, -200 * upper, 200 * upper))
    assert (gap.low, gap.high, gap.p) == pytest.approx((-upper, upper, 1))
    claim = claim_named("idp_at_least_equals_lora")
    for answers, expected in ((few, UNDECIDED), (many, SUPPORTED)):  # ten alike answers show little
        runs = [made_run(answers, compression="none"), recovered(answers, "lora", 1000)]
        assert check(compare([*runs, recovered(answers, "idp", 100)]), [claim])[0].status == expected


def test_one_item_decides_nothing():
    (finding,) = check(
        compare(
            [made_run(bits("1"), compression="none"), recovered(bits("1"), "idp", 1), recovered(bits("0"), "lora", 9)]
        ),
        [claim_named("idp_at_least_equals_lora")],
    )[0].findings
    assert (finding.status, finding.effect.value) == (UNDECIDED, 1)
    assert "a single one of the items has no interval" in finding.claim.measure.words(finding.effect)


@pytest.mark.parametrize(
    ("name", "gained", "away"), [("idp_at_least_equals_lora", 4, 0.01), ("redirection_wins_world_knowledge", 8, 0.01)]
)
def test_advice_says_how_many_items_would_decide(name, gained, away):
    from knowledge_compression.analysis.advice import run_next

    facts = np.arange(400)
    runs = [made_run(facts < 380, compression="none", tasks=("sciq",))]
    for recovery, right, trained in (("lora", facts < 300, 1000), ("idp", (facts < 300 + gained) & (facts > 3), 100)):
        runs.append(recovered(right, recovery, trained))
        runs[-1]._items = runs[-1].items.with_columns(task=pl.lit("sciq"))  # asked the same
    comparisons = compare(runs)
    (verdict,) = check(comparisons, [claim_named(name)])
    (line,) = run_next([verdict], comparisons)
    half_width = 1.96 * np.sqrt(4 + gained) / 400  # of four lost and some gained
    told = int(line.split("about ")[1].split(" items")[0].replace(",", ""))
    assert told == pytest.approx(400 * (half_width / away) ** 2, rel=0.2)  # ends are multiples of 1/400
    assert "instead of 400 would decide it" in line


def test_what_a_recovery_trained_has_to_be_stored_too():
    from knowledge_compression.analysis.advice import kept, smallest

    known = np.ones(1000, bool)
    bare, prompted, lora = (
        sized(recovered(known, name, n), 5) for name, n in (("none", 0), ("prompt", 250), ("lora", 9000))
    )
    rows = kept(compare([sized(made_run(known, compression="none"), 10), lora, prompted, bare]).groups[0])
    assert [row.size_mb for row in rows] == pytest.approx([10, 5.036, 5.001, 5])
    assert smallest(rows, 0.9).run is bare


def test_runs_of_an_older_format_are_read_named_and_compared_among_themselves(tmp_path):
    """Format 1 does not record what decided a run: it stands beside today's, under a name of its own."""
    store = RunStore(tmp_path)
    for compression, right in (("none", "1111"), ("magnitude", "1100")):
        for version in (1, 2):
            run = made_run(bits(right), compression=compression, id=f"{compression}{version}")
            run.environment["format"] = version
            if version == 2:
                deciding = {"model": {"content": "m"}, "dtype": "torch.float32", "eval": {"atlas": {"content": "f"}}}
                did = {} if compression == "none" else {"target": {}, "compression": {"sparsity": 0.2}}
                run.config["identity"] = deciding | did
            store.write(run)
    runs, skipped = store.scan()
    assert len(runs) == 4 and not skipped
    groups = compare(runs).groups
    members = {group.dense.id: [run.id for run in group.runs] for group in groups}
    assert members == {"none1": ["magnitude1"], "none2": ["magnitude2"]}
    names = {group.dense.id: group.asked.name for group in groups}
    assert "format=1" in names["none1"] and "format=1" not in names["none2"]


def test_the_ledger_is_in_the_order_of_the_dense_run():
    order = [str(i) for i in np.random.default_rng(0).permutation(5000)]
    dense, small = made_run(np.ones(5000, bool), compression="none", tasks=("r",)), made_run(np.ones(5000, bool))
    small._items = small.items.with_columns(pl.lit("r").alias("task"))
    dense._items = dense.items.with_columns(pl.Series("id", order))
    assert ledger.fates(dense, small, "atlas")["id"].to_list() == order
