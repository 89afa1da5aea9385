"""Presets or a search: which way a job goes, and the plan at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeq.converters.gguf.export import export_gguf
from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.imatrix import ImportanceMatrix, check_matches, read_imatrix
from edgeq.converters.gguf.presets import PRESETS
from edgeq.converters.gguf.quantize import quantizable_tensors
from edgeq.converters.gguf.sensitivity.evidence import Evidence, Workshop
from edgeq.errors import UsageError
from edgeq.llama_library import default_threads
from edgeq.planner.candidates import Menu, effective_budget, misses
from edgeq.planner.plan import Request, profile_notes, settings_for
from edgeq.planner.problem import Problem, SearchOptions
from edgeq.planner.search import Demand, Goal, search
from edgeq.profiles.device import DeviceProfile
from edgeq.types import Budget, Plan

__all__ = [
    "Found",
    "demand_of",
    "export_reference",
    "given_imatrix",
    "searched_plan",
    "wants_search",
    "workshop",
]

Progress = Callable[[str, int, int, str], None]

# Types so close to the unquantized model that a mix has nothing to gain where one of them fits.
_NEAR_LOSSLESS = ("f16", "q8_0")


@dataclasses.dataclass(frozen=True)
class Found:
    """A plan that came out of a search.

    Attributes:
        plan: the plan.
        evidence: what it stands on.
        file: the model, if trials made it.
    """

    plan: Plan
    evidence: Evidence
    file: Path | None


def given_imatrix(path: Path | None, gguf: Path) -> tuple[ImportanceMatrix | None, tuple[str, ...]]:
    """The user's importance matrix, checked against the model, and what a plan that uses it has to say.

    Args:
        path: None if none was given.
        gguf: a float GGUF or a skeleton of one.

    Raises:
        SourceError: it cannot be read.
        UsageError: it is of another model.
    """
    if path is None:
        return None, ()
    matrix = read_imatrix(path)
    gaps = check_matches(matrix, read_header(gguf), sorted(quantizable_tensors(gguf)))
    return matrix, (f"rounded with the importance matrix {path.name}, sha256 {matrix.sha256}", *gaps)


def wants_search(
    gguf: Path,
    profile: DeviceProfile,
    budget: Budget,
    request: Request,
    goal: Goal,
    options: SearchOptions,
    imatrix: ImportanceMatrix | None = None,
) -> bool:
    """Whether types are searched for, rather than taken from a preset or a recipe.

    Raises:
        UsageError: a search was asked for and a preset or recipe was given.
    """
    given = request.preset is not None or request.from_recipe
    if options.when == "always" and given:
        raise UsageError(
            "--search always finds the types, and a preset or recipe was given", "Leave out --quant and --recipe"
        )
    if options.when == "never" or given:
        _refuse_search_goals(goal)
        return False
    if options.when == "always" or goal != Goal():
        return True
    menu = Menu(gguf, request.overrides, imatrix)
    settings, limits = settings_for(menu, request, profile), effective_budget(budget, profile)
    lossless = [
        menu.candidate(menu.choice(PRESETS[n]), settings, profile, request.prompt_tokens) for n in _NEAR_LOSSLESS
    ]
    return not any(not misses(c.predicted, limits) for c in lossless)


def _refuse_search_goals(goal: Goal) -> None:
    if goal.minimize is not None:
        raise UsageError("--minimize needs a search, and the types are given", "Leave out --minimize, or the preset")


def export_reference(folder: Path, out: Path, progress: Progress) -> None:
    """A Hugging Face folder as the GGUF that mixes are made from and judged against.

    In f16, which llama.cpp computes with more exactly than with bf16; a tensor with a weight beyond f16 is in bf16.
    """
    export_gguf(folder, out, float_type="f16", progress=lambda d, t, n: progress("read weights", d, t, n))


def demand_of(
    reference: Path, profile: DeviceProfile, budget: Budget, asked: Budget, request: Request, goal: Goal
) -> Demand:
    """A job's limits and settings."""
    settings = settings_for(Menu(reference, ()), request, profile)
    return Demand(goal, effective_budget(budget, profile), asked, settings, request.prompt_tokens)


def searched_plan(
    problem: Problem,
    demand: Demand,
    request: Request,
    options: SearchOptions,
    shop: Workshop,
    notes: Sequence[str],
) -> Found:
    """Search, and put the result into a plan.

    Raises:
        BudgetError: no mix meets the limits.
    """
    found = search(problem, demand, trials=options.trials, shop=shop)
    profile = problem.pricing.profile
    plan = Plan(
        tensor_types=found.types,
        context_tokens=demand.settings.context_tokens,
        kv_type_k=demand.settings.kv_type,
        kv_type_v=demand.settings.kv_type,
        ubatch_tokens=demand.settings.ubatch_tokens,
        threads=request.threads or profile.threads,
        gpu_layers=-1 if profile.accelerator.startswith("cuda") else 0,
        predicted=found.predicted,
        search=found.record,
        notes=(*notes, *problem.evidence.notes, *profile_notes(profile, request.threads)),
    )
    return Found(plan, problem.evidence, found.file)


def workshop(folder: Path, weights_key: str, threads: int, progress: Progress) -> Workshop:
    """A folder of its own inside ``folder``."""
    work = folder / "search"
    work.mkdir(exist_ok=True)
    return Workshop(work, weights_key, threads or default_threads(), progress)
