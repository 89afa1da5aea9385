"""The fast path: prices on the limits give a proven bound, repair and local search give a choice near it.

With prices p >= 0 on the limits, the sum over items of ``min(cost + p * use)`` minus ``p * limit`` is a lower bound of
every choice within the limits (Lagrangian relaxation; Fisher, Management Science 27, 1981). One price is found exactly,
by walking the lower convex hull of cost against use (Sinha and Zoltners, Operations Research 27, 1979); several by the
ellipsoid method with deep cuts (Bland, Goldfarb and Todd, Operations Research 29, 1981), which needs no step size and
converges linearly in the few dimensions that there are.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from edgeq.planner.knapsack import Choice, Floats, Knapsack

__all__ = ["Relaxation", "improve", "relax"]

_WIDEST_PRICE = 1e6  # in units of total cost spread over total use spread; beyond it the bound is only less tight
_RESOLUTION = 1e-7  # of the bound, relative
_ROUNDING = 1e-15  # of the size of what is summed: a few units in the last place
_LEAST_SPREAD = 1e-100  # of use, relative to that of cost: below it a price would overflow, and is left at 0
_STEPS = 3000
_PAIRS = 384  # options nearest to the relaxation's choice, tried two at a time


@dataclasses.dataclass(frozen=True)
class Relaxation:
    """What the Lagrangian knows of a problem.

    Attributes:
        bound: no choice within the limits costs less; infinite if there is proven to be none.
        prices: of the priced resources.
        rounding: how far rounding can have moved a sum at these prices; the bound is lowered by it already.
        choice: the best that was found within all limits and cuts; None if none was found.
    """

    bound: float
    prices: Floats
    rounding: float
    choice: Choice | None


def reduced_costs(problem: Knapsack, prices: Floats) -> Floats:
    """By how much each option raises the relaxation's bound if it is forced; 0 for the best of each item."""
    above, _ = _above_least(problem)
    priced = problem.cost + np.tensordot(prices, above, axes=1)
    reduced: Floats = priced - priced.min(axis=1, keepdims=True)
    return reduced


def _above_least(problem: Knapsack) -> tuple[Floats, Floats]:
    """Use of the priced resources above the least of each item, and the limits less those: small numbers round less."""
    use = problem.use[: problem.priced]
    real = np.isfinite(problem.cost)
    least = np.where(real, use, np.inf).min(axis=2)
    return np.where(real, use - least[:, :, None], 0.0), problem.limit[: problem.priced] - least.sum(axis=1)


def relax(problem: Knapsack, start: Choice | None = None) -> Relaxation:
    """The best bound, and a good choice within the limits if one is found.

    Args:
        problem: what to solve.
        start: a choice within the limits and cuts that is known already.
    """
    pricing = _Pricing(problem)
    pricing.search()
    if math.isinf(pricing.bound):
        return Relaxation(math.inf, pricing.prices, 0.0, None)
    reduced = reduced_costs(problem, pricing.prices)
    found = [c for c in (start, pricing.feasible) if c is not None]
    found += [c for seed in pricing.seeds() if (c := _repair(problem, seed, reduced)) is not None]
    if not found and (lightest := _repair(problem, pricing.lightest(), reduced)) is not None:
        found = [lightest]
    best = improve(problem, min(found, key=problem.value), reduced) if found else None
    return Relaxation(pricing.bound, pricing.prices, pricing.rounding(pricing.prices), best)


class _Pricing:
    """The search for the prices; remembers the best bound and the best choice that it meets on the way."""

    def __init__(self, problem: Knapsack) -> None:
        self.problem = problem
        self.bound = -math.inf
        self.prices = np.zeros(problem.priced)
        self.feasible: Choice | None = None
        self._value = math.inf
        self._use, self._limit = _above_least(problem)
        self._rows = np.arange(len(problem.cost))
        finite = np.isfinite(problem.cost)
        dearest = np.where(finite, problem.cost, -np.inf).max(axis=1, initial=-np.inf)
        cheapest = problem.cost.min(axis=1, initial=np.inf)
        spread = float((dearest - cheapest).sum())
        self._dearest = float(dearest.sum())
        self._spread = spread or max(abs(self._dearest), 1.0)
        self._cost_size = float(np.where(finite, np.abs(problem.cost), 0.0).max(axis=1).sum())
        whole = (problem.use == np.rint(problem.use)).all(axis=(1, 2))[: problem.priced]
        # Differences of whole numbers are exact, those of fractions are only as good as what was subtracted.
        size = np.abs(np.where(whole[:, None, None], self._use, problem.use[: problem.priced]))
        self._use_size = size.max(axis=2).sum(axis=1) + np.abs(self._limit)
        self._last: Choice = problem.cost.argmin(axis=1)

    def search(self) -> None:
        """Find the best prices."""
        loosest, _ = self._evaluate(np.zeros(len(self.prices)))
        if (self._over(loosest) <= 0).all():
            return
        if len(self.prices) == 1:
            self._walk_hull(loosest)
        else:
            self._ellipsoid()

    def rounding(self, prices: Floats) -> float:
        """How far rounding can have moved a sum at these prices."""
        return _ROUNDING * (self._cost_size + float(prices @ self._use_size))

    def seeds(self) -> list[Choice]:
        """Choices to repair: at the best prices, and the last one met if it is another."""
        best = (self.problem.cost + np.tensordot(self.prices, self._use, axes=1)).argmin(axis=1)
        return [best] if (best == self._last).all() else [best, self._last]

    def lightest(self) -> Choice:
        """The choice that leans least on the limits, each use relative to its limit."""
        scale = np.maximum(np.abs(self.problem.limit), 1.0)[:, None, None]
        pressure = (self.problem.use / scale).sum(axis=0)
        choice: Choice = np.where(np.isfinite(self.problem.cost), pressure, np.inf).argmin(axis=1)
        return choice

    def _over(self, choice: Choice) -> Floats:
        over: Floats = self._use[:, self._rows, choice].sum(axis=1) - self._limit
        return over

    def _evaluate(self, prices: Floats) -> tuple[Choice, float]:
        """The cheapest choice at these prices, and the bound that they give."""
        priced = self.problem.cost + np.tensordot(prices, self._use, axes=1)
        choice: Choice = priced.argmin(axis=1)
        bound = math.fsum(priced[self._rows, choice]) - float(prices @ self._limit) - self.rounding(prices)
        if bound > self.bound:
            self.bound, self.prices = bound, prices
        if bound > self._dearest + self.rounding(prices):  # above the dearest choice: there is none within the limits
            self.bound = math.inf
        self._last = choice
        if self.problem.feasible(choice) and (value := self.problem.value(choice)) < self._value:
            self.feasible, self._value = choice, value
        return choice, bound

    def _walk_hull(self, above: Choice) -> None:
        """One price: between a choice above the limit and one within it, until no option lies below their line."""
        use = self._use[0]
        real = np.isfinite(self.problem.cost)
        lightest = np.where(real, use, np.inf).min(axis=1, keepdims=True)
        within: Choice = np.where(real & (use <= lightest), self.problem.cost, np.inf).argmin(axis=1)
        if self._over(within)[0] > 0:
            self.bound = math.inf
            return
        if self.problem.feasible(within):
            self.feasible, self._value = within, self.problem.value(within)
        for _ in range(_STEPS):
            drop = float(self._over(above)[0] - self._over(within)[0])
            dearer = max(self.problem.value(within) - self.problem.value(above), 0.0)
            if drop <= _LEAST_SPREAD * dearer:
                return
            price = dearer / drop
            line = self.problem.value(within) + price * float(self._over(within)[0])
            choice, bound = self._evaluate(np.array([price]))
            if bound >= line - 2 * self.rounding(np.array([price])):
                return
            if self._over(choice)[0] > 0:
                above = choice
            else:
                within = choice

    def _ellipsoid(self) -> None:
        """Several prices: shrink an ellipsoid around the best ones, cut at its centre by what the choice there says."""
        n = len(self.prices)
        real = np.isfinite(self.problem.cost)
        widest = np.where(real, self._use, -np.inf).max(axis=2) - np.where(real, self._use, np.inf).min(axis=2)
        use_spread = widest.sum(axis=1)
        unit = self._spread / np.where(use_spread > _LEAST_SPREAD * self._spread, use_spread, np.inf)
        centre, shape = np.zeros(n), np.eye(n) * _WIDEST_PRICE**2
        for _ in range(_STEPS):
            negative = int(centre.argmin())
            if centre[negative] < 0:
                slope = -np.eye(n)[negative]
                deficit = -float(centre[negative])
            else:
                choice, bound = self._evaluate(centre * unit)
                if math.isinf(self.bound):
                    return
                slope = -self._over(choice) * unit / self._spread
                deficit = (self.bound - bound) / self._spread
            width = math.sqrt(max(float(slope @ shape @ slope), 0.0))
            if width <= max(_RESOLUTION * abs(self.bound) / self._spread, 1e-13, deficit):
                return
            depth = deficit / width
            step = shape @ slope / width
            centre = centre - (1 + n * depth) / (n + 1) * step
            shape = shape - 2 * (1 + n * depth) / ((n + 1) * (1 + depth)) * np.outer(step, step)
            shape = shape * (n * n * (1 - depth * depth) / (n * n - 1))


def _repair(problem: Knapsack, choice: Choice, reduced: Floats) -> Choice | None:
    """Change one item at a time, the least loss for the most violation, until all limits are kept."""
    choice = choice.copy()
    rows = np.arange(len(choice))
    scale = np.maximum(np.abs(problem.limit), 1e-300)
    for _ in range(4 * len(choice)):
        used = problem.used(choice)
        violation = float((np.maximum(used - problem.limit, 0) / scale).sum())
        if violation == 0:
            return choice
        after = used[:, None, None] + problem.use - problem.use[:, rows, choice][:, :, None]
        left = (np.maximum(after - problem.limit[:, None, None], 0) / scale[:, None, None]).sum(axis=0)
        gain = np.where(np.isfinite(problem.cost), violation - left, 0.0)
        loss = reduced - reduced[rows, choice][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(gain > 1e-15 * violation, loss / gain, np.inf)
        item, option = np.unravel_index(int(rate.argmin()), rate.shape)
        if not math.isfinite(rate[item, option]):
            return None
        choice[item] = option
    return None


def improve(problem: Knapsack, choice: Choice, reduced: Floats) -> Choice:
    """Change one item, or two together, as long as that lowers the cost within the limits.

    Args:
        problem: what to solve.
        choice: within the limits; not changed.
        reduced: from `reduced_costs`; pairs are sought among the options where it is least.
    """
    rows = np.arange(len(choice))
    for _ in range(8 * len(choice)):
        slack = problem.limit - problem.used(choice)
        saved = problem.cost[rows, choice][:, None] - problem.cost
        freed = problem.use[:, rows, choice][:, :, None] - problem.use
        least = 1e-12 * max(abs(problem.value(choice)), 1e-300)
        single = np.where((freed + slack[:, None, None] >= 0).all(axis=0), saved, -np.inf)
        item, option = np.unravel_index(int(single.argmax()), single.shape)
        moved = choice.copy()
        if single[item, option] > least:
            moved[item] = option
        else:
            elsewhere = reduced - reduced[rows, choice][:, None]
            elsewhere[rows, choice] = np.inf
            pair = _best_pair(saved, freed, slack, elsewhere)
            if pair is None or pair[0] <= least:
                break
            for move in pair[1:]:
                moved[move // problem.cost.shape[1]] = move % problem.cost.shape[1]
        if not problem.feasible(moved):  # differences of floating-point sums round differently than the sums
            break
        choice = moved
    return choice


def _best_pair(saved: Floats, freed: Floats, slack: Floats, loss: Floats) -> tuple[float, int, int] | None:
    """The two changes of different items that together save most, as (saving, move, move) of flat indices."""
    width = saved.shape[1]
    order = np.argsort(loss, axis=None, kind="stable")
    moves = order[np.isfinite(loss.ravel()[order])][:_PAIRS]
    together = saved.ravel()[moves][:, None] + saved.ravel()[moves][None, :]
    flat = freed.reshape(len(freed), saved.size)[:, moves]
    allowed = moves[:, None] // width != moves[None, :] // width
    for row, room in zip(flat, slack, strict=True):
        allowed &= row[:, None] + row[None, :] + room >= 0
    together = np.where(allowed, together, -np.inf)
    if not together.size:
        return None
    first, second = np.unravel_index(int(together.argmax()), together.shape)
    return float(together[first, second]), int(moves[first]), int(moves[second])
