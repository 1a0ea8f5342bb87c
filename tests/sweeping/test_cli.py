"""The command line: bad input is one line, exit status 2, and nothing half-written."""

from __future__ import annotations

import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from knowledge_compression.sweeping.cli import main, settled_by_classes


@pytest.fixture
def command(monkeypatch, tmp_path, capfd):
    """Run the command line in this process; gives (exit status, stderr lines that are ours)."""

    def run(*arguments: str) -> tuple[int, list[str]]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments, f"output.dir={tmp_path / 'outputs'}"])
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return status, [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["target=atn"], "did you mean att?"),
        (["model=bert_tny"], "bert_tiny"),
        (["sparcity=0.2"], "did you mean sparsity?"),
        (["compression.bist=3"], "compression.bist"),
        (["eval=[atls]"], "choose one of"),
        (["sparsity=1.5"], "less than 1"),
        (["--sparsity", "0.3"], "write settings as sparsity=VALUE, without dashes"),
        (["--run.plan=true"], "write settings as run.plan=VALUE"),
        (["sparsity", "=", "0.3"], "write sparsity=VALUE, without spaces"),
        (["+eval.lama.limit=3"], "eval.lama has settings (limit) but is not chosen"),
        (["device=quantum"], "device=quantum"),
        (["dtype=float12"], "float32"),
        (["scoring_dtype=float12"], "auto, bfloat16, float32"),
        (["model=bert_tiny", "target=cross_att"], "encoder_att, ff, transform, final"),
        (["model=local"], "model.path must be given"),
        (["recovery=adapter"], "recovery.path must be given"),
        (["model=local", "model.path=/nowhere"], "/nowhere does not exist"),
        (["model=local", "model.path=/"], "model.path=/ holds no config.json"),
        (["-m", "model=bert_tiny", "sparsity=1.5,2"], "[0, 1)"),
        (["-m", "sparsity=interval(0,1)"], "continuous"),
        (["seed=18446744073709551616"], "seed=18446744073709551616"),
        (["device=[cpu]"], "device=['cpu']"),
        (["dtype=[float32]"], "dtype=['float32']"),
        (["limit=true"], "limit=true"),
        (["run.force=maybe"], "run.force=maybe"),
        (["run.plan=7"], "run.plan=7"),
        (["run.rate=fast"], "run.rate=fast"),
        (["run.rate=nan"], "run.rate=nan"),
        (["+foo=3"], "foo is not used"),
        (["output.compressed_gb=-1"], "output.compressed_gb=-1"),
        (["output.compressed_gb=lots"], "output.compressed_gb=lots"),
        (["output.compressed_gb=nan"], "output.compressed_gb=nan"),
        (["model=local", "model.path=/a=b"], "is quoted"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command, tmp_path, arguments, said):
    status, errors = command(*arguments)
    assert status == 2
    assert errors and any(said in line for line in errors)
    assert not list((tmp_path / "outputs").rglob("*"))


def test_settings_inside_a_part_are_left_to_its_class():
    typed = ["-m", "recovery=idp,concat", "recovery.prompts=[1,2]", "target=att", "seed=0,1", "+recovery.roles=[ff]"]
    assert settled_by_classes(typed) == [*typed[:2], "++recovery.prompts=[1,2]", *typed[3:]]
    options = ["hydra.launcher.options={reservation: night}", "hydra.launcher.options.hold=true"]
    assert settled_by_classes(["hydra.launcher.gpus=0", *options]) == [
        "hydra.launcher.gpus=0",
        *(f"++{option}" for option in options),
    ]
