"""The page of Forgotten or Displaced on small models, written from a store made by hand."""

from __future__ import annotations

import runpy

import pytest

from helpers.stores import bits, made_run
from knowledge_compression.analysis.published import EXPERIMENTS
from knowledge_compression.results.store import RunStore

SCRIPT = EXPERIMENTS / "forgotten_or_displaced" / "small.py"
ANSWERS = {  # dense knows the first six of ten; compression loses four of them
    "none": "1100000000",
    "lora": "1111000000",  # two of the lost come back by weights
    "prompt": "1101101000",  # one of them and another by redirection, and one that was never known
}


def test_the_page_counts_what_came_back_and_what_came_without_having_been_there(tmp_path):
    store = RunStore(tmp_path / "outputs")
    store.write(made_run(bits("1111110000"), compression="none"))
    for recovery, answers in ANSWERS.items():
        run = made_run(bits(answers), compression="gptq", recovery=recovery)
        run.config["compression"] |= {"bits": 3}
        store.write(run)
    runpy.run_path(str(SCRIPT))["main"](store.folder, tmp_path / "page.md", [])
    page = (tmp_path / "page.md").read_text()
    assert "which lost 4 that the dense model knows" in page
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")
        for line in page.splitlines()
        if line.startswith("|")
    }
    shares = {name: [cell.split(" [")[0] for cell in rows[name][-2:]] for name in ("lora", "prompt")}
    assert shares == {"lora": ["50.0 %", "0.0 %"], "prompt": ["50.0 %", "25.0 %"]}
    assert "Of the 4 lost, restored by redirection 25.0 %" in page
    assert "by weights 25.0 %" in page and "by both 25.0 %" in page and "by neither 25.0 %" in page


def test_a_store_without_recoveries_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"error: .*run the presets first"):
        runpy.run_path(str(SCRIPT))["main"](tmp_path / "empty", tmp_path / "page.md", [])
