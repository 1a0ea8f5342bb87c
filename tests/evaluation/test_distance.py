"""Distances to the dense model, against whole logits of whole networks in float64."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr, softmax

import knowledge_compression as kc
from helpers.experiments import SUITE, made
from helpers.questions import random_questions
from helpers.stores import made_run
from helpers.worlds import SMALL
from knowledge_compression.analysis import markdown, tables
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.analysis.page import _facts, render
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation import distance
from knowledge_compression.evaluation.distance import Beside, distance_metrics, distances, with_metrics
from knowledge_compression.evaluation.scoring import Blank, Question, Scorer
from knowledge_compression.evaluation.suite import Evaluation, item_table
from knowledge_compression.evaluation.world_facts import WorldProbes
from knowledge_compression.evaluation.world_two_hop import WorldTwoHop
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER
from knowledge_compression.results.store import RunStore
from knowledge_compression.results.tracker import NoTracker
from knowledge_compression.world import files
from knowledge_compression.world.generator import generate
from knowledge_compression.world.models import Shape, _network
from knowledge_compression.world.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-4, 0.1, 1.0, 20.0]), st.sampled_from([3, 50, 4097]))
def test_distances_are_scipys_on_whole_logits(seed, spread, vocabulary):
    rng = np.random.default_rng(seed)
    dense = (rng.normal(size=(7, vocabulary)) * rng.choice([0.1, 3, 30]) + 12).astype(np.float32)
    other = (dense + spread * rng.normal(size=dense.shape)).astype(np.float32)
    gold = rng.integers(vocabulary, size=7)
    kl, reverse, same, change = distances(torch.from_numpy(dense), torch.from_numpy(other), gold.tolist())
    p, q = (softmax(logits.astype(np.float64), axis=1) for logits in (dense, other))
    assert kl.numpy() == pytest.approx(rel_entr(p, q).sum(1), rel=2e-5, abs=1e-6)
    log_p, log_q = (log_softmax(logits.astype(np.float64), axis=1) for logits in (dense, other))
    assert reverse.numpy() == pytest.approx((q * (log_q - log_p)).sum(1), rel=2e-5, abs=1e-6)
    assert (same.numpy() == (dense.argmax(1) == other.argmax(1))).all()
    rows = np.arange(7)
    assert change.numpy() == pytest.approx(q[rows, gold] - p[rows, gold], abs=1e-6)


def test_a_distribution_has_no_distance_from_itself_and_padding_of_embeddings_does_not_count():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 8
    kl, reverse, same, change = distances(logits, logits.clone(), [0] * 5)
    assert not kl.any() and not reverse.any() and same.all() and not change.any()
    padded = torch.cat([logits, torch.full((5, 20), 3.0)], dim=1)
    assert not distances(logits, padded, [1] * 5)[0].any() and not distances(padded, logits, [1] * 5)[0].any()


@dataclass(frozen=True)
class Asking:
    """A suite that asks given blanks and questions; each is an item."""

    blanks: tuple = ()
    questions: tuple = ()

    def evaluate(self, scorer):
        log_probs = {}
        for batch, rows in scorer.distributions(self.blanks):
            log_probs |= {self.blanks[i].items[0]: float(row[7]) for i, row in zip(batch, rows, strict=True)}
        for question, answers in zip(self.questions, scorer.log_likelihoods(self.questions), strict=True):
            log_probs[question.items[0]] = answers[0].log_prob
        rows = [{"suite": "s", "task": "t", "id": name, "log_prob": value} for name, value in log_probs.items()]
        return Evaluation({}, item_table(rows))


def suite_for(model) -> Asking:
    """Blanks, and for generators questions: the first names its right continuation, the last begins as a blank does."""
    rows = [[9, 12, 30, 31], [8, 40, 41, 42, 43, 44, 10], [20, 21]]
    if model.family == ENCODER:
        return Asking(tuple(Blank(row, position=1, items=(f"b{i}",)) for i, row in enumerate(rows)))
    said = () if model.family == DECODER else (model.decoder_start,)
    blanks = tuple(Blank(row, decoder_ids=said, items=(f"b{i}",)) for i, row in enumerate(rows))
    questions = [replace(q, items=(f"q{i}",)) for i, q in enumerate(random_questions(3, 5))]
    questions[0] = replace(questions[0], continuations=questions[0].continuations[:1], gold=0)
    questions.append(Question(rows[0], [[7, 8], [7, 9]], items=("b0",)))
    return Asking(blanks, tuple(questions))


def disturbed(model):
    """A copy whose weights are a little off."""
    other = replace(model, network=deepcopy(model.network))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.network.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator) * weight.abs().mean()
    return other


@torch.no_grad()
def plain_logits(model, suite) -> dict[str, dict[tuple, np.ndarray]]:
    """Logits after every text that is read for an item, each in a pass of its own, float64."""
    network, found = model.network, {}

    def decoded(context, said):
        if model.family == DECODER:
            return network(input_ids=torch.tensor([[*context, *said]])).logits[0, -1]
        decoder_ids = torch.tensor([[model.decoder_start, *said]])
        return network(input_ids=torch.tensor([list(context)]), decoder_input_ids=decoder_ids).logits[0, -1]

    for blank in suite.blanks:
        if model.family == ENCODER:
            logits = network(input_ids=torch.tensor([blank.ids])).logits[0, blank.position]
        else:
            logits = decoded(blank.ids, ())
        found.setdefault(blank.items[0], {})[tuple(blank.ids), ()] = logits.double().numpy()
    for question in suite.questions:
        of = found.setdefault(question.items[0], {})
        for answer in question.continuations:
            for end in range(len(answer)):
                of[tuple(question.context), tuple(answer[:end])] = (
                    decoded(question.context, answer[:end]).double().numpy()
                )
    return found


def compared(model, other, suite, tokens=None, **changes):
    beside = Beside(lambda: model, "dense", **changes)
    return beside.ask(suite, Scorer(other, tokens), "asked")


def by_item(items: pl.DataFrame) -> dict[str, dict]:
    return {row["id"]: row for row in items.iter_rows(named=True)}


def test_every_position_is_compared_as_whole_networks_say_it(any_tiny_model):
    other, suite = disturbed(any_tiny_model), suite_for(any_tiny_model)
    rows = by_item(compared(any_tiny_model, other, suite).items)
    before, after = (plain_logits(model, suite) for model in (any_tiny_model, other))
    for name, positions in before.items():
        p, q = (softmax(np.stack([of[name][key] for key in positions]), axis=1) for of in (before, after))
        assert sorted(rows[name]["kl"]) == pytest.approx(sorted(rel_entr(p, q).sum(1)), rel=5e-3, abs=2e-6), name
        assert sorted(rows[name]["reverse_kl"]) == pytest.approx(sorted(rel_entr(q, p).sum(1)), rel=5e-3, abs=2e-6)
        assert sum(rows[name]["same_top"]) == (p.argmax(1) == q.argmax(1)).sum()
    if suite.questions:  # its one continuation is named as right, token by token
        answer, context = suite.questions[0].continuations[0], tuple(suite.questions[0].context)
        keys = [(context, tuple(answer[:end])) for end in range(len(answer))]
        p, q = (softmax(np.stack([of["q0"][key] for key in keys]), axis=1) for of in (before, after))
        steps = np.arange(len(answer)), list(answer)
        assert sorted(rows["q0"]["gold_change"]) == pytest.approx(sorted(q[steps] - p[steps]), abs=1e-6)
    p, q = (softmax(of["b1"][next(iter(before["b1"]))]) for of in (before, after))
    assert rows["b1"]["gold_change"] == pytest.approx([q[7] - p[7]], abs=1e-6)  # of the answer that the suite scored


def test_batches_do_not_matter_and_the_same_model_has_no_distance(tiny_model):
    model = tiny_model("llama")
    other, suite = disturbed(model), suite_for(model)
    small, large = (by_item(compared(model, other, suite, tokens).items) for tokens in (8, 4096))
    for name, row in small.items():
        assert sorted(row["kl"]) == pytest.approx(sorted(large[name]["kl"]), rel=1e-3, abs=1e-6)
        assert len(set(row["kl"])) == len(row["kl"])  # a position that is read twice counts once
    same = compared(model, replace(model, network=deepcopy(model.network)), suite)
    assert max(same.items["kl"].explode()) < 1e-9 and same.items["same_top"].explode().all()


def test_logits_in_small_parts_are_those_in_one(tiny_model, monkeypatch):
    model = tiny_model("gpt2")
    other, suite = disturbed(model), suite_for(model)
    whole = compared(model, other, suite).items
    monkeypatch.setattr(distance, "_BYTES", 1000)
    parts = compared(model, other, suite).items
    for one, same in zip(whole["kl"], parts["kl"], strict=True):
        assert one.to_list() == pytest.approx(same.to_list(), rel=1e-3, abs=1e-6)


def test_the_dense_side_is_recorded_once_and_by_the_dense_models_own_run(tiny_model, tmp_path):
    model = tiny_model("llama")
    other, suite = disturbed(model), suite_for(model)
    own = compared(model, model, suite, is_asked=True)
    assert own.items.columns == item_table([]).columns  # nothing is compared
    read = []
    real = Scorer.log_likelihoods
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "log_likelihoods", lambda self, q: (read.append(self.model), real(self, q))[1])
        first = compared(model, other, suite)
        assert read == [other]  # the dense model was not asked again
        unkept = compared(model, other, suite, gigabytes=0.0)
        assert read == [other, model, other]
    assert first.items.equals(unkept.items)
    (folder,) = (tmp_path / "cache" / "dense_states").glob("[!.]*")
    assert len(np.load(folder / "keys.npy")) * 16 * 4 == (folder / "states.bin").stat().st_size  # float32, width 16


def test_a_bfloat16_model_is_recorded_in_its_own_type(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.network.to(torch.bfloat16)
    suite = suite_for(model)
    rows = compared(model, replace(model, network=deepcopy(model.network)), suite).items
    assert max(rows["kl"].explode()) < 1e-6
    (folder,) = (tmp_path / "cache" / "dense_states").glob("[!.]*")
    assert len(np.load(folder / "keys.npy")) * 16 * 2 == (folder / "states.bin").stat().st_size


@dataclass(frozen=True)
class AskingOnceMore:
    """A suite that asks more of the model with the marked name, as one whose questions depend on answers does."""

    marked: int

    def evaluate(self, scorer):
        more = (Blank([9, 10, 11], items=("more",)),) if id(scorer.model.network) == self.marked else ()
        return Asking((Blank([8, 9], items=("both",)), *more)).evaluate(scorer)


def test_positions_that_the_dense_model_did_not_read_are_counted_and_said(tiny_model):
    model = tiny_model("llama")
    other = disturbed(model)
    found = compared(model, other, AskingOnceMore(id(other.network)))
    rows = by_item(found.items)
    assert len(rows["both"]["kl"]) == 1 and rows["more"]["kl"] is None and rows["more"]["gold_change"] is None
    assert found.fallbacks == ["1 positions are not compared, because the dense model does not read them"]


def test_metrics_are_numpys_over_all_positions_and_by_task():
    rng = np.random.default_rng(0)
    lists = [rng.gamma(1, size=n).astype(np.float32).tolist() for n in (3, 900, 50)]
    rows = [{"suite": "s", "task": f"t{i % 2}", "id": str(i)} for i in range(4)]
    items = item_table(rows).with_columns(
        kl=pl.Series([*lists, None], dtype=pl.List(pl.Float32)),
        reverse_kl=pl.Series([*lists, None], dtype=pl.List(pl.Float32)),
        same_top=pl.Series([[x > 0.5 for x in of] for of in lists] + [None], dtype=pl.List(pl.Boolean)),
        gold_change=pl.Series([[0.1], [-0.3], [None], None], dtype=pl.List(pl.Float32)),
    )
    metrics = with_metrics(Evaluation({"accuracy": 1.0}, items)).metrics
    flat = np.concatenate(lists).astype(np.float64)
    expected = {"kl": flat.mean(), "kl_median": np.median(flat), "kl_p99": np.quantile(flat, 0.99)}
    expected |= {"kl_p99_9": np.quantile(flat, 0.999), "same_top": (flat > 0.5).mean(), "positions": 953}
    expected |= {"gold_rms": np.sqrt((0.1**2 + 0.3**2) / 2), "accuracy": 1.0, "t1.kl": np.mean(lists[1])}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert distance_metrics(items[3:]) == {} and "kl" not in with_metrics(Evaluation({}, item_table([]))).metrics
    assert "kl" not in with_metrics(Evaluation({}, items, not_finite=1)).metrics


def test_distance_is_a_part_of_a_compressed_runs_identity_and_not_of_the_dense_run(tiny_folder):
    plain = made(tiny_folder, {"a": SUITE})
    asked = replace(plain, distance=True)
    assert asked.id != plain.id and asked.dense().id == plain.dense().id and asked.compressed_id == plain.compressed_id
    assert "distance" not in plain.identity and "distance" not in asked.dense().settings


def test_a_run_is_compared_with_its_dense_run(tiny_folder, tmp_path):
    store = RunStore(tmp_path / "outputs")
    asked = replace(made(tiny_folder, {"a": SUITE}), distance=True)
    dense, run = asked.dense().run(store, NoTracker()), asked.run(store, NoTracker())
    assert "kl" not in dense.items.columns and run.metrics["a.kl"] > 0 and 0 < run.metrics["a.gold_rms"] < 1
    assert run.metrics["a.positions"] >= run.items.height
    both = run.items.join(dense.items, on=["task", "id"], suffix="_dense")
    change = both["log_prob"].exp() - both["log_prob_dense"].exp()
    assert both["gold_change"].list.first().to_list() == pytest.approx(change.to_list(), abs=1e-6)
    untouched = replace(made(tiny_folder, {"a": SUITE}, sparsity=0.0), distance=True).run(store, NoTracker())
    assert untouched.metrics["a.kl_p99_9"] < 1e-6 and untouched.metrics["a.same_top"] == 1


def test_the_harness_itself_cannot_be_compared(tiny_folder):
    from knowledge_compression.evaluation.harness import Harness

    with pytest.raises(BadInput, match="choose scoring=fast"):
        replace(made(tiny_folder, {"h": Harness(["boolq"], scoring="stock")}), distance=True)


def far_run(answers, distance: float, **rest):
    """A run whose items have distances about a value, of one, two and three positions."""
    run = made_run(answers, **rest)
    lists = [[distance * (1 + i % 3 + k) for k in range(1 + i % 3)] for i in range(len(answers))]
    run._items = run.items.with_columns(
        kl=pl.Series(lists, dtype=pl.List(pl.Float32)),
        reverse_kl=pl.Series(lists, dtype=pl.List(pl.Float32)),
        same_top=pl.Series([[True] * len(of) for of in lists], dtype=pl.List(pl.Boolean)),
        gold_change=pl.Series([[0.1 * (-1) ** i] for i in range(len(answers))], dtype=pl.List(pl.Float32)),
    )
    run.metrics |= {f"atlas.{name}": value for name, value in distance_metrics(run.items).items()}
    return run


def test_tables_and_page_tell_distances_with_intervals_over_items():
    rng = np.random.default_rng(2)
    runs = [made_run(rng.random(60) < 0.8, compression="none"), far_run(rng.random(60) < 0.7, 0.01)]
    comparisons = compare(runs)
    (row,) = tables.distance_table(comparisons).rows
    kl, lists = row["kl"], runs[1].items["kl"].to_list()
    assert kl.value == pytest.approx(np.mean([x for of in lists for x in of]))
    redrawn = [lists[i] for i in range(60)]
    draws = rng.integers(60, size=(3000, 60))
    means = [np.mean([x for i in draw for x in redrawn[i]]) for draw in draws]  # of positions, items drawn anew
    low, high = np.quantile(means, [0.025, 0.975])
    assert (kl.low, kl.high) == pytest.approx((low, high), rel=0.03)
    assert row["gold_rms"].value == pytest.approx(0.1) and row["kl_p99_9"] == runs[1].metrics["atlas.kl_p99_9"]
    assert "& 0.03 [" in tables.distance_table(comparisons).latex()
    assert "| 0.03 [" in markdown.distances(comparisons)[-1]
    assert '"kl": [0.01, 0.025' in json.dumps(_facts(comparisons.groups[0], 1))


@pytest.mark.slow
def test_in_a_browser_distances_are_told_beside_flips(tmp_path, page_in_browser):
    rng = np.random.default_rng(2)
    runs = [made_run(rng.random(60) < 0.8, compression="none")]
    runs += [far_run(rng.random(60) < 0.7, far, sparsity=sparsity) for far, sparsity in ((0.01, 0.2), (0.1, 0.4))]
    (tmp_path / "report.html").write_text(render(runs))
    page = page_in_browser(tmp_path / "report.html")
    assert page.locator("#distance-table tbody tr").count() == 2
    assert "0.0300 [" in page.locator("#distance-table").inner_text()
    assert page.locator("#distance-chart .scatterlayer .trace").count() == 1
    page.click("#fact-list details.fact summary >> nth=0")
    page.wait_for_selector("#fact-list table")
    assert "kl from the dense" in page.locator("#fact-list table").inner_text().lower()
    (tmp_path / "report.html").write_text(render(runs[:1]))
    assert not page_in_browser(tmp_path / "report.html").locator("#distance").is_visible()


def test_tasks_of_the_harness_are_compared_and_what_is_generated_is_not(tiny_model, tasks_dir, monkeypatch, caplog):
    from knowledge_compression.evaluation.harness import Harness

    model = tiny_model("llama")
    other, suite = disturbed(model), Harness(tasks=["winogrande", "triviaqa"], limit=4, data_dir=str(tasks_dir))
    said, real = [], Scorer.generate
    monkeypatch.setattr(Scorer, "generate", lambda self, *of: (said.append(self.model.network), real(self, *of))[1])
    beside = Beside(lambda: model, "dense")
    parts = {name: beside.ask(part, Scorer(other), name) for name, part in suite.parts().items()}
    found = with_metrics(suite.joined(parts))
    of_task = {task: found.items.filter(pl.col("task") == task) for task in ("winogrande", "triviaqa")}
    assert of_task["winogrande"]["kl"].list.len().min() >= 1 and of_task["triviaqa"]["kl"].null_count() == 4
    assert found.metrics["winogrande.kl"] == found.metrics["kl"] > 0 and "triviaqa.kl" not in found.metrics
    assert set(map(id, said)) == {id(other.network)}  # the dense model says nothing
    assert [message for message in caplog.messages if "generated answers" in message] == [
        "distance=true: nothing of triviaqa is compared, because generated answers have no distance"
    ]
    assert not [name for part in parts.values() for name in part.fallbacks]


def test_behind_a_prompt_both_models_read_the_same_text(tiny_model):
    model = tiny_model("gpt2")
    other = disturbed(model)

    class Prompted(Scorer):
        """Has less room, as behind prompts."""

        max_positions = 20

    @dataclass(frozen=True)
    class Filling:
        """A suite that asks as much as there is room for."""

        def evaluate(self, scorer):
            row = [8 + i % 40 for i in range(scorer.max_positions)]
            return Asking((Blank(row, items=("b",)),)).evaluate(scorer)

    found = Beside(lambda: model, "dense").ask(Filling(), Prompted(other), "asked")
    assert len(found.items["kl"][0]) == 1 and not found.fallbacks


def test_suites_that_do_not_score_are_left_alone(tiny_model):
    class Timing(Asking):
        scores = False

    model = tiny_model("gpt2")
    found = Beside(lambda: pytest.fail("the dense model is not needed"), "dense").ask(
        Timing((Blank([8, 9], items=("b",)),)), Scorer(model), "asked"
    )
    assert "kl" not in found.items.columns


def test_a_notebook_compares_with_a_dense_model_at_hand(tiny_model):
    model = tiny_model("llama")
    other, suite = disturbed(model), suite_for(model)
    found = kc.ask(other, suite, dense=model)
    assert found.metrics["kl"] > 0 and found.items.equals(compared(model, other, suite).items)
    assert "kl" not in kc.ask(other, suite).metrics


@pytest.mark.parametrize(
    "suite", [WorldProbes(), WorldProbes(native=False), WorldTwoHop()], ids=["both", "typed", "two_hop"]
)
@pytest.mark.parametrize("family", [ENCODER, ENCODER_DECODER, DECODER])
def test_the_controlled_worlds_questions_are_compared_where_their_answers_begin(family, suite, tmp_path):
    world = generate(replace(SMALL, two_hop=0.5))
    files.write(world, tmp_path)
    tokenizer = train_tokenizer(world, family)
    torch.manual_seed(0)
    network = _network(Shape(16, 2, 2).config(family, tokenizer), "cpu").eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight *= (
                6 if family != ENCODER_DECODER and weight.ndim > 1 else 1
            )  # so that every question is answered otherwise
    model = Model(network, tokenizer, "world", {"world": str(tmp_path)})
    other = disturbed(model)
    items = compared(model, other, suite).items
    assert items.height > 20 and items["kl"].list.first().quantile(0.1) > 1e-4
    texts = {cloze.id: cloze.sentence for cloze in suite.questions(model).asked}
    for row in items.sample(20, seed=0).iter_rows(named=True):
        before, after = (answer_logits(one, texts[row["id"]]) for one in (model, other))
        p, q = softmax(before), softmax(after)
        assert row["kl"] == pytest.approx([rel_entr(p, q).sum()], rel=5e-3, abs=2e-6)
        assert row["reverse_kl"] == pytest.approx([rel_entr(q, p).sum()], rel=5e-3, abs=2e-6)
        (gold,) = tokenizer(row["gold"], add_special_tokens=False)["input_ids"]
        assert row["gold_change"] == pytest.approx([q[gold] - p[gold]], abs=1e-6)
        assert row["same_top"] == [p.argmax() == q.argmax()]
    same = compared(model, replace(model, network=deepcopy(network)), suite).items
    assert not any(same["kl"].explode()) and same["same_top"].explode().all()


@torch.no_grad()
def answer_logits(model, sentence: str) -> np.ndarray:
    """A network's logits at the blank of a sentence, in a pass of its own, float64."""
    tokenizer, network = model.tokenizer, model.network
    if model.family == DECODER:
        ids = tokenizer(sentence.split(" [MASK]")[0], return_tensors="pt")["input_ids"]
        return network(input_ids=ids).logits[0, -1].double().numpy()
    mask = tokenizer.mask_token if model.family == ENCODER else "<extra_id_0>"
    ids = tokenizer(sentence.replace("[MASK]", mask), return_tensors="pt")["input_ids"]
    if model.family == ENCODER:
        (place,) = (ids[0] == tokenizer.mask_token_id).nonzero()[0]
        return network(input_ids=ids).logits[0, place].double().numpy()
    said = torch.tensor([[model.decoder_start, tokenizer.convert_tokens_to_ids(mask)]])
    return network(input_ids=ids, decoder_input_ids=said).logits[0, -1].double().numpy()
