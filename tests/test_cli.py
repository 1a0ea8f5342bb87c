"""The command line: bad input is one line, exit status 2, and nothing half-written."""

from __future__ import annotations

import sys

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from knowledge_compression.sweeping.cli import main, with_their_files
from knowledge_compression.sweeping.combinations import combinations


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
        (["sparsity=1.5"], "[0, 1)"),
        (["+eval.lama.limit=3"], "eval.lama has settings (limit) but is not chosen"),
        (["device=quantum"], "device=quantum"),
        (["dtype=float12"], "float32"),
        (["scoring_dtype=float12"], "auto, bfloat16, float32"),
        (["model=bert_tiny", "target=cross_att"], "encoder_att, ff, transform, final"),
        (["model=local", "model.path=/nowhere"], "/nowhere"),
        (["-m", "model=bert_tiny", "sparsity=1.5,2"], "[0, 1)"),
        (["-m", "sparsity=interval(0,1)"], "continuous"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command, tmp_path, arguments, said):
    status, errors = command(*arguments)
    assert status == 2
    assert errors and any(said in line for line in errors)
    assert not list((tmp_path / "outputs").rglob("*"))


def test_settings_of_a_swept_group_wait_for_its_files():
    typed = ["-m", "recovery=idp,concat", "recovery.prompts=[1,2]", "target=att", "target.layers=all", "seed=0,1"]
    assert with_their_files(typed) == [*typed[:2], "recovery.prompts=[1,2],[1,2]", *typed[3:]]
    values = ["compression=rtn,gptq", "compression.bits=3,4", "compression.clip=mse", "+experiment=[a,b]", "a={"]
    assert with_their_files(values) == [*values[:2], "compression.clip=mse,mse", *values[3:]]
    preset = [
        "+experiment=[forgotten_or_displaced/table1_lora,forgotten_or_displaced/small_world]",
        "compression.bits=2",
    ]
    assert with_their_files(preset) == [preset[0], "compression.bits=2,2"]


@pytest.mark.parametrize("value", ["2", "null", "[1,2]", "mse", "'a b'"])
def test_a_setting_that_waits_is_one_value(value):
    waiting = with_their_files(["compression=rtn,gptq", f"compression.x={value}"])[1]
    jobs = combinations(OverridesParser.create().parse_overrides([waiting]))
    assert jobs == combinations(OverridesParser.create().parse_overrides([f"compression.x={value}"]))
