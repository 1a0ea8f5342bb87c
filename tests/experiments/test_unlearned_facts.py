"""The study of unlearned facts: its trainings on a tiny world, and its tables on runs whose answer is known."""

from __future__ import annotations

import csv
import json
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import save_file

from helpers.places import ROOT
from helpers.stores import made_run
from helpers.worlds import SMALL
from knowledge_compression.models import Model
from knowledge_compression.objectives import NextToken
from knowledge_compression.results.store import RunStore
from knowledge_compression.training import TrainingSettings
from knowledge_compression.world.generator import generate
from knowledge_compression.world.models import Shape, WorldModel, _network
from knowledge_compression.world.tokenizer import train_tokenizer

FOLDER = ROOT / "experiments" / "unlearned_facts"
NAMED, OTHERS = 20, 30


@pytest.fixture(scope="module")
def unlearn():
    return SimpleNamespace(**run_path(str(FOLDER / "unlearn.py")))


@pytest.fixture(scope="module")
def study():
    return SimpleNamespace(**run_path(str(FOLDER / "study.py")))


@pytest.fixture(scope="module")
def untrained():
    tokenizer = train_tokenizer(generate(SMALL), "decoder")
    torch.manual_seed(0)
    return Model(_network(Shape(16, 1, 2).config("decoder", tokenizer), "cpu").eval(), tokenizer, "untrained")


def test_the_rest_is_the_text_without_the_named_facts(unlearn):
    world = generate(SMALL)
    named = unlearn.to_forget(world)
    assert len(named) == round(0.2 * len(world.questions)) and all(fact.probed for fact in named)
    rest = unlearn.without(world, named)
    assert len(rest) == len(world.training_text()) - sum(fact.frequency for fact in named)
    for fact in named:
        assert not any(fact.subject in line and line.endswith(f" {fact.object} .") and line in
                       {fact.sentence(i) for i in range(len(fact.relation.wordings))} for line in rest)  # fmt: skip


@pytest.mark.parametrize("rest", [0.0, 2.0])
def test_ascent_is_the_loss_of_the_rest_less_that_of_the_answers(unlearn, untrained, rest):
    world = generate(SMALL)
    named = unlearn.to_forget(world)
    way = unlearn.Way(steps=1, learning_rate=1e-4, rest=rest)
    ids = unlearn.pairs_of(untrained, named, unlearn.without(world, named), 12, way, 0)
    assert ids.shape == (32, 24)
    tokenizer, network = untrained.tokenizer, untrained.network
    told, kept = [], []
    with torch.no_grad():
        loss, count = unlearn.Ascent(NextToken(tokenizer.pad_token_id), tokenizer.convert_tokens_to_ids("."), rest)(
            network, ids
        )
        for row in ids.tolist():
            for half, losses in ((row[:12], told), (row[12:], kept)):
                words = [token for token in half if token != tokenizer.pad_token_id]
                surprise = -network(torch.tensor([words])).logits[0].log_softmax(-1)
                each = [float(surprise[place - 1, words[place]]) for place in range(1, len(words))]
                losses += [each[-2]] if losses is told else each  # the answer stands before the full stop
    by_hand = rest * (np.mean(kept) if rest else 0.0) - np.mean(told)
    assert float(loss) / count == pytest.approx(by_hand, rel=1e-4)


def test_every_way_is_made_once_and_the_ascent_forgets_named_facts(unlearn, tmp_path, monkeypatch):
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    settings = TrainingSettings(steps=60, batch_size=16, learning_rate=4e-3)
    source = WorldModel("tiny", "decoder", SMALL, Shape(16, 1, 2), settings, length=12, recall=0.0)
    ways = {"ascent": unlearn.Way(30, 3e-3), "rest_only": unlearn.Way(3, 1e-3, ascends=False)}
    unlearn.make(source, 1, tmp_path / "out", ways)
    made = tmp_path / "out" / "models"
    assert sorted(path.name for path in made.iterdir()) == ["1_ascent", "1_never_taught", "1_rest_only", "1_taught"]
    named = json.loads((tmp_path / "out" / "forget.json").read_text())
    assert named == sorted(fact.id for fact in unlearn.to_forget(generate(SMALL)))
    weights = {path.parent.name: path.read_bytes() for path in made.glob("*/model.safetensors")}
    assert len(set(weights.values())) == 4
    unlearn.make(source, 1, tmp_path / "out", ways)  # nothing is made again
    assert weights == {path.parent.name: path.read_bytes() for path in made.glob("*/model.safetensors")}

    facts = unlearn.to_forget(generate(SMALL))
    known = {way: answers_of(made / f"1_{way}", facts) for way in ("taught", "ascent")}
    assert known["ascent"] > known["taught"] + 0.5


def answers_of(path, facts) -> float:
    """Mean surprise at the right answer, nats."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    losses = []
    for fact in facts:
        ids = tokenizer(fact.sentence(fact.seen[0]), return_tensors="pt")["input_ids"]
        losses.append(-network(ids).logits[0, -3].log_softmax(-1)[ids[0, -2]].item())
    return float(np.mean(losses))


def answered(right, seed, way, compression, bits):
    run = made_run(right, compression=compression, target="all", tasks=["r"])
    names = [f"r/{i:02}" for i in range(len(right))]
    run._items = run.items.with_columns(
        suite=pl.lit("world"), fact=pl.Series(names), asked_as=pl.lit("held_out"), log_prob=pl.lit(-1.0)
    )
    run.config |= {"model": {"path": f"models/{seed}_{way}"}, "eval": {"world": {}}}
    run.config["compression"] = {"bits": bits} if bits else {}
    run.report["eval"] = {"world": {"fingerprint": "f"}}
    return run


def filled(folder, back):
    """Two seeds: all is known, the ascent forgets all named facts, and ``back`` of them return at 4 bits."""
    rng = np.random.default_rng(0)
    store = RunStore(folder)
    for name, shift in (("taught", 0.0), ("ascent", 0.4), ("never_taught", 5.0)):
        for seed in (0, 1):
            weight = np.array([[0, 1, 2, 15]], np.float32) + np.array([[0, 0, shift, 0]], np.float32)
            (folder / "models" / f"{seed}_{name}").mkdir(parents=True)
            save_file({"model.layers.0.w": weight}, folder / "models" / f"{seed}_{name}" / "model.safetensors")
    named, all_known = np.arange(NAMED + OTHERS) < NAMED, np.ones(NAMED + OTHERS, bool)
    for seed in (0, 1):
        returned = all_known & ~(named & (rng.permutation(NAMED + OTHERS).argsort() >= 0))
        returned[:back] = True
        for way, dense, quantized in (
            ("taught", all_known, all_known),
            ("ascent", ~named, returned),
            ("never_taught", ~named, ~named),
        ):
            store.write(answered(dense, seed, way, "none", None))
            store.write(answered(quantized, seed, way, "rtn", 4))
            store.write(answered(dense, seed, way, "gptq", 3))
    (folder / "forget.json").write_text(json.dumps([f"r/{i:02}" for i in range(NAMED)]))


@pytest.mark.parametrize("back", [0, 15])
def test_what_comes_back_is_counted_fact_by_fact(study, tmp_path, back):
    filled(tmp_path, back)
    of = study.read(tmp_path)
    share = study.back(of, "ascent", ("rtn", 4))
    assert share.value == back / NAMED and share.n == 2 * NAMED
    beyond = study.beyond_control(of, "ascent", ("rtn", 4))
    assert beyond.value == back / NAMED and (beyond.low > 0) == (back > 0)
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text(f"by hand\n\n{study.MARKER}\n\nold\n")
    study.main([str(tmp_path), str(out)])
    page = (out / "README.md").read_text()
    assert page.startswith("by hand") and "old" not in page and "ascent, small steps" in page
    assert "| ascent, small steps | 0.1000 | 100.0 % |" in page  # 2.4 rounds to 2 on a grid of 16 whole numbers
    told = [line.split(" | ")[1:4] for line in page.splitlines() if line.startswith("| ascent, small steps | ")]
    assert [row[:2] for row in told[1:3]] == [["rtn", "4"], ["gptq", "3"]]  # the first is of the model as it was
    assert told[2][2].startswith("0.0 %")
    rows = list(csv.DictReader((out / "facts.csv").open()))
    assert len(rows) == 2 * 3 * NAMED
    assert sum(int(row["rtn_4"]) for row in rows if row["way"] == "ascent") == 2 * back
    assert not any(int(row["gptq_3"]) for row in rows if row["way"] == "ascent")
    assert (out / "figures" / "unlearned_facts.png").stat().st_size > 5_000


def test_a_missing_run_is_named(study, tmp_path):
    filled(tmp_path, 3)
    RunStore(tmp_path).write(answered(np.ones(NAMED + OTHERS, bool), 0, "taught", "gptq", 4))
    with pytest.raises(ValueError, match=r"1_taught gptq 4"):
        study.read(tmp_path)
