"""Which nodes compute in 8 bits: the exact choice by measured errors and measured times."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from edgeq.planner.knapsack import Item, Limits, Option
from edgeq.planner.solver import solve

__all__ = ["NodeCost", "choose_float_front", "choose_float_nodes", "cosine_of_error", "error_of_cosine"]


_LOST = 1e6  # an error that leaves nothing of the outputs, if they are numbers at all


@dataclasses.dataclass(frozen=True)
class NodeCost:
    """What is known of one quantizable node.

    Attributes:
        name: of it.
        error: relative squared error at the outputs when it alone is quantized.
        float_us: time in floats.
        int8_us: time in 8 bits, with the conversions that it brings.
        float_bytes: of its weight.
        int8_bytes: likewise.
    """

    name: str
    error: float
    float_us: float
    int8_us: float
    float_bytes: int
    int8_bytes: int


def error_of_cosine(cosine: float) -> float:
    """The relative squared error at which an independent error leaves that cosine: 1/cos² - 1."""
    return 1.0 / cosine**2 - 1.0


def cosine_of_error(error: float) -> float:
    """The cosine that an independent error of that relative squared size leaves."""
    return 1.0 / math.sqrt(1.0 + error)


def choose_float_nodes(
    costs: Sequence[NodeCost], *, max_error: float | None, fixed: Mapping[str, str] | None = None
) -> set[str]:
    """The nodes to leave in floats, so that the model is as fast as it can be within an error.

    Args:
        costs: of every node.
        max_error: of the sum of single errors; None for the fastest choice of all.
        fixed: node to ``"fp32"`` or ``"int8"`` where the user has decided.

    Raises:
        Infeasible: nodes that are fixed to 8 bits have more error than that.
    """
    items = [_item(cost, (fixed or {}).get(cost.name)) for cost in costs]
    if not items:
        return set()
    chosen = solve(items, Limits(kld=max_error), "ns")
    return {name for name, kind in chosen.types.items() if kind == "fp32"}


def choose_float_front(costs: Sequence[NodeCost]) -> set[str]:
    """The nodes before the one at which a model had best begin with 8 bits.

    In a convolutional network each change between floats and 8 bits lays out a whole image anew, which times of single
    nodes do not hold: one change costs less than many.

    Args:
        costs: of every node, in the graph's order.
    """
    gains = [*itertools.accumulate((cost.int8_us - cost.float_us for cost in costs), initial=0.0)]
    count = gains.index(max(gains))
    return {cost.name for cost in costs[:count]}


def _item(cost: NodeCost, fixed: str | None) -> Item:
    error = min(cost.error, _LOST)
    options = (
        Option("int8", cost.int8_bytes, cost.int8_bytes, 1e3 * cost.int8_us, error),
        Option("fp32", cost.float_bytes, cost.float_bytes, 1e3 * cost.float_us, 0.0),
    )
    return Item(cost.name, tuple(option for option in options if fixed in (None, option.type)))
