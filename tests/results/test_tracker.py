"""W&B: what was logged is on disk and whole, a failed run says so, and no server can stop or hold up a run."""

from __future__ import annotations

import json
import logging
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import wandb
from hydra.core.global_hydra import GlobalHydra
from wandb.proto.wandb_internal_pb2 import Record

from helpers.places import PARTS
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.suite import item_table
from knowledge_compression.results.store import Run
from knowledge_compression.results.wandb_tracker import WandbTracker, flat
from knowledge_compression.sweeping.cli import main

SETTINGS: dict[str, Any] = {
    "model": {"_target_": "x.Y", "name": "bert_tiny", "allow_pickle": False},
    "target": {"_target_": "x.T", "roles": ["encoder_att"]},
    "compression": {"_target_": "x.C", "sparsity": 0.4, "scope": "global"},
    "recovery": {"_target_": "x.R"},
    "eval": {"atlas": {"_target_": "x.A", "limit": 68}},
    "seed": 0,
    "choices": {"model": "bert_tiny", "target": "att", "compression": "magnitude", "recovery": "none"},
}


def result(items: int = 12) -> Run:
    rows = [
        {"suite": "atlas", "task": "capital", "id": f"capital/{i}", "prompt": "paris is the capital of [MASK] ."}
        | {"gold": "france", "prediction": "italy", "correct": i % 3 == 0, "log_prob": -0.5 * i, "rank": 2}
        for i in range(items)
    ]
    metrics = {"atlas.accuracy": 1 / 3, "atlas.majority": 0.1, "atlas.capital.accuracy": 1 / 3}
    report = {"compression": {"sparsity": 0.4, "bits": 32.0, "layers": [{"path": "a"}]}}
    return Run("0123456789abcdef", SETTINGS, metrics, report, {}, None, item_table(rows))


def records(file: Path) -> Iterator[Record]:
    """The records of a ``.wandb`` file: LevelDB's log format, checksums checked."""
    content, position, parts = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position < len(content):
        if (room := 32768 - position % 32768) < 7:  # too little left of the block for a header
            position += room
            continue
        checksum, length = (
            int.from_bytes(content[position : position + 4], "little"),
            int.from_bytes(content[position + 4 : position + 6], "little"),
        )
        kind, data = content[position + 6], content[position + 7 : position + 7 + length]
        assert zlib.crc32(data, zlib.crc32(bytes([kind]))) == checksum
        position += 7 + length
        parts += data
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def offline_record(folder: Path) -> tuple[list[Record], Path]:
    wandb.teardown()  # its own process writes; at its end all is on disk
    (place,) = folder.glob("wandb/offline-run-*")
    (file,) = place.glob("*.wandb")
    return list(records(file)), place


def summary_of(found: list[Record]) -> dict[str, Any]:
    return {
        item.key or ":".join(item.nested_key): json.loads(item.value_json)
        for record in found
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }


def history_of(found: list[Record]) -> dict[str, Any]:
    return {
        item.key or ":".join(item.nested_key): json.loads(item.value_json)
        for record in found
        if record.WhichOneof("record_type") == "history"
        for item in record.history.item
    }


def table_of(found: list[Record], place: Path) -> list[dict[str, Any]]:
    table = json.loads((place / "files" / history_of(found)["items:path"]).read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    wandb.teardown()  # its settings are those of the process
    yield
    wandb.teardown()


@pytest.mark.slow
def test_the_compressed_model_is_an_artifact_on_request(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    told = {}
    for wanted in (True, False):
        folder = tmp_path / str(wanted)
        tracker = WandbTracker(mode="offline", dir=str(folder), artifact=wanted, seconds=300)
        with tracker.track("0123456789abcdef", SETTINGS) as tracked:
            tracked.finish_with(result(), model)
        kinds = [
            record.request.log_artifact.artifact for record in offline_record(folder)[0] if record.HasField("request")
        ]
        kinds += [record.artifact for record in offline_record(folder)[0] if record.HasField("artifact")]
        told[wanted] = [(a.type, a.name, [e.path for e in a.manifest.contents]) for a in kinds if a.type == "model"]
    assert told[False] == []
    assert told[True] and told[True][0][:2] == ("model", "compressed-0123456789abcdef")
    assert (model / "model.safetensors").read_bytes() == b"weights"


def test_the_offline_record_holds_what_was_logged(tmp_path: Path) -> None:
    tracker = WandbTracker(mode="offline", dir=str(tmp_path), group="2026-11-22", tags=["mine"], items=5, seconds=300)
    run = result()
    with tracker.track(run.id, SETTINGS) as tracked:
        tracked.log({"loss": 2.5}, step=1)
        tracked.finish_with(run)
    found, place = offline_record(tmp_path)
    (started,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
    config = {update.key: json.loads(update.value_json) for update in started.config.update}
    assert (started.run_id, started.run_group, started.display_name) == (
        run.id,
        "2026-11-22",
        "bert_tiny att magnitude",
    )
    assert {"mine", "bert_tiny", "att", "magnitude", "atlas"} <= set(started.tags)
    assert config["compression_sparsity"] == 0.4 and config["eval_atlas_limit"] == 68
    assert config["target"] == "att" and config["model"] == "bert_tiny"
    assert not any(key.endswith("_target_") for key in config)
    summary = summary_of(found)
    assert summary["atlas/accuracy"] == pytest.approx(1 / 3) and summary["compression/sparsity"] == 0.4
    assert summary["items_in_table"] == 4 and summary["items_in_all"] == 12
    history = history_of(found)
    assert history["loss"] == 2.5
    table = json.loads((place / "files" / history["items:path"]).read_text())
    assert table["columns"][:4] == ["suite", "task", "id", "prompt"]
    assert [row[2] for row in table["data"]] == ["capital/0", "capital/3", "capital/6", "capital/9"]
    assert (place / "files" / history["figures/atlas:path"]).read_bytes().startswith(b"\x89PNG")
    (end,) = (record.exit for record in found if record.WhichOneof("record_type") == "exit")
    assert end.exit_code == 0


def shown(run: Run, folder: Path) -> tuple[list[Record], Path]:
    tracker = WandbTracker(mode="offline", dir=str(folder), seconds=300)
    with tracker.track(run.id, SETTINGS) as tracked:
        tracked.finish_with(run)
    return offline_record(folder)


def test_tasks_at_nought_and_a_hundred_percent_are_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of 7, the floats of Wilson's formula begin above 0 and end below 1, and no figure takes a negative bar."""
    run = result()
    answers = [("none", i, False) for i in range(7)] + [("all", i, True) for i in range(7)]
    rows = [{"suite": "atlas", "task": t, "id": f"{t}/{i}", "correct": right} for t, i, right in answers]
    run._items = item_table(rows)
    found, place = shown(run, tmp_path)
    assert "incomplete on W&B" not in caplog.text and "did not work" not in caplog.text
    assert summary_of(found)["atlas/accuracy"] == pytest.approx(1 / 3)
    assert len(table_of(found, place)) == 14
    assert (place / "files" / history_of(found)["figures/atlas:path"]).read_bytes().startswith(b"\x89PNG")


def test_lists_are_whole_in_the_table_and_a_figure_that_is_no_number_does_not_vanish(tmp_path: Path) -> None:
    run = result()
    run.metrics |= {"atlas.spread": float("nan"), "atlas.perplexity": float("inf")}
    chosen = [[i, *range(40)] for i in range(12)]
    run._items = run.items.with_columns(
        chosen_prompts=pl.Series(chosen), told=pl.Series([{"é": i, "of": [0.5]} for i in range(12)])
    )
    found, place = shown(run, tmp_path)
    summary, rows = summary_of(found), table_of(found, place)
    assert (summary["atlas/spread"], summary["atlas/perplexity"]) == ("NaN", "Infinity")
    assert [json.loads(row["chosen_prompts"]) for row in rows] == chosen
    assert [json.loads(row["told"]) for row in rows] == [{"é": i, "of": [0.5]} for i in range(12)]


def test_markup_is_text_in_the_table_and_the_figure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    markup = """<script>window.ran=1</script><img src=x onerror=window.ran=1>$x^{${{7*7}}[x](y)"""
    run = result()
    run._items = run.items.with_columns(pl.lit(markup).alias(name) for name in ("task", "prompt", "gold", "prediction"))
    found, place = shown(run, tmp_path)
    assert {row["prompt"] for row in table_of(found, place)} == {markup}  # a string, which W&B shows as one
    assert (place / "files" / history_of(found)["figures/atlas:path"]).read_bytes().startswith(b"\x89PNG")
    assert "W&B lacks" not in caplog.text  # no formula is read from it


def test_a_part_that_cannot_be_shown_is_named_and_the_others_are_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*_: Any) -> None:
        raise ValueError("no ink left")

    monkeypatch.setattr("knowledge_compression.results.drawing.task_figure", odd)
    found, place = shown(result(), tmp_path)
    assert summary_of(found)["atlas/accuracy"] == pytest.approx(1 / 3) and len(table_of(found, place)) == 12
    assert (
        "run 0123456789abcdef is incomplete on W&B, missing figure of atlas;" in caplog.text
        and "no ink left" in caplog.text
    )
    monkeypatch.setattr("knowledge_compression.results.wandb_tracker._plain", odd)
    caplog.clear()
    found, _ = shown(result(), tmp_path / "worse")
    assert summary_of(found)["atlas/accuracy"] == pytest.approx(1 / 3)  # figures and items come after the metrics
    assert "run 0123456789abcdef is incomplete on W&B, missing items, figure of atlas;" in caplog.text


def test_a_run_that_raises_is_closed_as_failed(tmp_path: Path) -> None:
    tracker = WandbTracker(mode="offline", dir=str(tmp_path), seconds=300)
    with pytest.raises(ZeroDivisionError), tracker.track("failing", SETTINGS):
        _ = 1 / 0
    found, _ = offline_record(tmp_path)
    assert [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"] == [1]
    assert wandb.run is None


def test_no_login_is_one_line_and_no_prompt() -> None:
    with pytest.raises(BadInput, match="tracker=wandb_offline"):
        WandbTracker()
    with pytest.raises(BadInput, match="online, offline"):
        WandbTracker(mode="onlin")


@pytest.mark.slow
@pytest.mark.parametrize("server", ["refuses", "is silent"])
def test_a_server_that_does_not_answer_is_done_without(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if server == "is silent":
            listener.listen()  # connections are taken and never answered
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        seconds = 12.0
        start = time.perf_counter()
        with (
            caplog.at_level(logging.WARNING),
            WandbTracker(dir=str(tmp_path), seconds=seconds).track("r", SETTINGS) as t,
        ):
            t.finish_with(result())
        assert time.perf_counter() - start < seconds
    assert "wandb sync" in caplog.text
    found, _ = offline_record(tmp_path)
    assert any(record.WhichOneof("record_type") == "exit" for record in found)


def test_what_goes_wrong_while_showing_stays_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with WandbTracker(mode="offline", dir=str(tmp_path), seconds=300).track("odd", SETTINGS) as tracked:
        tracked._run.log = lambda *args, **named: time.sleep(600)  # a disk that hangs
        tracked._left = 1.0
        start = time.perf_counter()
        tracked.log({"loss": 1.0})
        tracked.log({"loss": 0.5})
        tracked.finish_with(result())
        assert time.perf_counter() - start < 24
    assert caplog.text.count("did not work") == 1
    assert (
        "run 0123456789abcdef is incomplete on W&B, missing metrics of a step, metrics, items, figure of atlas;"
        in caplog.text
    )


def test_secrets_are_not_in_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_HUB_TOKEN", "hf_secret")
    config = flat(SETTINGS | {"model": {"path": "hf_secret", "api_key": "x", "hub_token": "y", "tokens": 7}})
    assert "hf_secret" not in map(str, config.values()) and not {"model_api_key", "model_hub_token"} & set(config)
    assert config["model_tokens"] == 7


@pytest.mark.slow
def test_runs_are_called_by_what_varies_in_their_sweep(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {}
    for swept in ("compression.group_size=8,16", "compression.bits=2"):
        GlobalHydra.instance().clear()
        outputs = tmp_path / swept
        where = [f"output.dir='{outputs}'", f"hydra.searchpath=[file://{PARTS}/conf]", "tracker.seconds=300"]
        chosen = ["model=local", f"model.path={tiny_folder}", "compression=rtn", "eval=[probe]", "device=cpu"]
        more = ["-m", "seed=0,1"] if "," in swept else []
        monkeypatch.setattr("sys.argv", ["run.py", *more, swept, *chosen, "tracker=wandb_offline", *where])
        try:
            main()
        except SystemExit as end:
            assert end.code == 0
        wandb.teardown()
        files = outputs.glob("wandb/offline-run-*/*.wandb")
        started = [record.run for file in files for record in records(file) if record.HasField("run")]
        told[swept] = {one.display_name for one in started}
    alone = {"local att rtn bits=2", "local dense"}
    assert told == {
        "compression.group_size=8,16": {"dense", "group_size=8", "group_size=16"},
        "compression.bits=2": alone,
    }
