"""A sweep: what cannot be is said before the first run starts, what is there is not done again."""

from __future__ import annotations

import sys
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hydra.core.global_hydra import GlobalHydra

from helpers.places import PARTS
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.results.store import RunStore
from knowledge_compression.sweeping import sweeper as sweep
from knowledge_compression.sweeping.cli import main
from knowledge_compression.sweeping.plan import Outcome, read_plan

pytestmark = pytest.mark.slow  # every test is a command line of its own


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> Any:
    """``command("-m", ...)`` runs the command line on the tiny model; gives the exit status and what it said."""
    (tmp_path / "mishaps").mkdir()
    monkeypatch.setenv("MISHAPS", str(tmp_path / "mishaps"))
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))

    def run(*arguments: str) -> tuple[int, str]:
        GlobalHydra.instance().clear()
        given = ["model=local", f"model.path={tiny_folder}", "device=cpu"]
        for default in ("compression=stumbling", "eval=[probe]"):
            group = default.partition("=")[0]
            given += [] if any(one.startswith(f"{group}=") for one in arguments) else [default]
        given += [f"output.dir={tmp_path / 'outputs'}", f"hydra.searchpath=[file://{PARTS}/conf]"]
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments, *given])
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        said = capfd.readouterr()
        return status, said.err + said.out

    return run


def way(tmp_path: Path) -> list[str]:
    log = tmp_path / "mishaps" / "log"
    return log.read_text().split() if log.is_file() else []


def test_contradictions_are_reported_first_and_the_rest_is_run(command: Any, tmp_path: Path) -> None:
    status, said = command("-m", "target=all,cross_att,self_att,decoder_att", "sparsity=0.2")
    assert status == 2
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in errors] == ["target=cross_att", "target=decoder_att"]
    assert all("it has encoder_att" in line for line in errors)
    assert "running the other 2 of 4 combinations" in said
    assert len(list(RunStore(tmp_path / "outputs"))) == 3  # two runs and their baseline
    assert way(tmp_path).count("probe") == 3


def test_a_sweep_of_nothing_but_bad_input_leaves_nothing(command: Any, tmp_path: Path) -> None:
    status, said = command("-m", "target=cross_att,decoder_att")
    assert status == 2 and said.count("error: ") == 2
    assert not (tmp_path / "outputs").exists()
    for wrong, why in (("run.detach=true", "hydra/launcher=slurm"), ("hydra/launcher=slrm", "slrm")):
        status, said = command("-m", "target=all,ff", wrong)
        assert status == 2 and why in said
        assert not (tmp_path / "outputs").exists()


def test_sweeps_that_start_in_one_second_do_not_share_a_folder(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        ticks = count()

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 1, 2, 3, 4, 5, next(cls.ticks), tz)

    monkeypatch.setattr("hydra.core.utils.datetime", Clock)
    for sparsity in ("0.2,0.3", "0.4,0.5"):
        assert command("-m", f"sparsity={sparsity}")[0] == 0
    folders = sorted((tmp_path / "outputs" / "sweeps").iterdir())
    assert [len(read_plan(folder)[0]) for folder in folders] == [2, 2]
    assert all(folder.name.startswith("2026-01-02_03-04-05.") for folder in folders)


def test_outputs_that_cannot_be_written_are_one_line(command: Any, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file")
    status, said = command("-m", "sparsity=0.2,0.3")
    assert status == 2
    assert [line for line in said.splitlines() if "cannot be written" in line]
    status, said = command("sparsity=0.2")
    assert status == 2
    assert sum("cannot be written" in line for line in said.splitlines()) == 1


def test_a_disk_that_is_full_at_the_end_of_a_run_does_not_end_the_sweep(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(path: Path, *arguments: Any, **options: Any) -> int:
        if "outcome" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    status, said = command("-m", "target=all", "sparsity=0.2,0.3")
    assert status == 0 and "Traceback" not in said
    assert said.count("outcome.json cannot be written (No space left on device)") == 2
    assert len(list(RunStore(tmp_path / "outputs"))) == 3

    def nothing(path: Path, *_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("knowledge_compression.results.summary._write", nothing)
    status, said = command("-m", "target=all", "sparsity=0.2,0.4")
    assert status == 2 and "Traceback" not in said and "error: " in said


def test_a_run_that_raises_is_named_and_the_sweep_goes_on(command: Any, tmp_path: Path) -> None:
    (tmp_path / "mishaps" / "compression-0.3").write_text("bad luck")
    status, said = command("-m", "target=all", "sparsity=0.2,0.3,0.4")
    assert status == 1
    assert "failed: sparsity=0.3: RuntimeError: bad luck (log: " in said
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    found = [Outcome.read(folder / str(number)) for number in range(3)]
    assert [outcome.status for outcome in found if outcome] == ["done", "failed", "done"]
    assert found[1] is not None and "bad luck" in Path(found[1].log).read_text()
    status, _ = command("-m", "target=all", "sparsity=0.2,0.3,0.4")  # the same again does what is missing
    assert status == 0
    counts = [way(tmp_path).count(f"compression-0.{i}") for i in (2, 3, 4)]
    assert counts == [1, 2, 1] and way(tmp_path).count("probe") == 4
    status, _ = command("-m", "target=all", "sparsity=0.2", "run.force=true")
    assert status == 0 and way(tmp_path).count("compression-0.2") == 2
    assert way(tmp_path).count("probe") == 5  # the baseline is not redone


def test_a_run_that_its_network_does_not_allow_counts_as_not_done(command: Any) -> None:
    status, said = command("-m", "target=all", "compression=none,rotate")  # BERT's norms cannot be rotated
    assert status == 2
    assert "1 of 2 runs failed:" in said and "bad input: compression=rotate: " in said
    assert "1 runs done, 1 failed" in said


def test_a_damaged_run_is_named_and_done_again(command: Any, tmp_path: Path) -> None:
    given = ["target=all", "sparsity=0.2,0.3"]
    assert command("-m", *given)[0] == 0
    store = RunStore(tmp_path / "outputs")
    (one,) = (run for run in store if run.config["compression"].get("sparsity") == 0.2)
    assert one.folder is not None
    (one.folder / "metrics.json").write_text('{"probe.accuracy": "high"}')
    status, said = command("-m", *given)
    assert status == 0 and f"{one.id} is left out: damaged: metrics.json" in said and "2 runs done, 0 failed" in said
    outputs = tmp_path / "outputs"
    last = said.strip().splitlines()[-1]  # what to type next
    assert last.endswith(f"next: kc report {outputs} -o report.html, or kc advise {outputs} --keep 95%")
    again = store.find(one.id)
    assert again is not None and again.metrics == one.metrics
    (one.folder / "items.parquet").write_bytes(b"PAR1 PAR1")
    status, said = command("target=all", "sparsity=0.2")
    assert status == 0 and "damaged: items.parquet" in said and store.find(one.id) is not None
    assert way(tmp_path).count("compression-0.2") == 1 and way(tmp_path).count("probe") == 5


def test_a_run_that_fails_is_tried_again(command: Any, tmp_path: Path) -> None:
    (tmp_path / "mishaps" / "probe").write_text("bad luck")
    status, said = command("-m", "target=all", "sparsity=0.2", "run.retries=1")
    assert status == 0 and "retrying" in said
    assert way(tmp_path).count("compression-0.2") == 1  # the compressed model is kept
    assert way(tmp_path).count("probe") == 3


def test_a_sweep_over_evaluations_compresses_once(command: Any, tmp_path: Path) -> None:
    status, _ = command("-m", "target=all", "sparsity=0.2", "eval=[probe],[second]")
    assert status == 0
    assert way(tmp_path).count("compression-0.2") == 1
    runs = [run for run in RunStore(tmp_path / "outputs") if run.config["choices"]["compression"] != "none"]
    assert sorted(run.report["compression"]["found"] for run in runs) == [False, True]
    assert len({run.metrics.get("probe.log_prob", run.metrics.get("second.log_prob")) for run in runs}) == 1


def test_a_large_sweep_with_nothing_to_do_draws_no_table(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["-m", "target=all", "sparsity=0.2,0.3"]
    assert "What compression did" in command(*given)[1]
    monkeypatch.setattr(sweep, "_SHOWN", 2)
    assert "What compression did" in command(*given)[1]
    monkeypatch.setattr(sweep, "_SHOWN", 1)
    status, said = command(*given)
    assert status == 0 and "kc report" in said and "What compression did" not in said
    assert "What compression did" in command(*given, "target=all,ff")[1]  # here is something to do
    assert way(tmp_path).count("probe") == 5


def test_a_cache_that_cannot_be_written_is_one_line(command: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    for how in (["-m", "sparsity=0.2,0.3"], ["sparsity=0.2"]):
        status, said = command(*how)
        assert status == 2
        errors = [line for line in said.splitlines() if "error" in line]
        assert len(errors) == 1 and "KC_CACHE_DIR" in errors[0]
        assert not (tmp_path / "outputs").exists()


def test_a_plan_from_the_command_line(command: Any, tmp_path: Path) -> None:
    status, said = command("-m", "target=all,cross_att", "sparsity=0.2", "run.plan=true", "run.rate=1e9")
    assert status == 2  # of the one that cannot be
    assert "it has encoder_att" in said and "nothing was started" in said and "2 runs to do" in said
    status, said = command("target=all", "sparsity=0.2", "run.plan=true")
    assert status == 0 and "2 runs to do" in said
    assert not (tmp_path / "outputs").exists()


def test_what_a_sweep_keeps_holds_no_secret(command: Any, tmp_path: Path) -> None:
    status, _ = command("-m", "target=all", "sparsity=0.2,0.3", "+hydra.job.env_set.HUB_TOKEN=opensesame")
    assert status == 0
    kept = [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]
    assert {"multirun.yaml", "plan.json", "config.yaml"} <= {path.name for path in kept}
    assert not [path for path in kept if b"opensesame" in path.read_bytes()]


def test_rows_that_differ_in_settings_alone_are_told_apart_and_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Eight combinations of deterministic rounding are four runs and one baseline, whatever the seed."""
    made: list[tuple[int, int | None]] = []
    shrink = Rtn.shrink
    first = {}

    def counted(self: Rtn, layer: Any) -> Any:
        first.setdefault(self, layer.path)
        if layer.path == first[self]:
            made.append((self.bits, self.group_size))
        return shrink(self, layer)

    monkeypatch.setattr(Rtn, "shrink", counted)
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    GlobalHydra.instance().clear()
    swept = ["compression=rtn", "compression.group_size=32,64", "compression.bits=2,4", "seed=0,1"]
    given = ["-m", "model=bert_tiny", *swept, "limit=20", "device=cpu", f"output.dir={tmp_path / 'outputs'}"]
    monkeypatch.setattr(sys, "argv", ["run.py", *given])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    said = capfd.readouterr()
    assert "8 combinations are 4 runs: seed has no effect in some of them" in said.out + said.err
    assert sorted(made) == [(2, 32), (2, 64), (4, 32), (4, 64)]
    assert len(list(RunStore(tmp_path / "outputs"))) == 5
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    table = pl.read_csv(folder / "table_by_bits_group_size.csv")
    assert table.columns[:3] == ["asked_bits", "asked_group_size", "suite"]  # what differs, and nothing else
    told = {(row["asked_group_size"], row["asked_bits"]) for row in table.iter_rows(named=True)}
    assert told == {(None, None), (32, 2), (32, 4), (64, 2), (64, 4)} and table.height == 5
    assert {path.name for path in folder.iterdir()} >= {"drop_by_bits_group_size.png", "plan.json"}
