"""When no mix of types meets the limits: which of them contradict each other, and what would be enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeq.errors import BudgetError
from edgeq.planner.knapsack import Item, Objective
from edgeq.planner.search_items import Pricing
from edgeq.planner.solver import Infeasible
from edgeq.types import Prediction
from edgeq.units import format_bytes, format_ms

__all__ = ["infeasible_mix"]

_LABELS: dict[Objective, tuple[str, str]] = {
    "file_bytes": ("file size", "--max-size"),
    "memory_bytes": ("peak memory", "--max-memory"),
    "ns": ("time of a token", "--max-itl"),
    "kld": ("mean KL divergence", "--max-kld"),
}


def infeasible_mix(
    error: Infeasible, pricing: Pricing, base: Mapping[str, str], at_base: Prediction, items: Sequence[Item]
) -> BudgetError:
    """The solver's finding in the user's quantities: the constants that it never saw are added again.

    Args:
        error: what the solver found.
        pricing: prices.
        base: types before the solver's choice.
        at_base: the prediction for ``base``.
        items: the solver's tensors.
    """
    names = [item.name for item in items]
    constants: dict[Objective, float] = {
        "file_bytes": at_base.file_bytes - sum(pricing.file_bytes(n, base[n]) for n in names),
        "memory_bytes": at_base.peak_memory_bytes - sum(pricing.memory_bytes(n, base[n]) for n in names),
        "ns": 1e6 * at_base.itl_ms - sum(pricing.ns(n, base[n]) for n in names),
        "kld": 0.0,
    }

    def text(quantity: Objective, value: float) -> str:
        return _format(quantity, value + constants[quantity])

    given = error.limits.given()
    clash = error.contradiction
    wanted = " and ".join(f"{_LABELS[q][0]} <= {text(q, given[q])}" for q in clash)
    if len(clash) == 1:
        only = clash[0]
        cause = f"No mix of types has {wanted}: the least is {text(only, error.least[only])}"
    else:
        cause = f"No mix of types has {wanted} at once"
    ways = [f"{_LABELS[q][1]} {text(q, value)}" for q in clash if (value := error.raise_to[q]) is not None]
    nearest = ", ".join(f"{_LABELS[q][0]} {text(q, value)}" for q, value in error.nearest.given().items())
    least = [f"the least {_LABELS[q][0]} alone is {text(q, value)}" for q, value in error.least.items()]
    remedy = f"Raise one limit: {' or '.join(ways)}" if ways else f"Raise the limits; together {nearest} can be met"
    details = (*least, f"together can be met: {nearest}") if len(clash) > 1 else ()
    return BudgetError(cause, remedy, details=details)


def _format(quantity: Objective, value: float) -> str:
    if quantity == "ns":
        return format_ms(value / 1e6)
    if quantity == "kld":
        return f"{value:.4g}"
    return format_bytes(round(value))
