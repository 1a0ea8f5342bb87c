"""The page, opened from disk in a real headless browser."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from stores import made_run

from knowledge_compression.analysis.page import render
from knowledge_compression.report import main
from knowledge_compression.results.store import RunStore

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    store = RunStore(folder)
    luck = np.random.default_rng(0).random(120)
    store.write(made_run(luck < 0.8, compression="none", id="dense000"))
    for target, loss in (("att", 0.2), ("ff", 0.5)):
        for sparsity in (0.2, 0.4, 0.6):
            run = made_run(luck < 0.8 - loss * sparsity, target=target, sparsity=sparsity, id=f"{target}{sparsity}")
            store.write(run)
    return store


def test_the_command_writes_one_file_that_needs_no_network(store, tmp_path, capsys):
    page = tmp_path / "report.html"
    main([str(store.folder), "-o", str(page)])
    html = page.read_text()
    assert "7 runs" in capsys.readouterr().out
    assert 'src="http' not in html and "<link" not in html.split("<script>")[0]
    assert not list(tmp_path.glob(".*.part"))


def test_a_store_without_runs_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), "-o", str(tmp_path / "report.html")])
    assert end.value.code == 2 and not (tmp_path / "report.html").exists()
    assert capsys.readouterr().err.count("\n") == 1


def test_what_items_say_cannot_break_out_of_the_page(store):
    run = made_run([True], compression="none", id="evil0000")
    run.config["choices"]["model"] = "</script><script>alert(1)</script>"
    assert "<script>alert(1)" not in render([run])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_in_a_browser_the_filters_change_the_chart_and_the_search_finds_a_fact(store, tmp_path):
    from playwright.sync_api import sync_playwright

    page_file = tmp_path / "report.html"
    main([str(store.folder), "-o", str(page_file)])
    problems = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(page_file.as_uri())
        page.wait_for_selector("body[data-ready=yes]")
        lines = page.locator("#drop-chart .scatterlayer .trace")
        before = lines.count()
        page.uncheck("input[data-facet=target][value=ff]")
        page.wait_for_function(f"document.querySelectorAll('#drop-chart .scatterlayer .trace').length < {before}")
        page.fill("#fact-search", "q17")
        assert page.locator("#fact-list details.fact").count() == 1
        page.click("#fact-list details.fact summary")
        assert page.locator("#fact-list table tr").count() == 8  # a head and seven runs
        page.click("#fact-list button.run >> nth=1")
        assert "magnitude" in page.locator("#run-page").inner_text() or page.locator("#run-page table").count()
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        browser.close()
    assert not problems
