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
# Of the limit of KL: where the search for its mix stops, and where it aims at.
_CLOSE, _AIM = 0.985, 0.995


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
    file_bytes: int


class _Bench:
    """Makes files and measures them; there are never more than two of them on disk."""

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
        tried = _Tried(label, solution, self._judge.compare([out])[0], out, out.stat().st_size)
        self.tried.append(tried)
        return tried

    def keep(self, best: _Tried | None) -> None:
        """Remove the files of all others."""
        for tried in self.tried:
            if tried is not best:
                tried.file.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class _Question:
    """What the solver was asked."""

    items: Sequence[Item]
    limits: Limits
    objective: Objective


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
        trials: how many mixes at most; to come close to ``max_kld`` up to four are taken all the same.
        shop: where and how; all files but the best one's are removed.

    Raises:
        BudgetError: ``max_kld`` cannot be met, as measured.
    """
    question = _Question(problem.items, limits, objective)
    with Judge(problem.evidence.header.path, text.chunks, threads=shop.threads) as judge:
        bench = _Bench(problem, judge, shop)
        shop.progress("try mixes", 0, trials, "predicted optimum")
        best = bench.measure("predicted optimum", first)
        if max_kld is None or objective == "kld":
            best = _nearest(bench, question, best, trials)
            if max_kld is not None and best.divergence.mean_kld > max_kld:
                raise _unmet(bench, max_kld)
        else:
            best = _meet(bench, question, best, max_kld, max(trials, _TIGHTENINGS))
        shop.progress("try mixes", trials, trials, "")
    records = tuple(
        Trial(
            label=tried.label,
            file_bytes=tried.file_bytes,
            predicted_kld=tried.solution.kld,
            measured_kld=tried.divergence.mean_kld,
            chosen=tried is best,
        )
        for tried in bench.tried
    )
    return Judged(best.solution, records, best.file)


def _nearest(bench: _Bench, question: _Question, first: _Tried, trials: int) -> _Tried:
    """The mix with the least measured KL among the predicted optimum and its neighbours."""
    best, rng = first, np.random.default_rng(0)
    for index in range(1, trials):
        bench.shop.progress("try mixes", index, trials, f"neighbour {index}")
        neighbour = _neighbour(question, first.solution, rng)
        if neighbour is None or bench.knows(neighbour):
            continue
        tried = bench.measure(f"neighbour {index}", neighbour)
        if tried.divergence.mean_kld < best.divergence.mean_kld:
            best = tried
        bench.keep(best)
    return best


def _neighbour(question: _Question, first: Solution, rng: np.random.Generator) -> Solution | None:
    """The optimum for sensitivities that are off by random factors, priced by the true ones."""
    items, objective = question.items, question.objective
    factors = {item.name: float(rng.lognormal(0.0, _SPREAD)) for item in items}
    shaken = [
        Item(item.name, tuple(dataclasses.replace(o, kld=o.kld * factors[item.name]) for o in item.options))
        for item in items
    ]
    try:
        found = solve(shaken, question.limits, objective)
    except Infeasible:  # only where KL itself is limited
        return None
    true = {(item.name, option.type): option.kld for item in items for option in item.options}
    found = dataclasses.replace(found, kld=sum(true[name, kind] for name, kind in found.types.items()))
    if question.limits.kld is not None and found.kld > question.limits.kld:
        return None
    # Its own gap is to the optimum of the shaken problem; here that of the true one counts.
    value, bound = (float(getattr(s, objective)) for s in (found, first))
    bound *= 1 - first.gap
    return dataclasses.replace(found, gap=max(0.0, (value - bound) / value) if value else 0.0)


def _meet(bench: _Bench, question: _Question, first: _Tried, max_kld: float, trials: int) -> _Tried:
    """Move the predicted limit until the measured KL is just within the real one.

    The ratio of measured to predicted changes slowly with the limit, so a few steps of scaling by it are enough.
    """
    best = first if first.divergence.mean_kld <= max_kld else None
    current = first
    for index in range(1, trials):
        bench.keep(best)
        measured = current.divergence.mean_kld
        if best is not None and measured > _CLOSE * max_kld and current is best:
            break
        aim = current.solution.kld * _AIM * max_kld / max(measured, 1e-12)
        bench.shop.progress("try mixes", index, trials, "meet the quality limit")
        try:
            solution = solve(question.items, dataclasses.replace(question.limits, kld=aim), question.objective)
        except Infeasible:
            break
        if bench.knows(solution):
            break
        current = bench.measure(f"limit {aim:.4g}", solution)
        better = best is None or getattr(solution, question.objective) < getattr(best.solution, question.objective)
        if current.divergence.mean_kld <= max_kld and better:
            best = current
    bench.keep(best)
    if best is None:
        raise _unmet(bench, max_kld)
    return best


def _unmet(bench: _Bench, max_kld: float) -> BudgetError:
    nearest = min(tried.divergence.mean_kld for tried in bench.tried)
    return BudgetError(
        f"No mix within the limits has a measured mean KL divergence of {max_kld:g}: the nearest has {nearest:.4g}",
        f"Use --max-kld {nearest * 1.03:.3g}, or raise the other limits",
    )
