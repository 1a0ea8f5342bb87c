"""The page, opened from disk in a real headless browser."""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import json
import os
import re
from contextlib import redirect_stdout

import numpy as np
import polars as pl
import pytest

from helpers.browser import until
from helpers.stores import made_run
from knowledge_compression.analysis.page import render, write
from knowledge_compression.report import main
from knowledge_compression.results.store import RunStore
from knowledge_compression.take import main as take


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


@pytest.fixture(scope="module")
def page_file(store, tmp_path_factory):
    """The page over the store, written once."""
    page, said = tmp_path_factory.mktemp("report") / "report.html", io.StringIO()
    with redirect_stdout(said):
        main([str(store.folder), "-o", str(page)])
    assert "7 runs" in said.getvalue()
    return page


def test_the_command_writes_one_file_that_needs_no_network(page_file):
    html = page_file.read_text()
    assert 'src="http' not in html and "<link" not in html.split("<script>")[0]
    assert [path.name for path in page_file.parent.iterdir()] == ["report.html"]


def test_a_store_without_runs_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), "-o", str(tmp_path / "report.html")])
    assert end.value.code == 2 and not (tmp_path / "report.html").exists()
    assert capsys.readouterr().err.count("\n") == 1


def test_what_cannot_be_read_or_compared_is_named_and_counted_on_the_page(tmp_path, capsys):
    store = RunStore(tmp_path / "outputs")
    store.write(made_run([True, False], compression="none", id="dense000"))
    store.write(made_run([True, True], id="asked001", settings={"limit": 5}))
    store.write(made_run([True, True], id="broken00"))
    (store.runs_folder / "broken00" / "report.json").unlink()
    main([str(store.folder), "-o", str(tmp_path / "report.html"), "--figures", str(tmp_path / "figures")])
    assert "2 runs, 1 folders left out" in capsys.readouterr().out
    left_out = (tmp_path / "figures" / "findings.md").read_text().partition("## Left out")[2]
    assert "`broken00`: half-copied" in left_out and "`asked001`: no dense run" in left_out
    html = (tmp_path / "report.html").read_text()
    assert "half-copied: report.json is not there" in html
    assert "no dense run of m with the same atlas settings (limit=5)" in html
    assert "2 entries of the store cannot be read or compared." in html


def test_a_store_of_broken_folders_alone_is_one_line_that_names_one(tmp_path, capsys):
    store = RunStore(tmp_path / "outputs")
    store.write(made_run([True], compression="none", id="dense000"))
    (store.runs_folder / "dense000" / "items.parquet").unlink()
    with pytest.raises(SystemExit) as end:
        main([str(store.folder), "-o", str(tmp_path / "report.html")])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "dense000: half-copied: items.parquet is not there" in said and said.count("\n") == 1


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_one_line_and_nothing_is_left(store, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for arguments in (
        ["-o", str(tmp_path / "file" / "report.html")],
        ["--figures", str(tmp_path / "file" / "figures")],
    ):
        with pytest.raises(SystemExit) as end:
            main([str(store.folder), "-o", str(tmp_path / "report.html"), *arguments])
        assert end.value.code == 2 and "cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_a_link_and_a_pipe_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDWR)
    for name in ("link", "pipe"):
        write("the page", tmp_path / name)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "the page"
    assert (tmp_path / "pipe").is_fifo() and os.read(reader, 100) == b"the page"
    os.close(reader)


def facts_of(html: str) -> list[dict]:
    """What the page's fact explorer holds."""
    packed = re.search(r'id="fact-table">([^<]*)<', html)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


@pytest.mark.slow
def test_above_the_limit_the_explorer_holds_fewer_facts_and_says_of_how_many(monkeypatch):
    luck = np.random.default_rng(1)
    runs = [made_run(luck.random(3000) < 0.7, compression="none"), made_run(luck.random(3000) < 0.5)]
    for run in runs:  # numbers that do not compress
        run._items = run.items.with_columns(log_prob=pl.Series(luck.normal(size=3000)))
    whole = render(runs)
    assert [len(group["question"]) for group in facts_of(whole)] == [3000]
    limit = len(whole) - 20_000
    monkeypatch.setattr("knowledge_compression.analysis.page.LARGEST", limit)
    thinned = render(runs)
    (group,) = facts_of(thinned)
    assert len(thinned) <= limit
    assert group["of"] == 3000 and 300 < len(group["question"]) < 3000


@pytest.mark.slow
def test_in_a_browser_the_filters_change_the_chart_and_the_search_finds_a_fact(page_file, page_in_browser):
    page = page_in_browser(page_file)
    lines = page.locator("#drop-chart .scatterlayer .trace")
    before = lines.count()
    page.uncheck("input[data-facet=target][value=ff]")
    until(page, f"document.querySelectorAll('#drop-chart .scatterlayer .trace').length < {before}")
    page.fill("#fact-search", "q17")
    until(page, "document.querySelectorAll('#fact-list details.fact').length === 1")
    answers = page.locator("#fact-list .answer")
    assert answers.count() == 5  # of the dense model and the first four others, side by side
    known = np.random.default_rng(0).random(120)[17] < 0.8
    assert ("✓" if known else "✗") in answers.first.inner_text()
    page.uncheck("#fact-runs input >> nth=1")
    until(page, "document.querySelectorAll('#fact-list .answer').length === 4")
    page.focus("#fact-list details.fact summary")
    page.keyboard.press("Enter")
    page.wait_for_selector("#fact-list table")
    assert page.locator("#fact-list table tr").count() == 8  # a head and seven runs
    lost = (np.random.default_rng(0).random(120) < 0.8).sum() - (np.random.default_rng(0).random(120) < 0.5).sum()
    page.fill("#fact-search", "")
    assert page.locator("#fact-change").is_disabled()
    page.select_option("#fact-changed-in", "ff0.6")
    for kind, count in {"all flips": lost, "flips": lost, "lost": lost, "gained": 0, "other wrong answer": 0}.items():
        page.select_option("#fact-change", kind)
        until(page, "n => document.querySelector('#fact-count').innerText.startsWith(`${n} facts`)", int(count))
    page.check("#fact-runs label:has-text('ff') input >> nth=-1")
    page.select_option("#fact-change", "lost")
    until(page, "document.querySelectorAll('#fact-list .answer.changed').length > 0")
    assert page.locator("#fact-list .answer.changed b").first.inner_text() == "lost"
    page.select_option("#fact-changed-in", "")
    page.fill("#fact-search", "q17")
    until(page, "document.querySelectorAll('#fact-list details.fact').length === 1")
    page.click("#fact-list details.fact summary")
    page.wait_for_selector("#fact-list table")
    assert "flips" in page.locator("#overview-table thead").inner_text().lower()
    page.click("#fact-list button.run >> nth=1")
    assert "atlas.accuracy" in page.locator("#run-page").inner_text()
    only_on_screen = ["nav", "#filters", "#fact-runs", "#size-chart .modebar", "#fact-search", "#run-choice"]
    assert all(page.locator(part).is_visible() for part in only_on_screen)
    page.emulate_media(media="print")  # nothing to click, and nothing cut off by a box that scrolls
    assert not any(page.locator(part).is_visible() for part in only_on_screen)
    for part in ("#overview-table", "#fact-list"):
        assert page.locator(part).evaluate("e => e.scrollHeight <= e.clientHeight + 1"), part
    assert page.locator("#overview-table tbody tr").last.is_visible()


def _luminance(colour: str) -> float:
    """Relative luminance of ``rgb(...)``, as WCAG 2.1 defines it."""
    shares = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    dark, light = sorted([_luminance(one), _luminance(other)])
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_it_reads_well_at_every_width_and_printed(page_file, page_in_browser, scheme):
    page = page_in_browser(page_file, color_scheme=scheme)

    def colours(part, of="color"):
        found = page.locator(part).evaluate_all(f"all => all.map(e => getComputedStyle(e)['{of}'])")
        assert found, part
        return set(found)

    def is_legible():
        (ground,) = colours("body", "background-color")
        words = colours("body") | colours("#overview-table td") | colours(".chart .xtick text", "fill")
        assert all(_contrast(ground, colour) >= 4.5 for colour in words), (ground, words)
        return _luminance(ground)

    assert (is_legible() < 0.2) == (scheme == "dark")
    for width in (1280, 800, 360):
        page.set_viewport_size({"width": width, "height": 800})
        until(page, "document.querySelector('#size-chart .main-svg').clientWidth <= document.body.clientWidth")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for chart in page.locator(".chart:has(.legend)").all():
            bar, legend = (chart.locator(part).bounding_box() for part in (".modebar", ".legend"))
            beside = bar is None or bar["x"] >= legend["x"] + legend["width"]
            below_or_above = bar is None or not (
                legend["y"] - bar["height"] < bar["y"] < legend["y"] + legend["height"]
            )
            assert beside or below_or_above, (width, chart.get_attribute("id"))
            assert (bar is None) == (width < 480)  # a phone has no room for tools that want a pointer
    page.evaluate("dispatchEvent(new Event('beforeprint'))")  # as browsers do; playwright only switches the style sheet
    page.emulate_media(media="print", color_scheme=scheme)
    until(page, "getComputedStyle(document.querySelector('.chart .xtick text')).fill === 'rgb(27, 31, 36)'")
    assert is_legible() > 0.9  # ink on paper, whatever the screen


@pytest.mark.slow
def test_in_a_browser_fates_are_told_by_frequency_by_recovery_and_by_depth(tmp_path, page_in_browser):
    def told(run, ranks):
        run._items = run.items.with_columns(bin=pl.Series(["head", "tail"] * 30))
        rows = [{"suite": "lens", "task": f"r{i % 3}", "id": str(i), "depth_rank": ranks} for i in range(60)]
        run.report["eval"]["lens"] = {"of": "atlas"}
        run._items = pl.concat([run.items, pl.DataFrame(rows)], how="diagonal")
        return run

    luck = np.random.default_rng(2).random(60)
    runs = [told(made_run(luck < 0.9, compression="none"), [5, 1, 1, 1]), told(made_run(luck < 0.4), [5, 1, 1, 2])]
    for name, share in (("lora", 0.6), ("prompt", 0.5)):
        runs.append(told(made_run(luck < share, recovery=name), [5, 1, 1, 1]))
    (tmp_path / "report.html").write_text(render(runs))
    page = page_in_browser(tmp_path / "report.html", color_scheme="dark")
    assert page.locator("#fate-by").input_value() == "frequency"
    assert page.locator("#fate-table").inner_text().count("tail") == 1
    page.select_option("#fate-by", "relation")
    until(page, "document.querySelector('#fate-table').innerText.includes('r2')")
    assert page.locator("#depth-chart .scatterlayer .trace").count() == 2
    assert "within the last third" in page.locator("#depth-words").inner_text()
    assert "lora, prompt" in page.locator("#restored-table").inner_text()
    settings = page.locator("#settings-table")
    assert settings.locator("tbody tr").count() == 3
    assert "restored by weights" in settings.locator("tr").first.inner_text().lower()
    whole = settings.inner_text()
    page.select_option("#fate-facts", "tail")
    until(page, "text => document.querySelector('#settings-table').innerText !== text", whole)
    assert page.locator("#settings-chart .scatterlayer .trace").count() == 1  # one target


@pytest.mark.slow
def test_in_a_browser_runs_without_right_answers_are_told_all_the_same(tmp_path, page_in_browser):
    runs = [made_run(np.ones(3, bool), compression="none"), made_run(np.ones(3, bool), compression="gptq")]
    for run, loss in zip(runs, (3.0, 3.5), strict=True):
        run.config["eval"] = run.report["eval"] = {"perplexity": {}}
        run.metrics = {"perplexity.perplexity": float(np.exp(loss))}
        run._items = run.items.with_columns(correct=pl.lit(None, pl.Boolean), nll=loss, suite=pl.lit("perplexity"))
    (tmp_path / "report.html").write_text(render(runs))
    page = page_in_browser(tmp_path / "report.html")
    assert "perplexity 33.12" in page.locator("#overview-table").inner_text()
    assert not page.locator("#charts").is_visible() and not page.locator("#facts").is_visible()
    links = {link.get_attribute("href"): link.is_visible() for link in page.locator("nav a").all()}
    assert links["#overview"] and links["#findings"] and links["#run"]
    assert not any(links[name] for name in ("#charts", "#distance", "#calibration", "#fates-of-facts", "#facts"))


@pytest.mark.slow
def test_in_a_browser_the_layer_map_shows_an_encoder_beside_its_decoder(tmp_path, page_in_browser):
    """Their blocks have the same numbers and modules; the decoder's used to cover the encoder's."""
    run = made_run(np.ones(3, bool), compression="magnitude", id="pruned00")
    layers = [(f"{stack}.block.{i}.layer.0.SelfAttention.q", i) for stack in ("encoder", "decoder") for i in (0, 1)]
    run.report["compression"]["layers"] = [
        {"path": path, "parameters": 100, "removed": 10 * number + block}
        for number, (path, block) in enumerate(layers, 1)
    ]
    (tmp_path / "report.html").write_text(render([run]))
    page = page_in_browser(tmp_path / "report.html")
    until(page, "document.querySelector('#layer-map')?.data !== undefined")
    assert page.evaluate("document.querySelector('#layer-map').data[0].z") == [[10, 21, 30, 41]]
    shown = page.evaluate("document.querySelector('#layer-map').data[0].x")
    assert shown == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]


@pytest.mark.slow
def test_in_a_browser_alike_distances_and_long_names_leave_the_axes_their_numbers(tmp_path, page_in_browser):
    dense = made_run(np.ones(3, bool), compression="none")
    runs = [made_run(np.ones(3, bool), compression=f"a_file_with_a_rather_long_name_{i}" * 3) for i in range(2)]
    told = dict.fromkeys(("reverse_kl", "same_top", "gold_rms", "positions"), 1.0)
    for run, kl in zip(runs, (0.25, 0.27), strict=True):
        run.metrics |= {f"atlas.{name}": value for name, value in (told | {"kl": kl}).items()}
    (tmp_path / "report.html").write_text(render([dense, *runs]))
    page = page_in_browser(tmp_path / "report.html")
    assert page.locator("#distance-chart .xtick").count() > 1
    box, axis = page.locator("#settings-chart").bounding_box(), page.locator("#settings-chart .ytitle").bounding_box()
    assert box["y"] <= axis["y"] and axis["y"] + axis["height"] <= box["y"] + box["height"]
    assert page.locator(".chart:not([role=figure][aria-label]):visible").count() == 0


@pytest.mark.slow
def test_in_a_browser_drops_of_files_are_drawn_over_their_bits(tmp_path, page_in_browser):
    """Nothing was pruned and no number was typed, so over the sparsity all of them would lie on one line."""
    luck = np.random.default_rng(4).random(60)
    runs = [made_run(luck < 0.9, compression="none")]
    for name, width, share in (("a_gptq", 3, 0.5), ("b_gptq", 4, 0.7), ("c_float", None, 0.9)):
        runs.append(made_run(luck < share, compression=name, sparsity=0.0))
        runs[-1].report["compression"] = {"sparsity": 0.0, "bits": width}
    (tmp_path / "report.html").write_text(render(runs))
    page = page_in_browser(tmp_path / "report.html")
    assert page.locator("#drop-chart .xtitle").text_content() == "mean bits of a weight"
    places = page.evaluate("document.querySelector('#drop-chart').data.map(line => line.x[0])")
    assert sorted(places) == [3, 4, 32]


@pytest.mark.slow
def test_in_a_browser_a_hundred_thousand_items_can_be_searched(tmp_path, page_in_browser, monkeypatch):
    monkeypatch.setattr("knowledge_compression.resampling.RESAMPLES_OF_ONE_SEED", 99)  # the intervals are not looked at
    luck = np.random.default_rng(3).random(100_000)
    runs = [made_run(luck < 0.8, compression="none"), made_run(luck < 0.6, sparsity=0.4), made_run(luck < 0.7)]
    page_file = tmp_path / "report.html"
    page_file.write_text(render(runs))
    assert page_file.stat().st_size < 25_000_000
    page = page_in_browser(page_file)
    assert "100000 facts, the first 50 shown" in page.locator("#fact-count").inner_text()
    page.fill("#fact-search", "q99999")
    until(page, "document.querySelectorAll('#fact-list details.fact').length === 1")
    page.fill("#fact-search", "q9999")
    until(page, "document.querySelector('#fact-count').innerText.startsWith('11 facts')")
    page.uncheck("input[data-facet=compression][value=magnitude]")
    until(page, "document.querySelectorAll('#drop-chart .scatterlayer .trace').length === 0")


@pytest.mark.slow
def test_in_a_browser_the_pages_policy_lets_no_other_script_run(page_file, tmp_path, page_in_browser):
    added = "<script>window.ran=1</script><img src=x onerror=window.ran=1>"
    spoilt = tmp_path / "report.html"
    spoilt.write_text(page_file.read_text().replace("<header>", f"{added}<header>"))
    page = page_in_browser(spoilt, complains=True)
    page.evaluate("document.body.setAttribute('onclick', 'window.ran=1'); document.body.click()")
    assert page.evaluate("window.ran") is None and page.locator("#overview-table tr").count() == 8
    sent = "fetch('https://localhost:1/').then(() => 'sent', error => String(error))"
    assert "TypeError" in page.evaluate(sent)


def test_the_page_calls_runs_by_what_varies():
    runs = [made_run([True, False] * 4, compression="none", sparsity=0)]
    for bits, size, seed in itertools.product((2, 3), (32, 64), (0, 1)):
        run = made_run([True, False, False, False] * 2, compression="gptq", sparsity=0)
        run.config["compression"] = {"bits": bits, "group_size": size}
        run.config["seed"] = seed
        runs.append(run)
    packed = re.search(r'id="content">([^<]*)<', render(runs))[1]
    content = json.loads(gzip.decompress(base64.b64decode(packed)))
    told = {(run["label"], run["setting"], run["method"]) for run in content["runs"] if not run["dense"]}
    settings = [f"bits={bits} group_size={size}" for bits in (2, 3) for size in (32, 64)]
    assert told == {(f"{one} seed={seed}", one, one) for one in settings for seed in (0, 1)}
    assert [run["label"] for run in content["runs"] if run["dense"]] == ["dense seed=0"]
    assert content["varying"] == ["bits", "group_size"]
    order = list(dict.fromkeys(run["setting"] for run in content["runs"] if not run["dense"]))
    assert order == [f"bits={bits} group_size={size}" for bits in (3, 2) for size in (32, 64)]


@pytest.mark.slow
def test_in_a_browser_what_is_unknown_of_a_taken_run_is_left_blank(tmp_path, page_in_browser):
    rows = [
        f"{how},{i},{'a' if right else 'b'}" for how in ("full", "small") for i, right in enumerate((1, how == "full"))
    ]
    (tmp_path / "answers.csv").write_text("\n".join(["how,no,said", *rows]))
    (tmp_path / "take.yaml").write_text(
        "columns: {made: how, id: 'no', prediction: said}\nfixed: {model: m, gold: a, prompt: q}\n"
        "made: {full: {compression: none}, small: {compression: nf4, bits: 4}}\n"
    )
    take([str(tmp_path / "answers.csv"), "--as", str(tmp_path / "take.yaml"), "-o", str(tmp_path / "out")])
    main([str(tmp_path / "out"), "-o", str(tmp_path / "report.html")])
    page = page_in_browser(tmp_path / "report.html")
    cells = [page.locator(f"#overview-table tbody tr:nth-child({n}) td").all_inner_texts() for n in (1, 2)]
    assert [row[3:7] for row in cells] == [["", "", "", cells[0][6]], ["", "4", "", cells[1][6]]]
    assert cells[0][6].startswith("100.0 %") and cells[1][6].startswith("50.0 %")
    assert "taken from results that other tools made" in page.inner_text("#notes")
    page.locator("#overview-table button.run").nth(1).click()
