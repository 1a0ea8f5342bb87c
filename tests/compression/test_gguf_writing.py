"""GGUF files that are written: read back by this program and by transformers, as the model that was saved."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from helpers.gguf_files import ARCHITECTURES, MERGES, TEMPLATE, TOKENS
from helpers.gguf_tiny import FURTHER, WRITTEN, byte_level, tiny
from knowledge_compression.compression.formats.gguf import GgufModel, save_gguf
from knowledge_compression.compression.methods.gguf import Gguf
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.mxfp4 import Mxfp4
from knowledge_compression.compression.methods.none import NoCompression
from knowledge_compression.compression.writing.writers import writer_of
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target
from knowledge_compression.models.checkpoints.gguf.vocabulary import GgufVocabulary
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.pretrained import auto_class

Kind = GGMLQuantizationType
ALL = Target("all", ["encoder_att", "decoder_self_att", "cross_att", "ff", "experts", "shared_experts"])
# Of which the file holds w + 1, or an exponential.
CHANGED = {"nemotron", "gemma", "gemma2", "gemma3", "mamba", "mamba2", "qwen3next", "qwen35", "qwen35moe", "jamba"}
CHANGED |= {"kimi-linear"}
CHANGED |= {name for name in FURTHER if name.startswith(("granitehybrid", "nemotron_h"))}
CHANGED |= {"deepseek2 of youtu"}  # another order of sums
# Of which the file holds other weights, for another network with the same answers.
ANSWERS_ALONE = {"granite of attention only", *(name for name in FURTHER if name.startswith("falcon-h1"))}
# Types that are read as another one with the same answers.
READ_AS = {"mistral": "llama", "internlm3": "llama", "iquestcoder": "llama", "solar_open": "glm4_moe"}
READ_AS |= {"gemma4_unified_text": "gemma4_text", "youtu": "deepseek_v2", "glm4_moe_lite": "deepseek_v3"}
# What transformers cannot read, or makes another model of (findings/transformers_misreads_gguf_settings.sh).
OURS_ALONE = {
    *("llama with biases", "mixtral", "qwen2moe with widths", "qwen3 with widths", "starcoder2 with another base"),
    *("phi3", "falcon 40b", "t5", "t5 of relu", "umt5", *(name for name in FURTHER if name.startswith("gemma4"))),
}
OURS_ALONE |= {name for name in FURTHER if name.split()[0] not in GGUF_SUPPORTED_ARCHITECTURES}
TEXTS = ("abc dead beef", "zebra", "a b c", "<|s|>ab")


def slow_but(case: Any, *fast: Any) -> Any:
    """A case that is slow unless it is one of these."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=() if case in fast else pytest.mark.slow)


def read_back(folder: Path, dtype: str = "float32") -> Model:
    return LocalModel("local", str(folder)).load("cpu", dtype)


def kinds_in(folder: Path) -> dict[str, Kind]:
    return {tensor.name: tensor.tensor_type for tensor in GGUFReader(folder / "model.gguf").tensors}


def logits(network: Any, ids: torch.Tensor) -> torch.Tensor:
    decoded = {"decoder_input_ids": ids[:, :5]} if network.config.is_encoder_decoder else {}
    with torch.no_grad():
        answer: torch.Tensor = network(ids, **decoded).logits
    return answer


@pytest.mark.parametrize(
    "architecture", [slow_but(name, "llama", "gpt2", "gemma2", "mamba", "falcon 40b", "t5") for name in WRITTEN]
)
def test_every_architecture_is_read_back_by_us_and_by_transformers(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    saved = save_gguf(model, tmp_path / "model")
    described = GgufModel.of(model)
    weights = dict(model.network.named_parameters()) | dict(model.network.named_buffers())
    sizes = {name: weights[name].numel() for name in described.names}
    assert saved["weights"] == {"F32": sum(sizes.values())} and "rounded" not in saved
    ours = read_back(tmp_path / "model")
    networks = [ours.network]
    if architecture not in OURS_ALONE:
        kind = auto_class(ours.network.config)
        networks.append(kind.from_pretrained(tmp_path / "model", gguf_file="model.gguf", dtype=torch.float32))
    ids = torch.randint(3, len(TOKENS), (2, 9))
    exact = architecture not in CHANGED | ANSWERS_ALONE
    bound = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
    for network in networks:
        assert torch.allclose(logits(model.network, ids), logits(network, ids), **bound)
        if architecture in ANSWERS_ALONE:
            continue
        there = network.state_dict()
        assert there.keys() == model.network.state_dict().keys()
        for name, value in model.network.state_dict().items():
            assert (
                torch.equal(there[name], value) if exact else torch.allclose(there[name], value, rtol=0, atol=5e-7)
            ), name
    kind = model.network.config.model_type
    as_read = "granite" if architecture == "granite of attention only" else READ_AS.get(kind, kind)
    assert ours.network.config.model_type == as_read
    for text in TEXTS[:3]:
        assert ours.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_weights_are_stored_in_the_narrowest_floats_that_hold_them(dtype: str, tmp_path: Path) -> None:
    model = tiny("llama", getattr(torch, dtype), tie_word_embeddings=False)
    save_gguf(model, tmp_path / "model")
    kinds = kinds_in(tmp_path / "model")
    assert kinds["output.weight"] == (Kind.F16 if dtype == "float16" else Kind.BF16)
    assert kinds["output_norm.weight"] == Kind.F32
    back = read_back(tmp_path / "model", dtype)
    assert all(
        torch.equal(value, back.network.state_dict()[name]) for name, value in model.network.state_dict().items()
    )


@pytest.mark.parametrize(
    ("method", "architecture"),
    [
        slow_but(pair, ("q4_k", "gpt2"), ("q8_0", "qwen3moe"), ("gptq", "llama"))
        for pair in product(["q4_k", "q8_0", "gptq"], ["llama", "gpt2", "qwen3moe", "bloom"])
    ]
    + [("mxfp4", "llama"), ("mxfp4", "gpt-oss"), ("q8_0", "deepseek2"), ("q8_0", "gemma4 with experts")]
    + [("q8_0", "falcon-h1 with norms")],  # none of its factors differs from 1
)
def test_compressed_layers_are_stored_in_the_blocks_of_their_compression(
    method: str, architecture: str, tmp_path: Path
) -> None:
    """The weights read back are the compressed ones, to the bit; rows of heads and experts are moved as blocks."""
    model = tiny(architecture)
    targets = ALL.select(model)
    if method == "gptq":
        windows: Any = torch.randint(3, len(TOKENS), (4, 16), generator=torch.Generator().manual_seed(0))
        Gptq(bits=4, group_size=32, symmetric=True).compress(model, targets, windows)
    else:
        (Mxfp4() if method == "mxfp4" else Gguf(method)).compress(model, targets)
    saved = save_gguf(model, tmp_path / "model")
    assert "rounded" not in saved
    kinds = kinds_in(tmp_path / "model")
    expected = {"gptq": {Kind.Q4_0}, "mxfp4": {Kind.MXFP4}, "q8_0": {Kind.Q8_0}, "q4_k": {Kind.Q5_0, Kind.Q4_K}}[method]
    coded = sum(weights for name, weights in saved["weights"].items() if Kind[name] in expected)
    config = model.network.config
    turned = 0  # keys that are made of latent vectors are stored by their columns, which are no blocks
    if architecture == "deepseek2":
        turned = config.num_hidden_layers * 4 * config.qk_nope_head_dim * config.kv_lora_rank
    assert coded == targets.parameters - turned and set(kinds.values()) - expected == {Kind.F32}
    back = read_back(tmp_path / "model")
    for name, value in model.network.state_dict().items():
        there = back.network.state_dict()[name]
        assert torch.allclose(value, there, atol=5e-7) if name.endswith("A_log") else torch.equal(value, there), name
    assert back.on_disk is not None and back.on_disk.made_by == "knowledge_compression"


@pytest.mark.parametrize(
    "kind",
    [
        slow_but(kind, "f16", "mxfp4", "q4_k")
        for kind in ("f16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "mxfp4", "q4_k", "q6_k")
    ],
)
def test_a_named_type_rounds_the_rest_and_says_how_much(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama", hidden_size=256, head_dim=64, tie_word_embeddings=False)
    attention = Target("att", ["decoder_self_att"]).select(model)
    Gguf("q8_0").compress(model, attention)
    saved = writer_of(f"gguf-{kind}").write(model, tmp_path / "model")
    kinds = kinds_in(tmp_path / "model")
    assert kinds["blk.0.attn_q.weight"] == Kind.Q8_0  # what a compression put on a grid stays on it
    fallback = {"q4_k": Kind.Q5_0, "q6_k": Kind.Q8_0}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_up.weight"] == Kind[kind.upper()]
    assert kinds["blk.1.ffn_down.weight"] == fallback.get(kind, Kind[kind.upper()])  # 96 inputs
    back, rounded, lost, whole = read_back(tmp_path / "model").network.state_dict(), 0, 0.0, 0.0
    for name, value in model.network.state_dict().items():
        if not torch.equal(back[name], value):
            rounded += value.numel()
            lost, whole = lost + float((back[name] - value).square().sum()), whole + float(value.square().sum())
    assert saved["rounded"] == rounded > 0
    assert saved["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert "were rounded when the GGUF file was written" in caplog.text


def test_an_untied_head_and_pruned_weights_are_stored_as_they_are(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    model.untie_head()
    head: Any = model.network.get_output_embeddings()  # type: ignore[operator]
    head.weight.data[::2] = 0
    save_gguf(model, tmp_path / "model")
    back = read_back(tmp_path / "model").network
    assert torch.equal(back.lm_head.weight, head.weight) and not back.config.tie_word_embeddings


def settings_in(folder: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(folder / "model.gguf").fields.items()}


def test_the_settings_are_those_of_the_specification(tmp_path: Path) -> None:
    model = tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    Gguf("q8_0").compress(model, ALL.select(model))
    model.tokenizer.chat_template = TEMPLATE
    save_gguf(model, tmp_path / "model")
    told = settings_in(tmp_path / "model")
    assert told["general.architecture"] == "llama" and told["general.file_type"] == 7
    assert told["general.quantization_version"] == 2
    assert told["llama.rope.freq_base"] == 5000 and told["llama.rope.dimension_count"] == 16
    assert told["llama.attention.head_count"] == 4 and told["llama.attention.head_count_kv"] == 2
    assert told["tokenizer.ggml.model"] == "gpt2" and told["tokenizer.ggml.pre"] == "gpt-2"
    assert told["tokenizer.ggml.tokens"] == TOKENS and told["tokenizer.ggml.merges"] == MERGES
    assert told["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert told["tokenizer.ggml.bos_token_id"] == 1 and told["tokenizer.chat_template"] == TEMPLATE
    assert told["tokenizer.ggml.add_bos_token"] is False
    assert read_back(tmp_path / "model").tokenizer.chat_template is None  # read from a file, it is not used unasked


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"hidden_act": "gelu"},
            "llama has hidden_act=gelu, which a GGUF file cannot express; its readers assume silu",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rotary embeddings of the type default or llama3, but this llama has linear",
        ),
    ],
)
def test_what_a_reader_would_take_otherwise_is_one_line(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=match) as caught:
        save_gguf(tiny("llama", **changes), tmp_path / "model")
    assert "\n" not in str(caught.value) and not (tmp_path / "model").exists()


def test_mistral_is_a_llama_unless_it_has_a_window(tmp_path: Path) -> None:
    settings = ARCHITECTURES["llama"][1]
    model = tiny("mistral", **settings, sliding_window=None)
    save_gguf(model, tmp_path / "model")
    ids = torch.randint(3, len(TOKENS), (2, 9))
    with torch.no_grad():
        assert torch.equal(model.network(ids).logits, read_back(tmp_path / "model").network(ids).logits)
    with pytest.raises(BadInput, match="mistral has sliding_window=16, which a GGUF file cannot express"):
        save_gguf(tiny("mistral", **settings, sliding_window=16), tmp_path / "other")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500_000.0}


def test_llama_3_1_scales_its_rotary_embeddings_after_reading_too(tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=256, head_dim=64, rope_parameters=LLAMA3)
    save_gguf(model, tmp_path / "model")
    back = read_back(tmp_path / "model").network
    assert {name: back.config.rope_parameters[name] for name in LLAMA3} == LLAMA3
    wanted, found = (network.model.rotary_emb.inv_freq for network in (model.network, back))
    plain = tiny("llama", hidden_size=256, head_dim=64, rope_parameters={"rope_theta": 5e5}).network
    stored = {t.name: t.data for t in GGUFReader(tmp_path / "model" / "model.gguf").tensors}["rope_freqs.weight"]
    assert torch.equal(wanted, found)
    assert torch.allclose(plain.model.rotary_emb.inv_freq / torch.tensor(stored), wanted, rtol=1e-5)
    with pytest.raises(BadInput, match="scale rotary embeddings differently from Llama"):
        save_gguf(tiny("llama", rope_parameters=LLAMA3 | {"low_freq_factor": 2.0}), tmp_path / "other")


def test_a_tokenizer_that_gguf_cannot_describe_is_one_line(tiny_tokenizer: Any) -> None:
    with pytest.raises(BadInput, match="and this is a WordLevel tokenizer"):
        GgufVocabulary.of(tiny_tokenizer, 200)
    with pytest.raises(BadInput, match="no name for the way in which this tokenizer splits text"):
        other = pre_tokenizers.Split(Regex(r"\w\w"), behavior="isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        GgufVocabulary.of(byte_level(pre_tokenizers.Sequence([other, last])), 200)
    with pytest.raises(BadInput, match=r"has 93 tokens, but its embeddings have only 50 rows"):
        GgufVocabulary.of(byte_level(), 50)
    odd = byte_level()
    odd.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", 0)]
    )
    with pytest.raises(BadInput, match="adds other tokens to a text"):
        GgufVocabulary.of(odd, 93)


def test_known_ways_of_splitting_text_have_their_names() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for name in ("llama3", "qwen2", "tekken", "gpt-4o"):
        pattern = GGUF_PRE_TOKENIZER_SPLITS[name]
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), last])
        named = GgufVocabulary.of(byte_level(split), 93).split
        assert GGUF_PRE_TOKENIZER_SPLITS[str(named)] == pattern
    digits = pre_tokenizers.Digits(individual_digits=True)
    split = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert GgufVocabulary.of(byte_level(split), 93).split == "smollm"


def test_a_tokenizer_made_from_sentencepiece_is_read_back(tmp_path: Path) -> None:
    """BPE with bytes to fall back on, as LLaMA 2 has: scores follow the order of the merges."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for token in ("<unk>", "<s>", "</s>"):
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    model = tiny("llama", vocab_size=len(words) + 3)
    model.tokenizer = made
    save_gguf(model, tmp_path / "model")
    told = settings_in(tmp_path / "model")
    assert told["tokenizer.ggml.model"] == "llama" and told["tokenizer.ggml.add_bos_token"] is True
    assert told["tokenizer.ggml.tokens"][-3:] == [f"[PAD{len(words) + i}]" for i in range(3)]
    assert told["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6] and told["tokenizer.ggml.token_type"][-1] == 5
    scores = dict(zip(told["tokenizer.ggml.tokens"], told["tokenizer.ggml.scores"], strict=True))
    assert scores["▁a"] > scores["ab"] > scores["▁ab"] > scores["b"]
    back = read_back(tmp_path / "model").tokenizer
    for text in ("ab a ba", "b", "a é"):
        assert back(text)["input_ids"] == made(text)["input_ids"]


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    """A run saves the file; its own report and a second run, of the file, tell the same perplexity."""
    from helpers.matrix import done, runs_in, sweep, write_text

    folder = tmp_path / "llama"
    model = tiny("llama", hidden_size=256, head_dim=64)
    model.network.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    data = write_text(tmp_path / "data") if (tmp_path / "data").mkdir() is None else tmp_path
    sweep(
        tmp_path / "outputs", data, "model=local", f"model.path={folder}", "compression=gguf",
        "compression.type=q6_k", "output.save_model=gguf",
    )  # fmt: skip
    runs = dict(runs_in(tmp_path / "outputs"))
    run = runs["gguf"]
    assert run.report["saved"]["weights"]["Q6_K"] > 0 and run.report["saved_as"] == "gguf"
    place = tmp_path / "outputs" / "runs" / run.id / "model" / "model.gguf"
    again = done(tmp_path / "again", place, data, NoCompression())
    name = "perplexity.perplexity"
    assert again.metrics[name] == pytest.approx(run.metrics[name], rel=1e-5)
    assert json.dumps(again.report["compression"]["stored"]).count("Q6_K")


def test_a_weight_that_is_not_finite_writes_nothing(tmp_path: Path) -> None:
    model = tiny("llama")
    next(model.network.parameters()).data[0, 0] = float("nan")
    with pytest.raises(BadInput, match="not finite"):
        save_gguf(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_same_model_have_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_gguf(tiny("llama"), tmp_path / name)
    one, two = ((tmp_path / name / "model.gguf").read_bytes() for name in ("one", "two"))
    assert one == two and np.frombuffer(one[:4], dtype=np.uint8).tobytes() == b"GGUF"


def test_a_skeleton_is_checked_without_weights() -> None:
    model = tiny("llama")
    with torch.device("meta"):
        network = auto_class(model.network.config).from_config(model.network.config)
    assert GgufModel.of(Model(network, model.tokenizer, "tiny")).names
    assert dequantize(np.zeros(34, dtype=np.uint8), Kind.Q8_0).shape == (32,)
