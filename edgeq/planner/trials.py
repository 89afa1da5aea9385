"""Real measurements decide: mixes near the predicted optimum are quantized, run, and compared on the same tokens.

Predictions add up what each tensor costs alone, and a sensitivity is itself an estimate. So beside the predicted
optimum the next best mixes are tried, and neighbours: what the solver finds when every sensitivity is off by as much as
sensitivities are. A limit of KL divergence is one of the measured figure; the prediction only says where to look.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
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
from edgeq.planner.solver import Infeasible, k_best, solve
from edgeq.search_record import Trial
from edgeq.units import format_bytes

__all__ = ["Judged", "run_trials", "within"]

# Standard deviation of log(measured / predicted) over single tensors; docs/quality.md.
_SPREAD = 0.2
_TIGHTENINGS = 4
_DRAWS = 3  # of neighbours for each trial, as some come out the same
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

    def __init__(self, problem: Problem, judge: Judge, kv_type: str, shop: Workshop) -> None:
        self._problem, self._judge, self._kv_type, self.shop = problem, judge, kv_type, shop
        self._store = BlockStore(problem.evidence)
        self.tried: list[_Tried] = []

    def knows(self, solution: Solution) -> bool:
        return any(tried.solution.types == solution.types for tried in self.tried)

    def measure(self, label: str, solution: Solution) -> _Tried:
        out = self.shop.folder / f"trial-{len(self.tried)}.gguf"
        types = self._problem.types(solution)
        self._store.prepare(types, self.shop.threads)
        assemble(self._problem.evidence.header, types, self._store.blocks, out)
        divergence = self._judge.compare([out], kv_type=self._kv_type)[0]
        tried = _Tried(label, solution, divergence, out, out.stat().st_size)
        self.tried.append(tried)
        return tried

    def keep(self, best: _Tried | None) -> None:
        """Remove the files of all others."""
        for tried in self.tried:
            if tried is not best:
                tried.file.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class _Question:
    """What the solver is asked, but for the limit of KL."""

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
    kv_type: str,
    trials: int,
    shop: Workshop,
) -> Judged:
    """Measure the predicted optimum and mixes near it.

    Args:
        problem: the model on its device.
        limits: the solver's; that of KL is one of what is measured, mean and in nats.
        objective: what is minimised.
        first: the predicted optimum.
        text: the same for all trials; not the calibration's.
        kv_type: of the KV cache that the mixes are judged with.
        trials: how many mixes at most; to come close to a limit of KL up to four are taken all the same.
        shop: where and how; all files but the best one's are removed.

    Raises:
        BudgetError: the limit of KL cannot be met, as measured.
    """
    max_kld = limits.kld
    question = _Question(problem.items, dataclasses.replace(limits, kld=None), objective)
    with Judge(problem.evidence.header.path, text.chunks, threads=shop.threads) as judge:
        bench = _Bench(problem, judge, kv_type, shop)
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
    """The mix with the least measured KL among the predicted optimum and mixes near it."""
    best = first
    others = _others(question, first.solution, trials)
    while len(bench.tried) < trials and (found := next(others, None)) is not None:
        label, solution = found
        if bench.knows(solution):
            continue
        bench.shop.progress("try mixes", len(bench.tried), trials, label)
        tried = bench.measure(label, solution)
        if tried.divergence.mean_kld < best.divergence.mean_kld:
            best = tried
        bench.keep(best)
    return best


def _others(question: _Question, first: Solution, trials: int) -> Iterator[tuple[str, Solution]]:
    """Mixes near the predicted optimum: the next best ones for a third of the trials, then neighbours."""
    n_next = (trials - 1) // 3
    if n_next > 0:
        for rank, solution in enumerate(k_best(question.items, question.limits, question.objective, 1 + n_next)[1:], 2):
            yield f"predicted rank {rank}", solution
    rng = np.random.default_rng(0)
    for index in range(1, _DRAWS * trials):
        yield f"neighbour {index}", _neighbour(question, first, rng)


def _neighbour(question: _Question, first: Solution, rng: np.random.Generator) -> Solution:
    """The optimum for sensitivities that are off by random factors, priced by the true ones."""
    items, objective = question.items, question.objective
    factors = {item.name: float(rng.lognormal(0.0, _SPREAD)) for item in items}
    shaken = [
        Item(item.name, tuple(dataclasses.replace(o, kld=o.kld * factors[item.name]) for o in item.options))
        for item in items
    ]
    found = solve(shaken, question.limits, objective)
    true = {(item.name, option.type): option.kld for item in items for option in item.options}
    found = dataclasses.replace(found, kld=sum(true[name, kind] for name, kind in found.types.items()))
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
        solution = within(question.items, question.limits, question.objective, aim)
        if bench.knows(solution):
            break
        current = bench.measure(f"predicted {solution.kld:.4g}", solution)
        better = best is None or getattr(solution, question.objective) < getattr(best.solution, question.objective)
        if current.divergence.mean_kld <= max_kld and better:
            best = current
    bench.keep(best)
    if best is None:
        raise _unmet(bench, max_kld)
    return best


def within(items: Sequence[Item], limits: Limits, objective: Objective, max_kld: float | None) -> Solution:
    """The optimum with a predicted KL divergence of at most ``max_kld``; where there is none, the one with the least.

    Raises:
        Infeasible: nothing meets the other limits.
    """
    try:
        return solve(items, dataclasses.replace(limits, kld=max_kld), objective)
    except Infeasible:
        return solve(items, dataclasses.replace(limits, kld=None), "kld")


def _unmet(bench: _Bench, max_kld: float) -> BudgetError:
    nearest = min(tried.divergence.mean_kld for tried in bench.tried)
    return BudgetError(
        f"No mix within the limits has a measured mean KL divergence of {max_kld:g}: the nearest has {nearest:.4g}",
        f"Use --max-kld {nearest * 1.03:.3g}, or raise the other limits",
        details=tuple(
            f"tried {format_bytes(t.file_bytes)}: measured {t.divergence.mean_kld:.4g}, predicted {t.solution.kld:.4g}"
            for t in bench.tried
        ),
    )
