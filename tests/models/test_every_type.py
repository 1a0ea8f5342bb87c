"""Models of the types that people use first go through everything: a tiny one of each, with a tokenizer of its kind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.every_type import DECODERS, ENCODER_DECODERS, ENCODERS, TOKENIZERS, TYPES, sentences, write_tiny
from helpers.places import EXHAUSTIVE, ROOT
from knowledge_compression.compression.base import Compression
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.corpora.own_samples import own_samples
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.latency import Latency
from knowledge_compression.evaluation.lm import ScorerLM, stock_lm
from knowledge_compression.evaluation.scoring import Blank, Question, Scorer
from knowledge_compression.library import choose
from knowledge_compression.models import Model, Target
from knowledge_compression.models.families import ENCODER, ENCODER_DECODER
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.saving import full_state, save_checkpoint

pytestmark = pytest.mark.minutes

# One of each kind: fused projections, banks of experts, recurrent state beside attention, windows, chunks and experts,
# a state-space model, encoder, encoder-decoder, encoder-decoder with experts. The slow ones add one block used many
# times, word pieces, latent and linear attention, transposed weights and banks, embeddings narrower than the blocks,
# a transform between body and head, and what NEVER_RUN, IN_GROUPS and _PLAIN are about.
SAMPLE = {
    "phi3",
    "qwen2_moe",
    "bamba",
    "gemma2",
    "llama4_text",
    "mamba",
    "modernbert",
    "t5gemma",
    "switch_transformers",
}
SLOW_SAMPLE = {
    "albert",
    "electra",
    "deepseek_v3",
    "deepseek_v4",
    "modernbert-decoder",
    "zamba2",
    "gpt2",
    "gpt_oss",
    "jamba",
    "led",
    "mbart",
    "opt",
    "qwen3_next",
}
TRIED = TYPES.keys() if EXHAUSTIVE else SAMPLE | SLOW_SAMPLE


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in TYPES if name in TRIED],
)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model, written and then loaded as a user loads one; no test changes it."""
    folder = tmp_path_factory.mktemp("tiny") / request.param
    write_tiny(request.param, folder)
    return loaded(request.param, folder)


def loaded(name: str, folder: Path) -> Model:
    return LocalModel(name, str(folder)).load("cpu", "float32")


@cache
def target(name: str) -> Target:
    return choose(f"target={name}")


def windows(model: Model, samples: int = 6, length: int = 32) -> Tensor:
    ids = model.tokenizer(" ".join(sentences()[: 40 * samples]), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: samples * length]).view(samples, length)


@torch.no_grad()
def logits(model: Model) -> Tensor:
    ids = windows(model, 2, 24)
    decoder = {"decoder_input_ids": ids.flip(0)} if model.family == ENCODER_DECODER else {}
    return model.network(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder).logits


def matrices(model: Model) -> int:
    """Numbers in all parameters of two or more dimensions of numbered modules, pictures' apart: counted by names."""
    return sum(
        parameter.numel() * (model.network.config.num_hidden_layers if "albert_layers" in name else 1)
        for name, parameter in model.network.named_parameters()
        if parameter.dim() > 1 and re.search(r"\.\d+\.", name) and "vision" not in name
    )


def compressed(dense: Model, method: Compression, name: str) -> tuple[Model, Any]:
    model = Model(deepcopy(dense.network), dense.tokenizer, dense.name)
    report = method.compress(model, target(name).select(model), windows(model))
    return model, report


def back(model: Model, folder: Path) -> Model:
    save_checkpoint(model, folder)
    return loaded(model.name, folder)


@pytest.mark.parametrize("part", ["att", "ff", "all", "final"])
def test_magnitude(dense: Model, part: str, tmp_path: Path) -> None:
    if part in TYPES[dense.name].without:
        with pytest.raises(BadInput, match="does not have; it has"):
            target(part).select(dense)
        return
    before = {name: parameter.clone() for name, parameter in dense.network.named_parameters()}
    model, report = compressed(dense, Magnitude(0.5), part)
    layers = list(target(part).select(model))
    assert report.removed == round(0.5 * sum(layer.parameters for layer in layers)) > 0
    assert sum(int((layer.weight == 0).sum()) for layer in layers) == report.removed
    touched = {layer.weight_name for layer in layers}
    for name, parameter in model.network.named_parameters():
        if name in before:  # a head that was tied has a weight of its own now
            assert torch.equal(parameter, before[name]) == (name not in touched), name
    if part == "all":
        selected = target(part).select(dense)
        assert sum(layer.parameters * layer.uses for layer in selected) + sum(
            part.parameters for part in selected.left_out
        ) == matrices(dense)
    elsewhere = logits(model)
    assert elsewhere.isfinite().all() and not torch.equal(elsewhere, logits(dense))
    if part in ("all", "final"):  # which hold what the others do
        assert torch.equal(logits(back(model, tmp_path / "again")), elsewhere)


def test_int8(dense: Model, tmp_path: Path) -> None:
    if dense.name in IN_GROUPS:
        with pytest.raises(BadInput, match=r"are not linear layers, e\.g\. model\.layers\.0\.self_attn\.o_a_proj"):
            compressed(dense, Int8Dynamic("per_channel"), "all")
        return
    model, report = compressed(dense, Int8Dynamic("per_channel"), "all")
    assert {layer.bits for layer in report.layers} == {8.0}
    assert 0 < (logits(model) - logits(dense)).norm() < 0.1 * logits(dense).norm()
    held, read = full_state(model.network), back(model, tmp_path / "again").network.state_dict()
    assert held.keys() == read.keys()
    assert all(torch.equal(tensor, read[name]) for name, tensor in held.items())


def test_gptq(dense: Model, tmp_path: Path) -> None:
    model, report = compressed(dense, Gptq(bits=4, group_size=8), "all")
    assert {layer.bits for layer in report.layers} == {4.0}
    without = {layer.path for layer in report.layers if "no_tokens" in layer.fallbacks and layer.role != "experts"}
    assert {path.rpartition(".")[2] for path in without} == NEVER_RUN.get(dense.name, set())
    assert 0 < (logits(model) - logits(dense)).norm() < 0.5 * logits(dense).norm()
    assert torch.equal(logits(back(model, tmp_path / "again")), logits(model))


def test_scoring(dense: Model) -> None:
    if dense.family == ENCODER:
        compare(masked(dense, Scorer(dense)))
    elif dense.name in _PLAIN:
        compare(said_alone(dense))
    else:
        compare(asked(dense))


# Recurrent state alone, beside attention and in the same blocks, no cache at all, and positions counted over padding.
@pytest.mark.parametrize("name", ["mamba", "qwen3_next", "falcon_h1", "recurrent_gemma", "bart", "led"])
def test_what_it_says_does_not_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    write_tiny(name, tmp_path)
    model = loaded(name, tmp_path)
    with torch.no_grad():
        for parameter in model.network.parameters():  # so that what it says depends on all that it reads
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    prompts = [model.tokenizer(text)["input_ids"] for text in _texts()[:6]]
    alone = [said_by(model, prompt, 5) for prompt in prompts]
    ends = {tuple(said[: 1 + i % 5]) for i, said in enumerate(alone)}  # not all at once
    wanted = [next(said[:n] for n in range(1, 6) if n == 5 or tuple(said[:n]) in ends) for said in alone]
    assert Scorer(model).generate(prompts, 5, lambda said: tuple(said) in ends) == wanted
    assert len(set(map(tuple, alone))) > 1


@pytest.mark.parametrize("name", ["mamba", "recurrent_gemma"])
def test_a_network_without_keys_and_values_writes_its_own_text_and_is_timed(name: str, tmp_path: Path) -> None:
    write_tiny(name, tmp_path)
    model = loaded(name, tmp_path)
    ids = own_samples(model, 3, 12, seed=0)
    assert ids.shape == (3, 12) and not torch.equal(ids[0], ids[1])
    timed = Latency(batch=2, length=8, decode_tokens=2, repeats=1, warmup=0).evaluate(Scorer(model)).metrics
    assert ("decode_seconds" in timed) == (name == "mamba") and timed["prefill_seconds"] > 0


@torch.no_grad()
def said_by(model: Model, prompt: list[int], most: int) -> list[int]:
    """The likeliest tokens after a prompt, by plain passes over all of it."""
    said: list[int] = []
    for _ in range(most):
        inputs: dict[str, Any] = {"input_ids": torch.tensor([[*prompt, *said]])}
        if model.family == ENCODER_DECODER:
            inputs = {"input_ids": torch.tensor([prompt])}
            inputs["decoder_input_ids"] = torch.tensor([[model.decoder_start, *said]])
        said.append(int(model.network(**inputs, use_cache=False).logits[0, -1].argmax()))
    return said


# Layers through which no text goes: for tokens that all others see, or whose weight the network multiplies by itself.
NEVER_RUN = {
    "led": {"query_global", "key_global", "value_global"},
    "mamba": {"dt_proj"},
    "jamba": {"dt_proj"},
    "zamba2": {"0", "1"},  # adapters of a shared layer, each for another of the blocks that share it
}
# Types whose attention multiplies parts of its output by parts of a weight.
IN_GROUPS = ("deepseek_v4",)
# Stock begins what a decoder says as the network's training does: mBART's labels end in the language's token, which
# is moved to the front. An answer has no such token, so with stock the decoder reads the answer's last token first.
_PLAIN = ("mbart",)


def compare(pairs: Iterator[tuple[Any, Any]]) -> None:
    for found, expected in pairs:
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def masked(model: Model, scorer: Scorer) -> Iterator[tuple[Any, Any]]:
    """Log-probabilities of each word at a masked place, by the scorer and by a plain pass over the text alone."""
    blanks = []
    for i, text in enumerate(_texts()):
        ids = model.tokenizer(text)["input_ids"]
        place = 1 + i % (len(ids) - 2)
        blanks.append(Blank([*ids[:place], model.tokenizer.mask_token_id, *ids[place + 1 :]], position=place))
    for indices, rows in scorer.distributions(blanks):
        for i, row in zip(indices, rows, strict=True):
            with torch.no_grad():
                plain = model.network(input_ids=torch.tensor([blanks[i].ids])).logits[0, blanks[i].position]
            yield row.tolist(), plain.log_softmax(-1).tolist()


def asked(model: Model) -> Iterator[tuple[Any, Any]]:
    """Log-likelihoods of continuations, by our core and by stock lm-eval."""
    from lm_eval.api.instance import Instance

    texts = _texts()
    requests = [
        Instance("loglikelihood", {}, (text, f" {end}"), i)
        for i, text in enumerate(texts)
        for end in ("Paris", "the moon of Saturn", "1", texts[-i])
    ]
    fast = ScorerLM(Scorer(model)).loglikelihood(requests)
    for ours, theirs in zip(fast, stock_lm(Scorer(model)).loglikelihood(requests, disable_tqdm=True), strict=True):
        yield ours[0], theirs[0]


def said_alone(model: Model) -> Iterator[tuple[Any, Any]]:
    """Log-likelihoods of what an encoder-decoder says, by the scorer and by a plain pass over each text alone."""
    texts = [model.tokenizer(text)["input_ids"] for text in _texts()]
    answers = [texts[-i] for i in range(len(texts))]
    asked = [Question(text, [answer]) for text, answer in zip(texts, answers, strict=True)]
    for (found,), text, answer in zip(Scorer(model).log_likelihoods(asked), texts, answers, strict=True):
        said = torch.tensor([[model.network.config.decoder_start_token_id, *answer[:-1]]])
        with torch.no_grad():
            rows = model.network(input_ids=torch.tensor([text]), decoder_input_ids=said).logits[0].log_softmax(-1)
        yield found.log_prob, sum(float(row[token]) for row, token in zip(rows, answer, strict=True))


def _texts() -> Sequence[str]:
    """Short ones and some that are longer than the tiny networks' windows."""
    return [" ".join(sentences()[i : i + 1 + i % 5]) for i in range(0, 60, 6)]


def test_the_sample_has_every_family_and_tokenizer() -> None:
    families = {"decoder": DECODERS, "encoder": ENCODERS, "encoder_decoder": ENCODER_DECODERS}
    assert all(SAMPLE & types.keys() for types in families.values()) and TYPES.keys() >= SAMPLE | SLOW_SAMPLE
    assert {TYPES[name].tokenizer for name in SAMPLE | SLOW_SAMPLE} == TOKENIZERS.keys()
    assert NEVER_RUN.keys() | set(_PLAIN) | set(IN_GROUPS) <= SAMPLE | SLOW_SAMPLE  # which are treated by themselves


def test_the_page_gives_their_number() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    assert f"\n{len(TYPES)} types were tried from end to end" in page
    assert all(f"| {name} |" in page for name in TYPES)
