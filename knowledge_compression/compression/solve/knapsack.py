"""One choice for each of many layers, with the least total error within a budget: the multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_STEPS = 20_000  # the largest number of units into which a budget is divided


def least_harm(harms: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int] | None:
    """The choices with the smallest sum of errors whose costs do not exceed the budget.

    Exact, by dynamic programming over the budget in units of the costs' greatest common divisor; if that makes more
    than 20,000 units, costs are rounded up to a 20,000th of the budget, and the rest is then spent on the steps that
    gain most per unit of cost.

    Args:
        harms: the error of each choice, by layer.
        costs: the cost of each choice, not negative.
        budget: the budget of all layers together.

    Returns:
        The number of a choice for each layer; None if even the cheapest choices cost more than the budget.
    """
    cheapest = [min(of_layer) for of_layer in costs]
    room = budget - sum(cheapest)
    if room < 0:
        return None
    extra = [[cost - least for cost in of_layer] for of_layer, least in zip(costs, cheapest, strict=True)]
    unit = math.gcd(*(cost for of_layer in extra for cost in of_layer)) or 1
    unit = max(unit, math.ceil(min(room, sum(map(max, extra))) / _STEPS))
    most = min(room, sum(map(max, extra))) // unit
    best = np.zeros(most + 1)
    taken = np.zeros((len(harms), most + 1), dtype=np.uint8)
    for layer, (of_layer, more) in enumerate(zip(harms, extra, strict=True)):
        now = np.full(most + 1, np.inf)
        for choice, (harm, cost) in enumerate(zip(of_layer, more, strict=True)):
            step = -(-cost // unit)
            if step > most:
                continue
            candidate = np.concatenate([np.full(step, np.inf), best[: most + 1 - step] + harm])
            better = candidate < now
            now[better], taken[layer, better] = candidate[better], choice
        best = now
    place, chosen = int(best.argmin()), [0] * len(harms)
    for layer in reversed(range(len(harms))):
        chosen[layer] = int(taken[layer, place])
        place -= -(-extra[layer][chosen[layer]] // unit)
    return _spent(harms, extra, chosen, room)


def _spent(harms: Sequence[Sequence[float]], extra: Sequence[Sequence[int]], chosen: list[int], room: int) -> list[int]:
    """The choices after the rest of the budget is spent."""
    left = room - sum(of_layer[choice] for of_layer, choice in zip(extra, chosen, strict=True))
    while True:
        steps = [
            ((harms[layer][now] - harms[layer][choice]) / max(cost - extra[layer][now], 1), layer, choice)
            for layer, now in enumerate(chosen)
            for choice, cost in enumerate(extra[layer])
            if harms[layer][choice] < harms[layer][now] and cost - extra[layer][now] <= left
        ]
        if not steps:
            return chosen
        _, layer, choice = max(steps)
        left -= extra[layer][choice] - extra[layer][chosen[layer]]
        chosen[layer] = choice
