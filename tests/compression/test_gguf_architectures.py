"""Which configurations of an architecture are written as GGUF, and which are refused."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, GGUFValueType
from transformers import AutoConfig

from helpers.gguf_files import TOKENS
from helpers.gguf_tiny import WRITTEN, held, tiny, unusual, usual
from helpers.networks import build_network
from helpers.places import ROOT
from knowledge_compression.compression.formats.gguf import GgufModel, save_gguf
from knowledge_compression.compression.writing.writers import writer_of
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model
from knowledge_compression.models.checkpoints.gguf.architecture import architecture_for
from knowledge_compression.models.checkpoints.gguf.families import ARCHITECTURES
from knowledge_compression.models.checkpoints.gguf.unwritten import UNWRITTEN
from knowledge_compression.models.loading import LocalModel


def answers(network: Any) -> torch.Tensor:
    ids = torch.randint(3, len(TOKENS), (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = network(ids).logits
    return found


# As published configurations have them: whole numbers for floats, and entries that no code of the network reads.
_OF_DEEPSEEK = {"ep_size": 1, "moe_layer_freq": 1, "aux_loss_alpha": 1e-3, "seq_aux": True, "scoring_func": "sigmoid"}
_SCALED = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"}
_SECTIONS = {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25}
_UNUSUAL = {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.0, "rope_theta": 1e4}
_UNUSUAL |= {"original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1}
_BASES = {"full_attention": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.334, "factor": 2.0}}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000}},
    "granite": {"embedding_multiplier": 12, "logits_scaling": 8},
    "deepseek2": {
        **_OF_DEEPSEEK,
        "topk_method": "noaux_tc",
        "rope_theta": 10_000,
        "rope_scaling": _SCALED | {"original_max_position_embeddings": 4096},
    },
    "qwen35": {
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000, **_SECTIONS},
    },
    "gpt-oss": {"experts_per_token": 4, "initial_context_length": 4096},
    "olmo2 with windows": {
        "rope_parameters": {
            "full_attention": {
                **{"rope_type": "yarn", "rope_theta": 500_000, "factor": 8.0, "beta_fast": 32, "beta_slow": 1},
                **{"original_max_position_embeddings": 8192, "attention_factor": 1.2079441541679836},
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 500_000},
        }
    },
    "gemma3n": {"vocab_size_per_layer_input": len(TOKENS) - 3},  # words that stand for images and sounds
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 500_000, "model_type": ""},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 3, "moe_top_k": 2, "moe_jitter_eps": 0.01}
        | {"moe_loss_weight": 0.05, "model_type": ""},
    },
    "kimi-linear": {"use_grouped_topk": True, "moe_router_activation_func": "sigmoid", "mla_use_nope": True},
    "mimo2": {"sliding_window_size": 3, "routed_scaling_factor": None, "add_swa_attention_sink_bias": True}
    | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "attention_chunk_size": 3},
    "minimax-m2": {"use_mtp": True, "qk_norm_type": "per_layer", "attn_type_list": [1, 1], "rope_theta": 5_000_000},
}


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_published_configurations_are_written(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture, **PUBLISHED[architecture])
    save_gguf(model, tmp_path / "model")
    back = LocalModel("local", str(tmp_path / "model")).load("cpu", "float32")
    assert torch.allclose(answers(back.network), answers(model.network), rtol=1e-4, atol=1e-5)
    fields = GGUFReader(tmp_path / "model" / "model.gguf").fields
    floats = ("freq_base", "_scale", "beta_fast", "beta_slow", "scaling.factor")
    assert {field.types[-1] for key, field in fields.items() if key.endswith(floats)} == {GGUFValueType.FLOAT32}


def test_what_llama_cpp_would_guess_or_requires_is_in_the_file(tmp_path: Path) -> None:
    """It caps Gemma 4's logits at 30 if the file is silent, and wants keys in blocks that take those of others."""
    save_gguf(tiny("gemma4 with experts", final_logit_softcapping=None), tmp_path / "model")
    assert GGUFReader(tmp_path / "model" / "model.gguf").fields["gemma4.final_logit_softcapping"].contents() == 0
    save_gguf(tiny("gemma3n"), tmp_path / "model")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "model" / "model.gguf").tensors}
    assert tensors["blk.19.attn_k.weight"].any() and not tensors["blk.20.attn_k.weight"].any()


# Attributes that stay at their default: names of others, values that llama.cpp takes for granted, or kinds of networks
# that are tiny ones of their own.
AT_DEFAULT = {
    **{key: {"head_dim"} for key in ("qwen3", "gemma2", "gemma3", "exaone4", "qwen35", "qwen35moe")},
    **{"qwen3moe": {"num_experts"}, "bloom": {"hidden_size", "n_layer"}, "falcon": {"num_ln_in_parallel_attn"}},
    **{key: {"qk_layernorm"} for key in ("stablelm", "phi2", "stablelm with a share")},
    **{key: {"use_qk_norm"} for key in ("command-r", "glm4moe of solar_open")},
    **{"mpt": {"attn_config"}, "ernie4_5-moe": {"moe_layer_interval"}, "falcon-h1": {"mamba_rms_norm"}},
    **{key: {"feed_forward_proj", "is_gated_act", "dense_act_fn"} for key in ("t5 of relu", "umt5")},
    "dbrx": {"ffn_config", "n_layers"},
    **{key: {"position_embedding_type"} for key in ("granitehybrid", "granitehybrid with experts")},
    **{key: {"num_hidden_layers"} for key in ("nemotron_h", "nemotron_h_moe latent")},
    "nemotron_h_moe": {"num_hidden_layers", "moe_latent_size"},
    "gemma4": {"global_head_dim", "num_kv_shared_layers", "num_experts", "top_k_experts", "enable_moe_block"},
    "gemma4 with shared keys": {"global_head_dim", "num_experts", "top_k_experts", "enable_moe_block"},
    "gemma4 with experts": {"global_head_dim", "num_kv_shared_layers"},
    "gemma4 of gemma4_unified": {"global_head_dim", "num_kv_shared_layers", "hidden_size_per_layer_input"}
    | {"vocab_size_per_layer_input", "num_experts", "top_k_experts", "moe_intermediate_size", "enable_moe_block"},
}


@pytest.mark.parametrize("architecture", WRITTEN)
def test_every_setting_off_its_default_is_read_back(architecture: str) -> None:
    """Writing refuses a configuration that is not read back as it is; here no held attribute is guessed right."""
    model = tiny(architecture, **unusual(architecture))
    config = model.network.config
    attributes = {name for name in held(config.model_type, architecture_for(config)) if usual(config, name)}
    assert attributes <= AT_DEFAULT.get(architecture, set())
    GgufModel.of(model)


@pytest.mark.parametrize(
    ("architecture", "changes", "match"),
    [
        (
            "hunyuan-dense stretched",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "depend on the length of a text",
        ),
        (
            "exaone4",
            {"sliding_window": 4, "layer_types": None},
            "sliding_window=4, which llama.cpp takes only in networks of 64 blocks",
        ),
        (
            "deepseek2 without groups",
            {"q_lora_rank": None},
            "q_lora_rank=None, which llama.cpp takes only in networks of 26 or 27",
        ),
        (
            "deepseek2 without groups",
            {"topk_method": "group_limited_greedy", "n_group": 2},
            "has topk_method=group_limited_greedy",
        ),
        ("hunyuan-moe", {"moe_topk": [1, 2]}, r"has moe_topk=\[1, 2\]; llama.cpp takes one number for all blocks"),
        (
            "mistral3",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 8.0,
                    "attention_factor": 1.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 8,
                    "llama_4_scaling_beta": 0.1,
                }
            },
            "attention_factor=1.0, but readers",
        ),
        ("olmoe", {"num_key_value_heads": 2}, "which llama.cpp takes only if every head has its own keys"),
        ("command-r", {"use_qk_norm": True}, "use_qk_norm=True, which llama.cpp takes only from 64 blocks on"),
        ("dots1", {"num_key_value_heads": 2}, "which llama.cpp takes only if every head has its own keys"),
        ("deepseek2", {"rope_interleave": False}, "has rope_interleave=False, which a GGUF file cannot express"),
        ("gpt-oss", {"swiglu_limit": 5.0}, "has swiglu_limit=5.0, which a GGUF file cannot express"),
        ("llama4", {"attention_chunk_size": 64}, "has attention_chunk_size=64, which a GGUF file cannot express"),
        ("gemma3n", {"num_kv_shared_layers": 4}, "num_kv_shared_layers=4; llama.cpp assumes 2 in networks of 22"),
        (
            "granitehybrid",
            {"mamba_d_head": 32, "mamba_expand": 4},
            "state spaces .* are 256 wide; llama.cpp takes only .* 128",
        ),
        ("granitehybrid", {"time_step_limit": [0.0, 1.0]}, "has time_step_limit=.*, which a GGUF file cannot express"),
        ("granite of attention only", {"position_embedding_type": None}, "readers of such files assume rope"),
        ("falcon-h1 with norms", {"mamba_norm_before_gate": True}, "llama.cpp takes the norm after the gate"),
        ("falcon-h1 with norms", {"embedding_multiplier": 2.0}, "are one matrix with two factors, 2.0 and 1.0"),
        ("nemotron_h_moe", {"layers_block_type": ["mlp", "moe"]}, "some have none; llama.cpp takes one kind"),
        (
            "dbrx",
            {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
            "attn_config.rope_theta=10000.0, but transformers computes with rope_parameters.rope_theta=500000.0",
        ),
        (
            "dbrx",
            {"ffn_config": {"moe_normalize_expert_weights": 2.0}},
            "has ffn_config.moe_normalize_expert_weights=2.0, which a GGUF file cannot express; .* assume 1.0",
        ),
        ("minicpm3", {"scale_depth": 1.0}, "has scale_depth=1.0, which a GGUF file cannot express"),
        ("minicpm3", {"q_lora_rank": None}, "self_attn.q_proj.weight, for which minicpm3 has no tensor"),
        ("minicpm3", {"num_key_value_heads": 2}, "takes only if every head has its own keys"),
        ("glm-dsa", {"index_head_dim": 96}, "index_head_dim=96, which llama.cpp takes only if it is 64, 128 or 256"),
        (
            "kimi-linear",
            {"linear_num_heads": 2},
            "linear_num_heads=2; llama.cpp takes only the number of the other heads",
        ),
        ("kimi-linear", {"q_lora_rank": 16}, "has q_lora_rank=16, which a GGUF file cannot express"),
        (
            "mimo2",
            {"rope_parameters": _BASES | {"sliding_attention": _BASES["full_attention"] | {"rope_type": "linear"}}},
            "those of sliding_attention of this mimo_v2_flash have linear",
        ),
        (
            "mimo2",
            {
                "rope_parameters": _BASES
                | {"sliding_attention": _BASES["full_attention"] | {"partial_rotary_factor": 0.5}}
            },
            r"rotates \[8, 12\] channels of its heads in different blocks",
        ),
        ("mimo2", {"routed_scaling_factor": 2.0}, "has routed_scaling_factor=2.0, which a GGUF file cannot express"),
        ("exaone-moe", {"mlp_layer_types": ["sparse", "dense"] * 2}, "blocks without experts only before those with"),
        ("chatglm", {"head_dim": 32}, "heads of this glm are 128 wide together; llama.cpp takes only"),
        ("gpt-oss", {"layer_types": ["full_attention"] * 2}, "has layer_types=.*, which a GGUF file cannot express"),
    ],
)
def test_what_llama_cpp_takes_otherwise_is_one_line(architecture: str, changes: Any, match: str) -> None:
    with pytest.raises(BadInput, match=match) as caught:
        GgufModel.of(tiny(architecture, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "match"),
    [
        ("bert", "GGUF files have no tensors for the head by which bert fills blanks; choose output.save_model=true"),
        (
            "opt",
            "cannot write models of the type opt: gguf .* has no architecture for it; it writes afmoe, .*qwen3",
        ),
        ("bart", "cannot write models of the type bart: gguf .* has no architecture for it; it writes .*qwen3"),
    ],
)
def test_other_architectures_are_one_line(architecture: str, match: str, tiny_tokenizer: Any) -> None:
    model = Model(build_network(architecture), tiny_tokenizer, architecture)
    with pytest.raises(BadInput, match=match):
        writer_of("gguf").check(model, SimpleNamespace(tokenizer=lambda: tiny_tokenizer))  # type: ignore[arg-type]


def test_what_gguf_names_is_written_or_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's list is that of the installed gguf and transformers."""
    place = ROOT / "experiments" / "gguf_conversion"
    monkeypatch.syspath_prepend(str(place))
    told = run_path(str(place / "architectures.py"))
    assert not UNWRITTEN.keys() & ARCHITECTURES.keys()
    assert {one.architecture for one in UNWRITTEN.values()} <= set(MODEL_ARCH_NAMES.values())
    kinds = {kind: role for role, named in told["KINDS"].items() for kind in named if kind not in told["SAME"]}
    assert UNWRITTEN.keys() | ARCHITECTURES.keys() <= kinds.keys()
    rows = [(kind, role, *told["said"](kind)) for kind, role in sorted(kinds.items()) if told["said"](kind)[0]]
    versions = f"gguf {version('gguf')}, transformers {version('transformers')}"
    page = (ROOT / "docs" / "saving.md").read_text().partition(told["BEGIN"])[2].partition(told["END"])[0]
    assert page.split() == "\n".join(told["table"](rows, versions)).split()


def test_a_refusal_gives_the_reason_of_the_list() -> None:
    with pytest.raises(BadInput, match=r"of the type phimoe: llama\.cpp computes the weights of its"):
        architecture_for(AutoConfig.for_model("phimoe"))
