"""The forecast: what a miniature is asked is what the network itself is asked, and nothing is started."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from helpers.experiments import SUITE, made
from helpers.networks import MIXTURES, build_network, make_tokenizer
from helpers.worlds import SMALL
from knowledge_compression.compression.base import Compression
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.methods.scales import Scales
from knowledge_compression.compression.methods.wanda import Wanda
from knowledge_compression.corpora.text import TextFile
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.world_facts import WorldProbes
from knowledge_compression.evaluation.world_two_hop import WorldTwoHop
from knowledge_compression.experiment import Experiment
from knowledge_compression.models import Model
from knowledge_compression.models.targets import is_linear, linear_layers
from knowledge_compression.results.store import RunStore
from knowledge_compression.results.tracker import NoTracker
from knowledge_compression.sweeping import rate
from knowledge_compression.sweeping.forecast import Forecaster, largest_block, totals
from knowledge_compression.sweeping.rehearsal import counting, miniature, multiply_adds, reached, rehearse
from knowledge_compression.world.generator import generate
from knowledge_compression.world.models import Shape, WorldModel


def counted(model: Model) -> float:
    """Multiply-adds of the suite on the network itself, by torch's own count of each product."""
    seen: Counter[str] = Counter()
    scorer = Scorer(model)
    for path, module in model.network.named_modules():
        if is_linear(module):
            module.register_forward_hook(
                lambda m, i, _, path=path: seen.update({path: i[0].numel() // i[0].shape[-1] * m.weight.numel()})
            )
    SUITE.evaluate(scorer)
    return float(seen.total())


def test_a_miniature_counts_what_the_network_does(any_tiny_model: Model) -> None:
    """Of every architecture: same passes, same tokens."""
    work = rehearse(any_tiny_model, SUITE)
    assert multiply_adds(any_tiny_model, work.tokens) == counted(any_tiny_model)
    assert work.items > 0 and work.widest > 0
    small = miniature(any_tiny_model).network
    assert sum(p.numel() for n, p in small.named_parameters() if "embed" not in n) < 40_000


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_of_a_mixture_active_multiply_adds_are_counted(name: str) -> None:
    """By hand: each token passes attention, the router and the head, and of the experts as many as it is sent to."""
    model = Model(build_network(name), make_tokenizer(), name)
    ids = torch.randint(7, 60, (4, 32), generator=torch.Generator().manual_seed(0))
    with counting(model) as tokens, torch.no_grad():
        model.network(input_ids=ids)
    chosen = model.network.config.num_experts_per_tok
    active = 0.0
    for layer in linear_layers(model):
        share = chosen / 4 if layer.expert else 1  # of four experts
        active += layer.parameters * ids.numel() * share
    assert multiply_adds(model, tokens) == active
    foretold = reached(model)(ids.numel())
    assert multiply_adds(model, foretold) == pytest.approx(active)
    small = miniature(model)
    assert small.parameter_count() < 40_000 and len(linear_layers(small)) == len(linear_layers(model))


def test_a_suite_is_rehearsed_on_a_mixture() -> None:
    model = Model(build_network("mixtral"), make_tokenizer(), "mixtral")
    work = rehearse(model, SUITE)
    layers = linear_layers(model)
    through = {layer.path: work.tokens[layer.path] for layer in layers if layer.path.endswith("q_proj")}
    (passed,) = set(through.values())
    for part in ("gate_up_proj", "down_proj"):
        of_experts = [work.tokens[layer.path] for layer in layers if f"layers.0.mlp.experts.{part}" in layer.path]
        assert len(of_experts) == 4 and sum(of_experts) == 2 * passed


@dataclass(frozen=True)
class Unaskable:
    def evaluate(self, scorer: Scorer) -> Any:
        raise OSError("no such data")


def test_what_is_there_and_what_is_shared(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    store = RunStore(tmp_path / "outputs")
    runs = [made(tiny_folder, {"a": SUITE}), made(tiny_folder, {"b": SUITE}), made(tiny_folder, {"a": SUITE}, 0.2)]

    def foretold(rate: float | None = 1e6) -> list[Any]:
        forecaster = Forecaster(store, rate)
        return [one for i, run in enumerate(runs) for one in forecaster.of(run, f"run {i}")]

    found = foretold()
    assert [(one.label, one.state) for one in found] == [
        ("run 0", "to do"),
        ("dense baseline of run 0", "to do"),
        ("run 1", "shared"),
        ("dense baseline of run 1", "to do"),
        ("run 2", "to do"),
    ]
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "cache" / "compressions").exists()
    assert all(one.macs == found[0].macs > 0 for one in found)
    assert found[2].seconds < found[0].seconds and found[2].disk < found[0].disk
    slower = foretold(rate=1e5)
    assert slower[0].seconds - found[0].seconds == pytest.approx(9e-6 * found[0].macs)
    whole = totals(found, at_once=2, gpus=3)
    assert whole["runs to do"] == 5 and whole["GPU-hours"] == 3 * whole["seconds, one after the other"] / 3600

    runs[0].run(store, NoTracker())
    assert [one.state for one in foretold()] == ["finished", "to do", "shared", "to do", "to do"]
    past = foretold(rate=None)[-1]  # the finished run tells how fast this machine is
    (done,) = store
    took = done.report["cost"]["seconds"]["eval.a"]
    assert past.seconds == pytest.approx(took, abs=0.5)
    assert done.report["cost"]["peak_memory"] > 0

    unknown = Forecaster(store, 1e6).of(made(tiny_folder, {"c": Unaskable()}), "run")
    assert unknown[0].unknown == ["c"] and "no such data" in caplog.text


@pytest.mark.parametrize("family", ["encoder", "encoder_decoder", "decoder"])
def test_questions_about_a_world_are_counted_before_any_model_knows_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path))
    source = WorldModel("tiny", family, replace(SMALL, two_hop=0.5), Shape(16, 2, 2))
    world = generate(source.world)
    facts = rehearse(source.skeleton(), WorldProbes())
    assert facts.items == 2 * len(world.questions)
    assert facts.compared == facts.items  # each is read at one position, in both ways of asking
    compositions = rehearse(source.skeleton(), WorldTwoHop())
    assert compositions.items == compositions.compared == sum(one.first.probed for one in world.two_hops)
    assert multiply_adds(source.skeleton(), facts.tokens) > 0
    assert not list(tmp_path.glob("worlds/tiny-*"))  # nothing was trained


def test_tuning_costs_what_its_steps_read(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model is an encoder, of which each position is read, so a window costs its tokens."""
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path))
    (text := tmp_path / "text.txt").write_text("some words")

    def macs(compression: Compression, samples: int, length: int) -> float:
        run = replace(made(tiny_folder, {}), compression=compression)
        run = replace(run, corpus=TextFile(name="text", path=str(text), samples=samples, length=length))
        return Forecaster(RunStore(tmp_path / "outputs"), 1e6).of(run, "")[0].macs

    rounded = Rtn(bits=4)
    for length in (8, 16):
        one_pass = macs(Wanda(0.5), 6, length) / 2  # it observes a block, and then runs the compressed one
        tuned = macs(Scales(first=rounded, steps=5, batch=2), 6, length) - macs(rounded, 6, length)
        assert tuned == pytest.approx(4 * 5 * 2 / 6 * one_pass)


def test_distance_costs_the_dense_head_again_and_states_on_disk(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("KC_CACHE_DIR", str(cache))
    store = RunStore(tmp_path / "outputs")
    plain = made(tiny_folder, {"a": SUITE})
    far = replace(plain, distance=True)
    of_plain, of_far = Forecaster(store, 1e6), Forecaster(store, 1e6)
    (alone, dense), (compared, recorded) = of_plain.of(plain, ""), of_far.of(far, "")
    assert recorded.macs == dense.macs and compared.disk == alone.disk
    mixed = Forecaster(store, 1e6)
    mixed.of(plain, "")  # brings a dense run that records nothing
    (late,) = mixed.of(far, "")
    assert late.macs == compared.macs + dense.macs and late.disk == recorded.disk

    far.dense().run(store, NoTracker())
    (states,) = cache.glob("dense_states/*/states.bin")
    assert recorded.disk - dense.disk == states.stat().st_size > 0
    head = far.source.skeleton().network.get_submodule("cls.predictions.decoder").weight.numel()
    positions = len(np.load(states.with_name("keys.npy")))
    assert compared.macs - alone.macs == positions * head
    assert compared.memory - of_far.libraries > alone.memory - of_plain.libraries  # which this process may give back
    assert compared.seconds > alone.seconds + positions * head / 1e6

    (again,) = Forecaster(store, 1e6).of(far, "")
    assert again.macs == compared.macs and again.disk == compared.disk
    shutil.rmtree(cache / "dense_states")  # the dense run is there, so the first that compares asks the dense model too
    first, second = Forecaster(store, 1e6), replace(far, compression=Magnitude(0.2))
    (lacking,), (served,) = first.of(far, ""), first.of(second, "")
    assert lacking.macs == compared.macs + dense.macs and lacking.disk == compared.disk + recorded.disk - dense.disk
    assert served.macs == compared.macs


def test_other_processes_have_their_own_libraries_and_share_a_copy_of_the_weights(
    tiny_folder: Path, tmp_path: Path
) -> None:
    dense = replace(made(tiny_folder, {"a": SUITE}).dense(), kept_models=None)
    found = {}
    for count in (1, 2, 4):
        forecaster = Forecaster(RunStore(tmp_path), 1e6)
        forecaster.libraries = 1e9  # whatever this process holds by now
        (found[count],) = forecaster.of(replace(dense, processes=count), "")
    skeleton = dense.source.skeleton()
    work, weights = forecaster.work(dense, skeleton, "a"), 4.0 * skeleton.parameter_count()
    assert work is not None
    each = 1e9 + 8.0 * work.widest * skeleton.text_config.vocab_size
    assert found[2].memory - found[1].memory == pytest.approx(each + weights, rel=1e-3)
    assert found[4].memory - found[2].memory == pytest.approx(2 * each)
    assert found[1].seconds == found[4].seconds  # the threads of a processor are divided


def test_a_model_that_stays_on_disk_takes_the_memory_of_a_block(tiny_folder: Path, tmp_path: Path) -> None:
    run = made(tiny_folder, {})
    streamed = replace(run, source=replace(run.source, stream=True), kept_models=None)
    (found,) = (forecaster := Forecaster(RunStore(tmp_path), 1e6)).of(streamed, "")
    skeleton = run.source.skeleton()
    assert found.memory - forecaster.libraries == pytest.approx(1.2 * 4 * largest_block(skeleton))
    blocks = [skeleton.network.get_submodule(path) for path in skeleton.architecture.block_paths(skeleton.network)]
    embeddings = skeleton.network.get_input_embeddings().weight.numel()
    assert largest_block(skeleton) == max(embeddings, *(sum(p.numel() for p in b.parameters()) for b in blocks))


def test_a_large_vocabulary_costs_a_plan_nothing() -> None:
    """Of a network with ten times the words the same is counted, and the miniature computes no more logits."""
    model = Model(build_network("llama"), make_tokenizer(), "llama")
    config = deepcopy(model.network.config)
    config.vocab_size = 262_144
    with torch.device("meta"):
        wide = Model(type(model.network)(config), model.tokenizer, "wide")
    seen: list[int] = []
    suite = replace(SUITE, relations=["currency"])
    with torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, out: seen.append(out.shape[-1]) if isinstance(module, torch.nn.Linear) else None
    ):
        work = rehearse(wide, suite)
    assert max(seen) <= 2048
    assert work.tokens == rehearse(model, suite).tokens


def test_a_calibrated_compression(tiny_folder: Path, tmp_path: Path) -> None:
    """Counts its passes over the text, until a finished run tells what it takes."""
    text = tmp_path / "text.txt"
    text.write_text("paris is the capital of france . " * 40)
    corpus = TextFile(name="text", path=str(text), samples=4, length=16)
    plain = replace(made(tiny_folder, {"a": SUITE}), kept_models=None)
    runs = [replace(made(tiny_folder, {suite: SUITE}), kept_models=None) for suite in "ab"]
    runs = [replace(run, compression=Wanda(sparsity=0.5), corpus=corpus) for run in runs]
    skeleton = plain.source.skeleton()
    blocks = sum(layer.parameters for layer in linear_layers(skeleton) if layer.role != "final")
    store = RunStore(tmp_path / "outputs")
    without, calibrated = (Forecaster(store, 1e6).of(run, "")[0] for run in (plain, runs[0]))
    assert calibrated.macs - without.macs == 2 * 4 * 16 * blocks
    runs[0].run(store, NoTracker())
    (done,) = store
    took = done.report["cost"]["seconds"]["compress"]
    told = Forecaster(store, 1e6).of(runs[1], "")[0]
    assert told.macs == without.macs and told.seconds == pytest.approx(without.seconds + took)


@pytest.mark.parametrize(
    ("settings", "forward", "backward"),
    [({}, 1, 0), ({"true_sequential": False}, 2, 0), ({"true_sequential": False, "by_influence": True}, 2, 1)],
)
def test_passes_over_the_text_are_those_that_the_walk_makes(
    settings: dict[str, bool], forward: int, backward: int, tiny_folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("paris is the capital of france . " * 40)
    corpus = TextFile(name="text", path=str(text), samples=4, length=16)
    gptq = Gptq(bits=4, **settings)
    plain, run = (
        replace(made(tiny_folder, {}), kept_models=None, compression=c, corpus=corpus) for c in (Gptq(), gptq)
    )
    model = run.source.load("cpu")
    blocks = sum(layer.parameters for layer in linear_layers(model) if layer.role != "final")
    store = RunStore(tmp_path / "outputs")
    one, foretold = (Forecaster(store, 1e6).of(of, "")[0].macs for of in (plain, run))
    assert foretold - one == (forward + backward - 1) * 4 * 16 * blocks

    seen = 0

    def count(_: Any, inputs: Any, __: Any) -> None:
        nonlocal seen
        seen += inputs[0].shape[:-1].numel()

    model.network.get_submodule("bert.encoder.layer.0.attention.output.LayerNorm").register_forward_hook(count)
    gptq.compress(model, run.target.select(model), corpus.windows(model))
    assert seen == forward * 4 * 16 + (16 if gptq.true_sequential else 0)  # one window shows what reads what


@pytest.mark.slow
def test_the_rate_is_measured_where_nothing_tells_it(tiny_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    experiment = made(tiny_folder, {"a": SUITE})
    found = Forecaster(RunStore(tmp_path)).rate_of(experiment, experiment.source.skeleton())
    assert 1e5 < found < 1e15


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "t5", "bart", "gpt2", "opt"])
def test_one_block_of_any_kind_is_timed(
    architecture: str, tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate, "_PROBING", 0.0)
    run = cast(Experiment, SimpleNamespace(device="cpu", dtype="float32", scored_in=None))
    assert rate.measured_rate(run, tiny_model(architecture)) > 0
