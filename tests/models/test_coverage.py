"""The table of model types that are placed, held against an independent count."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.places import DOCS, EXHAUSTIVE
from knowledge_compression.models.coverage import Coverage, as_markdown, cover, main
from knowledge_compression.models.families import EXCEPTIONS

pytestmark = pytest.mark.minutes

QUICK = ("gpt2", "qwen3_moe", "mamba2", "switch_transformers", "modernbert")


def by_table(*types: str) -> dict[tuple[str, str], Coverage]:
    return {(one.table, one.type): one for one in cover(types)}


def test_a_few_types_of_every_kind_are_placed() -> None:
    found = by_table(*QUICK)
    assert not [one for one in found.values() if one.trouble]
    assert found["decoder", "mamba2"].weights["mixer"] and not found["decoder", "mamba2"].weights["decoder_self_att"]
    assert found["encoder_decoder", "switch_transformers"].weights["experts"] > 0


def test_shares_by_role_equal_an_independent_count() -> None:
    """Qwen3-MoE from its configuration's sizes, and all of it from the network's own parameters."""
    (one,) = cover(["qwen3_moe"])
    config = AutoConfig.for_model("qwen3_moe")
    depth, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    assert one.weights["decoder_self_att"] == depth * width * head * 2 * (heads + config.num_key_value_heads)
    assert one.weights["experts"] == depth * config.num_experts * 3 * width * config.moe_intermediate_size
    assert one.weights["router"] == depth * config.num_experts * width
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    assert one.in_blocks == sum(p.numel() for p in network.model.layers.parameters() if p.dim() > 1)


def test_the_page_says_what_is_placed_and_what_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "models.md"), "--only", "gpt2,perceiver"]) == 0
    page = (tmp_path / "models.md").read_text()
    assert "| gpt2 | 28.3 | 56.6 |" in page and "| perceiver | masked | yes | " in page
    assert "1 of 2 placed" in capsys.readouterr().out


def test_a_type_that_is_in_no_table_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "models.md"), "--only", "gpt2,vit"]) == 2
    assert "no language model of the type vit" in capsys.readouterr().err
    assert not (tmp_path / "models.md").exists()


# Beside the types that are excepted from the rules: one for each rule, reason and role, and each way to nest blocks.
RULES = {
    *("gpt2", "llama", "bloom", "falcon", "qwen2_moe", "gpt_oss", "jetmoe", "granitemoehybrid", "ernie4_5_moe"),
    *("mamba2", "jamba", "xlstm", "lfm2", "minimax", "qwen3_next", "kimi_linear", "blt", "gemma3"),
    *("modernbert", "convbert", "squeezebert", "deberta-v2", "perceiver"),
    *("t5", "bart", "switch_transformers", "nllb-moe", "longt5", "granite_speech"),
}


@pytest.mark.slow
def test_what_a_sample_holds_is_what_the_page_says() -> None:
    """For every type of the page see the next test."""
    found = list(cover((RULES | EXCEPTIONS.keys()) - {"dbrx"}))  # whose default configuration transformers cannot build
    assert {one.type for one in found if one.trouble} == {"perceiver"} and all(one.builds for one in found)
    page = (DOCS / "models.md").read_text()
    rows = [line for line in as_markdown(found).splitlines() if line.startswith("| ")]
    assert len(rows) > len(found)
    if f" transformers {transformers.__version__} " in " ".join(page.split()):  # in others the default sizes may differ
        assert set(rows) <= set(page.splitlines())


@pytest.mark.slow
@pytest.mark.skipif(not EXHAUSTIVE, reason="a sample stands for them (KC_TEST_EXHAUSTIVE=1)")
def test_at_least_240_types_are_placed() -> None:
    found = list(cover())
    assert sum(not one.trouble for one in found) >= 240
    assert [one.type for one in found if one.builds and one.trouble] == ["perceiver"]
