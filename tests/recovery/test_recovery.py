"""Recoveries: they lower the loss, leave the base alone, go on after an interruption, and refuse what cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.every_type import write_tiny
from helpers.networks import build_network
from helpers.places import CONF
from helpers.recoveries import SHORT, STRATEGIES
from helpers.shipped import NEEDED
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring import Question, Scorer
from knowledge_compression.models import Target
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.objectives import objective_for
from knowledge_compression.recovery import adapters
from knowledge_compression.recovery.adapters import FrozenBase
from knowledge_compression.recovery.concat import Concat
from knowledge_compression.recovery.idp import Idp
from knowledge_compression.recovery.lora import Lora
from knowledge_compression.recovery.prefix import Prefix
from knowledge_compression.recovery.prompt import Prompt

# peft has prompts and prefixes for decoders only; ours join the input of the other families' stacks.
FITTING = [("llama", strategy) for strategy in STRATEGIES] + [
    ("opt", "prompt"), ("opt", "idp"), ("gpt2", "lora"), ("gpt2", "prefix"), ("gpt2", "idp"), ("albert", "lora"),
    ("bert", "lora"), ("bert", "prompt"), ("roberta", "prompt"), ("t5", "lora"), ("t5", "prompt"), ("bart", "prompt"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))


def state(model):
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def loss(model, text):
    """Mean loss over the whole text, with the same masks whenever it is asked for."""
    torch.manual_seed(0)
    with torch.no_grad():
        total, count = objective_for(model)(model.network, text.ids)
    return float(total) / count


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "strategy"), FITTING)
def test_every_recovery_lowers_the_loss_and_leaves_the_base_as_it_was(tiny_model, text, architecture, strategy):
    model = tiny_model(architecture)
    Magnitude(sparsity=0.5).compress(model, Target("all", ["ff"]).select(model), None)
    before, loss_before = state(model), loss(model, text)
    # T5's embeddings are ten times as large as the others' at the start, and so are the steps that move a prompt
    training = replace(SHORT, learning_rate=0.1) if architecture == "t5" else SHORT
    report = replace(STRATEGIES[strategy], training=training).recover(model, text).report
    assert loss(model, text) < loss_before - 0.01
    assert report.trainable_parameters > 0 and report.tokens == 30 * 4 * 16 * (
        2 if strategy in ("idp", "concat") else 1
    )
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.network.state_dict().items()}
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert not any(p.requires_grad for p in model.network.parameters())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recovered_decoders_are_scored_like_any_other(tiny_model, text, strategy):
    model = tiny_model("llama")
    question = Question([7, 8, 9, 10], [[11, 12], [13], [14, 15, 16]])
    (dense,) = Scorer(model).log_likelihoods([question])
    prompts = STRATEGIES[strategy].recover(model, text).prompts
    (together,) = Scorer(model, prompts=prompts).log_likelihoods([question])
    for i, continuation in enumerate(question.continuations):
        ((alone,),) = Scorer(model, prompts=prompts).log_likelihoods([Question(question.context, [continuation])])
        assert together[i].log_prob == pytest.approx(alone.log_prob, abs=1e-4)
        assert together[i].log_prob != pytest.approx(dense[i].log_prob, abs=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("strategy", ["prompt", "prefix"])
def test_what_was_trained_is_what_answers(tiny_model, text, architecture, strategy):
    """The cached keys and values give what peft gives that trained them."""
    model = tiny_model(architecture)
    if (architecture, strategy) == ("opt", "prefix"):
        pytest.skip("the tiny OPT has embeddings of another width than its blocks, which peft's prefixes do not know")
    STRATEGIES[strategy].recover(model, text)
    (file,) = Path(model_cache(), "adapters").glob("*/adapter.safetensors")
    from safetensors.torch import load_file

    ((name, trained),) = load_file(file).items()
    settings = (
        PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5, token_dim=trained.shape[1])
        if strategy == "prompt"
        else PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
    )
    peft = get_peft_model(build_network(architecture), settings).eval()
    dict(peft.named_parameters())[name].data.copy_(trained)
    ids = text.ids[:3]
    with torch.no_grad():
        theirs = peft(input_ids=ids).logits[:, -16:]
        assert (model.network(input_ids=ids).logits - theirs).abs().max() < 1e-4


def model_cache():
    import os

    return os.environ["KC_CACHE_DIR"]


@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_a_joined_prompt_is_read_with_the_input(tiny_model, text, architecture):
    model = tiny_model(architecture)
    plain = tiny_model(architecture).network
    Prompt(SHORT, tokens=5).recover(model, text)
    ids = text.ids[:3]
    prompt = model.network.soft_prompt
    joined = torch.cat([prompt.expand(3, -1, -1), plain.get_input_embeddings()(ids)], 1)
    with torch.no_grad():
        if architecture == "bert":
            theirs = plain(inputs_embeds=joined).logits[:, 5:]
            assert (model.network(input_ids=ids).logits - theirs).abs().max() < 1e-5
        else:
            states = plain.get_encoder()(inputs_embeds=joined).last_hidden_state
            said = ids[:, :4]
            theirs = plain(encoder_outputs=(states,), decoder_input_ids=said).logits
            mask = torch.ones_like(ids)
            ours = model.network(input_ids=ids, attention_mask=mask, decoder_input_ids=said).logits
            assert (ours - theirs).abs().max() < 1e-5


def hand_count(hidden, inner, layers, rank, key_width):
    """LoRA on q, k, v, o, gate, up, down: rank x (in + out) each."""
    attention = 2 * (hidden + hidden) + 2 * (hidden + key_width)
    return layers * rank * (attention + 3 * (hidden + inner))


def test_trainable_parameters_by_hand(tiny_model, text):
    counts = {
        name: strategy.recover(tiny_model("llama"), text).report.trainable_parameters
        for name, strategy in STRATEGIES.items()
    }
    assert counts == {
        "lora": hand_count(hidden=16, inner=32, layers=2, rank=2, key_width=8),
        "prompt": 5 * 16,
        "prefix": 2 * 5 * 2 * 8,  # layers x tokens x (key and value) x (1 key head of width 8)
        "idp": (3 + 5) * 16,
        "concat": (3 + 5) * 16,
    }


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tiny_model, text, tmp_path, monkeypatch):
    class Cut(Exception):
        pass

    def cut(metrics, step):
        if step == 20:
            raise Cut

    ends = []
    for interrupted in (False, True):
        monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / f"cache-{interrupted}"))
        if interrupted:
            with pytest.raises(Cut):
                Lora(SHORT, rank=2).recover(tiny_model("llama"), text, cut)
        model = tiny_model("llama")
        report = Lora(SHORT, rank=2).recover(model, text).report
        assert report.details["resumed_at"] == ([15] if interrupted else [])
        assert report.tokens == 30 * 4 * 16
        ends.append((state(model), report.loss_after))
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(tensor, ends[1][0][name]) for name, tensor in ends[0][0].items())
    assert not list((tmp_path / "cache-True" / "adapters").glob(".*.checkpoint"))


def test_trained_prompts_are_shared_between_runs(tiny_model, text):
    assert Prompt(SHORT, tokens=3).recover(tiny_model("llama"), text).report.details["adapters_of_earlier_runs"] == []
    model = tiny_model("llama")
    report = Idp(SHORT, prompts=(3, 5)).recover(model, text).report
    assert len(report.details["adapters_of_earlier_runs"]) == 1
    again = tiny_model("llama")
    assert len(Idp(SHORT, prompts=(3, 5)).recover(again, text).report.details["adapters_of_earlier_runs"]) == 2
    ids = text.ids[:2]
    with torch.no_grad():
        assert torch.equal(model.network(input_ids=ids).logits, again.network(input_ids=ids).logits)
    other = replace(SHORT, learning_rate=0.01)
    assert Prompt(other, tokens=3).recover(tiny_model("llama"), text).report.details["adapters_of_earlier_runs"] == []


@pytest.mark.parametrize(("strategy", "name"), [(Lora(SHORT, rank=2), "lora"), (Prompt(SHORT, tokens=5), "prompt")])
def test_an_adapter_fits_its_own_base_only(tiny_model, text, strategy, name, tmp_path):
    trained = tiny_model("llama")
    strategy.recover(trained, text)
    (file,) = Path(model_cache(), "adapters").glob("*/adapter.safetensors")
    given = replace(strategy, adapter=str(file))
    same = tiny_model("llama")
    given.recover(same, text)
    with torch.no_grad():
        ids = text.ids[:2]
        assert torch.equal(same.network(input_ids=ids).logits, trained.network(input_ids=ids).logits)
    pruned = tiny_model("llama")
    Magnitude(sparsity=0.5).compress(pruned, Target("ff", ["ff"]).select(pruned), None)
    with pytest.raises(BadInput, match=r"trained for another base model \(weights [0-9a-f]{12}, here [0-9a-f]{12}\)"):
        given.recover(pruned, text)
    with pytest.raises(BadInput, match="was asked for"):
        (replace(given, rank=3) if name == "lora" else replace(given, tokens=6)).recover(tiny_model("llama"), text)
    with pytest.raises(BadInput, match="cannot be read"):
        replace(given, adapter=str(file.with_name("gone.safetensors"))).recover(tiny_model("llama"), text)
    with safe_open(file, "pt") as opened:
        about, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    first = next(iter(tensors))
    for harmed in (tensors[first] * 1.5, tensors[first][..., :1].contiguous()):  # other numbers, or of another shape
        save_file(tensors | {first: harmed}, tmp_path / "adapter.safetensors", about)
        with pytest.raises(BadInput, match="has changed since it was written"):
            replace(given, adapter=str(tmp_path / "adapter.safetensors")).recover(tiny_model("llama"), text)


@pytest.mark.parametrize("strategy", ["lora", "prompt"])
def test_quantized_weights_stay_quantized(tiny_model, text, strategy):
    model = tiny_model("llama")
    Int8Dynamic().compress(model, Target("all", ["decoder_self_att", "ff"]).select(model), None)
    integers = {name: t.clone() for name, t in model.network.named_buffers() if t.dtype == torch.int8}
    assert len(integers) == 2 * 7
    loss_before = loss(model, text)
    STRATEGIES[strategy].recover(model, text)
    assert loss(model, text) < loss_before - 0.01
    after = {name.replace(".base_layer", ""): t for name, t in model.network.named_buffers()}
    assert all(torch.equal(t, after[name]) for name, t in integers.items())


@pytest.mark.skipif(not hasattr(torch.ao.quantization, "quantize_dynamic"), reason="this torch has no int8 kernels")
@pytest.mark.filterwarnings("ignore")
def test_kernels_without_gradients_name_the_variant_that_has_them(tiny_model, text):
    model = tiny_model("llama")
    attention = model.network.model.layers[1].self_attn
    alone = torch.nn.ModuleDict({"q_proj": attention.q_proj})
    attention.q_proj = torch.ao.quantization.quantize_dynamic(alone, {torch.nn.Linear})["q_proj"]  # torch's own kernel
    for strategy in STRATEGIES.values():
        said = r"1 layers .* without gradients \(model.layers.1.self_attn.q_proj, .* compression=int8_dynamic"
        with pytest.raises(BadInput, match=said):
            strategy.recover(model, text)


def test_a_changed_base_is_noticed(tiny_model):
    model = tiny_model("llama")
    base = FrozenBase(model.network)
    base.check(model.network)
    layer = model.network.get_submodule("model.layers.0.mlp.up_proj")
    with torch.no_grad():
        layer.weight[0, 0] += 1e-6
    with pytest.raises(RuntimeError, match="changed weights"):
        base.check(model.network)
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"took model.layers.0.mlp.up_proj.weight"):
        base.check(model.network)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Lora(SHORT, rank=0), "recovery.rank=0 adds nothing"),
        (lambda: Prompt(SHORT, tokens=0), "a prompt needs at least 1 token, not 0"),
        (lambda: Prompt(SHORT, init="text"), "recovery.init=text does not exist; choose one of vocabulary, random"),
        (lambda: Prefix(SHORT, tokens=-1), "a prompt needs at least 1 token, not -1"),
        (lambda: Idp(SHORT, prompts=[]), "names no prompt"),
        (lambda: Idp(SHORT, prompts=[5, 5]), "names a prompt twice"),
        (lambda: Idp(SHORT, selection="best"), "recovery.selection=best does not exist"),
        (lambda: Concat(SHORT, prompts=[0]), "a prompt needs at least 1 token, not 0"),
    ],
)
def test_settings_that_cannot_be_say_so(make, why):
    with pytest.raises(BadInput, match=why):
        make()


def test_trainings_that_cannot_be_say_so(tiny_model, text):
    with pytest.raises(BadInput, match="a prompt of 128 tokens leaves none of the 128 positions"):
        Prompt(SHORT, tokens=128).recover(tiny_model("opt"), text)
    with pytest.raises(
        BadInput, match=r"after a prompt of 120 do not fit the 128 positions .* corpus.length=8 or less"
    ):
        Prompt(SHORT, tokens=120).recover(tiny_model("opt"), text)
    with pytest.raises(BadInput, match=r"384 tokens .* too few for a budget of 1,920 in at most 2 passes.*epochs=5"):
        Lora(SHORT, epochs=2).recover(tiny_model("llama"), text)
    with pytest.raises(BadInput, match="both directions"):
        Prefix(SHORT).recover(tiny_model("bert"), text)


@pytest.mark.parametrize("adapter", [Prefix, Prompt])
def test_libraries_warn_of_nothing_that_a_user_cannot_change(tiny_model, recwarn, adapter):
    adapter(SHORT, tokens=5).trainable(tiny_model("llama"))
    assert [str(one.message) for one in recwarn] == []


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(tiny_model, text):
    wild = replace(SHORT, learning_rate=1e30, checkpoint_every=1, clip=0.0)
    with pytest.raises(BadInput, match=r"the loss of step \d+ of 30 is .* kept in .*checkpoint"):
        Prefix(wild, tokens=5).recover(tiny_model("llama"), text)
    (kept,) = Path(model_cache(), "adapters").glob(".*.checkpoint")
    assert kept.stat().st_size


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "recovery").glob("[!_]*.yaml")))
def test_every_strategy_is_a_choice(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(
            "config", overrides=[f"recovery={name}", "eval=[]", "compression=none", *NEEDED.get(f"recovery={name}", [])]
        )
    instantiate(config.recovery, _convert_="all")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_additions_to_narrow_weights_are_trained_in_float32(tiny_model, text, dtype):
    """As a GPU loads them by default; in float16 Adam's squares vanish, and its steps are far too large."""
    found = []
    for narrow in (False, True):
        model = tiny_model("llama")
        model.network.to(dtype)
        model.network.to(dtype if narrow else torch.float32)
        training = replace(SHORT, learning_rate=0.01)
        found.append(Lora(training, rank=2).recover(model, text).report)
        added = [p for path, p in model.network.named_parameters() if ".lora_" in path]
        assert added and {p.dtype for p in added} == {torch.float32}
        assert model.dtype == (dtype if narrow else torch.float32)
    wide, narrow_report = found
    assert wide.loss_after < wide.loss_before - 0.3
    assert narrow_report.loss_after == pytest.approx(wide.loss_after, rel=0.01)


def one_of(name, folder):
    write_tiny(name, folder)
    return LocalModel(name, str(folder)).load("cpu", "float32")


@pytest.mark.parametrize("strategy", ["prompt", "prefix", "idp", "concat"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mamba", "keeps a state of the text"),
        ("qwen3_next", "keeps a state of the text"),
        ("falcon_h1", "keeps a state of the text"),  # beside attention, in every block
        ("mistral", "attends within windows"),
    ],
)
def test_a_decoder_that_cannot_read_cached_prompts_is_refused_before_any_training(
    text, tmp_path, monkeypatch, name, why, strategy
):
    monkeypatch.setattr(adapters, "train", lambda *args, **kwargs: pytest.fail("it was trained"))
    with pytest.raises(BadInput, match=why):
        STRATEGIES[strategy].recover(one_of(name, tmp_path / "model"), text)


@pytest.mark.parametrize("name", ["mamba", "falcon_h1"])
def test_lora_leaves_out_what_a_kernel_multiplies_by_itself(text, tmp_path, name):
    model = one_of(name, tmp_path / "model")
    before = loss(model, text)
    Lora(replace(SHORT, steps=6), rank=2).recover(model, text)
    added = {path.rpartition(".lora_A")[0] for path, _ in model.network.named_parameters() if ".lora_A" in path}
    assert any(path.endswith("in_proj") for path in added) and not any(path.endswith("out_proj") for path in added)
    assert loss(model, text) < before


@pytest.mark.parametrize("rounded", [False, True])
def test_a_network_may_route_by_a_linear_layer_and_add_in_place(rounded, tmp_path, text):
    """Llama 4's router is a linear layer that returns two tensors; its shared expert's output is added to in place."""
    write_tiny("llama4_text", tmp_path)
    model = LocalModel("local", str(tmp_path)).load("cpu", "float32")
    if rounded:
        Int8Dynamic().compress(model, Target("all", ["decoder_self_att", "shared_experts"]).select(model))
    before = loss(model, text)
    Lora(SHORT, rank=2).recover(model, text)
    assert loss(model, text) < before
