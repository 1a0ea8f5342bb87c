"""What was loaded is a model that can be asked, or one line says why not; weights that are not finite are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from helpers.matrix import WIDE
from helpers.networks import VOCABULARY, build_network, make_tokenizer
from helpers.places import CONF
from knowledge_compression.configuration import part
from knowledge_compression.errors import BadInput, ModelUnavailable
from knowledge_compression.evaluation.scoring import Blank, Question, Scorer
from knowledge_compression.models import Model, Target
from knowledge_compression.models.families import ENCODER
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.soundness import check_finite, non_finite, shown, weights_of

METHODS = sorted((CONF / "compression").glob("*.yaml"))
ALL = Target("all", ["encoder_att", "decoder_self_att", "cross_att", "ff"])
TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]


@given(
    places=st.dictionaries(
        st.integers(0, 99), st.sampled_from([float("nan"), float("inf"), -float("inf")]), max_size=4
    ),
    kind=st.sampled_from(TYPES),
    large=st.booleans(),
)
def test_every_value_that_is_not_finite_is_counted(places: dict[int, float], kind: torch.dtype, large: bool) -> None:
    """Also where finite values add up to infinity, and in types without sums."""
    values = torch.full((100,), torch.finfo(kind).max if large else 1.0, dtype=torch.float64)
    for place, value in places.items():
        values[place] = value
    tensor = values.to(kind)
    wrong = int((~tensor.double().isfinite()).sum())
    assert wrong == len(places) or kind == torch.float8_e4m3fn  # which has no infinity
    assert non_finite([("weight", tensor.view(4, 25)), ("ids", torch.arange(3))]) == (
        {"weight": wrong} if wrong else {}
    )


def test_what_holds_nothing_and_what_is_tied_is_counted_once(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("llama")
    assert non_finite([("meta", torch.empty(3, device="meta"))]) == {}
    with torch.no_grad():
        model.network.get_input_embeddings().weight[3, 2] = float("nan")
    assert model.head_is_tied and non_finite(weights_of(model)) == {"model.embed_tokens.weight": 1}


def test_a_message_names_few_tensors_and_counts_the_others() -> None:
    found = {f"layer.{i}": i + 1 for i in range(5)}
    assert shown(found) == "layer.0: 1, layer.1: 2, layer.2: 3, and 2 more tensors"
    with pytest.raises(BadInput, match=r"mine has weights that are not finite \(weight: 2\)"):
        check_finite([("weight", torch.tensor([1.0, float("nan"), -float("inf")]))], "mine")


@pytest.mark.parametrize("path", [path for path in METHODS if path.stem != "none"], ids=lambda path: path.stem)
@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_no_method_turns_a_nan_away_or_keeps_it(path: Path, where: str, tiny_model: Callable[[str], Model]) -> None:
    """In a layer that it compresses, and in one that it does not."""
    settings = {"group_size": 8} if "group_size:" in path.read_text() else {}
    method = part("compression", path.stem, sparsity=0.5, **settings)
    wide = build_network("llama", **WIDE["llama"])  # for blocks of 32 inputs
    model = Model(wide, tiny_model("llama").tokenizer, "llama")
    with torch.no_grad():
        model.network.get_parameter(where).view(-1)[3] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    text = torch.randint(7, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(BadInput, match=f"not finite \\({where}: 1\\)"):
        method.compress(model, ALL.select(model), text if method.calibrated else None)
    after = model.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].nan_to_num(7.0), after[name].nan_to_num(7.0)) for name in before)


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "big"}, "'hidden_size' expected int, got str"),
        ({"hidden_size": 0}, "ZeroDivisionError"),
        ({"num_attention_heads": -1}, "invalid shape dimension"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000; a network has 1 to 4096 blocks"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0; a network has 1 to"),
        ({"num_hidden_layers": 1}, "hold bert.encoder.layer.1.* but its configuration has 1 blocks"),
        ({"num_hidden_layers": 3}, "has 3 blocks, but its files hold no weight of the last"),
        ({"vocab_size": 5}, r"of shape \[94, 16\], but its configuration describes \[5, 16\]"),
        ({"hidden_act": 3}, "KeyError|TypeError"),
    ],
)
def test_a_configuration_that_is_not_that_of_the_weights(folder: Path, changes: Any, said: str) -> None:
    edit(folder, **changes)
    with pytest.raises(BadInput, match=said) as error:
        LocalModel("mine", str(folder)).load("cpu")
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    network = build_network("bert", vocab_size=20)
    network.save_pretrained(folder)
    with pytest.raises(BadInput, match=r"gives '.*' the id 20, but its embeddings have only 20 rows"):
        LocalModel("mine", str(folder)).load("cpu")


def test_a_token_that_was_added_beyond_the_embeddings_is_let_through(folder: Path) -> None:
    """As llamas have a padding token without a row: no text has it."""
    network = build_network("bert", vocab_size=len(make_tokenizer()))
    network.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[MORE]"})
    tokenizer.save_pretrained(folder)
    model = LocalModel("mine", str(folder)).load("cpu")
    assert model.tokenizer.pad_token_id == len(make_tokenizer())
    blanks = [Blank([7, 8, 9], 1), Blank([7, 8, 9, 10, 11], 1)]  # of different lengths, side by side
    rows = {i: row for which, part in Scorer(model).distributions(blanks) for i, row in zip(which, part, strict=True)}
    model.tokenizer.pad_token = "[PAD]"
    same = {i: row for which, part in Scorer(model).distributions(blanks) for i, row in zip(which, part, strict=True)}
    assert all(torch.equal(rows[i], same[i]) for i in (0, 1))


@pytest.mark.parametrize("architecture", ["bert", "llama", "t5", "bart"])
def test_a_text_with_a_token_that_was_added_beyond_the_embeddings_is_one_line(
    architecture: str, tmp_path: Path
) -> None:
    build_network(architecture, vocab_size=len(make_tokenizer())).save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["[MORE]"])
    tokenizer.save_pretrained(tmp_path)
    model = LocalModel("mine", str(tmp_path)).load("cpu")
    sound, beyond = tokenizer(["paris is in france", "paris is [MORE]"], add_special_tokens=False)["input_ids"]
    scorer = Scorer(model)

    def asked(ids: list[int]) -> None:
        if model.family == ENCODER:
            list(scorer.distributions([Blank(ids, 0)]))
            return
        scorer.generate([ids, sound], 2, lambda _: False)
        scorer.log_likelihoods([Question(sound, [ids, sound])])

    asked(sound)
    said = r"the token '\[MORE\]', which was added to the tokenizer of mine with the id \d+, .* the ids 0 to \d+; use"
    with pytest.raises(BadInput, match=said):
        asked(beyond)
    if model.family != ENCODER:
        with pytest.raises(BadInput, match=said):
            scorer.log_likelihoods([Question(beyond, [sound])])


def test_a_weight_of_integers_is_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    save_file(weights | {name: weights[name].char()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=f"holds {name} as integers, without a quantization_config"):
        LocalModel("mine", str(folder)).load("cpu")


def test_a_streamed_weight_of_the_wrong_shape_is_refused(folder: Path) -> None:
    """Nothing else would notice where nothing is asked."""
    weights = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    save_file(weights | {name: weights[name][1:].clone()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"output.dense.weight of shape \[15, 32\], .* describes \[16, 32\]"):
        LocalModel("mine", str(folder), stream=True).streamed("cpu")
    save_file(weights | {name: weights[name].char()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"of shape \[16, 32\] of integers"):
        LocalModel("mine", str(folder), stream=True).streamed("cpu")


@pytest.mark.parametrize("where", [3, None, ["x"], "", ".", "../x.safetensors", "/etc/passwd", "none.safetensors"])
def test_an_index_that_names_no_file_beside_it(tmp_path: Path, where: Any) -> None:
    build_network("llama").save_pretrained(tmp_path, max_shard_size="8KB")
    make_tokenizer().save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = where
    index.write_text(json.dumps(content))
    with pytest.raises(ModelUnavailable) as error:
        LocalModel("mine", str(tmp_path), stream=True).streamed("cpu")
    assert "\n" not in str(error.value)
