"""A network divided by accelerate over memory and disk, with a limit that forces it: it gives the same answers."""

import gc
import os
import platform
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.utils
import polars as pl
import psutil
import pytest
import torch
from torch.utils._pytree import tree_map_only

from helpers.experiments import SUITE, made
from helpers.gguf_files import write
from helpers.layers import windows
from helpers.networks import build_network
from helpers.questions import random_questions
from knowledge_compression.compression.base import memory_bytes
from knowledge_compression.corpora.text import TextFile
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation import similarity
from knowledge_compression.evaluation.scoring import Blank, Scorer
from knowledge_compression.evaluation.scoring.depths import head_at_every_depth
from knowledge_compression.evaluation.similarity import Similarity
from knowledge_compression.models import Model
from knowledge_compression.models.device import Device
from knowledge_compression.models.families import ENCODER
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.soundness import non_finite, weights_of
from knowledge_compression.models.spread import Spread, bytes_by_place, is_spread
from knowledge_compression.recovery.bank import bank_of
from knowledge_compression.recovery.lora import Lora
from knowledge_compression.recovery.prompt import Prompt
from knowledge_compression.recovery.prompted_network import Prompted
from knowledge_compression.recovery.selection import ONCE, PER_LAYER, Reading
from knowledge_compression.results.store import RunStore
from knowledge_compression.results.tracker import NoTracker
from knowledge_compression.training import TrainingSettings

CPU = torch.device("cpu")
ARCHITECTURES = ["bert", "t5", "llama", "gpt2", "gpt_neox", "mistral"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))


def folder_of(place: Path, tokenizer: Any, architecture: str, **changes: Any) -> Path:
    network = build_network(architecture, **changes)
    network.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def divided(folder: Path, share: float = 0.5) -> Model:
    """The model with part of its weights on disk."""
    limit = int(share * (folder / "model.safetensors").stat().st_size)
    model = LocalModel("divided", str(folder)).load(Spread.over("cpu", {"cpu": limit}))
    assert is_spread(model.network) and any(weight.is_meta for weight in model.network.parameters())
    return model


def log_probs(model: Model) -> torch.Tensor:
    scorer = Scorer(model, 512)
    if model.family == ENCODER:
        blanks = [Blank(row.tolist(), position=3) for row in windows(5, 12)]
        return torch.cat([rows for _, rows in scorer.distributions(blanks)])
    return torch.tensor([one.log_prob for said in scorer.log_likelihoods(random_questions(0)) for one in said])


def said(model: Model) -> list[list[int]]:
    return Scorer(model, 512).generate([row.tolist() for row in windows(3, 8)], 5, lambda _: False)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_answers_as_the_undivided_model(
    architecture: str, onednn: bool, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if onednn:  # whichever library multiplies; it takes layers of 256 inputs and more
        monkeypatch.setitem(Device.known, CPU, replace(Device.of(CPU), onednn_products=True))
    wide = {"llama": {"hidden_size": 256, "intermediate_size": 256, "head_dim": 128}}.get(architecture, {})
    folder = folder_of(tmp_path / "model", tiny_tokenizer, architecture, **wide)
    whole, parts = LocalModel("whole", str(folder)).load("cpu"), divided(folder)
    assert parts.device == CPU and memory_bytes(parts.network) >= memory_bytes(whole.network)
    assert len(Scorer(parts).reader.linears) == len(Scorer(whole).reader.linears)
    # The products are the same; their last bit may depend on where in memory a matrix begins.
    torch.testing.assert_close(log_probs(parts), log_probs(whole), rtol=0, atol=2e-5)
    assert parts.family == ENCODER or said(parts) == said(whole)
    found = dict(weights_of(parts))  # tied ones under both names
    assert all(torch.equal(found[name], weight) for name, weight in weights_of(whole))


def test_it_says_where_its_weights_lie(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = divided(folder_of(tmp_path, tiny_tokenizer, "llama"))
    places = bytes_by_place(model.network)
    assert places["disk"] > 0
    assert sum(places.values()) == sum(weight.nbytes for weight in model.network.parameters())


def test_a_weight_on_disk_that_is_not_finite_is_found(tmp_path: Path, tiny_tokenizer: Any) -> None:
    network = build_network("llama")
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    network.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = divided(tmp_path)
    assert model.network.model.layers[1].mlp.down_proj.weight.is_meta
    assert non_finite(weights_of(model)) == {"model.layers.1.mlp.down_proj.weight": 1}


def experiment(folder: Path, tmp_path: Path, **changes: Any) -> Any:
    (tmp_path / "text.txt").write_text("the capital of france is paris . " * 200)
    first = made(folder, {"atlas": SUITE})
    corpus = TextFile(name="text", path=str(tmp_path / "text.txt"), samples=8, length=16)
    return replace(first, corpus=corpus, kept_models=None, **changes)


def test_a_run_compresses_from_disk_to_disk_and_asks_the_divided_model(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = folder_of(tmp_path / "model", tiny_tokenizer, "bert")
    limit = {"cpu": (folder / "model.safetensors").stat().st_size // 2}
    store = RunStore(tmp_path / "out")
    spread = experiment(folder, tmp_path, device=Spread.over("cpu", limit))
    run = spread.run(store, NoTracker())
    assert run.report["spread"]["disk"] > 0
    assert run.config["device_map"] == "auto" and run.config["max_memory"] == limit
    streaming = experiment(folder, tmp_path, source=LocalModel("tiny", str(folder), stream=True))
    assert streaming.id == spread.id  # where a model lies decides nothing
    again = streaming.run(RunStore(tmp_path / "other"), NoTracker())
    assert pl.DataFrame.equals(run.items, again.items)


def test_prompts_are_trained_beside_offloaded_weights_and_other_adapters_are_refused(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    folder = folder_of(tmp_path / "model", tiny_tokenizer, "llama", num_hidden_layers=6)
    device = Spread.over("cpu", {"cpu": int(0.8 * (folder / "model.safetensors").stat().st_size)})
    training = TrainingSettings(tokens=128, batch_size=2)
    target = replace(experiment(folder, tmp_path).target, roles=["ff"])
    run = experiment(folder, tmp_path, device=device, target=target, recovery=Prompt(training=training, tokens=2)).run(
        RunStore(tmp_path / "out"), NoTracker()
    )
    assert run.report["recovery"]["trainable_parameters"] > 0 and "spread" in run.report
    with pytest.raises(BadInput, match="device_map=auto keeps some in memory or on disk"):
        experiment(folder, tmp_path, device=device, target=target, recovery=Lora(training=training)).run(
            RunStore(tmp_path / "out"), NoTracker()
        )


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ({"gpu": "1GB"}, "max_memory names gpu"),
        ({"cpu": "much"}, "max_memory.cpu=much is no size"),
        ({"cpu": 0}, "max_memory.cpu=0 is no size"),
        ({"cpu": "-1GB"}, "is no size"),
    ],
)
def test_a_limit_that_is_none_is_one_line(limits: dict[str, int | str], line: str) -> None:
    with pytest.raises(BadInput, match=line):
        Spread.over("auto", limits)


def test_a_gpu_that_is_not_there_is_one_line() -> None:
    with pytest.raises(BadInput, match="max_memory names 7, and this run divides its model over cpu"):
        Spread.over("cpu", {"7": "1GB"}).room(CPU)


def test_limits_of_several_gpus_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.utils, "get_max_memory", lambda: {0: 1000, 1: 2000, "cpu": 5})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=7))
    assert Spread.over("auto", {"cuda:1": "1.5KB"}).room(torch.device("cuda")) == {0: 900, 1: 1500, "cpu": 7}
    assert Spread("cuda:1").room(torch.device("cuda", 1)) == {1: 1800, "cpu": 7}
    assert Spread("cpu").room(CPU) == {"cpu": 7}


def test_a_compressed_checkpoint_is_not_divided(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write(file)
    with pytest.raises(BadInput, match=r"compressed already .* choose device_map=null"):
        LocalModel("mine", str(file)).load(Spread("cpu"))


def test_weights_that_killed_processes_left_on_disk_are_deleted(tmp_path: Path, tiny_tokenizer: Any) -> None:
    place = tmp_path / "cache" / "offloaded"
    gone, elsewhere = place / f"{platform.node()}-999999999-abc", place / "another-999999999-abc"
    for left in (gone, elsewhere):
        left.mkdir(parents=True)
    model = divided(folder_of(tmp_path / "model", tiny_tokenizer, "llama"))
    assert not gone.exists() and elsewhere.exists()
    mine = [left for left in place.iterdir() if f"-{os.getpid()}-" in left.name]
    assert len(mine) == 1
    del model
    gc.collect()
    assert not mine[0].exists()


def over_two_devices(model: Model) -> Model:
    """The model with its second half on the device ``meta``, which refuses to compute with a tensor of the CPU.

    It stands for a second GPU; what is computed there has a shape and no values.
    """
    network: Any = model.network
    second = network.model.layers[1]
    for part in (second, network.model.norm, network.lm_head):
        part.to("meta")

    def arrive(_: Any, args: Any, kwargs: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))

    second.register_forward_pre_hook(arrive, with_kwargs=True)
    return model


def test_the_lens_looks_into_blocks_on_two_devices(tiny_tokenizer: Any) -> None:
    model = over_two_devices(Model(build_network("llama", tie_word_embeddings=False), tiny_tokenizer, "tiny"))
    ids = windows(3, 8)
    with torch.no_grad(), head_at_every_depth(model.network, torch.arange(3), torch.full((3,), 7), 8):
        logits = model.network(input_ids=ids, use_cache=False).logits
    assert logits.is_meta and logits.shape[:2] == (2, 8)  # three depths of three positions, in rows of eight


@pytest.mark.parametrize("prompts", [1, 2])
def test_prompts_are_read_in_blocks_on_two_devices(prompts: int, tiny_tokenizer: Any) -> None:
    model = Model(build_network("llama", tie_word_embeddings=False), tiny_tokenizer, "tiny")
    bank = bank_of(model, [torch.randn(2 + number, 16) for number in range(prompts)])
    prompted = Prompted(over_two_devices(model), bank, ONCE)
    with torch.no_grad(), prompted.choosing(None):
        logits = model.network(input_ids=windows(3, 8), use_cache=False).logits
    assert logits.is_meta and logits.shape[:2] == (3, 8)


def test_a_block_on_another_device_chooses_its_own_prompt(tiny_tokenizer: Any) -> None:
    model = Model(build_network("llama"), tiny_tokenizer, "tiny")
    reading = Reading(bank_of(model, [torch.randn(2, 16), torch.randn(3, 16)]), PER_LAYER, torch.ones(3, 8))
    query, own = torch.empty(3, 2, 8, 8, device="meta"), torch.empty(3, 2, 8, device="meta")
    for attended, _ in (reading.attend_to_prompt(1, query, own, 1.0) for _ in range(2)):  # chooses, then knows
        assert attended.is_meta and attended.shape == query.shape
    assert reading.choices[1].is_meta


def test_similarity_compares_what_two_devices_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    def cosine(before: torch.Tensor, after: torch.Tensor, dim: int) -> torch.Tensor:
        assert before.device == after.device
        return torch.ones(len(before))

    places = {"dense": "cpu", "model": "meta"}
    monkeypatch.setattr(similarity, "functional", SimpleNamespace(cosine_similarity=cosine))
    monkeypatch.setattr(similarity, "_blocks", lambda model: 1)
    monkeypatch.setattr(Similarity, "_windows", lambda self, scorer: windows(2, 8))
    monkeypatch.setattr(Similarity, "fingerprint", lambda self: "")
    rows = {(kind, "block#0"): torch.ones(8, 4) for kind in ("attention", "activation")}
    monkeypatch.setattr(
        similarity, "observe", lambda model, ids: {key: seen.to(places[model]) for key, seen in rows.items()}
    )
    scorer: Any = SimpleNamespace(original=lambda: "dense", model="model")
    assert Similarity().evaluate(scorer).metrics["activation"] == 1.0
