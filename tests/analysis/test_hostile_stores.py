"""What a store says is text, wherever it is shown."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
from markdown_it import MarkdownIt

from helpers.stores import made_run
from knowledge_compression.report import main, write_figures
from knowledge_compression.results.store import RunStore
from knowledge_compression.results.summary import show

# Markup, a template's expression, a formula, and what ends attributes, cells and rows; a folder's name takes no slash.
IN_A_NAME = """<img src=x onerror=window.ran=1><b>$x^{${{7*7}}[x](y)|`"'\\\\&amp;%_"""


MARKUP = f"""</script><script>window.ran=1</script><a href="javascript:window.ran=1">x</a><a href="https://x.y">x</a>{IN_A_NAME}"""


def hostile_run(answers, **chosen):
    """A run with markup in every field that its files have."""
    run = made_run(answers, tasks=(f"{MARKUP} r0", f"{MARKUP} r1"), **chosen)
    run.config["choices"] |= {"model": f"m {MARKUP}", "target": f"t {MARKUP}", "corpus": f"c {MARKUP}"}
    run.config |= {"reading": MARKUP, MARKUP: MARKUP, "recovery": {"prompts": [2, 3], MARKUP: MARKUP}}
    run.config["eval"] = {f"s {MARKUP}": {"limit": MARKUP, MARKUP: MARKUP}}
    run.metrics = {f"s {MARKUP}.accuracy": run.metrics["atlas.accuracy"], MARKUP: 1.0}
    run.report["model"] |= {"name": f"m {MARKUP}", "note": f"note {MARKUP}"}
    run.report["eval"] = {f"s {MARKUP}": {"fingerprint": MARKUP, "of": MARKUP}, "lens": {"of": f"s {MARKUP}"}}
    run.report["compression"] = {"sparsity": 0.5, "method": MARKUP, "calibration": MARKUP}
    run.report["compression"]["layers"] = [
        {"path": f"{MARKUP}.{i}.l {MARKUP}", "role": MARKUP, "parameters": 4, "removed": i} for i in range(3)
    ]
    run.environment = {"dtype": MARKUP, "command": MARKUP, MARKUP: {MARKUP: [MARKUP]}}
    marked = {name: pl.lit(f"{name} {MARKUP}") for name in ("prompt", "gold", "prediction", "bin")}
    run._items = run.items.with_columns(suite=pl.lit(f"s {MARKUP}"), id=pl.col("id") + MARKUP, **marked).with_columns(
        prediction=pl.when("correct").then("gold").otherwise("prediction")
    )
    return run


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A store that someone wants to harm its reader with."""
    store = RunStore(tmp_path_factory.mktemp("hostile"))
    luck = np.random.default_rng(4).random(40)
    store.write(hostile_run(luck < 0.9, compression="none", id=f"d {IN_A_NAME}"))
    store.write(hostile_run(luck < 0.5, id=f"a {IN_A_NAME}"))
    other = hostile_run(luck < 0.4, id=f"b {IN_A_NAME}", sparsity=0.4)
    other.config["choices"]["target"] = f"u {MARKUP}"
    store.write(other)
    store.write(hostile_run(luck < 0.7, id=f"l {IN_A_NAME}", recovery="lora"))
    broken = hostile_run(luck < 0.7, id=f"n {IN_A_NAME}", sparsity=0.6)
    broken.report["non_finite_weights"] = {MARKUP: 1}
    store.write(broken)
    store.write(made_run([True], id=f"v {IN_A_NAME}"))
    (store.runs_folder / f"v {IN_A_NAME}" / "environment.json").write_text(json.dumps({"format": MARKUP}))
    store.write(made_run([True], id=f"k {IN_A_NAME}"))
    (store.runs_folder / f"k {IN_A_NAME}" / "metrics.json").write_text(json.dumps({MARKUP: MARKUP}))
    return store


@pytest.mark.slow
def test_in_a_browser_nothing_that_a_store_says_runs_and_all_of_it_shows_as_text(hostile, tmp_path, page_in_browser):
    page_file = tmp_path / "report.html"
    main([str(hostile.folder), "-o", str(page_file)])
    page = page_in_browser(page_file)
    page.click("#fact-list details.fact summary >> nth=0")
    page.wait_for_selector("#fact-list table")
    page.select_option("#run-choice", f"n {IN_A_NAME}")
    void = f"s {MARKUP} gives no figures, because weights of the model are not finite ({MARKUP})"
    assert void in page.locator("#run-page").text_content()
    page.select_option("#run-choice", f"b {IN_A_NAME}")
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    page.click("#overview-table button.run >> nth=1")
    page.wait_for_selector("#layer-map .heatmaplayer")
    assert page.evaluate("window.ran") is None
    assert page.locator("script").count() == 4 and page.locator("img").count() == 0
    assert page.evaluate("[...document.querySelectorAll('a')].every(a => (a.getAttribute('href') ?? '#')[0] === '#')")
    for place, text in {
        "#overview-table": [f"t {MARKUP}", f"s {MARKUP}"],
        "#notes": [f"m {MARKUP}: note {MARKUP}"],
        "#filters": [f"m {MARKUP}", f"t {MARKUP}", f"s {MARKUP}"],
        "#fate-table": [f"bin {MARKUP}"],
        "#settings-table": [f"t {MARKUP}"],
        "#fact-list": [f"prompt {MARKUP}", f"gold {MARKUP}", f"prediction {MARKUP}"],
        "#run-page": [MARKUP, json.dumps(MARKUP)],
        "#run-choice": [f"t {MARKUP}"],
        "#skipped": [
            f"n {IN_A_NAME}: weights of the model are not finite ({MARKUP})",
            f"v {IN_A_NAME}",
            f"its format is {MARKUP}",
            f"k {IN_A_NAME}",
        ],
    }.items():
        said = " ".join(page.locator(place).text_content().split())
        for one in text:
            assert " ".join(one.split()) in said, (place, one)
    page.select_option("#fate-by", "relation")
    assert f"{MARKUP} r0" in page.locator("#fate-table").text_content()
    for chart in ("#drop-chart", "#settings-chart", "#fate-chart", "#layer-map"):
        assert "<img src=x onerror=window.ran=1><b>" in page.locator(chart).text_content(), chart
        assert page.locator(f"{chart} svg a").count() == 0


def test_what_is_written_beside_the_page_says_it_as_text(hostile, tmp_path, capsys):
    write_figures(hostile.folder, tmp_path)
    runs = hostile.scan()[0]
    sound = [run for run in runs if not run.void]
    show(runs, {run.id: sound[-1] for run in runs}, tmp_path)
    assert f"m {MARKUP}"[:20] in capsys.readouterr().out
    names = {path.name for path in tmp_path.iterdir()}
    assert {"findings.md", "fates.tex", "fates.csv"} <= names and any(name.endswith(".svg") for name in names)
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render((tmp_path / "findings.md").read_text())
    tree = ElementTree.fromstring(f"<x>{html}</x>")
    assert {element.tag for element in tree.iter()} <= {*("x", "h2", "p", "ul", "li", "code"), *TABLE}
    told = " ".join("".join(tree.itertext()).split())
    assert f"m {MARKUP}" in told and f"s {MARKUP}" in told and f"its format is {MARKUP}" in told
    for path in tmp_path.glob("*.svg"):
        tree = ElementTree.parse(path)
        kinds = {element.tag.rpartition("}")[2] for element in tree.iter()}
        assert not kinds & {"script", "a", "image", "foreignObject", "img"}, path
        assert not any(name.startswith("on") for element in tree.iter() for name in element.attrib)
    for path in tmp_path.glob("*.tex"):
        rows = [row for row in path.read_text().splitlines() if row.endswith("\\\\")]
        columns = {len(re.findall(r"(?<!\\)&", row)) for row in rows}
        assert len(columns) == 1, path
        commands = set(re.findall(r"\\[a-zA-Z]+", "\n".join(rows)))
        assert commands <= {rf"\text{name}" for name in LATEX_NAMES}, path
        assert not re.search(r"(?<!\\)[$%#_]", "\n".join(rows)), path


LATEX_NAMES = ("backslash", "asciitilde", "asciicircum", "less", "greater", "bar", "quotedbl")


TABLE = ("table", "thead", "tbody", "tr", "th", "td")
