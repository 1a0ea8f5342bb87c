"""The layer map: a heat map of a compression's damage, with a column per block and a row per linear layer."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping

import numpy as np

from knowledge_compression.compression.layer_reports import CompressionReport, LayerReport

# What a map can show, by its label; the first quantity that a report has is drawn.
QUANTITIES: Mapping[str, Callable[[LayerReport], float | None]] = {
    "relative output error": lambda layer: layer.error_after,
    "share of weights removed": lambda layer: layer.sparsity if layer.removed else None,
    "bits per kept weight": lambda layer: layer.bits,
}
_NUMBERED = re.compile(r"(?P<stack>.*?)\.(?P<block>\d+)\.(?P<inside>.+)")


def layer_map(report: CompressionReport, quantity: str | None = None) -> bytes:
    """Draw a compression, layer by module, as a PNG.

    Args:
        report: the compression's report, with at least one layer.
        quantity: one of :data:`QUANTITIES`; the first that the report has if None. Errors are drawn on a logarithmic
            scale. Linear layers outside the blocks have a separate column.

    Returns:
        The image.

    Raises:
        ValueError: the report has no layer, or nothing of that quantity.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    name = quantity or next((q for q, of in QUANTITIES.items() if any(of(x) is not None for x in report.layers)), None)
    values = {layer.path: QUANTITIES[name](layer) for layer in report.layers} if name else {}
    if all(value is None for value in values.values()):
        raise ValueError(f"{report.method} reported no {quantity or 'layer'} to draw")

    places = {path: _place(path) for path in values}
    columns = list(dict.fromkeys(column for column, _ in places.values()))
    rows = list(dict.fromkeys(row for _, row in places.values()))
    grid = np.full((len(rows), len(columns)), np.nan)
    for path, value in values.items():
        grid[rows.index(places[path][1]), columns.index(places[path][0])] = np.nan if value is None else value

    figure = Figure(figsize=(2.6 + 0.28 * len(columns), 1.4 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    logarithmic = name == "relative output error" and bool(np.all(grid[np.isfinite(grid)] > 0))
    image = axes.imshow(grid, aspect="auto", cmap="viridis", norm=LogNorm() if logarithmic else None)
    stacks = list(dict.fromkeys(stack for stack, _ in columns))
    labels = [f"{stack} {block}" if len(stacks) > 1 else str(block) for stack, block in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=90 if len(stacks) > 1 else 0, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set(xlabel="block", title=f"{report.method}: {name}")
    figure.colorbar(image, ax=axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _place(path: str) -> tuple[tuple[str, str], str]:
    """The column (stack and block number) and the row (module inside the block) of a layer."""
    if (match := _NUMBERED.fullmatch(path)) is None:
        return ("", path.rsplit(".", 1)[-1]), path
    stack = next((word for word in ("encoder", "decoder") if word in match["stack"]), "")
    return (stack, match["block"]), match["inside"]
