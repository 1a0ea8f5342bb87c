"""The library: the same objects as on the command line."""

from __future__ import annotations

import pytest

import knowledge_compression as kc


def test_the_example_of_the_documentation():
    model = kc.load("bert_tiny")
    atlas = kc.choose("eval=atlas", relations=["capital_of", "language"])
    known = kc.ask(model, atlas)
    report = kc.compress(model, kc.choose("compression=magnitude", sparsity=0.9), kc.choose("target=all"))
    left = kc.ask(model, atlas)
    drop = kc.drop(known, left)
    assert report.sparsity == pytest.approx(0.9, abs=1e-4)
    assert drop.low <= drop.value <= drop.high and drop.value > 5


@pytest.mark.parametrize(
    ("choice", "settings", "said"),
    [
        ("compression=magnitud", {}, "did you mean magnitude"),
        ("compresion=magnitude", {}, "model, target, compression"),
        ("compression=magnitude", {"colour": "red"}, "sparsity"),
        ("compression=magnitude", {"sparsity": 2}, "must lie in"),
        ("model=local", {}, "path"),
    ],
)
def test_bad_input_is_our_exception_with_one_line(choice, settings, said):
    with pytest.raises(kc.BadInput, match=said) as refusal:
        kc.choose(choice, **settings)
    assert "\n" not in str(refusal.value)


def test_evaluations_of_different_questions_are_not_compared():
    model = kc.load("bert_tiny")
    one, other = (kc.ask(model, kc.choose("eval=atlas", relations=[r])) for r in ("capital_of", "currency"))
    with pytest.raises(kc.BadInput, match="different items"):
        kc.drop(one, other)
