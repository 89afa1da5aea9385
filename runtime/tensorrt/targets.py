"""What an engine is built for: this machine's GPU, a device of a profile, or a bare compute capability."""

from __future__ import annotations

import dataclasses
import re

from edgeq.errors import ProfileError, SessionError, UsageError
from edgeq.profiles.device import DeviceProfile
from edgeq.profiles.loader import load_profile
from edgeq.runtime.tensorrt.driver import Gpu, find_gpu
from edgeq.runtime.tensorrt.engine_key import Machine, read_machine
from edgeq.runtime.tensorrt.precisions import refuse_missing_scheme
from edgeq.runtime.tensorrt.records import EngineSettings
from edgeq.tensor_types import TensorPlan
from edgeq.types import Budget

__all__ = ["EngineTarget", "parse_target", "settings_for", "target_here", "target_of", "this_machine"]

_SM = re.compile(r"sm_?(\d{1,2})(\d)", re.IGNORECASE)
_CAPABILITY = re.compile(r"([0-9]{1,2})\.([0-9])")
_WORKSPACE_SHARE = 4  # of the usable memory, one part for scratch; weights and other programs need the rest
_LEAST_WORKSPACE_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class EngineTarget:
    """A GPU to build for.

    Attributes:
        name: for people.
        compute_capability: ``"8.7"``.
        usable_bytes: memory that a bundle may take; None where nothing is known.
        dla_cores: deep learning accelerators; None where nothing is known, and TensorRT is asked.
        machine: what an engine depends on beside that; nothing is known of a machine elsewhere.
    """

    name: str
    compute_capability: str
    usable_bytes: int | None = None
    dla_cores: int | None = None
    machine: Machine = dataclasses.field(default_factory=Machine)

    @property
    def sm(self) -> str:
        """``"sm_87"``."""
        return f"sm_{self.compute_capability.replace('.', '')}"


def parse_target(text: str) -> EngineTarget:
    """A target by its compute capability (``sm_86`` or ``8.6``) or by a profile's name or file.

    Raises:
        UsageError: a profile without a GPU.
        ProfileError: there is no such profile.
    """
    match = _SM.fullmatch(text) or _CAPABILITY.fullmatch(text)
    if match is not None:
        return _located(EngineTarget(f"sm_{int(match[1])}{match[2]}", f"{int(match[1])}.{match[2]}"))
    return _located(target_of(load_profile(text)))


def target_of(profile: DeviceProfile) -> EngineTarget:
    """The GPU of a profile.

    Raises:
        UsageError: it has none.
    """
    if profile.gpu is None:
        raise UsageError(
            f"{profile.name} has no GPU, and TensorRT runs on nothing else", "Run the bundle there without an engine"
        )
    return EngineTarget(
        name=profile.name,
        compute_capability=profile.gpu.compute_capability,
        usable_bytes=profile.memory.usable_bytes,
        dla_cores=0 if profile.dla is None else profile.dla.cores,
    )


def _located(target: EngineTarget) -> EngineTarget:
    """With what is known of this machine, if its GPU is of that kind."""
    gpu = find_gpu()
    if gpu is None or gpu.compute_capability != target.compute_capability:
        return target
    return dataclasses.replace(target, machine=read_machine(gpu.sms))


def this_machine(gpu: Gpu | None = None) -> EngineTarget:
    """The GPU of this machine.

    Raises:
        SessionError: it has none.
    """
    gpu = find_gpu() if gpu is None else gpu
    if gpu is None:
        raise SessionError(
            "There is no NVIDIA GPU on this machine",
            "Run it on the target, or name what to build for with --for (TensorRT-RTX builds without a GPU)",
        )
    return EngineTarget(gpu.name, gpu.compute_capability, gpu.memory_bytes, machine=read_machine(gpu.sms))


def target_here(built_for: str, gpu: Gpu | None = None) -> EngineTarget:
    """This machine, with what the profile that a bundle was built for says of its memory and accelerators.

    Where there is no such profile, or it is of another GPU, the GPU's own memory counts.

    Raises:
        SessionError: this machine has no GPU.
    """
    here = this_machine(gpu)
    try:
        told = target_of(load_profile(built_for))
    except (ProfileError, UsageError):
        return here
    if told.compute_capability != here.compute_capability:
        return here
    return dataclasses.replace(here, usable_bytes=told.usable_bytes, dla_cores=told.dla_cores)


def settings_for(
    target: EngineTarget,
    plan: TensorPlan,
    budget: Budget,
    *,
    workspace_bytes: int | None = None,
    dla_core: int | None = None,
    threads: int | None = None,
) -> EngineSettings:
    """How to build the engine of a plan for a target.

    The workspace is a quarter of the target's usable memory, and no more than the budget leaves beside the model.

    Args:
        target: that it is for.
        plan: of the bundle.
        budget: of the bundle.
        workspace_bytes: instead of what follows from the memory.
        dla_core: the accelerator to use; None for the GPU alone.
        threads: of the builder.

    Raises:
        UnsupportedModelError: the GPU lacks the plan's precision.
        UsageError: an accelerator that the target does not have.
    """
    refuse_missing_scheme(plan.scheme, target.compute_capability, target.name)
    if dla_core is not None and target.dla_cores is not None and dla_core >= target.dla_cores:
        there = f"has {target.dla_cores}" if target.dla_cores else "has none"
        raise UsageError(f"DLA core {dla_core} is asked for, and {target.name} {there}", "Leave out --dla")
    return EngineSettings(
        compute_capability=target.compute_capability,
        axes=plan.axes,
        workspace_bytes=_workspace(target, plan, budget) if workspace_bytes is None else workspace_bytes,
        dla_core=dla_core,
        threads=threads,
    )


def _workspace(target: EngineTarget, plan: TensorPlan, budget: Budget) -> int | None:
    limits = []
    if target.usable_bytes is not None:
        limits.append(target.usable_bytes // _WORKSPACE_SHARE)
    if budget.peak_memory_bytes is not None:
        taken = plan.predicted
        limits.append(
            budget.peak_memory_bytes - taken.runtime_bytes - taken.weights_bytes - taken.activation_bytes
        )  # fmt: skip
    return max(_LEAST_WORKSPACE_BYTES, min(limits)) if limits else None
