"""What decides a run is read off the fields of its parts: whatever made them, and whatever no file lists."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import knowledge_compression as kc
from helpers.experiments import SUITE, made
from helpers.shipped import NEEDED, shipped
from knowledge_compression.building import build
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.random_pruning import RandomPruning
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.corpora.own_samples import OwnSamples
from knowledge_compression.corpora.text import TextFile
from knowledge_compression.errors import BadInput
from knowledge_compression.identity import identity, plain
from knowledge_compression.recovery.lora import Lora
from knowledge_compression.results.varying import Names, varied
from knowledge_compression.sweeping.sweeper import PlannedSweeper
from knowledge_compression.training import TrainingSettings

PARTS = ["compression=gptq", "compression=sparsegpt", "compression=prune_int8", "recovery=lora", "recovery=idp"]
PARTS += ["corpus=self", "target=att", "eval=atlas", "eval=latency", "model=bert_tiny"]
WRONG = [["a", {}], {"a": 1}, "no such value", -1e300, True, 1 << 70, float("nan")]


def test_a_replaced_field_is_another_run_and_a_speed_is_not(tiny_folder, tmp_path):
    (tmp_path / "a.txt").write_text("some words")
    text = TextFile(path=str(tmp_path / "a.txt"))
    run = replace(made(tiny_folder, {"atlas": SUITE}), corpus=text)
    lora = Lora(training=TrainingSettings(steps=10))
    tuned = replace(run, recovery=lora)
    assert replace(tuned, recovery=replace(lora, rank=64)).id != tuned.id
    assert replace(tuned, recovery=replace(lora, roles=("ff",))).id != tuned.id  # no file lists it
    slower = replace(lora, training=replace(lora.training, checkpoint_every=3))
    assert replace(tuned, recovery=slower).id == tuned.id
    quantized = replace(run, compression=Gptq())
    faster = replace(run, compression=Gptq(block_size=32, device="cpu"))
    assert faster.id == quantized.id != replace(run, compression=Gptq(bits=3)).id


def test_what_draws_nothing_carries_no_seed(tiny_folder):
    run = made(tiny_folder, {"atlas": SUITE})
    assert replace(run, seed=7).id == run.id and run.settings["seed"] is None
    drawn = replace(run, compression=RandomPruning(0.5, seed=1))
    assert drawn.id != replace(run, compression=RandomPruning(0.5, seed=2)).id and drawn.settings["seed"] == 0


@pytest.mark.parametrize("choice", PARTS)
def test_a_part_is_built_again_from_its_plain_form(choice):
    part = kc.choose(choice)
    again = build(choice.partition("=")[0], plain(part))
    assert identity(again) == identity(part) and plain(again) == plain(part)


@pytest.mark.parametrize("choice", PARTS)
def test_a_value_of_a_wrong_kind_is_one_line_for_every_field(choice):
    part = kc.choose(choice)
    settings = plain(part)
    for field in fields(part):
        for value in WRONG:
            try:
                build("part", settings | {field.name: value})
            except BadInput as error:
                assert "\n" not in str(error)
        with pytest.raises(BadInput, match=r"does not fit|no setting"):
            build("part", settings | {field.name: {"no such": [object]}})
    with pytest.raises(BadInput, match=r"there is no setting part\.colour"):
        build("part", settings | {"colour": "red"})


@pytest.mark.parametrize("choice", shipped("compression", "recovery", "corpus", "eval", "model"))
def test_no_number_of_any_part_may_be_below_zero_or_beyond_64_bits(choice):
    """Found out from the settings alone: nothing is loaded."""
    part = build("part", settings_of(choice))
    looked_at = [(part, lambda value: value)]
    looked_at += [
        (getattr(part, one.name), lambda value, name=one.name: {name: value})
        for one in fields(part)
        if is_dataclass(getattr(part, one.name))
    ]
    for inner, placed in looked_at:
        hints = get_type_hints(type(inner))
        for one in fields(inner):
            if one.init and {int, float} & {hints[one.name], *get_args(hints[one.name])}:
                for value in (-7, 1 << 70, float("nan")):
                    setting = placed({one.name: value})
                    with pytest.raises(BadInput) as refusal:
                        build("part", merged(plain(part), setting))
                    assert "\n" not in str(refusal.value)


@cache
def settings_of(choice):
    given = dict(one.split("=") for one in NEEDED.get(choice, []))
    named = {key.rpartition(".")[2]: None if value == "null" else value for key, value in given.items()}
    return plain(kc.choose(choice, **named))


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
ANYTHING = st.recursive(
    PLAIN, lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=6), one, max_size=3)
)


@given(choice=st.sampled_from(shipped("compression", "recovery", "corpus", "eval", "model", "target")), data=st.data())
@settings(max_examples=200)
def test_whatever_a_field_is_given_is_taken_as_it_is_or_refused_in_one_line(choice, data):
    told = settings_of(choice)
    name = data.draw(st.sampled_from([*sorted(told.keys() - {"_target_"}), "a setting that it has not"]))
    value = data.draw(ANYTHING)
    try:
        part = build("part", told | {name: value})
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        assert build("part", plain(part)) == part
        if isinstance(value, bool | str | None):
            assert getattr(part, name) == value


def merged(settings, changes):
    """Settings with some of them, at any depth, changed."""
    inner = {key: merged(settings[key], value) for key, value in changes.items() if isinstance(value, dict)}
    return settings | changes | inner


def test_nested_settings_are_checked_like_any_other():
    assert kc.choose("recovery=lora", training={"tokens": 100}).training.tokens == 100
    assert is_dataclass(kc.choose("recovery=lora", roles=["ff"]))
    with pytest.raises(BadInput, match=r"recovery\.training\.tokens=much"):
        kc.choose("recovery=lora", training={"tokens": "much"})
    with pytest.raises(BadInput, match=r"no setting recovery\.training\.tokns \(did you mean tokens"):
        kc.choose("recovery=lora", training={"tokns": 1})


def test_a_place_is_given_where_the_file_asks_for_one(tmp_path, tiny_folder):
    text = tmp_path / "a.txt"
    text.write_text("some words")
    assert kc.choose("corpus=text", path=str(text)).path == str(text)
    assert kc.load("local", path=str(tiny_folder), device="cpu").name == "local"
    assert kc.choose("model=local", path=str(tiny_folder), name="mine").name == "mine"


def test_numbers_have_one_plain_form():
    assert identity(Magnitude(0.1 + 0.2)) == identity(Magnitude(0.3))


def test_just_what_varies_is_named(tiny_folder):
    run = made(tiny_folder, {"atlas": SUITE})
    runs = [replace(run, compression=Magnitude(s, scope="layer")) for s in (0.1, 0.2)]
    assert [(one.name, list(one.values)) for one in varied([r.settings for r in runs])] == [("sparsity", [0.1, 0.2])]
    with_dense = varied([r.settings for r in [*runs, run.dense()]])
    assert [(one.name, list(one.values)) for one in with_dense] == [("sparsity", [0.1, 0.2, None])]


def test_runs_are_called_by_what_varies_and_nothing_else(tiny_folder):
    pruned = made(tiny_folder, {"atlas": SUITE})
    rounded = [replace(pruned, compression=Rtn(bits=bits, group_size=size)) for bits in (2, 4) for size in (8, 16)]
    drawn = [replace(pruned, compression=Gptq(bits=3), corpus=OwnSamples(seed=seed), seed=seed) for seed in (0, 1)]

    def called(*runs, without=()):
        names = Names({run.id: run.settings for run in runs})
        return [names.of(run.id, without) for run in runs]

    alike = [f"bits={bits} group_size={size}" for bits in (2, 4) for size in (8, 16)]
    assert called(pruned.dense(), *rounded) == ["dense", *alike]
    assert called(*rounded, without=("group_size",)) == [f"bits={bits}" for bits in (2, 2, 4, 4)]
    assert called(*drawn, *rounded[:1])[:2] == [f"gptq seed={seed}" for seed in (0, 1)]
    assert called(*rounded[:1], *drawn, without=("seed", "compression")) == ["tiny all"] * 3
    assert called(pruned.dense()) == ["dense"]
    ways = [Magnitude(0.5, "layer"), Magnitude(0.6, "layer"), Magnitude(0.2, "layer", pattern="2:4")]
    pattern_alone = ["sparsity=0.5", "sparsity=0.6", "pattern=2:4"]  # it sets the sparsity
    assert called(*(replace(pruned, compression=way) for way in ways)) == pattern_alone
    lens = replace(pruned, suites={"other": SUITE})
    assert called(pruned, lens) == ["atlas", "other"]


def test_grids_of_a_preset_are_swept_each_by_itself():
    grids = [{"compression": "rtn", "compression.bits": "2,4"}, {"compression": "magnitude", "sparsity": [0.2, 0.4]}]
    jobs = PlannedSweeper({"target": "all"}, grids)._jobs(["seed=1"])
    bits = [["target=all", "compression=rtn", f"++compression.bits={n}", "seed=1"] for n in (2, 4)]
    assert jobs == bits + [["target=all", "compression=magnitude", f"sparsity={s}", "seed=1"] for s in (0.2, 0.4)]
    pruned = [["target=all", f"sparsity={s}", "compression=magnitude"] for s in (0.2, 0.4)]
    assert PlannedSweeper({"target": "all"}, grids)._jobs(["compression=magnitude,gptq"]) == pruned  # selects a grid
    everywhere = PlannedSweeper({"target": "all"}, grids)._jobs(["compression=gptq"])  # which no grid has
    assert [job[-1] for job in everywhere] == ["compression=gptq"] * 4
    assert len(PlannedSweeper({"target": "all"}, grids)._jobs(["compression=magnitude,rtn"])) == 4
    with pytest.raises(BadInput, match=r"both sweep compression;"):
        PlannedSweeper({"compression": "rtn"}, grids)._jobs([])
