"""Drawing primitives for the figures: panels, lines and bars, always with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from knowledge_compression.statistics import Estimate


def panels(count: int, width: float = 4.2, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure with this many panels, at most four per row; sizes are in inches per panel."""
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[count:]:
        axes.set_visible(False)  # unused places of the last row
    return figure, grid[:count]


def line(
    axes: Axes, label: str, values: Sequence[Estimate], x: Sequence[float], scale: Sequence[float] | None = None
) -> Any:
    """A line with its interval as a band, or a point with a bar; each figure divided by its ``scale``; its colour."""
    value, low, high = _parts(values, scale)
    (drawn,) = axes.plot(x, value, marker="o", markersize=4, label=label)
    if len(x) > 1:
        axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    else:
        axes.errorbar(x, value, [value - low, high - value], color=drawn.get_color(), capsize=3)
    return drawn.get_color()


def bars(axes: Axes, label: str, values: Sequence[Estimate], x: Sequence[float], width: float) -> None:
    """Bars with their intervals."""
    value, low, high = _parts(values)
    axes.bar(x, value, width, yerr=[value - low, high - value], label=label, error_kw={"elinewidth": 0.8})


def level(axes: Axes, label: str, value: Estimate, color: Any = "grey") -> None:
    """A reference for the other marks: a dashed line over the whole width, its interval as a band."""
    axes.axhline(value.value, color=color, linestyle="--", linewidth=0.8, label=label)
    across = axes.get_yaxis_transform()  # x runs from 0 to 1 over the panel, whatever the other marks need
    axes.fill_between([0, 1], value.low, value.high, color=color, alpha=0.1, linewidth=0, transform=across)


def _parts(values: Sequence[Estimate], scale: Sequence[float] | None = None) -> list[NDArray[np.float64]]:
    return [
        np.array([getattr(value, part) for value in values]) / (scale or [1.0] * len(values))
        for part in ("value", "low", "high")
    ]
