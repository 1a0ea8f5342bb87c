"""The examples of docs/extending.md, written to a user's own folder and run as they stand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from transformers import AutoModelForCausalLM

from helpers.networks import build_network, make_tokenizer
from helpers.places import ROOT
from knowledge_compression.analysis.ledger import restores_by
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model
from knowledge_compression.models.families import EXCEPTIONS, EXPERTS
from knowledge_compression.models.targets import linear_layers
from knowledge_compression.results.store import RunStore
from knowledge_compression.sweeping.cli import main

GUIDE = (ROOT / "docs" / "extending.md").read_text()
FILES = re.findall(r"^`([\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)^```", GUIDE, flags=re.S | re.M)


@pytest.fixture
def users_folder(tmp_path, monkeypatch):
    """The guide's files where a user would have them; nothing of this project is edited."""
    for name, content in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.startswith("my_package")]:  # of an earlier user
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def run(folder: Path, monkeypatch, *overrides: str):
    GlobalHydra.instance().clear()
    arguments = ["run.py", "--config-dir", str(folder / "my_conf"), *overrides, f"output.dir={folder / 'outputs'}"]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    return list(RunStore(folder / "outputs"))


def test_every_example_is_short():
    assert len(FILES) == 12
    assert all(content.count("\n") < 40 for _, content in FILES)


@pytest.mark.slow
def test_a_method_a_recovery_and_a_suite_of_ones_own(users_folder, monkeypatch):
    overrides = ("compression=keep_signs", "recovery=rescale", "eval=[days]", "target=att")
    runs = run(users_folder, monkeypatch, *overrides)
    dense, compressed = sorted(runs, key=lambda run: run.config["choices"]["compression"] != "none")
    assert compressed.report["compression"]["method"] == "keep_signs"
    assert compressed.report["compression"]["bits"] == 1.0
    assert compressed.report["recovery"]["strategy"] == "rescale"
    assert restores_by(compressed) == compressed.report["recovery"]["restores_by"] == "weights"
    assert dense.items["task"].to_list() == ["days"] * 7
    assert dense.metrics["days.accuracy"] >= compressed.metrics["days.accuracy"]


def test_a_misspelt_method_of_ones_own_is_found_and_a_package_out_of_reach_is_named(users_folder, monkeypatch, capsys):
    with pytest.raises(SystemExit) as refusal:
        run(users_folder, monkeypatch, "compression=keep_sign")
    said = capsys.readouterr().err
    assert refusal.value.code == 2 and "(did you mean keep_signs?)" in said and " magnitude, " in said
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(users_folder)])
    with pytest.raises(SystemExit) as refusal:
        run(users_folder, monkeypatch, "compression=keep_signs")
    said = capsys.readouterr().err
    assert refusal.value.code == 2 and said.count("\n") == 1
    assert "put the folder that holds my_package on PYTHONPATH, or install it" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("RestoresBy.WEIGHTS", "None"), "Rescale does not say how it restores .*RestoresBy.REDIRECTION"),
        (("RestoresBy.WEIGHTS", "'weights'"), "Rescale does not say how it restores"),
        (("class Rescale(Recovery)", "class Rescale"), "Rescale is not a recovery; derive from .*base.Recovery"),
    ],
)
def test_a_recovery_has_to_say_how_it_restores(users_folder, monkeypatch, capsys, change, says):
    path = users_folder / "my_package" / "rescale.py"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(SystemExit) as refusal:
        run(users_folder, monkeypatch, "recovery=rescale", "compression=none", "model=bert_tiny")
    assert refusal.value.code == 2
    said = capsys.readouterr().err.strip()
    assert re.search(says, said) and "\n" not in said


@pytest.mark.slow
def test_a_corpus_of_ones_own_calibrates_a_method_of_ones_own(users_folder, monkeypatch):
    runs = run(users_folder, monkeypatch, "compression=quiet_inputs", "corpus=counting", "eval=[days]", "target=att")
    (compressed,) = (run for run in runs if run.report["compression"].get("calibration"))
    assert compressed.report["compression"]["method"] == "quiet_inputs"
    assert compressed.report["compression"]["sparsity"] == pytest.approx(0.1, abs=0.01)


@pytest.mark.slow
def test_a_method_of_ones_own_removes_the_smallest_experts(users_folder, monkeypatch, capsys):
    network = build_network("mixtral")
    layers = [layer for layer in linear_layers(Model(network, None, "m")) if layer.role == EXPERTS]
    for layer in layers:  # one in each block is small
        layer.weight.mul_(0.1 if layer.expert_number == 3 - layer.block else 1.0)
    network.save_pretrained(users_folder / "mixture")
    make_tokenizer().save_pretrained(users_folder / "mixture")
    settings = ["compression=small_experts", "model=local", f"model.path={users_folder / 'mixture'}", "eval=[days]"]
    runs = run(users_folder, monkeypatch, "target=experts", "output.save_model=true", *settings)
    (compressed,) = (run for run in runs if run.report["compression"].get("method") == "small_experts")
    saved = Model(AutoModelForCausalLM.from_pretrained(compressed.folder / "model"), None, "m")
    zero = {(layer.block, layer.expert_number) for layer in linear_layers(saved) if not layer.weight.any()}
    assert zero == {(0, 3), (1, 2)} and compressed.report["compression"]["sparsity"] == 0.25
    with pytest.raises(SystemExit):
        run(users_folder, monkeypatch, "target=all", *settings)
    assert "takes experts alone: target=experts" in capsys.readouterr().err


def test_a_family_of_ones_own(monkeypatch):
    import torch
    from transformers import StableLmConfig, StableLmForCausalLM

    from knowledge_compression.models import Target

    example = GUIDE.split("## A model family")[1].split("```python\n")[1].split("```")[0]
    monkeypatch.setattr(sys.modules["knowledge_compression.models.families"], "EXCEPTIONS", dict(EXCEPTIONS))
    config = StableLmConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.device("meta"):
        networks = [StableLmForCausalLM(config) for _ in range(2)]
        for network in networks:
            for block in network.model.layers:
                block.shortcut, block.scales = torch.nn.Linear(32, 32), torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(BadInput, match=r"model\.layers\.\*\.scales, model\.layers\.\*\.shortcut"):
        Target("ff", ["ff"]).select(Model(networks[0], None, "stable"))
    exec(example, {})  # what a reader would paste into a module of theirs
    targets = Target("ff", ["ff"]).select(Model(networks[1], None, "stable"))
    assert len(targets) == 8
    assert [part.parameters for part in targets.left_out if part.reason == "learned scales"] == [8]
