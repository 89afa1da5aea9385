"""Real measurements decide: mixes near the predicted optimum are quantized, run, and compared on the same tokens.

Predictions add up what each tensor costs alone, and a sensitivity is itself an estimate. So beside the predicted
optimum its neighbours are tried: what the solver finds when every sensitivity is off by as much as sensitivities are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgeq.converters.calibration.texts import TokenText
from edgeq.converters.gguf.assemble import assemble
from edgeq.converters.gguf.divergence import Divergence, Judge
from edgeq.converters.gguf.sensitivity.evidence import Workshop
from edgeq.converters.gguf.sensitivity.store import BlockStore
from edgeq.errors import BudgetError
from edgeq.planner.knapsack import Item, Limits, Objective, Solution
from edgeq.planner.problem import Problem
from edgeq.planner.solver import Infeasible, solve
from edgeq.search_record import Trial

__all__ = ["Judged", "run_trials"]

# Standard deviation of log(measured / predicted) over single tensors; docs/quality.md.
_SPREAD = 0.2
_TIGHTENINGS = 4


@dataclasses.dataclass(frozen=True)
class Judged:
    """What the trials came to.

    Attributes:
        best: the mix with the least measured KL divergence, or with the least objective where quality is a limit.
        trials: all of them, in order.
        file: the best one's GGUF.
    """

    best: Solution
    trials: tuple[Trial, ...]
    file: Path


@dataclasses.dataclass(frozen=True)
class _Tried:
    label: str
    solution: Solution
    divergence: Divergence
    file: Path


class _Bench:
    """Makes files and measures them; keeps only the best file."""

    def __init__(self, problem: Problem, judge: Judge, shop: Workshop) -> None:
        self._problem, self._judge, self.shop = problem, judge, shop
        self._store = BlockStore(problem.evidence)
        self.tried: list[_Tried] = []

    def knows(self, solution: Solution) -> bool:
        return any(tried.solution.types == solution.types for tried in self.tried)

    def measure(self, label: str, solution: Solution) -> _Tried:
        out = self.shop.folder / f"trial-{len(self.tried)}.gguf"
        types = self._problem.types(solution)
        self._store.prepare(types, self.shop.threads)
        assemble(self._problem.evidence.header, types, self._store.blocks, out)
        tried = _Tried(label, solution, self._judge.compare([out])[0], out)
        self.tried.append(tried)
        return tried


def run_trials(
    problem: Problem,
    limits: Limits,
    objective: Objective,
    first: Solution,
    *,
    text: TokenText,
    max_kld: float | None,
    trials: int,
    shop: Workshop,
) -> Judged:
    """Measure the predicted optimum and its neighbours.

    Args:
        problem: the model on its device.
        limits: the solver's.
        objective: what is minimised.
        first: the predicted optimum.
        text: the same for all trials; not the calibration's.
        max_kld: limit of the measured mean KL, in nats.
        trials: how many mixes at most.
        shop: where and how; all files but the best one's are removed.

    Raises:
        BudgetError: ``max_kld`` cannot be met, as measured.
    """
    items, progress = problem.items, shop.progress
    with Judge(problem.evidence.header.path, text.chunks, threads=shop.threads) as judge:
        bench = _Bench(problem, judge, shop)
        progress("try mixes", 0, trials, "predicted optimum")
        current = bench.measure("predicted optimum", first)
        if max_kld is not None:
            current = _meet(bench, items, limits, objective, current, max_kld, trials)
        rng = np.random.default_rng(0)
        for index in range(1, trials if max_kld is None else 0):
            progress("try mixes", index, trials, f"neighbour {index}")
            neighbour = _neighbour(items, limits, objective, rng)
            if neighbour is not None and not bench.knows(neighbour):
                tried = bench.measure(f"neighbour {index}", neighbour)
                if tried.divergence.mean_kld < current.divergence.mean_kld:
                    current = tried
        progress("try mixes", trials, trials, "")
    for tried in bench.tried:
        if tried is not current:
            tried.file.unlink(missing_ok=True)
    records = tuple(
        Trial(
            label=tried.label,
            file_bytes=tried.file.stat().st_size if tried is current else _file_bytes(tried, current),
            predicted_kld=tried.solution.kld,
            measured_kld=tried.divergence.mean_kld,
            chosen=tried is current,
        )
        for tried in bench.tried
    )
    return Judged(current.solution, records, current.file)


def _file_bytes(tried: _Tried, current: _Tried) -> int:
    return current.file.stat().st_size - current.solution.file_bytes + tried.solution.file_bytes


def _neighbour(
    items: Sequence[Item], limits: Limits, objective: Objective, rng: np.random.Generator
) -> Solution | None:
    """The optimum for sensitivities that are off by random factors, priced by the true ones."""
    factors = {item.name: float(rng.lognormal(0.0, _SPREAD)) for item in items}
    shaken = [
        Item(item.name, tuple(dataclasses.replace(o, kld=o.kld * factors[item.name]) for o in item.options))
        for item in items
    ]
    try:
        found = solve(shaken, limits, objective)
    except Infeasible:  # only where KL itself is limited
        return None
    true = {(item.name, option.type): option.kld for item in items for option in item.options}
    return dataclasses.replace(found, kld=sum(true[name, kind] for name, kind in found.types.items()))


def _meet(
    bench: _Bench,
    items: Sequence[Item],
    limits: Limits,
    objective: Objective,
    first: _Tried,
    max_kld: float,
    trials: int,
) -> _Tried:
    """Move the predicted limit until the measured KL is just within the real one.

    The ratio of measured to predicted changes slowly with the limit, so a few steps of scaling by it are enough.
    """
    best = first if first.divergence.mean_kld <= max_kld else None
    current = first
    for index in range(1, max(trials, _TIGHTENINGS)):
        measured = current.divergence.mean_kld
        if best is not None and measured > 0.97 * max_kld and current is best:
            break
        aim = current.solution.kld * 0.985 * max_kld / max(measured, 1e-12)
        bench.shop.progress("try mixes", index, max(trials, _TIGHTENINGS), "meet the quality limit")
        try:
            solution = solve(items, dataclasses.replace(limits, kld=aim), objective)
        except Infeasible:
            break
        if bench.knows(solution):
            break
        current = bench.measure(f"limit {aim:.4g}", solution)
        better = best is None or getattr(solution, objective) < getattr(best.solution, objective)
        if current.divergence.mean_kld <= max_kld and better:
            best = current
    if best is None:
        nearest = min(bench.tried, key=lambda tried: tried.divergence.mean_kld)
        raise BudgetError(
            f"No mix within the limits has a measured mean KL divergence of {max_kld:g}: the nearest has "
            f"{nearest.divergence.mean_kld:.4g}",
            f"Use --max-kld {nearest.divergence.mean_kld * 1.03:.3g}, or raise the other limits",
        )
    return best
