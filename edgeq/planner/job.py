"""What is asked for in one conversion, and what of it comes to nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from edgeq.ggml_types import ggml_type
from edgeq.planner.inspection import QualityOptions
from edgeq.planner.plan import Request
from edgeq.planner.problem import SearchOptions
from edgeq.planner.search import Goal
from edgeq.profiles.device import DeviceProfile, power_mode_of
from edgeq.profiles.loader import load_profile
from edgeq.types import Budget, Plan

__all__ = ["Job", "idle_notes", "is_float", "is_judged", "power_note", "profile_of"]


@dataclasses.dataclass(frozen=True)
class Job:
    """One conversion.

    Attributes:
        model: a hub id, a Hugging Face folder, or a float GGUF.
        target: a device profile's name or file.
        budget: overrides the profile's, line by line.
        request: types, context and KV cache that the user asked for.
        revision: of a hub id.
        llama_cpp: a checkout whose converter replaces edgeq's own.
        threads: for quantizing and checking; 0 for all cores.
        goal: limits on bytes and quality.
        search: whether and how types are searched for.
        quality: on which text the result is judged.
        search_given: the options of ``search`` that the user gave, for a note if they come to nothing.
        power_mode: of the device; None for the profile's own.
    """

    model: str
    target: str
    budget: Budget = dataclasses.field(default_factory=Budget)
    request: Request = dataclasses.field(default_factory=Request)
    revision: str | None = None
    llama_cpp: Path | None = None
    threads: int = 0
    goal: Goal = dataclasses.field(default_factory=Goal)
    search: SearchOptions = dataclasses.field(default_factory=SearchOptions)
    quality: QualityOptions = dataclasses.field(default_factory=QualityOptions)
    search_given: tuple[str, ...] = ()
    power_mode: str | None = None

    @property
    def leaves_search(self) -> bool:
        """Whether types can be searched for, rather than being given."""
        return self.request.preset is None and not self.request.from_recipe and self.search.when != "never"


def profile_of(job: Job) -> DeviceProfile:
    """The device in the power mode that was asked for. Raises ProfileError if there is no such device or mode."""
    profile = load_profile(job.target)
    return profile if job.power_mode is None else power_mode_of(profile, job.power_mode)


def power_note(profile: DeviceProfile) -> tuple[str, ...]:
    """Which power mode a plan's figures are for, as a note; nothing on a device without."""
    return () if profile.power_mode is None else (f"for power mode {profile.power_mode}",)


def idle_notes(job: Job, plan: Plan) -> list[str]:
    """The options that come to nothing, because a preset is good enough."""
    notes = []
    if job.search_given and job.leaves_search:
        notes.append(
            f"{', '.join(job.search_given)} had no effect: f16 or q8_0 fits, so no mix is searched for; "
            "--search always searches in any case"
        )
    judging = {"--eval-text": job.quality.text, "--eval-tokens": job.quality.tokens}
    given = [option for option, value in judging.items() if value]
    if given and not is_judged(job, plan):
        notes.append(
            f"{', '.join(given)} had no effect: {plan.preset or 'float'} weights are not judged without a limit"
        )
    return notes


def is_judged(job: Job, plan: Plan) -> bool:
    """Whether quality is measured where it may be: not that of float weights, unless something limits it."""
    return job.goal != Goal() or not is_float(plan)


def is_float(plan: Plan) -> bool:
    """Whether all types of a plan are float."""
    return all(ggml_type(kind).is_float for kind in plan.tensor_types.values())
