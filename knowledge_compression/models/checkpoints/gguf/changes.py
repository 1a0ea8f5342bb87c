"""Changes between tensors of a GGUF file and of the network, in both directions, as in llama.cpp's own conversion.

Matrices come as ``[..., out_features, in_features]`` or, encoded, as ``[..., out_features, bytes]``, so that a change
moves only whole rows unless it declares otherwise; tensors of one dimension, and convolutions, are never encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Function = Callable[[Array, Any], Array]


def _one_below_the_other(parts: Sequence[Array]) -> Array:
    return np.concatenate(parts, axis=-2)


@dataclass(frozen=True)
class Change:
    """A change of a tensor, given the network's configuration.

    Attributes:
        store: converts the network's tensor to the file's.
        load: converts the file's tensor to the network's.
        rows: whether only whole rows are moved, which is then possible for encoded rows too.
        exact: whether the file's values are the network's; otherwise they need more bits than these.
        idle: whether it changes nothing in a network of a configuration.
        join: makes one parameter of the results of ``load`` if several tensors form it; by default along the rows.
    """

    store: Function
    load: Function
    rows: bool = True
    exact: bool = True
    idle: Callable[[Any], bool] = lambda config: False
    join: Callable[[Sequence[Array]], Array] = _one_below_the_other


def paired(heads: str) -> Change:
    """Rows of a rotated projection: in the file the two halves of each head's rows, one row of each in turn."""

    def store(tensor: Array, config: Any) -> Array:
        return tensor.reshape(getattr(config, heads), 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)

    def load(tensor: Array, config: Any) -> Array:
        return tensor.reshape(getattr(config, heads), -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)

    return Change(store, load)


def of_each_kind(heads: str) -> Change:
    """Rows of queries, keys and values: ordered by head in the network, and by kind in the file."""

    def store(tensor: Array, config: Any) -> Array:
        return tensor.reshape(getattr(config, heads), 3, -1, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)

    def load(tensor: Array, config: Any) -> Array:
        return tensor.reshape(3, getattr(config, heads), -1, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)

    return Change(store, load)


def of_each_group(groups: Callable[[Any], int]) -> Change:
    """The same for grouped heads: in the network each group's queries, its key and its value."""

    def store(tensor: Array, config: Any) -> Array:
        parts = tensor.reshape(groups(config), config.num_attention_heads // groups(config) + 2, -1, *tensor.shape[1:])
        kinds = (parts[:, :-2], parts[:, -2], parts[:, -1])
        return np.concatenate([part.reshape(-1, *tensor.shape[1:]) for part in kinds])

    def load(tensor: Array, config: Any) -> Array:
        count, heads = groups(config), config.num_attention_heads
        width = len(tensor) // (heads + 2 * count)
        kinds = np.split(tensor, [heads * width, (heads + count) * width])
        parts = [kind.reshape(count, -1, width, *tensor.shape[1:]) for kind in kinds]
        return np.concatenate(parts, axis=1).reshape(tensor.shape)

    return Change(store, load)


def half(number: int) -> Change:
    """The first or second half of a matrix's rows, of each expert in a bank."""

    def store(tensor: Array, config: Any) -> Array:
        return np.split(tensor, 2, axis=-2)[number]

    return Change(store, _same)


def _same(tensor: Array, config: Any) -> Array:
    return tensor


def _add(number: float) -> Function:
    def change(tensor: Array, config: Any) -> Array:
        return np.asarray(tensor + np.float32(number))

    return change


UNCHANGED = Change(_same, _same)
PAIRED = {".attn_q.": paired("num_attention_heads"), ".attn_k.": paired("num_key_value_heads")}
PLUS_ONE = Change(_add(1), _add(-1))
NEGATIVE_EXPONENTIAL = Change(lambda tensor, _: -np.exp(tensor), lambda tensor, _: np.log(-tensor))
WITHOUT_MIDDLE = Change(lambda tensor, _: tensor[:, 0], lambda tensor, _: tensor[:, None])
FLAT = Change(lambda tensor, _: tensor[0], lambda tensor, _: tensor.reshape(1, -1))
COLUMN = Change(lambda tensor, _: tensor[:, None], lambda tensor, _: tensor.reshape(-1))
NEGATIVE_EXPONENTIAL_COLUMN = Change(
    lambda tensor, _: -np.exp(tensor)[:, None], lambda tensor, _: np.log(-tensor.reshape(-1))
)
BANK_HALVES = {"ffn_gate_exps": half(0), "ffn_up_exps": half(1)}
SHARED_HALVES = {"ffn_gate_shexp": half(0), "ffn_up_shexp": half(1)}


def row_per_group(groups: str) -> Change:
    """A vector, in the file a matrix with one row for each group."""
    return Change(
        lambda tensor, config: tensor.reshape(getattr(config, groups), -1), lambda tensor, _: tensor.reshape(-1)
    )


def scaled(factor: Callable[[Any], float | Sequence[float]]) -> Change:
    """A matrix multiplied by a factor of the configuration, or each row by its own; a file's network has none left."""

    def store(tensor: Array, config: Any) -> Array:
        return np.asarray(tensor * np.asarray(factor(config), dtype=np.float32).reshape(-1, 1))

    return Change(store, _same, rows=False, exact=False, idle=lambda config: bool(np.all(np.equal(factor(config), 1))))


def filled(rows: str) -> Change:
    """A table with as many rows as an attribute says; words that the network's lacks get its first row, as there."""

    def store(tensor: Array, config: Any) -> Array:
        return np.concatenate([tensor, np.repeat(tensor[:1], getattr(config, rows) - len(tensor), axis=0)])

    return Change(store, _same, rows=False)


def every_second(number: int, axis: int) -> Change:
    """Every second row of a matrix, of each expert in a bank (axis -2), or of its biases (axis -1)."""

    def store(tensor: Array, config: Any) -> Array:
        return np.moveaxis(np.moveaxis(tensor, axis, 0)[number::2], 0, axis)

    def join(parts: Sequence[Array]) -> Array:
        first = [np.moveaxis(part, axis, 0) for part in parts]
        return np.moveaxis(np.stack(first, axis=1).reshape(-1, *first[0].shape[1:]), 0, axis)

    return Change(store, _same, join=join)


def of_latent(number: int) -> Change:
    """Keys (0) or values (1) that multi-head latent attention makes of its latent vectors: of each head first the
    keys, then the values in the network; in the file two banks of heads, the keys ``[heads, latent, width]``.
    """

    def store(tensor: Array, config: Any) -> Array:
        heads = tensor.reshape(config.num_attention_heads, -1, tensor.shape[-1])
        keys, values = np.split(heads, [config.qk_nope_head_dim], axis=1)
        return values if number else keys.swapaxes(1, 2)

    def load(tensor: Array, config: Any) -> Array:
        return tensor if number else tensor.swapaxes(1, 2)

    def join(parts: Sequence[Array]) -> Array:
        whole = np.concatenate(parts, axis=1)
        return whole.reshape(-1, whole.shape[-1])

    return Change(store, load, rows=bool(number), join=join)


def of_key_heads(number: int) -> Change:
    """Rows of Qwen3-Next's joint projection: of each key head its query, key, values and gates in the network; in the
    file all queries, keys and values (0), and all gates (1).
    """

    def widths(config: Any) -> list[int]:
        key = config.linear_key_head_dim
        values = config.linear_num_value_heads // config.linear_num_key_heads * config.linear_value_head_dim
        return [key, 2 * key, 2 * key + values]

    def store(tensor: Array, config: Any) -> Array:
        heads = tensor.reshape(config.linear_num_key_heads, -1, *tensor.shape[1:])
        kinds = np.split(heads, widths(config), axis=1)
        chosen = kinds[3:] if number else kinds[:3]
        return np.concatenate([kind.reshape(-1, *tensor.shape[1:]) for kind in chosen])

    def load(tensor: Array, config: Any) -> Array:
        count, ends = config.linear_num_key_heads, widths(config)
        kinds = [tensor] if number else np.split(tensor, [count * end for end in ends[:2]])
        return np.concatenate([kind.reshape(count, -1, *tensor.shape[1:]) for kind in kinds], axis=1)

    def join(parts: Sequence[Array]) -> Array:
        whole = np.concatenate(parts, axis=1)
        return whole.reshape(-1, *whole.shape[2:])

    return Change(store, load, join=join)


def values_in_turn(axis: int = 0, *, behind_keys: bool = False, before: Change | None = None) -> Change:
    """Value heads of Qwen3.5's linear attention: of each key head together in the network, of all key heads in turn in
    the file.

    Args:
        axis: along which they lie.
        behind_keys: whether queries and keys lie before them.
        before: a change that the file's tensor has besides.
    """

    def moved(tensor: Array, config: Any, *, stored: bool) -> Array:
        keys = config.linear_num_key_heads
        start = 2 * keys * config.linear_key_head_dim if behind_keys else 0
        rest, values = np.split(np.moveaxis(tensor, axis, 0), [start])
        sizes = (keys, config.linear_num_value_heads // keys)
        heads = values.reshape(*(sizes if stored else sizes[::-1]), -1, *values.shape[1:]).swapaxes(0, 1)
        return np.moveaxis(np.concatenate([rest, heads.reshape(values.shape)]), 0, axis)

    def store(tensor: Array, config: Any) -> Array:
        return moved(before.store(tensor, config) if before else tensor, config, stored=True)

    def load(tensor: Array, config: Any) -> Array:
        back = moved(tensor, config, stored=False)
        return before.load(back, config) if before else back

    return Change(store, load, rows=axis == 0)


GATE_AND_UP_IN_TURN = {
    f"ffn_{name}_exps.{ending}": every_second(number, axis)
    for number, name in enumerate(("gate", "up"))
    for ending, axis in (("weight", -2), ("bias", -1))
}
LATENT = {"attn_k_b.": of_latent(0), "attn_v_b.": of_latent(1)}
ROW = Change(lambda tensor, _: tensor.reshape(-1), lambda tensor, _: tensor.reshape(1, -1))
QWEN3_NEXT = {
    "ssm_norm": UNCHANGED,
    "norm.weight": PLUS_ONE,
    "ssm_a": NEGATIVE_EXPONENTIAL,
    "ssm_conv1d.weight": WITHOUT_MIDDLE,
    "attn_qkv": of_key_heads(0),
    "attn_gate": of_key_heads(1),
    "ffn_gate_inp_shexp": FLAT,
    **BANK_HALVES,
}
QWEN3_5 = {
    "ssm_alpha": values_in_turn(),  # before ssm_a, which its name contains
    "ssm_a": values_in_turn(before=NEGATIVE_EXPONENTIAL),
    "ssm_conv1d.weight": values_in_turn(behind_keys=True, before=WITHOUT_MIDDLE),
    "attn_qkv": values_in_turn(behind_keys=True),
    "attn_gate": values_in_turn(),
    "ssm_beta": values_in_turn(),
    "ssm_dt": values_in_turn(),
    "ssm_out": values_in_turn(1),
    "ssm_norm": UNCHANGED,
    "norm.weight": PLUS_ONE,
    "ffn_gate_inp_shexp": FLAT,
    **BANK_HALVES,
}
