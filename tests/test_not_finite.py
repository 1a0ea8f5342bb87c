"""Answers that are not finite: counted, without figures, marked, and left out of whatever is concluded."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from helpers.networks import build_network
from helpers.stores import bits, made_run
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.commands import main
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.calibration import Questions, answers_by_task
from knowledge_compression.evaluation.cloze import MASK, Cloze
from knowledge_compression.evaluation.harness import Harness
from knowledge_compression.evaluation.perplexity import Perplexity
from knowledge_compression.evaluation.probe import Probe
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.suite import Evaluation, ask, item_table
from knowledge_compression.results.store import RunStore
from knowledge_compression.results.summary import drop_rows, show
from knowledge_compression.results.wandb_tracker import _summary
from trials.materials import prepare


class Clozes:
    """Three facts."""

    def __init__(self, candidates):
        self.probe = Probe(candidates)

    def evaluate(self, scorer):
        golds = {"paris": "france", "rome": "italy", "berlin": "the red moon"}
        clozes = [Cloze("in", name, name, name, gold, f"{name} is in {MASK} .", "0") for name, gold in golds.items()]
        return self.probe.ask("clozes", scorer, Questions(clozes, answers_by_task(clozes)))


@pytest.mark.parametrize("candidates", ["typed", "full"])
@pytest.mark.parametrize("architecture", ["bert", "t5", "llama"])
def test_answers_that_are_not_finite_give_no_accuracy(tiny_model, architecture, candidates):
    model = tiny_model(architecture)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.view(-1)[0] = math.nan
    found = ask(Clozes(candidates), Scorer(model))
    assert found.not_finite == found.items.height > 0
    assert found.metrics == {"items": found.items.height, "not_finite": found.not_finite}
    assert found.items["correct"].null_count() == found.items["rank"].null_count() == found.items.height
    sound = ask(Clozes(candidates), Scorer(tiny_model(architecture)))
    assert sound.not_finite == 0 and {"accuracy", "mrr"} <= sound.metrics.keys()


@pytest.mark.parametrize("task", ["boolq", "winogrande", "lambada_openai", "triviaqa"])
def test_tasks_without_finite_answers_give_no_accuracy(tiny_model, tasks_dir, task):
    model = tiny_model("llama")
    suite = Harness([task, "piqa"], data_dir=str(tasks_dir))
    parts = suite.parts()
    sound = ask(parts["piqa"], Scorer(model))
    with torch.no_grad():
        model.network.model.norm.weight[0] = math.nan
    broken = ask(parts[task], Scorer(model))
    assert broken.not_finite == broken.items.height and not any("acc" in name for name in broken.metrics)
    joined = suite.joined({task: broken, "piqa": sound})
    assert joined.not_finite == broken.not_finite
    assert "accuracy" not in joined.metrics and "piqa.acc" in joined.metrics


@pytest.mark.parametrize(("nll", "perplexity"), [(800.0, None), (3.0, math.exp(3))])
def test_a_loss_whose_perplexity_is_no_float(tiny_model, monkeypatch, tmp_path, nll, perplexity):
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.raw.txt").write_text("the dog is a cat . " * 20)
    suite = Perplexity(window=8, limit=3, data_dir=str(tmp_path))
    scored = "knowledge_compression.evaluation.perplexity._continuations"
    monkeypatch.setattr(scored, lambda *_: [(-7 * nll, 7)] * 3)
    found = ask(suite, Scorer(tiny_model("llama")))
    assert found.metrics["nats_per_token"] == pytest.approx(nll)
    assert found.metrics.get("perplexity") == (perplexity and pytest.approx(perplexity))
    assert bool(found.not_finite) is (perplexity is None)
    json.dumps(found.metrics, allow_nan=False)


def test_one_answer_that_is_not_finite_is_enough(tiny_model):
    class Some:
        def evaluate(self, _):
            rows = [
                {"id": str(n), "correct": True, "log_prob": value} for n, value in enumerate([-1.0, math.nan, -2.0])
            ]
            return Evaluation({"accuracy": 1.0}, item_table(rows))

    found = ask(Some(), Scorer(tiny_model("llama")))
    assert (found.not_finite, found.metrics) == (1, {"items": 3.0, "not_finite": 1.0})
    assert found.items["correct"].to_list() == [True, None, True]


def test_such_a_run_is_named_and_nothing_follows_from_it(capsys, tmp_path):
    dense, small, broken = made_run(bits("1111"), compression="none"), made_run(bits("1000")), made_run(bits("0000"))
    broken.report["eval"]["atlas"]["not_finite"] = 4
    broken.metrics = {"atlas.items": 4.0, "atlas.not_finite": 4.0}
    comparisons = compare([dense, small, broken])
    assert [run.id for run in comparisons.groups[0].runs] == [small.id]
    why = "4 of the answers to atlas are not finite"
    assert comparisons.skipped == [(broken.id, f"{why}, so atlas has no valid result")]
    for run in (dense, small, broken):
        run.report["model"]["note"] = ""
    show([small, broken], {small.id: dense, broken.id: dense}, tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{broken.id[:8]}: atlas has no valid result: {why}" in said
    assert broken.id not in (tmp_path / "table.csv").read_text()


@pytest.mark.slow
def test_a_run_of_a_model_with_broken_weights_says_so_wherever_it_is_shown(capfd, tmp_path, monkeypatch):
    """In a row that no text of one part reads: every answer is finite, and none is worth anything."""
    prepare(tmp_path)
    network = build_network("bert")
    network.bert.embeddings.token_type_embeddings.weight.data[1] = math.nan
    network.save_pretrained(tmp_path / "bert")
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    arguments = "-m model=local model.path=bert eval=[lama] data_dir=data compression=none output.dir=out device=cpu"

    def said(command, *given):
        GlobalHydra.instance().clear()
        monkeypatch.setattr("sys.argv", ["kc", command, *given])
        with suppress(SystemExit):
            main()
        told = capfd.readouterr()
        return " ".join(f"{told.out} {told.err}".split())

    why = "weights of the model are not finite (bert.embeddings.token_type_embeddings.weight)"
    assert f"lama has no valid result: {why}" in said("run", *arguments.split())
    (run,) = RunStore("out")
    assert run.metrics == {"lama.items": run.items.height} and run.items.height
    assert run.items["correct"].null_count() == run.items.height
    assert run.items["log_prob"].is_finite().all()
    assert compare([run]).groups == [] and compare([run]).skipped == [(run.id, f"{why}, so lama has no valid result")]
    assert f"runs/{run.id}: {why}" in said("status", "out")
    said("report", "out")
    assert f"{run.id}</code>: {why}" in Path("report.html").read_text()
    assert _summary(run)["lama/void"] == why

    (run.folder / "metrics.json").write_text('{"lama.accuracy": 0.5}')  # as an earlier version wrote it
    earlier = RunStore("out").find(run.id)
    assert drop_rows([earlier], {}) == [] and compare([earlier]).groups == []


def test_a_padding_token_that_the_network_does_not_have_is_one_line(tiny_model):
    model = tiny_model("llama")
    model.tokenizer.__class__ = type("Padded", (type(model.tokenizer),), {"pad_token_id": 10_000})
    try:
        with pytest.raises(BadInput, match=r"padding token of tiny-llama has id 10000, .* ids 0 to 93") as refusal:
            Scorer(model).generate([[7, 8, 9], [10]], 3, lambda _: False)
    finally:
        model.tokenizer.__class__ = type(model.tokenizer).__mro__[1]
    assert "\n" not in str(refusal.value)
