"""When no mix of types meets the limits: which of them contradict each other, and what would be enough."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from edgeq.errors import BudgetError
from edgeq.planner.knapsack import Item, Quantity
from edgeq.planner.search_items import Pricing, token_limits_ms
from edgeq.planner.solver import Infeasible
from edgeq.types import Budget, Prediction
from edgeq.units import format_bytes, format_ms

__all__ = ["infeasible_mix"]

_LABELS: dict[Quantity, str] = {
    "file_bytes": "file size",
    "memory_bytes": "peak memory",
    "ns": "time of a token",
    "prompt_ns": "time to first token",
    "kld": "predicted mean KL divergence",
}
_OPTIONS: dict[Quantity, str] = {
    "file_bytes": "--max-size",
    "memory_bytes": "--max-memory",
    "prompt_ns": "--max-ttft",
    "kld": "--max-kld",
}
_TIMES = ("ns", "prompt_ns")
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


@dataclasses.dataclass(frozen=True)
class _Words:
    """The solver's quantities in the user's: the constants that it never saw are added again.

    Attributes:
        constants: by quantity.
        budget: of the device.
        usable_bytes: of the device's memory.
    """

    constants: Mapping[Quantity, float]
    budget: Budget
    usable_bytes: int

    def amount(self, q: Quantity, value: float) -> str:
        """A figure of the solver's, rounded up, so that who allows as much gets a mix."""
        total = value + self.constants[q]
        if q in _TIMES:
            return f"{_up(total / 1e6)}ms"
        if q == "kld":
            return _up(total)
        unit, factor = next((u for u in _UNITS if total >= u[1]), ("B", 1))
        return f"{math.ceil(100 * total / factor) / 100:.10g}{unit}" if factor > 1 else f"{math.ceil(total)}B"

    def limit(self, q: Quantity, value: float) -> str:
        """A limit as it was given."""
        total = value + self.constants[q]
        if q == "ns":
            line, _ = self._lines(math.inf)[0]
            if line == "tokens_per_s" and self.budget.tokens_per_s is not None:
                return f"decode speed >= {self.budget.tokens_per_s:g} tok/s"
        shown = format_ms(total / 1e6) if q in _TIMES else f"{total:.4g}" if q == "kld" else format_bytes(round(total))
        return f"{_LABELS[q]} <= {shown}"

    def way(self, q: Quantity, value: float) -> str:
        """What to allow, so that a quantity may reach a value."""
        if q == "memory_bytes" and value + self.constants[q] > self.usable_bytes:
            return f"a shorter --context or a smaller --kv-type ({format_bytes(self.usable_bytes)} are all there is)"
        if q != "ns":
            return f"{_OPTIONS[q]} {self.amount(q, value)}"
        token = (value + self.constants[q]) / 1e6
        return " with ".join(self._option(line, token) for line, _ in self._lines(token))

    def _lines(self, token: float) -> list[tuple[str, float]]:
        """The budget's lines that allow a token less than that time, the strictest first."""
        limits = token_limits_ms(self.budget)
        return sorted(((line, ms) for line, ms in limits.items() if ms < token), key=lambda pair: pair[1])

    def _option(self, line: str, token: float) -> str:
        return f"--max-itl {_up(token)}ms" if line == "itl_ms" else f"--min-tps {_down(1e3 / token)}"


def infeasible_mix(
    error: Infeasible,
    pricing: Pricing,
    base: Mapping[str, str],
    at_base: Prediction,
    items: Sequence[Item],
    budget: Budget,
    chunks: Mapping[int, int],
) -> BudgetError:
    """The solver's finding for people: the limits that clash, what would be enough, and the nearest feasible point.

    Args:
        error: what the solver found.
        pricing: prices.
        base: types before the solver's choice.
        at_base: the prediction for ``base``.
        items: the solver's tensors.
        budget: of the device.
        chunks: of the prompt that ``at_base`` is for.
    """
    names = [item.name for item in items]
    constants: dict[Quantity, float] = {
        "file_bytes": at_base.file_bytes - sum(pricing.file_bytes(n, base[n]) for n in names),
        "memory_bytes": at_base.peak_memory_bytes - sum(pricing.memory_bytes(n, base[n]) for n in names),
        "ns": 1e6 * at_base.itl_ms - sum(pricing.ns(n, base[n]) for n in names),
        "prompt_ns": 1e6 * at_base.ttft_ms - sum(pricing.prompt_ns(n, base[n], chunks) for n in names),
        "kld": 0.0,
    }
    words = _Words(constants, budget, pricing.profile.memory.usable_bytes)
    given, clash = error.limits.given(), error.contradiction
    wanted = " and ".join(words.limit(q, given[q]) for q in clash)
    if len(clash) == 1:
        least = words.amount(clash[0], error.least[clash[0]])
        cause = f"No mix of types has {wanted}: the least {_LABELS[clash[0]]} is {least}"
    else:
        cause = f"No mix of types has {wanted} at once"
    ways = [words.way(q, value) for q in clash if (value := error.raise_to[q]) is not None]
    nearest: dict[Quantity, float] = {
        q: value for q, value in error.nearest.given().items() if q in clash or value > given[q]
    }
    if not ways:  # no limit alone is in the way
        ways = [" with ".join(words.way(q, value) for q, value in nearest.items() if value > given[q])]
    remedy = f"Use {' or '.join(ways)}"
    alone = [f"the least {_LABELS[q]} alone is {words.amount(q, error.least[q])}" for q in clash]
    together = ", ".join(f"{_LABELS[q]} {words.amount(q, value)}" for q, value in nearest.items())
    details = (*alone, f"together can be met: {together}") if len(clash) > 1 else ()
    return BudgetError(cause, remedy, details=details)


def _up(value: float) -> str:
    """Four significant digits, not less than the value."""
    step = _step(value)
    return f"{math.ceil(value / step - 1e-9) * step:.4g}"


def _down(value: float) -> str:
    """Four significant digits, not more than the value."""
    step = _step(value)
    return f"{math.floor(value / step + 1e-9) * step:.4g}"


def _step(value: float) -> float:
    return 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
