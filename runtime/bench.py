"""Measure a bundle on this machine and judge it against its budget: `run_bench`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from edgeq.bundle import open_bundle
from edgeq.errors import ProfileError, PromptTooLongError, UsageError
from edgeq.profiles.loader import load_profile
from edgeq.report import (
    DEFAULT_CONFIDENCE,
    MemorySplit,
    Metric,
    Report,
    Workload,
    judge,
    metric,
    overall_result,
    predictions,
)
from edgeq.runtime import measure
from edgeq.runtime.bench_run import Conditions, Progress, Run, measure_bundle
from edgeq.runtime.bench_worker import Sample
from edgeq.types import Budget, Manifest, Plan, Target, merge_budgets

__all__ = ["DEFAULT_MAX_HOST_LOAD", "run_bench"]

DEFAULT_MAX_HOST_LOAD = 0.10
"""Share of the machine that others may take before a run is called invalid."""


def run_bench(
    bundle: Path,
    workload: Workload | None = None,
    *,
    budget: Budget | None = None,
    confidence: float = DEFAULT_CONFIDENCE,
    max_host_load: float = DEFAULT_MAX_HOST_LOAD,
    progress: Progress | None = None,
) -> Report:
    """Verify a bundle's hashes, measure it in a fresh process, and judge it.

    Args:
        bundle: its folder.
        workload: None for the default one.
        budget: lines that replace those of the bundle's own budget.
        confidence: of the one-sided bounds, at least 0.5 and below 1.
        max_host_load: share of the machine (0 to 1) that other processes may take before the run counts as invalid;
            1 switches the check off.
        progress: called with steps done, steps in all (0 if unknown) and what is going on.

    Raises:
        BundleError: no bundle, or one that was changed.
        UsageError: a workload that makes no sense.
        PromptTooLongError: prompt and answer together do not fit the context.
        SessionError: the model could not be loaded or run, or its process died.
    """
    workload = workload or Workload()
    tell = progress or (lambda done, total, what: None)
    _check(workload, confidence, max_host_load)
    opened = open_bundle(bundle, verify=True, progress=lambda done, total, name: tell(done, total, f"verifying {name}"))
    limits = merge_budgets(opened.llm.budget, budget or Budget())
    context_tokens = workload.context_tokens or opened.llm.plan.context_tokens
    wanted = workload.prompt_tokens + workload.output_tokens
    if wanted > context_tokens:
        raise PromptTooLongError(
            f"{workload.prompt_tokens} prompt and {workload.output_tokens} output tokens make {wanted}, "
            f"the context holds {context_tokens}",
            "Lower --prompt-tokens or --output-tokens",
        )
    device = measure.describe_device()
    run = measure_bundle(opened.path, Conditions(workload, limits, confidence, max_host_load), tell)
    unlike, notes = _compare_with_target(opened.llm, device.machine)
    metrics, unmeasured = _metrics(run, confidence)
    invalid = list(measure.disturbances(run.before, run.after, run.load))
    if unlike is not None:
        invalid.append(f"simulated: {unlike}")
    predicted = opened.llm.plan.predicted
    verdicts = judge(
        limits,
        metrics,
        confidence,
        predicted=predictions(predicted, workload.prompt_tokens),
        unmeasured=unmeasured,
        invalid=invalid,
    )
    return Report(
        bundle=opened.llm.name,
        manifest_sha256=opened.manifest_sha256,
        profile=opened.llm.built_for,
        device=device,
        simulated=unlike is not None,
        workload=workload,
        context_tokens=run.loaded.context_tokens,
        threads=run.loaded.threads,
        repetitions=len(run.samples),
        planned_repetitions=run.planned,
        duration_s=run.duration_s,
        confidence=confidence,
        metrics=metrics,
        warmup=_answer_metrics(run.warmup, confidence),
        unmeasured=unmeasured,
        memory=_memory_split(run),
        predicted=predicted,
        budget=limits,
        host_load=run.load,
        temperatures=measure.temperatures(run.before, run.after),
        throttle_events=measure.throttle_events(run.before, run.after),
        valid=not invalid,
        invalid_reasons=tuple(invalid),
        verdicts=verdicts,
        result=overall_result(verdicts),
        notes=(*notes, *_notes(run, workload, opened.llm.plan)),
        tools=run.loaded.tools,
        created_utc=_now(),
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _check(workload: Workload, confidence: float, max_host_load: float) -> None:
    if not 0.5 <= confidence < 1:
        raise UsageError(f"A confidence of {confidence:g} is not at least 0.5 and below 1", "Choose 0.95 or 0.99")
    if not 0 <= max_host_load <= 1:
        raise UsageError(f"A host load of {max_host_load:g} is no share of the machine", "Choose from 0 to 1")
    if workload.repetitions is not None and workload.seconds is not None:
        raise UsageError("Repetitions and seconds exclude each other", "Give one of the two")
    lowest = (
        ("prompt tokens", workload.prompt_tokens, 1),
        ("output tokens", workload.output_tokens, 1),
        ("warm-up repetitions", workload.warmup, 0),
        ("repetitions", workload.repetitions, 1),
        ("context tokens", workload.context_tokens, 1),
        ("threads", workload.threads, 1),
    )
    for what, value, least in lowest:
        if value is not None and value < least:
            raise UsageError(f"{value} {what} are too few", f"Choose at least {least}")
    for seconds in (workload.seconds, workload.max_seconds):
        if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
            raise UsageError(f"{seconds:g} seconds are no time to measure for", "Choose more than 0")


def _compare_with_target(manifest: Manifest, machine: str) -> tuple[str | None, list[str]]:
    """Why this machine is not what the bundle was built for, or None; and what to note."""
    name, target = manifest.built_for, manifest.target
    if target is None:  # an older bundle names its profile only
        try:
            profile = load_profile(name)
        except ProfileError as error:
            return None, [f"Whether this machine is a {name} was not checked: {error.cause}"]
        target = Target(arch=profile.arch, accelerator=profile.accelerator)
    return measure.unlike_target(name, target, machine), []


def _answer_metrics(samples: Sequence[Sample], confidence: float) -> dict[str, Metric]:
    """Metrics of answers, by `Budget` field; those without a sample are left out."""
    found = {
        "ttft_ms": metric(
            "ms", "from the call to the first token", [s.ttft_ms for s in samples], confidence=confidence
        ),
        "itl_ms": metric(
            "ms", "every gap between two tokens", [gap for s in samples for gap in s.gaps_ms], confidence=confidence
        ),
        "tokens_per_s": metric(
            "tok/s",
            "of each answer after its first token",
            [1e3 * len(s.gaps_ms) / sum(s.gaps_ms) for s in samples if s.gaps_ms],
            confidence=confidence,
        ),
    }
    return {name: entry for name, entry in found.items() if entry.samples}


def _metrics(run: Run, confidence: float) -> tuple[dict[str, Metric], dict[str, str]]:
    """What was measured, and why the rest was not, both by `Budget` field."""
    metrics = _answer_metrics(run.samples, confidence)
    metrics["load_ms"] = metric(
        "ms", "from process start to ready, file in the page cache", run.loads_ms, confidence=confidence
    )
    unmeasured = {
        "latency_ms": "a language model has no latency of a single call; constrain ttft and itl",
        "power_w": "not measured: no power sensor is read on this machine",
    }
    if run.usage.peak_bytes is not None:
        metrics["peak_memory_bytes"] = metric(
            "bytes", "VmHWM of the serving process", [run.usage.peak_bytes], confidence=confidence
        )
    else:
        unmeasured["peak_memory_bytes"] = "not measured: /proc/self/status has no VmHWM here"
    for name in ("itl_ms", "tokens_per_s"):
        if name not in metrics:
            unmeasured[name] = "not measured: an answer of one token has no gap"
    return metrics, unmeasured


def _memory_split(run: Run) -> MemorySplit | None:
    if run.usage.peak_bytes is None:
        return None
    return MemorySplit(
        peak_bytes=run.usage.peak_bytes,
        anonymous_bytes=run.usage.anonymous_bytes,
        file_bytes=run.usage.file_bytes,
        before_load_bytes=run.loaded.resident_before_load_bytes,
    )


def _notes(run: Run, workload: Workload, plan: Plan) -> list[str]:
    predicted_prompt_tokens = plan.predicted.prompt_tokens
    notes = []
    if run.planned is not None and len(run.samples) < run.planned:
        notes.append(
            f"Stopped after {workload.max_seconds:g} s and {len(run.samples)} of {run.planned} repetitions; "
            "allow more with --max-seconds"
        )
    if run.planned_loads > len(run.loads_ms):
        notes.append(f"Only {len(run.loads_ms)} of {run.planned_loads} load times fitted into the time")
    if workload.prompt_tokens != predicted_prompt_tokens:
        notes.append(
            f"The plan predicts the time to first token for prompts of {predicted_prompt_tokens} tokens, "
            f"not {workload.prompt_tokens}"
        )
    answered = workload.prompt_tokens + workload.output_tokens
    if answered < plan.context_tokens:
        notes.append(
            f"Predicted times are means; inter-token latency and decode speed for a full context of "
            f"{plan.context_tokens} tokens, measured with at most {answered}"
        )
    cached = max(sample.cached_tokens for sample in run.samples)
    if cached > 0:
        notes.append(f"Up to {cached} of {workload.prompt_tokens} prompt tokens were found in the cache")
    return notes
