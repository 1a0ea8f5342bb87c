"""Unstructured pruning removes exactly what it says, and the same weights as torch's own."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune as torch_prune

from helpers.networks import logits_of
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.random_pruning import RandomPruning
from knowledge_compression.compression.solve.threshold import pieces, smallest
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target, Targets

ATT = ["encoder_att", "decoder_self_att", "cross_att"]
ALL = [*ATT, "ff"]


def select(model: Model, *roles: str) -> Targets:
    return Target("test", list(roles)).select(model)


def zeros(targets: Targets) -> int:
    return sum(int((layer.weight == 0).sum()) for layer in targets)


@pytest.mark.parametrize("roles", [ATT, ALL, ["final"]], ids=["att", "all", "final"])
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.55, 0.9])
def test_global_magnitude_is_torchs_global_unstructured(
    any_tiny_model: Model, tiny_model: Callable[[str], Model], roles: list[str], sparsity: float
) -> None:
    reference = tiny_model(any_tiny_model.network.config.model_type)
    reference.untie_head()
    modules = [(layer.module, "weight") for layer in select(reference, *roles)]
    torch_prune.global_unstructured(modules, torch_prune.L1Unstructured, amount=sparsity)

    targets = select(any_tiny_model, *roles)
    report = Magnitude(sparsity).compress(any_tiny_model, targets, None)

    for ours, (theirs, _) in zip(targets, modules, strict=True):
        assert torch.equal(ours.module.weight, theirs.weight)
    assert report.removed == round(sparsity * targets.parameters) == zeros(targets)
    assert report.sparsity == report.removed / targets.parameters
    assert report.model_sparsity == report.removed / report.model_parameters


@pytest.mark.parametrize("sparsity", [0.1, 0.5])
def test_layer_magnitude_is_torchs_l1_unstructured(tiny_model: Callable[[str], Model], sparsity: float) -> None:
    model, reference = tiny_model("gpt2"), tiny_model("gpt2")
    targets = select(model, *ALL)
    Magnitude(sparsity, scope="layer").compress(model, targets, None)
    for ours, theirs in zip(targets, select(reference, *ALL), strict=True):
        torch_prune.l1_unstructured(theirs.module, "weight", sparsity)
        assert torch.equal(ours.module.weight, theirs.module.weight)


@given(
    st.lists(st.lists(st.floats(width=16, allow_nan=False), min_size=1, max_size=40), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.data(),
)
def test_the_cut_is_the_kth_smallest_and_exact_under_ties(
    values: list[list[float]], dtype: torch.dtype, data: st.DataObject
) -> None:
    tensors = [torch.tensor(row).to(dtype) for row in values]
    everything = torch.cat(tensors).abs()
    k = data.draw(st.integers(0, len(everything)))
    cut = smallest(lambda: tensors, k)
    masks = torch.cat([cut.removes(tensor) for tensor in tensors])
    assert int(masks.sum()) == k
    if k:
        assert cut.threshold == float(everything.float().kthvalue(k).values)
        assert everything[masks].max() <= cut.threshold
        if k < len(everything):
            assert everything[~masks].min() >= cut.threshold
        # of the ties the first go
        ties = masks[everything == cut.threshold]
        assert torch.equal(ties, torch.arange(len(ties)) < cut.ties)


def test_the_cut_walks_large_and_transposed_tensors_in_pieces() -> None:
    wide = torch.randn(3, 700_000, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    assert [len(piece) for piece in pieces(wide)] == [1, 1, 1]
    assert [len(piece) for piece in pieces(wide.T)] == [349525, 349525, 950]
    k = 1_000_001
    for tensor in (wide, wide.T):
        cut = smallest(lambda tensor=tensor: [tensor], k)
        assert cut.threshold == float(wide.abs().flatten().kthvalue(k).values)
        assert sum(int(cut.removes(piece).sum()) for piece in pieces(tensor)) == k


def test_asking_for_more_than_there_is_is_an_error() -> None:
    with pytest.raises(ValueError, match="fewer than 5"):
        smallest(lambda: [torch.ones(4)], 5)


@pytest.mark.parametrize("method", [Magnitude, RandomPruning])
@settings(max_examples=30)
@given(sparsity=st.floats(0, 1, exclude_max=True), scope=st.sampled_from(["global", "layer"]))
def test_any_sparsity_is_reached_exactly(
    method: type, tiny_llama_weights: tuple[Model, dict[str, torch.Tensor]], sparsity: float, scope: str
) -> None:
    model, weights = tiny_llama_weights
    model.network.load_state_dict(weights)
    targets = select(model, *ALL)
    report = method(sparsity, scope=scope).compress(model, targets, None)
    wanted = (
        round(sparsity * targets.parameters)
        if scope == "global"
        else sum(round(sparsity * layer.parameters) for layer in targets)
    )
    assert report.removed == wanted == zeros(targets)


@pytest.fixture(scope="module")
def tiny_llama_weights() -> tuple[Model, dict[str, torch.Tensor]]:
    from helpers.networks import build_network

    network = build_network("llama")
    return Model(network, None, "tiny"), {key: value.clone() for key, value in network.state_dict().items()}


@pytest.mark.parametrize(("pattern", "keep", "of"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
@pytest.mark.parametrize("method", [Magnitude, RandomPruning])
def test_a_pattern_holds_in_every_group(any_tiny_model: Model, method: type, pattern: str, keep: int, of: int) -> None:
    targets = select(any_tiny_model, *ALL)
    before = [layer.weight.clone() for layer in targets]
    report = method(0.5, pattern=pattern).compress(any_tiny_model, targets, None)
    assert report.sparsity == 1 - keep / of
    for layer, dense in zip(targets, before, strict=True):
        groups, were = layer.weight.unflatten(1, (-1, of)), dense.unflatten(1, (-1, of))
        assert ((groups != 0).sum(-1) == keep).all()
        if method is Magnitude:
            kept = torch.where(groups != 0, were.abs(), torch.inf).amin(-1)
            gone = torch.where(groups == 0, were.abs(), 0).amax(-1)
            assert (kept >= gone).all()


def test_random_is_repeatable_and_depends_on_its_seed(tiny_model: Callable[[str], Model]) -> None:
    def pruned(seed: int) -> torch.Tensor:
        model = tiny_model("llama")
        RandomPruning(0.5, seed=seed).compress(model, select(model, "ff"), None)
        return torch.cat([layer.weight.flatten() for layer in select(model, "ff")])

    assert torch.equal(pruned(0), pruned(0))
    assert not torch.equal(pruned(0), pruned(1))


def test_pruning_the_final_layer_leaves_the_embeddings_alone(any_tiny_model: Model) -> None:
    embeddings = any_tiny_model.network.get_input_embeddings().weight
    before = embeddings.detach().clone()
    Magnitude(0.5).compress(any_tiny_model, select(any_tiny_model, "final"), None)
    any_tiny_model.network.tie_weights()  # lm-eval's HFLM does this
    (final,) = select(any_tiny_model, "final")
    assert torch.equal(any_tiny_model.network.get_input_embeddings().weight, before)
    assert int((final.weight == 0).sum()) == round(0.5 * final.parameters)
    assert logits_of(any_tiny_model).isfinite().all()


def test_bfloat16_is_pruned_exactly_and_counted_as_16_bits(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("llama")
    model.network.bfloat16()
    targets = select(model, *ALL)
    report = Magnitude(0.4).compress(model, targets, None)
    assert report.removed == round(0.4 * targets.parameters) == zeros(targets)
    assert report.bits == 16


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"sparsity": 1.0}, r"sparsity=1.0 .*\[0, 1\)"),
        ({"sparsity": -0.1}, r"sparsity=-0.1 .*\[0, 1\)"),
        ({"sparsity": float("nan")}, r"sparsity=nan .*\[0, 1\)"),
        ({"sparsity": 0.2, "scope": "block"}, "scope=block does not exist; choose one of global, layer"),
        ({"sparsity": 0.2, "pattern": "half"}, "pattern=half is not of the form n:m"),
        ({"sparsity": 0.2, "pattern": "4:2"}, "pattern=4:2 is not of the form n:m"),
        ({"sparsity": 0.2, "pattern": "3:5"}, "pattern=3:5 does not divide the 16 inputs of model.layers.0"),
    ],
)
@pytest.mark.parametrize("method", [Magnitude, RandomPruning])
def test_bad_settings_get_one_line_and_touch_nothing(
    tiny_model: Callable[[str], Model], method: type, settings: dict, line: str
) -> None:
    model = tiny_model("llama")
    before = logits_of(model)
    with pytest.raises(BadInput, match=line) as error:
        method(**settings).compress(model, select(model, *ALL), None)
    assert "\n" not in str(error.value)
    assert torch.equal(logits_of(model), before)
