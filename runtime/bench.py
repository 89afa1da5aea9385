"""Measure a bundle on this machine and judge it against its budget: `run_bench`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from edgeq.bundle import Bundle, open_bundle
from edgeq.errors import ProfileError, UsageError
from edgeq.profiles.loader import load_profile
from edgeq.report import (
    DEFAULT_CONFIDENCE,
    LanguageWorkload,
    MemorySplit,
    Metric,
    Report,
    TensorWorkload,
    Workload,
    judge,
    metric,
    overall_result,
)
from edgeq.runtime import measure
from edgeq.runtime.bench_language import LanguageSubject
from edgeq.runtime.bench_messages import Ready
from edgeq.runtime.bench_run import Conditions, Findings, Progress, Run, Subject, measure_subject
from edgeq.tensor_types import TensorManifest
from edgeq.types import BUDGET_LINES, Budget, Manifest, Target, merge_budgets
from edgeq.units import format_bytes

__all__ = ["DEFAULT_MAX_HOST_LOAD", "run_bench"]

L = TypeVar("L", bound=Ready)
S = TypeVar("S")

DEFAULT_MAX_HOST_LOAD = 0.10
"""Share of the machine that others may take before a run is called invalid."""

_FOREIGN_LINES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "llm": ("a language model", ("latency_ms",)),
    "tensor": ("called with arrays", ("ttft_ms", "itl_ms", "tokens_per_s")),
}


def run_bench(
    bundle: Path,
    workload: Workload | None = None,
    *,
    inputs: Path | None = None,
    device: str | None = None,
    budget: Budget | None = None,
    confidence: float = DEFAULT_CONFIDENCE,
    max_host_load: float = DEFAULT_MAX_HOST_LOAD,
    progress: Progress | None = None,
) -> Report:
    """Verify a bundle's hashes, measure it in a fresh process, and judge it.

    Args:
        bundle: its folder.
        workload: of the bundle's kind; None for the default one.
        inputs: for a model that is called with arrays, see `edgeq.runtime.bench_inputs.bench_inputs`.
        device: of a bundle that was made for several, the one whose graph is measured; None for the one that
            `edgeq.load` takes on this machine.
        budget: lines that replace those of the bundle's own budget.
        confidence: of the one-sided bounds, at least 0.5 and below 1.
        max_host_load: share of the machine (0 to 1) that other processes may take before the run counts as invalid;
            1 switches the check off.
        progress: called with steps done, steps in all (0 if unknown) and what is going on.

    Raises:
        BundleError: no bundle, one that was changed, or one that was not made for that device.
        UsageError: a workload that makes no sense or is for another kind of bundle, inputs that the model does not
            take, or a line of ``budget`` that this kind of bundle cannot have.
        PromptTooLongError: prompt and answer together do not fit the context.
        SessionError: the model could not be loaded or run, its process died, or it needs a GPU that is not here.
    """
    tell = progress or (lambda done, total, what: None)
    opened = open_bundle(bundle)
    kind = opened.manifest.kind
    chosen = workload or (LanguageWorkload() if kind == "llm" else TensorWorkload())
    _check(chosen, confidence, max_host_load)
    _refuse_foreign(opened, chosen, inputs, device, budget or Budget())
    opened = open_bundle(bundle, verify=True, progress=lambda done, total, name: tell(done, total, f"verifying {name}"))
    if kind == "tensor":
        opened = _for_one_device(opened, device)
    limits = merge_budgets(opened.manifest.budget, budget or Budget())
    conditions = Conditions(chosen, limits, confidence, max_host_load)
    if isinstance(chosen, LanguageWorkload):
        return _report(opened, LanguageSubject(opened, chosen), conditions, tell)
    # numpy and what prepares inputs are nothing that a language model needs
    from edgeq.runtime.bench_inputs import bench_inputs
    from edgeq.runtime.bench_tensor import TensorSubject

    with tempfile.TemporaryDirectory(prefix="edgeq-bench-") as folder:
        calls = bench_inputs(opened, chosen, inputs)
        return _report(opened, TensorSubject(opened, calls, Path(folder), chosen.threads), conditions, tell)


def _for_one_device(opened: Bundle, device: str | None) -> Bundle:
    """The bundle as `edgeq.load` takes it here."""
    from edgeq.runtime.tensor.devices import fitting_device, named_device

    manifest = opened.tensor
    return opened.made_for(fitting_device(manifest) if device is None else named_device(manifest, device))


def _report(opened: Bundle, subject: Subject[L, S], conditions: Conditions, tell: Progress) -> Report:
    manifest, confidence = opened.manifest, conditions.confidence
    device = measure.describe_device()
    run = measure_subject(subject, conditions, tell)
    unlike, notes = _compare_with_target(manifest, device.machine)
    findings = subject.findings(run, confidence)
    metrics, unmeasured = _metrics(run, findings, confidence, on_gpu=subject.on_gpu)
    invalid = list(measure.disturbances(run.before, run.after, run.load))
    if unlike is not None:
        invalid.append(f"simulated: {unlike}")
    verdicts = judge(
        conditions.budget,
        metrics,
        confidence,
        predicted=findings.predicted,
        floors=findings.floors,
        unmeasured=unmeasured,
        invalid=invalid,
    )
    return Report(
        bundle=manifest.name,
        manifest_sha256=opened.manifest_sha256,
        profile=manifest.built_for,
        device=device,
        simulated=unlike is not None,
        workload=conditions.workload,
        details=findings.details,
        threads=run.loaded.threads,
        repetitions=len(run.samples),
        planned_repetitions=run.planned,
        duration_s=run.duration_s,
        confidence=confidence,
        metrics=metrics,
        warmup=findings.warmup,
        unmeasured=unmeasured,
        memory=_memory_split(run),
        budget=conditions.budget,
        host_load=run.load,
        temperatures=measure.temperatures(run.before, run.after),
        throttle_events=measure.throttle_events(run.before, run.after),
        valid=not invalid,
        invalid_reasons=tuple(invalid),
        verdicts=verdicts,
        result=overall_result(verdicts),
        notes=(*notes, *_notes(run, conditions.workload), *findings.notes),
        tools=run.loaded.tools,
        created_utc=_now(),
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _refuse_foreign(
    opened: Bundle, workload: Workload, inputs: Path | None, device: str | None, budget: Budget
) -> None:
    """Refuse, rather than ignore, what the other kind of bundle has."""
    kind = opened.manifest.kind
    what, foreign = _FOREIGN_LINES[kind]
    if isinstance(workload, LanguageWorkload) != (kind == "llm"):
        raise UsageError(f"{opened.path} is {what}, and the workload is for others", "Give one of its own kind")
    if inputs is not None and kind == "llm":
        raise UsageError(f"{opened.path} is {what}, which takes no arrays", "Leave --inputs out")
    if device is not None and kind == "llm":
        raise UsageError(f"{opened.path} is {what}, which is one for all devices", "Leave --device out")
    for line in BUDGET_LINES:
        if line.field in foreign and budget.limit(line) is not None:
            raise UsageError(f"{opened.path} is {what}, which has no {line.label}", f"Leave the limit {line.field} out")


def _check(workload: Workload, confidence: float, max_host_load: float) -> None:
    if not 0.5 <= confidence < 1:
        raise UsageError(f"A confidence of {confidence:g} is not at least 0.5 and below 1", "Choose 0.95 or 0.99")
    if not 0 <= max_host_load <= 1:
        raise UsageError(f"A host load of {max_host_load:g} is no share of the machine", "Choose from 0 to 1")
    if workload.repetitions is not None and workload.seconds is not None:
        raise UsageError("Repetitions and seconds exclude each other", "Give one of the two")
    lowest = [
        ("warm-up repetitions", workload.warmup, 0),
        ("repetitions", workload.repetitions, 1),
        ("threads", workload.threads, 1),
    ]
    if isinstance(workload, LanguageWorkload):
        lowest += [
            ("prompt tokens", workload.prompt_tokens, 1),
            ("output tokens", workload.output_tokens, 1),
            ("context tokens", workload.context_tokens, 1),
        ]
    for what, value, least in lowest:
        if value is not None and value < least:
            raise UsageError(f"{value} {what} are too few", f"Choose at least {least}")
    for seconds in (workload.seconds, workload.max_seconds):
        if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
            raise UsageError(f"{seconds:g} seconds are no time to measure for", "Choose more than 0")


def _compare_with_target(manifest: Manifest | TensorManifest, machine: str) -> tuple[str | None, list[str]]:
    """Why this machine is not what the bundle was built for, or None; and what to note."""
    name, target = manifest.built_for, manifest.target
    if target is None:  # an older bundle names its profile only
        try:
            profile = load_profile(name)
        except ProfileError as error:
            return None, [f"Whether this machine is a {name} was not checked: {error.cause}"]
        target = Target(arch=profile.arch, accelerator=profile.accelerator)
    return measure.unlike_target(name, target, machine), []


def _metrics(
    run: Run[L, S], findings: Findings, confidence: float, *, on_gpu: bool
) -> tuple[dict[str, Metric], dict[str, str]]:
    """What was measured, and why the rest was not, both by `Budget` field."""
    metrics = dict(findings.metrics)
    metrics["load_ms"] = metric(
        "ms", "from process start to ready, file in the page cache", run.loads_ms, confidence=confidence
    )
    unmeasured = {**findings.unmeasured, "power_w": "not measured: no power sensor is read on this machine"}
    if run.usage.peak_bytes is None:
        unmeasured["peak_memory_bytes"] = "not measured: /proc/self/status has no VmHWM here"
    elif on_gpu:
        unmeasured["peak_memory_bytes"] = (
            f"not measured: VmHWM of the serving process, {format_bytes(run.usage.peak_bytes)}, is without memory of "
            "the GPU"
        )
    else:
        source = "VmHWM of the serving process"
        metrics["peak_memory_bytes"] = metric("bytes", source, [run.usage.peak_bytes], confidence=confidence)
    return metrics, unmeasured


def _memory_split(run: Run[L, S]) -> MemorySplit | None:
    if run.usage.peak_bytes is None:
        return None
    return MemorySplit(
        peak_bytes=run.usage.peak_bytes,
        anonymous_bytes=run.usage.anonymous_bytes,
        file_bytes=run.usage.file_bytes,
        before_load_bytes=run.loaded.resident_before_load_bytes,
    )


def _notes(run: Run[L, S], workload: Workload) -> list[str]:
    notes = []
    if run.planned is not None and len(run.samples) < run.planned:
        notes.append(
            f"Stopped after {workload.max_seconds:g} s and {len(run.samples)} of {run.planned} repetitions; "
            "allow more with --max-seconds"
        )
    if run.planned_loads > len(run.loads_ms):
        notes.append(f"Only {len(run.loads_ms)} of {run.planned_loads} load times fitted into the time")
    return notes
