"""The controlled world: its facts and texts, its models, and what they are asked."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from scipy.stats import spearmanr

import knowledge_compression as kc
from helpers.places import EXHAUSTIVE
from knowledge_compression.compression.methods.awq import Awq
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.int8_static import Int8Static
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.smoothquant import SmoothQuant
from knowledge_compression.compression.methods.sparsegpt import SparseGpt
from knowledge_compression.compression.methods.wanda import Wanda
from knowledge_compression.corpora.world_text import WorldText, packed
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.world_facts import WorldProbes
from knowledge_compression.identity import identity
from knowledge_compression.objectives import NextToken, objective_for
from knowledge_compression.training import TrainingSettings
from knowledge_compression.world import models
from knowledge_compression.world.generator import WorldSettings, generate
from knowledge_compression.world.models import Mixture, Shape, WorldModel
from knowledge_compression.world.schema import RELATIONS

pytestmark = pytest.mark.minutes

# Few relations with many subjects each, so that every wording is learnt from many others; no fact is rare.
TRAINED = WorldSettings(people=36, works=2, firms=12, towns=10, countries=2, professions=10, languages=8, instruments=8,
                        relations=("born_in", "employer", "profession", "instrument"), mean_frequency=8.0,
                        exponent=0.5)  # fmt: skip
FAMILIES = ("encoder", "encoder_decoder", "decoder")


def recipe(shape: Shape, length: int, steps: int, batch_size: int, learning_rate: float, weight_decay: float) -> dict:
    plan = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "weight_decay": weight_decay}
    return {"shape": shape, "length": length, "training": TrainingSettings(**plan, betas=(0.9, 0.99))}


# What each family needs to know that world, from any seed and however a processor rounds: a window holds one sentence.
RECIPES = {
    "encoder": recipe(Shape(width=64, depth=2), 11, 500, 64, 5e-3, 0.1),
    "encoder_decoder": recipe(Shape(width=64, depth=4), 9, 400, 64, 4e-3, 0.5),
    "decoder": recipe(Shape(width=64, depth=2, heads=2), 10, 500, 32, 4e-3, 0.1),
}


def small_model(family: str, **changes) -> WorldModel:
    made = {"world": TRAINED, "recall": 0.9} | RECIPES.get(family, RECIPES["decoder"])
    return WorldModel(f"small_{family}", family, **(made | changes))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of this module's own, in which each small model is trained once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("KC_CACHE_DIR", str(folder))
        yield folder


def test_windows_hold_whole_sentences_all_of_them_in_every_reading():
    sentences = [[n] * (2 + n % 4) for n in range(1, 60)]
    rows = packed(sentences, 16, 40, seed=3)
    assert len(rows) == 40 and all(11 < len(row) <= 16 for row in rows)  # no further sentence would have fitted
    tokens = [token for row in rows for token in row]
    said = [token for token, before in zip(tokens, [0, *tokens], strict=False) if token != before]
    assert all(tokens.count(n) % len(sentences[n - 1]) == 0 for n in said)
    assert set(said[:59]) == set(range(1, 60)) and said[:59] != said[59:118]
    with pytest.raises(BadInput, match=r"model\.length"):
        packed(sentences, 4, 1, seed=0)


def test_the_parameter_budgets_match():
    sizes = [small_model(name, shape=Shape()).skeleton().parameter_count() for name in FAMILIES]
    sizes += [small_model("decoder", shape=Mixture(experts=n)).skeleton().parameter_count() for n in (4, 8)]
    assert max(sizes) / min(sizes) < 1.1


def test_the_shipped_mixture_has_eight_experts_of_which_two_read_a_token():
    source = kc.choose("model=world_moe")
    network = source.skeleton().network
    experts = kc.choose("target=experts").select(source.skeleton())
    assert len(experts) == 2 * 8 * len(network.model.layers) and network.config.num_experts_per_tok == 2
    assert all(size % 8 == 0 for layer in experts for size in layer.weight.shape)
    assert source.shape.objective(NextToken(0)) == NextToken(0, balance=0.01)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"family": "encoder"}, r"model\.family=encoder has no shape with experts; choose model\.family=decoder"),
        ({"shape": {"experts": 2, "active": 3}}, r"model\.shape\.active=3 .* model\.shape\.experts=2"),
        ({"shape": {"experts": 0}}, r"model\.shape\.experts=0"),
        ({"shape": {"balance": -1}}, r"model\.shape\.balance=-1"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(changes, says):
    with pytest.raises(BadInput, match=says):
        kc.choose("model=world_moe", **changes).skeleton()


def relation_of(name):
    return next(relation for relation in RELATIONS if relation.name == name)


def test_what_decides_the_weights_decides_the_fingerprint():
    source = small_model("decoder")
    same = (source, replace(source, name="other"), replace(source, recall=0.5))
    assert len({s.fingerprint() for s in same}) == 1
    others = [
        replace(source, family="encoder"),
        replace(source, world=replace(TRAINED, seed=1)),
        replace(source, shape=Shape(32, 2, 2)),
        replace(source, shape=Mixture(64, 2, 2)),
        replace(source, length=32),
        replace(source, training=replace(source.training, learning_rate=1e-3)),
    ]
    assert len({s.fingerprint() for s in [source, *others]}) == 7


def test_a_family_that_does_not_exist_is_refused():
    with pytest.raises(BadInput, match="choose one of encoder"):
        WorldModel("x", "diffusion")


def test_more_facts_than_chance(cache):
    """What an untrained model recalls is what guessing among the typed answers gives."""
    source = small_model("decoder", training=TrainingSettings(steps=1, batch_size=1, learning_rate=1e-9), recall=0.0)
    metrics = WorldProbes(native=False).evaluate(Scorer(source.load())).metrics
    assert metrics["accuracy"] < 4 * metrics["chance"] and not math.isnan(metrics["accuracy"])


@pytest.mark.parametrize("family", FAMILIES)
def test_recovery_reads_whole_sentences_as_training_did(cache, family):
    source = small_model(family, training=TrainingSettings(steps=1, batch_size=1, learning_rate=1e-9), recall=0.0)
    model, corpus = source.load(), WorldText(samples=5, length=21)
    windows = corpus.token_stream(model).view(-1, 21)
    assert corpus.windows(model).shape == (5, 21)
    whole = set(generate(TRAINED).recovery_text())
    seen = set()
    for text in model.tokenizer.batch_decode(windows, skip_special_tokens=True):
        sentences = [f"{part.strip()} ." for part in text.split(" .") if part.strip()]
        assert len(sentences) > 1 and set(sentences) <= whole
        seen |= set(sentences)
    assert seen == whole
    begins = model.tokenizer.bos_token_id
    assert (windows[:, 0] == begins).all() if family != "encoder_decoder" else (windows != begins).all()
    assert objective_for(model) is model.objective
    with torch.no_grad():
        loss, count = objective_for(model)(model.network, windows)
    assert math.isfinite(loss) and count


def test_windows_begin_as_in_training_unless_told_otherwise(cache):
    model = small_model("decoder").load("cpu")
    corpus, begin = WorldText(samples=4, length=21), model.tokenizer.bos_token_id
    without = replace(corpus, bos=False)
    assert (corpus.windows(model)[:, 0] == begin).all() and not (without.windows(model) == begin).any()
    assert identity(corpus) == identity(replace(corpus, bos="auto")) != identity(without)


def test_text_of_a_world_is_refused_to_other_models_before_anything_is_done(tiny_model):
    with pytest.raises(BadInput, match="was not trained on one"):
        WorldText().prepared(tiny_model("llama"))


@pytest.fixture(scope="module")
def trained(cache):
    """The three small models, each trained once."""
    return {family: small_model(family).load() for family in FAMILIES}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_a_small_world_in_any_wording(trained, family):
    metrics = WorldProbes().evaluate(Scorer(trained[family])).metrics
    assert metrics["head.held_out"] >= 0.9  # of 34 questions: seeds and processors decide one or two
    assert metrics["accuracy"] >= 0.9
    assert metrics["native.accuracy"] >= 0.9
    assert metrics["majority"] < 0.4


@pytest.mark.slow
def test_a_mixture_learns_a_small_world_and_uses_every_expert(cache):
    plan = replace(small_model("decoder").training, steps=600)
    model = small_model("decoder", shape=Mixture(64, 2, 2, experts=4), training=plan).load()
    metrics = WorldProbes().evaluate(Scorer(model)).metrics
    assert metrics["head.held_out"] >= 0.95 and metrics["accuracy"] >= 0.85
    windows = WorldText(samples=64, length=21).windows(model)
    report = Gptq(bits=3).compress(model, kc.choose("target=experts").select(model), windows)
    seen = [layer.tokens for layer in report.layers if "down_proj" in layer.path]
    assert min(seen) > windows.numel() * 2 / 4 / 3 and sum(seen[:4]) == sum(seen[4:]) == 2 * windows.numel()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_more_sparsity_does_more_damage(trained, family):
    grid = [i / 10 for i in range(10)]
    left = []
    for sparsity in grid:
        model = small_model(family).load()
        targets = kc.choose("target=all").select(model)
        Magnitude(sparsity).compress(model, targets, None)
        left.append(WorldProbes(native=False).evaluate(Scorer(model)).metrics["accuracy"])
    whole = max(i for i, accuracy in enumerate(left) if accuracy == left[0])  # until there ranks would only be ties
    assert spearmanr(grid[whole:], left[whole:]).statistic < -0.9, left
    assert all(more <= less + 0.05 for less, more in pairwise(left)), left
    assert left[-1] < 0.5 < left[0]


@pytest.fixture(scope="module")
def dense_recall(trained):
    """What each of the three recalls before anything is done to it."""
    return {
        family: WorldProbes(native=False).evaluate(Scorer(model)).metrics["accuracy"]
        for family, model in trained.items()
    }


# Every calibrated method; of what its report says, the error that must be left of that without calibration.
CALIBRATED = {
    "gptq": (Gptq(bits=3), 0.5),
    "gptq by influence": (Gptq(bits=3, true_sequential=False, by_influence=True), 0.5),
    "sparsegpt": (SparseGpt(sparsity=0.5), 0.5),
    "sparsegpt 4 bits": (SparseGpt(sparsity=0.5, bits=4), 0.7),
    "wanda": (Wanda(sparsity=0.5), None),
    "awq": (Awq(bits=3, group_size=None), 1.0),
    "smoothquant": (SmoothQuant(), None),
    "int8_static": (Int8Static(), None),
}


# GPTQ is led through every family, the others, which are led through a network in the same way, through one each.
PAIRS = [
    (name, family)
    for i, name in enumerate(CALIBRATED)
    for j, family in enumerate(FAMILIES)
    if EXHAUSTIVE or name == "gptq" or (i + j) % 3 == 0
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_calibrated_methods_leave_every_family_what_it_knows(dense_recall, family, name):
    method, left_over = CALIBRATED[name]
    model = small_model(family).load()
    targets = kc.choose("target=all").select(model)
    report = method.compress(model, targets, WorldText(samples=64, length=21).windows(model))
    assert {layer.path for layer in report.layers} == {layer.path for layer in targets}
    assert WorldProbes(native=False).evaluate(Scorer(model)).metrics["accuracy"] > dense_recall[family] - 0.15
    if left_over is not None:
        before, after = (
            sum(getattr(layer, side) for layer in report.layers) for side in ("error_before", "error_after")
        )
        assert after < left_over * before
    if hasattr(method, "sparsity"):
        for layer in kc.choose("target=all").select(model):
            assert int((layer.weight == 0).sum()) >= layer.parameters // 2
        assert report.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.slow
def test_an_interrupted_model_is_gone_on_with_and_comes_out_the_same(cache, tmp_path, monkeypatch):
    source = small_model("decoder", training=TrainingSettings(steps=12, batch_size=4, checkpoint_every=5), recall=0.0)
    whole = source.load().network.state_dict()

    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path))
    steps = 0

    def power_cut(*arguments, **options):
        nonlocal steps
        steps += 1
        if steps == 8:
            raise KeyboardInterrupt
        return NextToken.__call__(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(models, "_objective", lambda *_: partial(power_cut, NextToken(0)))
        source.load()
    again = source.load()
    assert again.provenance["made"]["training"]["resumed_at"] == 5
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.network.state_dict().items())


def test_a_world_too_large_for_its_model_says_so_and_leaves_nothing_to_use(tmp_path, monkeypatch):
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path))
    source = small_model("decoder", training=TrainingSettings(steps=2, batch_size=2), recall=0.9)
    for _ in range(2):
        with pytest.raises(BadInput, match=r"too large for it: after 2 steps it recalls .* but 90\.0% is required"):
            source.load()
    assert not list((tmp_path / "worlds").glob("*/model.safetensors"))


def test_a_model_of_another_version_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path))
    source = small_model("decoder", training=TrainingSettings(steps=2, batch_size=2), recall=0.0)
    folder = source.folder()
    made = json.loads((folder / "made.json").read_text())
    for spoil in (
        lambda: (folder / "made.json").write_text(json.dumps(made | {"recipe": made["recipe"] | {"format": 0}})),
        lambda: (folder / "made.json").write_text("{"),
        lambda: (folder / "model.safetensors").unlink(),
    ):
        spoil()
        weights = source.load().network.state_dict()
        assert json.loads((folder / "made.json").read_text())["recipe"] == source.recipe
        assert all(tensor.isfinite().all() for tensor in weights.values())
