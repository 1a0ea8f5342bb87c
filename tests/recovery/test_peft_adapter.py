"""Adapter folders that peft wrote, beside peft's own reading of them, and folders that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from helpers.networks import build_network
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring import Question, Scorer
from knowledge_compression.models import Model, Target
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.recovery.base import RestoresBy
from knowledge_compression.recovery.peft_adapter import PeftAdapter

KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(task_type=TaskType.CAUSAL_LM, r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"]),
    "dora": lambda: LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, use_dora=True, target_modules=["v_proj"]),
    "prompt": lambda: PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5, prompt_tuning_init=PromptTuningInit.RANDOM
    ),
    "prefix": lambda: PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4),
}


def written(folder: Path, kind: str, architecture: str = "llama", **wide: Any) -> Path:
    """An adapter of random numbers, saved by peft."""
    torch.manual_seed(1)
    model = get_peft_model(build_network(architecture, **wide), KINDS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_answers_as_peft_does(kind: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = written(tmp_path, kind)
    model = Model(build_network("llama"), tiny_tokenizer, "llama")
    ids = torch.tensor([[9, 12, 30, 41], [8, 8, 50, 13]])
    with torch.no_grad():
        plain = model.network(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(build_network("llama"), folder).eval()(input_ids=ids).logits[:, -4:]
    before = {name: parameter.clone() for name, parameter in model.network.named_parameters()}
    recovered = PeftAdapter(str(folder)).recover(model, None)
    with torch.no_grad():
        ours = model.network(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=2e-5) and not torch.allclose(ours, plain, atol=1e-3)
    after = dict(model.network.named_parameters())
    assert all(torch.equal(after.get(name, after.get(_based(name))), tensor) for name, tensor in before.items())
    assert recovered.report.trainable_parameters == sum(
        t.numel() for t in load_file(folder / "adapter_model.safetensors").values()
    )
    way = RestoresBy.WEIGHTS if "ora" in kind else RestoresBy.REDIRECTION
    assert recovered.restores_by == way
    asked = Question([9, 12], [[30], [41]], items=["one"])
    (scores,) = Scorer(model, prompts=recovered.prompts).log_likelihoods([asked])
    wanted = theirs.log_softmax(-1)[0, 1, [30, 41]]
    assert torch.allclose(torch.tensor([score.log_prob for score in scores]), wanted, atol=2e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_merged_adapter_answers_the_same(kind: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = written(tmp_path, kind)
    beside, merged = (Model(build_network("llama"), tiny_tokenizer, "llama") for _ in range(2))
    names = set(merged.network.state_dict())
    PeftAdapter(str(folder)).recover(beside, None)
    recovered = PeftAdapter(str(folder), merge=True).recover(merged, None)
    ids = torch.tensor([[9, 12, 30, 41], [8, 8, 50, 13]])
    with torch.no_grad():
        one, other = (model.network(input_ids=ids).logits for model in (beside, merged))
    assert torch.allclose(one, other, atol=2e-5) and set(merged.network.state_dict()) == names
    assert recovered.report.trainable_parameters > 0 and recovered.restores_by == RestoresBy.WEIGHTS


def test_what_cannot_be_merged_is_one_line(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for kind, compression in (("prompt", None), ("lora", Int8Dynamic())):
        model = Model(build_network("llama"), tiny_tokenizer, "llama")
        if compression is not None:
            compression.compress(model, Target("att", ["decoder_self_att"]).select(model))
        with pytest.raises(BadInput, match=r"so choose recovery\.merge=false"):
            PeftAdapter(str(written(tmp_path / kind, kind)), merge=True).recover(model, None)


def _based(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{path}.base_layer.{leaf}"


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_an_adapter_of_another_model_is_one_line(
    kind: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = written(tmp_path, kind, hidden_size=32, head_dim=16)
    model = Model(build_network("llama"), tiny_tokenizer, "llama")
    with pytest.raises(BadInput, match="was trained for another model than llama: ") as caught:
        PeftAdapter(str(folder)).recover(model, None)
    assert "\n" not in str(caught.value)
    assert {"lora": "and the model takes [", "prompt": "its embeddings have", "prefix": "numbers per token"}[
        kind
    ] in str(caught.value)


def test_an_adapter_of_another_architecture_is_one_line(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = Model(build_network("bert"), tiny_tokenizer, "bert")
    with pytest.raises(BadInput, match="was trained for another model than bert: "):
        PeftAdapter(str(written(tmp_path, "lora"))).recover(model, None)


def test_what_is_not_read_is_one_line(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = Model(build_network("llama"), tiny_tokenizer, "llama")

    def refused(match: str) -> None:
        for ask in (PeftAdapter(str(tmp_path)).fingerprint, lambda: PeftAdapter(str(tmp_path)).recover(model, None)):
            with pytest.raises(BadInput, match=match) as caught:
                ask()
            assert "\n" not in str(caught.value)

    refused("holds no adapter_config.json that can be read")
    folder = written(tmp_path, "lora")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "LOHA"}))
    refused("of the kind LOHA; LORA, PROMPT_TUNING and PREFIX_TUNING can be read")
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"modules_to_save": ["lm_head"]}))
    refused("replaces whole layers \\(\\['lm_head'\\]\\)")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    refused("holds a pickle, which can run code, and no adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="nothing in it is for "):
        PeftAdapter(str(folder)).recover(model, None)


def test_a_path_of_an_adapter_says_what_to_type(tmp_path: Path) -> None:
    folder = written(tmp_path, "lora")
    with pytest.raises(BadInput, match=r"choose model\.path=BASE recovery=adapter recovery\.path="):
        LocalModel("local", str(folder)).skeleton()
