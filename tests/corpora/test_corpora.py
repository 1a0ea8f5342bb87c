"""Corpora: the published draw, the splits, the model's own samples, and bad input."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.experiments import SUITE, made
from helpers.networks import WORDS
from knowledge_compression.compression.methods.wanda import Wanda
from knowledge_compression.corpora.c4 import C4
from knowledge_compression.corpora.corpus import TEST, VALIDATION, digest, hub_texts
from knowledge_compression.corpora.own_samples import OwnSamples, own_samples
from knowledge_compression.corpora.text import TextFile
from knowledge_compression.corpora.wikitext import WikiText
from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.harness import Harness
from knowledge_compression.evaluation.lama import Lama
from knowledge_compression.evaluation.perplexity import Perplexity
from knowledge_compression.evaluation.similarity import Similarity
from knowledge_compression.models import Model
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.results.store import RunStore
from knowledge_compression.results.tracker import NoTracker

TEXTS = [" ".join(random.Random(i).choices(WORDS, k=40)) for i in range(20)]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_draw_is_that_of_the_published_scripts(tiny_model: Callable[[str], Model], text_file: Path) -> None:
    model = tiny_model("llama")
    tokens = model.tokenizer("\n\n".join(TEXTS), add_special_tokens=False)["input_ids"]
    random.seed(0)
    expected = []
    for _ in range(6):
        start = random.randint(0, len(tokens) - 16 - 1)
        expected.append(tokens[start : start + 16])
    corpus = TextFile(path=str(text_file), samples=6, length=16, seed=0, bos=False)
    assert corpus.windows(model).tolist() == expected
    behind = [[model.tokenizer.bos_token_id, *window[:-1]] for window in expected]  # as its tokenizer begins a text
    for bos in ("auto", True):
        assert replace(corpus, bos=bos).windows(model).tolist() == behind
    tuned = replace(corpus, bos="auto").token_stream(model).view(-1, 16)
    assert set(tuned[:, 0].tolist()) == {model.tokenizer.bos_token_id}
    assert tuned[:, 1:].flatten().tolist() == tokens[: tuned[:, 1:].numel()] and len(tuned) == len(tokens) // 15


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_only_a_decoder_reads_behind_a_beginning_of_text_token(
    family: str, tiny_model: Callable[[str], Model], text_file: Path
) -> None:
    corpus = TextFile(path=str(text_file), samples=2, length=8)
    model = tiny_model(family)
    assert torch.equal(corpus.windows(model), replace(corpus, bos=False).windows(model))
    with pytest.raises(BadInput, match=r"corpus\.bos=true: .* is not a decoder; choose auto or false"):
        replace(corpus, bos=True).windows(model)
    with pytest.raises(BadInput, match=r"corpus\.bos=maybe does not exist; choose one of auto, true, false"):
        replace(corpus, bos="maybe")


@given(seed=st.integers(0, 2**32), samples=st.integers(1, 5), length=st.integers(1, 30))
def test_windows_are_pieces_of_the_stream(seed: int, samples: int, length: int, word_model: Model) -> None:
    corpus = TextFile(path=str(word_model.provenance["path"]), samples=samples, length=length, seed=seed, bos=False)
    windows, stream = corpus.windows(word_model), corpus.token_stream(word_model)
    assert windows.shape == (samples, length)
    assert torch.equal(windows, corpus.windows(word_model))
    pieces = stream.unfold(0, length, 1)
    assert all((pieces == window).all(1).any() for window in windows)


@pytest.fixture(scope="module")
def word_model(tiny_tokenizer: object, tmp_path_factory: pytest.TempPathFactory) -> Model:
    from helpers.networks import build_network

    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(TEXTS))
    return Model(build_network("llama"), tiny_tokenizer, "words", provenance={"path": path})  # type: ignore[arg-type]


def test_c4_reads_the_split_that_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "c4"
    folder.mkdir()
    (folder / "sample.jsonl").write_text('{"text": "the sample"}\n')
    corpus = C4(data_dir=str(tmp_path))
    assert corpus.documents().texts == ["the sample"]
    assert not caplog.records
    assert corpus.documents(TEST).texts == ["the sample"]
    assert "the calibration text" in caplog.text
    (folder / "c4-validation.jsonl").write_text('{"text": "held out"}\n')
    assert corpus.documents(TEST).texts == ["held out"]
    assert corpus.documents().texts == ["the sample"]


def test_wikitext_keeps_the_hubs_rows(tmp_path: Path) -> None:
    folder = tmp_path / "wikitext2"
    folder.mkdir()
    (folder / "validation.tokens.txt").write_text(" \n = A title = \n \n A <unk> . \n")
    (folder / "test.raw.txt").write_text(" \n = Raw = \n")
    corpus = WikiText(data_dir=str(tmp_path))
    assert corpus.documents(TEST).texts == ["", " = Raw = \n"]
    assert corpus.documents().texts == ["", " = A title = \n", "", " A <unk> . \n"]
    (folder / "train.raw.txt").write_text(" = Train = \n")
    assert corpus.documents().texts == [" = Train = \n"]
    assert corpus.documents(VALIDATION).texts[1] == " = A title = \n"


def test_the_test_text_never_calibrates(tmp_path: Path) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.raw.txt").write_text("a test")
    with pytest.raises(DataUnavailable, match=r"no train text.*train\.raw\.txt"):
        WikiText(data_dir=str(tmp_path)).documents()


def test_other_text_is_another_run(text_file: Path) -> None:
    corpus = TextFile(path=str(text_file))
    before = corpus.fingerprint()
    assert before == TextFile(path=str(text_file), samples=3).fingerprint()
    text_file.write_text(text_file.read_text() + '{"text": "more"}\n')
    assert corpus.fingerprint() != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\nnot json\n', r"line 2: not JSON"),
        ('{"words": "no"}\n', r"line 1 is not a JSON object with a string under \"text\""),
        ('{"text": 3}\n', r"line 1"),
        ("[1]\n", r"line 1"),
        ("\n\n", r"holds no text"),
    ],
)
def test_a_bad_jsonl_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(BadInput, match=message) as caught:
        TextFile(path=str(path)).documents()
    assert "\n" not in str(caught.value)


def test_bad_windows_are_refused(tiny_model: Callable[[str], Model], text_file: Path, tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.network.config.max_position_embeddings = 64
    with pytest.raises(BadInput, match=r"length=65 is longer than tiny-bert's 64 positions"):
        TextFile(path=str(text_file), length=65).windows(model)
    with pytest.raises(BadInput, match=r"length=65"):
        OwnSamples(length=65).windows(model)
    with pytest.raises(BadInput, match=r"tokens, too few for windows of 4000"):
        TextFile(path=str(text_file), length=4000).windows(tiny_model("t5"))
    for wrong in ({"samples": 0}, {"length": 0}):
        with pytest.raises(BadInput, match="is too small; it must be at least 1"):
            TextFile(path=str(text_file), **wrong)
        with pytest.raises(BadInput, match="is too small; it must be at least 1"):
            OwnSamples(**wrong)
    with pytest.raises(DataUnavailable, match="cannot be read"):
        TextFile(path=str(tmp_path / "missing.txt")).fingerprint()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not UTF-8"):
        TextFile(path=str(tmp_path / "binary.txt")).documents()
    with pytest.raises(DataUnavailable, match=r"no \*\.jsonl for train"):
        C4(data_dir=str(tmp_path)).fingerprint()


def test_every_family_writes_samples(any_tiny_model: Model) -> None:
    model = any_tiny_model
    ids = own_samples(model, 3, 20, seed=1)
    assert ids.shape == (3, 20)
    assert torch.equal(ids, own_samples(model, 3, 20, seed=1))
    assert not torch.equal(ids, own_samples(model, 3, 20, seed=2))
    special = set(model.tokenizer.all_special_ids)
    ends = {2, 3} if model.family != "encoder_decoder" else set()  # [CLS] before, [SEP] after an encoder's text
    assert set(ids[:, 1:-1].flatten().tolist()).isdisjoint(special)
    assert set(ids[:, [0, -1]].flatten().tolist()) & special <= ends
    assert int(ids.max()) < len(model.tokenizer)


def test_samples_follow_the_models_distribution(tiny_model: Callable[[str], Model]) -> None:
    """A head that only ever says one word after another gives that word."""
    model = tiny_model("llama")
    model.network.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.network.lm_head.weight))
    model.network.lm_head.bias = torch.nn.Parameter(torch.zeros(model.network.config.vocab_size))
    with torch.no_grad():
        model.network.lm_head.bias[11] = 50.0
    assert (own_samples(model, 2, 8, seed=0)[:, 1:] == 11).all()


def test_the_samples_are_those_of_the_model_as_loaded(tiny_model: Callable[[str], Model], own_cache: Path) -> None:
    corpus, model = OwnSamples(samples=2, length=12), tiny_model("llama")
    prepared = corpus.prepared(model)
    before = prepared.windows(model)
    assert list((own_cache / "self").glob("[!.]*"))
    with torch.no_grad():
        model.network.model.layers[0].mlp.down_proj.weight.mul_(30)
    assert torch.equal(prepared.windows(model), before)
    assert torch.equal(prepared.token_stream(model), before.flatten())
    assert digest(corpus.windows(model)) != digest(before)


@pytest.mark.data
def test_the_reference_calibration_can_be_drawn(data_dir: Path, word_model: Model) -> None:
    windows = C4(data_dir=str(data_dir), samples=4, length=32).windows(word_model)
    assert windows.shape == (4, 32)
    assert len(WikiText(data_dir=str(data_dir)).documents(TEST).texts) > 4000


@pytest.mark.parametrize(
    ("suite", "corpus"),
    [
        (Perplexity(), None),
        (Perplexity(corpus="c4"), None),
        (Similarity(), None),
        (Lama(), None),
        (Harness(["boolq"]), None),
        (SUITE, WikiText()),
        (SUITE, C4()),
        (Similarity(data_dir="data"), None),  # has the training text alone, by which it is known
    ],
)
def test_data_that_is_not_to_be_had_is_missed_before_anything_is_loaded(
    suite: Any, corpus: Any, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("there is no hub")

    def too_late(*_: object) -> None:
        raise AssertionError("a model was loaded first")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(LocalModel, "load", too_late)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "wikitext2").mkdir(parents=True)
    (tmp_path / "data" / "wikitext2" / "train.raw.txt").write_text("a text\n")
    hub_texts.cache_clear()
    experiment = made(tiny_folder, {"suite": suite})
    if corpus is not None:
        experiment = replace(experiment, compression=Wanda(0.5), corpus=corpus)
    with pytest.raises(DataUnavailable) as refusal:
        experiment.run(RunStore(tmp_path / "outputs"), NoTracker())
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "outputs").exists()
