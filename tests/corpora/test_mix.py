"""A mix of corpora: how many windows each gives, in which order, what identifies it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import knowledge_compression as kc
from helpers.networks import WORDS
from knowledge_compression.corpora.mix import Mix
from knowledge_compression.corpora.text import TextFile
from knowledge_compression.errors import BadInput
from knowledge_compression.identity import digest_of, identity
from knowledge_compression.models import Model

WORD_OF = {"cats": "cat", "dogs": "dog", "fishes": "fish"}


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, TextFile]:
    """Texts of one word each, so that a window shows where it is from."""
    for number, (name, word) in enumerate(WORD_OF.items()):
        (tmp_path / name).write_text(f"{word} " * (100 * (number + 1)))
    return {name: TextFile(path=str(tmp_path / name), bos=False) for name in WORD_OF}


def mix(sources: Mapping[str, Any], weights: Mapping[str, float], samples: int = 12, seed: int = 0) -> Mix:
    return Mix(samples=samples, length=5, seed=seed, sources=sources, weights=weights)


def origins(rows: torch.Tensor, model: Model) -> list[str]:
    names = {model.tokenizer.convert_tokens_to_ids(word): name for name, word in WORD_OF.items()}
    assert WORDS and all(len(set(row.tolist())) == 1 for row in rows)
    return [names[int(row[0])] for row in rows]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [((1, 1, 1), (4, 4, 4)), ((1, 2, 3), (2, 4, 6)), ((0.5, 0.3, 0.2), (6, 4, 2)), ((10, 1, 1), (10, 1, 1))],
)
def test_each_source_gives_windows_by_its_weight(
    weights: Any, counts: Any, sources: Any, tiny_model: Callable[[str], Model]
) -> None:
    model = tiny_model("gpt2")
    of = dict(zip(sources, weights, strict=True))
    drawn = origins(mix(sources, of).windows(model), model)
    assert [drawn.count(name) for name in sources] == list(counts)
    assert drawn != sorted(drawn, key=list(sources).index)  # shuffled
    assert drawn == origins(mix(sources, of).windows(model), model)
    assert drawn != origins(mix(sources, of, seed=1).windows(model), model)


def test_running_text_repeats_nothing(sources: Any, tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("gpt2")
    stream = mix(sources, {"cats": 1, "dogs": 1, "fishes": 2}).token_stream(model)
    drawn = origins(stream.view(-1, 5), model)
    assert [drawn.count(name) for name in sources] == [20, 20, 40]  # all cats; dogs have 40, fishes 60


def test_every_source_identifies_it(sources: Any, tmp_path: Path) -> None:
    weights = {"cats": 1.0, "dogs": 1.0, "fishes": 2.0}
    found = {digest_of(identity(mix(sources, weights)))}
    found.add(digest_of(identity(mix(sources, weights | {"dogs": 1.5}))))
    (tmp_path / "dogs").write_text("dog dog cat")
    found.add(digest_of(identity(mix(sources, weights))))
    assert len(found) == 3


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"cats": 1, "dogs": 0, "fishes": 1}, "weights.dogs=0 is not a weight"),
        ({"cats": 1, "dogs": -1, "fishes": 1}, "weights.dogs=-1 is not a weight"),
        ({"cats": 1, "dogs": 1}, "fishes is in one of them"),
        ({"cats": 1, "dogs": 1, "fishes": 0.001}, "none of 12 windows"),
    ],
)
def test_weights_that_are_none_are_one_line(
    weights: Any, said: str, sources: Any, tiny_model: Callable[[str], Model]
) -> None:
    with pytest.raises(BadInput, match=said):
        mix(sources, weights).check_data()


def test_an_empty_source_is_one_line(sources: Any, tmp_path: Path, tiny_model: Callable[[str], Model]) -> None:
    (tmp_path / "dogs").write_text(" \n")
    with pytest.raises(BadInput, match="dogs holds no text"):
        mix(sources, dict.fromkeys(sources, 1)).windows(tiny_model("gpt2"))
    with pytest.raises(BadInput, match=r"corpus.sources is empty"):
        mix({}, {})


def test_the_shipped_mix_is_built_with_its_sources(data_dir: Path) -> None:
    made = kc.choose("corpus=mix", data_dir=str(data_dir), samples=4, length=8)
    assert [type(source).__name__ for source in made.sources.values()] == ["C4", "WikiText"]
    assert [source.samples for source in made.parts.values()] == [2, 2]
