"""The study of knowledge per bit: its figures on runs whose answer is known beforehand."""

from __future__ import annotations

import json
import math
import runpy
import shutil
from types import SimpleNamespace

import polars as pl
import pytest

from helpers.places import ROOT
from helpers.stores import bits, made_run
from knowledge_compression.results.store import RunStore

STUDY = SimpleNamespace(**runpy.run_path(str(ROOT / "experiments" / "knowledge_per_bit" / "study.py")))


def quantized(answers: str, nll: float, compression: str, width: int | None, others: str = "", **rest):
    """A run of ten facts and two windows of text; the layer has 1,000 weights and 300 bits of scales.

    ``others`` are the answers to LAMA and to BEAR, half each; empty: not asked.
    """
    run = made_run(bits(answers), compression=compression, **rest)
    text = {"suite": "perplexity", "task": "wikitext", "correct": False, "rank": 0, "log_prob": 0.0, "prompt": ""}
    rows = [text | {"id": str(i), "nll": nll + 0.1 * i, "gold": "", "prediction": ""} for i in range(2)]
    items = pl.concat([run.items, pl.DataFrame(rows)], how="diagonal_relaxed")
    run._items = items
    run.metrics["perplexity.perplexity"] = math.exp(nll + 0.05)
    run.report["eval"]["perplexity"] = run.report["eval"]["atlas"]
    half = len(others) // 2
    for suite, said in (("lama", others[:half]), ("bear", others[half:])) if others else ():
        asked = made_run(bits(said)).items.with_columns(pl.lit(suite).alias("suite"))
        run._items = pl.concat([run._items, asked], how="diagonal_relaxed")
        run.report["eval"][suite] = run.report["eval"]["atlas"]
        run.config["eval"] |= {suite: {}}
    layer = {"path": "a", "role": "ff", "parameters": 1000, "bits": float(width or 32)}
    layers = [layer | {"overhead_bits": 300}] if width else []
    run.report["compression"] = run.report.get("compression", {}) | {
        "layers": layers, "model_parameters": 1500, "seconds": 3.0, "peak_memory": None, "method": compression,
    }  # fmt: skip
    if width:
        run.config["compression"] |= {"bits": width}
    return run


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    store = RunStore(tmp_path_factory.mktemp("store"))
    store.write(quantized("1111111100", 3.0, "none", None, "11101100"))
    store.write(quantized("1111110000", 3.4, "rtn", 3, "11001011"))
    store.write(quantized("1111111000", 3.6, "gptq", 3, "10001100"))
    store.write(quantized("1111111101", 3.1, "rtn", 4))
    return store


def rows_of(*places):
    """The rows of the lowest seeds."""
    return [row for row, *_ in STUDY.rows_of(*places)]


def test_rows_are_what_the_store_holds(store: RunStore) -> None:
    rows = {(round(row.bits, 1), round(row.kept["atlas"].value, 3)): row for row in rows_of(store.folder)}
    assert set(rows) == {(3.3, 0.75), (3.3, 0.875), (4.3, 1.0)}
    row = rows[3.3, 0.75]
    assert row.megabytes == pytest.approx((3300 / 8 + 2 * 500) / 1e6)
    assert (row.nats.value, row.flips.value) == (pytest.approx(0.4), pytest.approx(0.2))
    assert rows[4.3, 1.0].flips.value == pytest.approx(0.1)


def test_kept_floats_count_two_bytes_whatever_the_network_holds(tmp_path) -> None:
    pruned = quantized("1111110000", 3.4, "magnitude", None)
    layer = {"path": "a", "role": "ff", "parameters": 1000, "removed": 500, "bits": 32.0}
    pruned.report["compression"]["layers"] = [layer]
    store = RunStore(tmp_path)
    store.write(quantized("1111111100", 3.0, "none", None))
    store.write(pruned)
    (row,) = rows_of(store.folder)
    assert row.bits == pytest.approx(500 * 16 / 1000 + 1)  # and a bitmask


def test_the_page_says_whether_facts_follow_perplexity(store: RunStore, tmp_path) -> None:
    (tmp_path / "README.md").write_text(f"# Title\n\nWords.\n\n{STUDY.MARKER}\nold\n")
    STUDY.main(store.folder, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# Title\n\nWords.\n") and "old" not in page
    said = next(line for line in page.splitlines() if line.startswith("- 3.30 to 3.30 bits"))
    assert (
        "gptq bits=3 keeps most facts of the atlas (87.5 %" in said and "rtn bits=3 has the lowest perplexity" in said
    )
    assert (
        "rtn bits=3 keeps most facts of LAMA (66.7 %" in said
        and "gptq bits=3 keeps most facts of BEAR (100.0 %" in said
    )
    (row,) = (line.split(" | ") for line in page.splitlines() if line.startswith("| rtn bits=4"))
    kept = dict(zip(STUDY.HEADS, row, strict=True))
    assert (
        kept["kept of the atlas, %"].startswith("100.0 [") and kept["kept of LAMA, %"] == kept["kept of BEAR, %"] == ""
    )
    assert (tmp_path / "figures" / "knowledge_per_bit.png").stat().st_size > 1000


def test_rows_written_before_stay_until_a_store_has_them_again(store: RunStore, tmp_path) -> None:
    for place, others in (("first", "11001011"), ("second", "11101100")):
        part = RunStore(tmp_path / place)
        part.write(quantized("1111111100", 3.0, "none", None, "11101100"))
        part.write(quantized("1111110000", 3.4, "rtn", 3, others))
    RunStore(tmp_path / "first").write(quantized("1111111101", 3.1, "rtn", 4))
    RunStore(tmp_path / "second").write(quantized("1111111101", 3.2, "gptq", 3))

    def told(place: str) -> dict[str, list[str]]:
        (tmp_path / "README.md").write_text(f"{STUDY.MARKER}\n")
        STUDY.main(tmp_path / place, tmp_path)
        table = [line.strip("| ").split(" | ") for line in (tmp_path / "README.md").read_text().splitlines()]
        return {line[0]: line for line in table if len(line) == len(STUDY.HEADS)}

    before, after = told("first"), told("second")
    assert set(after) - set(before) == {"gptq bits=3"}
    assert after["rtn bits=4"] == before["rtn bits=4"]
    lama = STUDY.HEADS.index("kept of LAMA, %")
    assert (before["rtn bits=3"][lama][:4], after["rtn bits=3"][lama][:4]) == ("66.7", "100.")
    assert after["rtn bits=3"][-1] == "float32"
    assert told("second") == after


@pytest.mark.parametrize("damaged", ["[[{", '[[{"name": "rtn bits=3"}]]', "[[]]", "{}x", "[1]"])
def test_damaged_results_are_one_line_and_stay(store: RunStore, tmp_path, damaged: str) -> None:
    (tmp_path / "README.md").write_text(f"{STUDY.MARKER}\n")
    (tmp_path / "results.json").write_text(damaged)
    with pytest.raises(SystemExit, match=r"^error: .*results.json is not what this study wrote; restore it, or delete"):
        STUDY.main(store.folder, tmp_path)
    assert (tmp_path / "results.json").read_text() == damaged
    assert (tmp_path / "README.md").read_text() == f"{STUDY.MARKER}\n"


def test_the_front_is_of_rows_that_no_smaller_one_beats(store: RunStore) -> None:
    assert [round(row.kept["atlas"].value, 3) for row in STUDY.best(rows_of(store.folder))] == [0.875, 1.0]


def test_other_facts_are_those_that_the_dense_model_knows_of_each_suite(store: RunStore) -> None:
    kept = {(row.name, suite): share for row in rows_of(store.folder) for suite, share in row.kept.items()}
    told = {key: (share.value, share.n) for key, share in kept.items() if key[1] != "atlas"}
    assert told == {
        ("rtn bits=3", "lama"): (pytest.approx(2 / 3), 3),
        ("rtn bits=3", "bear"): (0.5, 2),
        ("gptq bits=3", "lama"): (pytest.approx(1 / 3), 3),
        ("gptq bits=3", "bear"): (1.0, 2),
    }


def test_methods_are_ordered_by_each_suite_and_by_perplexity(tmp_path) -> None:
    store = RunStore(tmp_path)
    store.write(quantized("1111111100", 3.0, "none", None, "11101110"))
    store.write(quantized("1111111000", 3.1, "rtn", 3, "11101000"))
    store.write(quantized("1111110000", 3.2, "gptq", 3, "11001100"))
    store.write(quantized("1111100000", 3.3, "awq", 3, "10001110"))
    (said,) = STUDY.answer(rows_of(tmp_path))
    orders = "the atlas and LAMA 1.00, the atlas and BEAR -1.00, the atlas and perplexity 1.00, LAMA and BEAR -1.00, "
    assert said.endswith(f"over 3 rows: {orders}LAMA and perplexity 1.00, BEAR and perplexity -1.00.")


def test_another_seed_is_no_row_but_a_line(store: RunStore, tmp_path) -> None:
    assert STUDY.between_seeds(STUDY.rows_of(store.folder)) == []
    seeded = RunStore(tmp_path)
    seeded.write(quantized("1111111100", 3.0, "none", None))
    for seed, nll in ((1, 3.5), (0, 3.4)):
        run = quantized("1111110000" if seed else "1111111000", nll, "rtn", 3)
        run.config["seed"] = seed
        seeded.write(run)
    (seeds,) = STUDY.rows_of(tmp_path)
    assert [row.nats.value for row in seeds] == pytest.approx([0.4, 0.5])
    (line,) = STUDY.between_seeds([seeds])
    assert line == f"- Seeds of {seeds[0].name}: 0.400, 0.500 nats above dense; the atlas 87.5, 75.0 %."


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """What peers.py leaves of another program: a run of the file that it saved, and what it told."""
    folder = tmp_path_factory.mktemp("peers")
    run = quantized("1111111110", 3.5, "theirs/saved", None)
    stored = {"layer_bits": 3.5, "weights": {"F32": 500, "3 bits": 1000}}
    run.report["compression"] |= {"stored": stored, "seconds": 0.01}
    run.config["file"] = {"path": "anywhere/theirs/saved"}
    RunStore(folder / "store").write(run)
    (folder / "theirs").mkdir()
    told = {"peer": "theirs 1.2", "bits": 3, "seconds": {"clock": 70.0, "processor": 60.0}}
    (folder / "theirs" / "told.json").write_text(json.dumps(told))
    return folder


def test_another_program_is_a_row_with_the_bytes_of_its_file(store: RunStore, peers) -> None:
    (row,) = [row for row in rows_of(store.folder, peers) if row.peer]
    assert (row.name, row.bits, row.seconds) == ("theirs 1.2 bits=3", 3.5, 70.0)
    assert row.megabytes == pytest.approx((3500 / 8 + 2 * 500) / 1e6)
    assert (row.nats.value, row.kept["atlas"].value) == (pytest.approx(0.5), 1.0)
    assert len(rows_of(store.folder, peers)) == 1 + len(rows_of(store.folder))


def test_the_dense_run_may_be_that_of_the_other_programs(peers, tmp_path) -> None:
    shutil.copytree(peers, tmp_path / "peers")
    RunStore(tmp_path / "peers" / "store").write(quantized("1111111100", 3.0, "none", None))
    (row,) = rows_of(tmp_path / "nothing", tmp_path / "peers")
    assert row.peer


def test_a_pruning_of_another_program_counts_as_ours(store: RunStore, peers, tmp_path) -> None:
    run = quantized("1111111110", 3.5, "theirs/saved", None)
    run.config["file"] = {"path": "anywhere/theirs/saved"}
    RunStore(tmp_path / "store").write(run)
    (tmp_path / "theirs").mkdir()
    told = json.loads((peers / "theirs" / "told.json").read_text())
    del told["bits"]
    told |= {"method": "wanda", "pattern": "2:4", "weights": 1000, "removed": 500}
    (tmp_path / "theirs" / "told.json").write_text(json.dumps(told))
    (row,) = [row for row in rows_of(store.folder, tmp_path) if row.peer]
    assert (row.name, row.bits) == ("theirs 1.2 wanda pattern=2:4", 9.0)
    assert row.megabytes == pytest.approx((9000 / 8 + 2 * 500) / 1e6)


def test_the_best_of_ours_is_held_against_the_best_of_other_programs(store: RunStore, peers, tmp_path) -> None:
    (line,) = STUDY.against_peers(rows_of(store.folder, peers))
    assert line.startswith("- Other programs, 3.50 to 3.50 bits: ")
    assert "bits=4 is 0.100 nats above dense, theirs 1.2 bits=3, the best of theirs, 0.500: 0.20 times, within" in line
    assert "times)" not in line  # none of ours has that size
    run = quantized("1111111000", 3.2, "hqq", 3)
    run.report["compression"]["layers"][0]["overhead_bits"] = 500
    again = RunStore(tmp_path)
    for one in (*RunStore(store.folder), run):
        again.write(one)
    (beside,) = STUDY.against_peers(rows_of(again.folder, peers))
    assert "(hqq bits=3, of the same size, 0.40 times)" in beside
    assert "by ours and by theirs: the atlas 100.0 % (" in line and line.endswith("% (theirs 1.2 bits=3), +0.0 points.")
    assert STUDY.against_peers(rows_of(store.folder)) == []


def test_a_file_of_which_nothing_is_told_is_one_line(store: RunStore, peers, tmp_path) -> None:
    (tmp_path / "store").symlink_to(peers / "store")
    with pytest.raises(SystemExit, match=r"^error: the run \w+ asked the file theirs/saved, of which nothing is told"):
        STUDY.rows_of(store.folder, tmp_path)


def test_an_empty_store_is_one_line(tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"^error: .* holds no compressed model asked for both atlas and perplexity"):
        STUDY.main(tmp_path, tmp_path)
