"""Checks that a loaded model is usable: its configuration, its weights, and one forward pass."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import nn, torch
from knowledge_compression.models.families import ENCODER_DECODER, architecture_of
from knowledge_compression.models.model import Model
from knowledge_compression.models.spread import at_hand

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

_DEEPEST = 4096  # blocks: no network has more, and building a billion of them would never end
_DEPTHS = (
    "num_hidden_layers",
    "num_decoder_layers",
    "decoder_layers",
)  # transformers' own names, whatever the file uses
_SHOWN = 3  # tensors named in a message


def check_configuration(config: PretrainedConfig) -> None:
    """Refuse a configuration with no blocks, or with more than a network can have.

    Raises:
        BadInput: there is such a value; the message names it.
    """
    for name in _DEPTHS:
        depth = getattr(config, name, None)
        if depth is not None and not (isinstance(depth, int) and 1 <= depth <= _DEEPEST):
            raise BadInput(f"its configuration has {name}={depth}; a network has 1 to {_DEEPEST} blocks")


def check_loaded(network: PreTrainedModel, missing: Iterable[str], left_over: Iterable[str]) -> None:
    """Refuse a network that does not match its files.

    Args:
        network: as it was loaded.
        missing: weights of the network that are missing from the files.
        left_over: tensors in the files that no weight of the network uses.

    Raises:
        BadInput: weights would be random, or whole blocks left out.
    """
    names = sorted(missing)
    for stack in architecture_of(network).stacks:
        inside = re.escape(stack.blocks.removeprefix(f"{network.base_model_prefix}.")).replace(r"\*", r"[^.]+")
        depth = sum(stack.is_block(path) for path, _ in network.named_modules())
        last = [name for name in network.state_dict() if re.search(rf"(?:^|\.){inside}\.{depth - 1}\.", name)]
        if last and set(last) <= set(names):
            raise BadInput(
                f"its configuration has {depth} blocks, but its files hold no weight of the last ({last[0]}, ...); one "
                "of the two is wrong"
            )
        for name in sorted(left_over):
            found = re.search(rf"(?:^|\.){inside}\.(\d+)\.", name)
            if found and int(found[1]) >= depth:
                raise BadInput(
                    f"its files hold {name}, but its configuration has {depth} blocks; one of the two is wrong"
                )
    if names:
        raise BadInput(
            f"it lacks {len(names)} weights ({names[0]}, ...), so its answers would be partly random; use a "
            "checkpoint that was saved whole, with its language-model head"
        )


def check_shapes(mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Refuse weights of another shape than the configuration describes.

    Args:
        mismatched: name, shape in the files and shape in the network, as transformers reports them.

    Raises:
        BadInput: there is such a weight.
    """
    for name, stored, wanted in sorted(mismatched):
        raise BadInput(
            f"it holds {name} of shape {list(stored)}, but its configuration describes {list(wanted)}; use weights and "
            "config.json of the same model"
        )


def check_tokenizer(model: Model) -> None:
    """Refuse a tokenizer whose own ids exceed the embeddings, as another model's would.

    Added tokens may exceed them: from now on the network refuses a text that contains one.

    Raises:
        BadInput: there is such an id; the message names a token and both sizes.
    """
    embeddings = cast(nn.Embedding, model.network.get_input_embeddings())
    rows, tokenizer = embeddings.weight.shape[0], model.tokenizer
    tokenizer(["a text"])  # errors caused by its settings appear here
    added = set(getattr(tokenizer, "added_tokens_decoder", ()))
    unknown = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if unknown:
        refuse = partial(_refuse_beyond, model.name, {i: token for token, i in unknown.items()})
        for module in model.network.modules():
            if isinstance(module, nn.Embedding) and module.weight is embeddings.weight:
                module.register_forward_pre_hook(refuse)
    if beyond := {token: i for token, i in unknown.items() if i not in added}:
        token = min(beyond, key=lambda one: beyond[one])
        raise BadInput(
            f"its tokenizer gives '{token}' the id {beyond[token]}, but its embeddings have only {rows} rows; use "
            "weights and tokenizer of the same model"
        )


def _refuse_beyond(name: str, unknown: Mapping[int, str], embeddings: nn.Module, given: tuple[Tensor, ...]) -> None:
    """Refuse ids that an embedding lacks before it looks them up; on a GPU such an id would end the process."""
    largest, rows = int(given[0].max()), cast(nn.Embedding, embeddings).weight.shape[0]
    if largest >= rows:
        raise BadInput(
            f"a text has the token '{unknown.get(largest, largest)}', which was added to the tokenizer of {name} with "
            f"the id {largest}, and its network has embeddings for the ids 0 to {rows - 1}; use a checkpoint whose "
            "embeddings were resized, or the tokenizer that it was trained with"
        )


def check_it_runs(model: Model) -> None:
    """Run the network on a few tokens, so that a network that cannot run fails before anything else is done.

    Raises:
        Exception: any error that its modules raise.
        BadInput: its logits do not have the vocabulary's size.
    """
    ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    decoder = {"decoder_input_ids": ids} if model.family == ENCODER_DECODER else {}
    with torch.inference_mode():
        logits = model.network(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder).logits
    if logits.shape[:2] != ids.shape:
        raise BadInput(f"its logits for {ids.shape[1]} tokens have the shape {list(logits.shape)}")


def non_finite(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """The number of NaN or infinite values in each tensor; tensors without any are left out.

    Costs one pass over the tensors; those on the meta device have no values.
    """
    floating = ((name, tensor) for name, tensor in tensors if tensor.is_floating_point() and not tensor.is_meta)
    return {name: count for name, tensor in floating if (count := _non_finite_in(tensor))}


def weights_of(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer of a model by name, each once, also in a divided network."""
    seen = set[int]()
    for name, tensor in model.network.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, at_hand(model.network, name, tensor.detach())


def check_finite(tensors: Iterable[tuple[str, Tensor]], of: str) -> None:
    """Refuse NaN or infinite weights, before compression turns them into something that looks valid.

    Args:
        tensors: the weights by name, e.g. :func:`weights_of` a model.
        of: the name of their model, for the message.

    Raises:
        BadInput: there are such weights; the message names the tensors.
    """
    if found := non_finite(tensors):
        raise BadInput(
            f"{of} has weights that are not finite ({shown(found)}), so a compressed version would be "
            "meaningless; use an intact checkpoint, or compression=none to evaluate it unchanged"
        )


def shown(found: Mapping[str, int]) -> str:
    """The result of :func:`non_finite` as part of a message."""
    first = [f"{name}: {count}" for name, count in list(found.items())[:_SHOWN]]
    return ", ".join(first + ([f"and {len(found) - _SHOWN} more tensors"] if len(found) > _SHOWN else []))


def _non_finite_in(tensor: Tensor) -> int:
    if type(tensor) not in (torch.Tensor, nn.Parameter):  # another library's packed weight
        tensor = tensor.dequantize()
    if tensor.itemsize < 4:
        tensor = tensor.float()  # sums of narrow dtypes overflow, or are not implemented
    if bool(tensor.sum().isfinite()):  # one pass without a copy; a sum that is not finite is not conclusive
        return 0
    return int((~tensor.isfinite()).sum())
