"""The record of one measured run: on what, with which samples, and what they say about a budget.

Reports keep every raw sample, so that a verdict can be checked again later. They lie in the bundle's ``reports``
folder, beside the hashed files and never among them.
"""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgeq.bundle import Bundle
from edgeq.errors import BundleError
from edgeq.record import Record
from edgeq.types import Budget, from_json, to_json
from edgeq.verdicts import (
    DEFAULT_CONFIDENCE,
    Metric,
    Percentile,
    Result,
    Verdict,
    judge,
    metric,
    overall_result,
    predictions,
    tensor_floors,
    tensor_predictions,
)
from edgeq.workload import Details, LanguageDetails, LanguageWorkload, TensorDetails, TensorWorkload, Workload

__all__ = [
    "DEFAULT_CONFIDENCE",
    "LATEST",
    "Details",
    "Device",
    "HostLoad",
    "LanguageDetails",
    "LanguageWorkload",
    "MemorySplit",
    "Metric",
    "Percentile",
    "Report",
    "Result",
    "Temperature",
    "TensorDetails",
    "TensorWorkload",
    "Verdict",
    "Workload",
    "check_writable",
    "judge",
    "latest_report",
    "metric",
    "overall_result",
    "predictions",
    "publish_report",
    "read_report",
    "tensor_floors",
    "tensor_predictions",
    "write_report",
]

LATEST = "report.json"
SCHEMA_VERSION = 2
_MAX_REPORT_BYTES = 256 << 20


class MemorySplit(Record, frozen=True, kw_only=True):
    """What the peak consists of, as far as the kernel tells.

    Attributes:
        peak_bytes: the high-water mark of the resident set.
        anonymous_bytes: resident at the end and backed by no file: weights read into memory, KV cache, buffers.
        file_bytes: resident at the end and backed by files: libraries, and weights if they are mapped.
        before_load_bytes: resident before the model was loaded: interpreter and libraries.
    """

    peak_bytes: int
    anonymous_bytes: int | None
    file_bytes: int | None
    before_load_bytes: int | None


class Device(Record, frozen=True, kw_only=True):
    """The machine that was measured. None stands for what it does not tell.

    Attributes:
        machine: ``"x86_64"``, ``"aarch64"``.
        model: the board or product name.
        cpu: the processor's name.
        logical_cpus: that this process may use.
        physical_cores: of the machine.
        memory_bytes: total.
        kernel: its release.
        system: the distribution.
        governor: of the first CPU's frequency scaling.
        frequency_mhz: of each usable CPU before the run.
        frequency_limit_mhz: the highest that scaling allows now, per usable CPU.
    """

    machine: str
    model: str | None
    cpu: str | None
    logical_cpus: int
    physical_cores: int | None
    memory_bytes: int | None
    kernel: str
    system: str | None
    governor: str | None
    frequency_mhz: tuple[float, ...]
    frequency_limit_mhz: tuple[float, ...]


class HostLoad(Record, frozen=True, kw_only=True):
    """What else the machine did, as shares (0 to 1) of all CPU time of the CPUs that this process may use.

    Attributes:
        before: busy share just before the run; None if the kernel does not tell.
        during: share that other processes used, or that a hypervisor took, while samples were taken.
        steal: the hypervisor's part of ``during``.
        own: share that the measured process and its parent used.
        allowed: the run is invalid if ``during`` is above it.
    """

    before: float | None
    during: float | None
    steal: float | None
    own: float | None
    allowed: float


class Temperature(Record, frozen=True, kw_only=True):
    """One thermal zone.

    Attributes:
        zone: its name as the kernel gives it.
        before_c: degrees Celsius before the run.
        after_c: degrees Celsius after it.
    """

    zone: str
    before_c: float
    after_c: float


class Report(Record, frozen=True, kw_only=True):
    """One run of one bundle on one machine.

    Attributes:
        schema_version: of this record.
        kind: ``"bench"``.
        bundle: its name.
        manifest_sha256: of ``edgeq.json``.
        profile: the profile that the bundle was built for.
        device: the machine that was measured.
        simulated: True if that is not the kind of machine that the profile describes.
        workload: what was asked for.
        details: what only this kind of bundle has to tell.
        threads: what the session had.
        repetitions: that were counted.
        planned_repetitions: that the budget's lines or the user wanted; None if only seconds were given.
        duration_s: of the counted repetitions.
        confidence: of every bound.
        metrics: by `Budget` field, and ``calls_per_s`` of models that are called with arrays.
        warmup: the uncounted samples, by `Budget` field.
        unmeasured: `Budget` field to the reason why there are no samples of it.
        memory: what the peak consists of.
        budget: that was held against the samples.
        host_load: see `HostLoad`.
        temperatures: where the kernel tells them.
        throttle_events: how often a CPU was slowed down by heat during the run; None if the kernel does not tell.
        valid: False if the machine was not in a state to judge anything on.
        invalid_reasons: why.
        verdicts: one for each line of a budget.
        result: of all constrained lines together; None if nothing is constrained.
        notes: what a reader must know, one line each.
        tools: name to version.
        created_utc: ISO 8601.
    """

    schema_version: int = SCHEMA_VERSION
    kind: Literal["bench"] = "bench"
    bundle: str
    manifest_sha256: str
    profile: str
    device: Device
    simulated: bool
    workload: Workload
    details: Details
    threads: int
    repetitions: int
    planned_repetitions: int | None
    duration_s: float
    confidence: float
    metrics: dict[str, Metric]
    warmup: dict[str, Metric]
    unmeasured: dict[str, str]
    memory: MemorySplit | None
    budget: Budget
    host_load: HostLoad
    temperatures: tuple[Temperature, ...]
    throttle_events: int | None
    valid: bool
    invalid_reasons: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    result: Result | None
    notes: tuple[str, ...]
    tools: dict[str, str]
    created_utc: str


def write_report(report: Report, path: Path) -> None:
    """Write a report in one step: a reader sees the old file or the new one, never a part.

    Raises:
        BundleError: the folder cannot be made or written.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(to_json(report))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error


def check_writable(path: Path) -> None:
    """Find out before a long run whether its report can be written to ``path``.

    Raises:
        BundleError: it cannot.
    """
    probe = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> BundleError:
    return BundleError(
        f"The report {path} cannot be written: {error.strerror}", "Write it elsewhere with --output FILE"
    )


def publish_report(report: Report, bundle: Bundle) -> Path:
    """Add a report to a bundle, as ``reports/<time>-bench.json`` and as the latest one; returns the former.

    Raises:
        BundleError: the bundle cannot be written.
    """
    stamp = report.created_utc.replace("-", "").replace(":", "")
    path = bundle.reports / f"{stamp}-{report.kind}.json"
    write_report(report, path)
    write_report(report, bundle.reports / LATEST)
    return path


def latest_report(bundle: Bundle) -> Report:
    """The newest report of a bundle.

    Raises:
        BundleError: it has none, one that cannot be read, or one of another bundle.
    """
    path = bundle.reports / LATEST
    if not path.is_file():
        raise BundleError(f"{bundle.path} has no report yet", f"Measure it with: edgeq bench {bundle.path}")
    report = read_report(path)
    if report.manifest_sha256 != bundle.manifest_sha256:
        raise BundleError(f"{path} is the report of another bundle", f"Measure it with: edgeq bench {bundle.path}")
    return report


def read_report(path: Path) -> Report:
    """A report from its file.

    Raises:
        BundleError: it is missing, no report, or written by a newer edgeq.
    """
    remedy = "Measure again with: edgeq bench BUNDLE"
    try:
        if path.stat().st_size > _MAX_REPORT_BYTES:
            raise BundleError(f"{path} is larger than any report", remedy)
        data = path.read_bytes()
        version = from_json(data, _Version).schema_version
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {version}; this edgeq reads up to {SCHEMA_VERSION}",
                "Update it with: pip install --upgrade edgeq",
            )
        return from_json(data, Report) if version == SCHEMA_VERSION else _from_first_schema(data)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", remedy) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is no valid report: {error}", remedy) from error


class _Version(msgspec.Struct):
    schema_version: int = 0


def _from_first_schema(data: bytes) -> Report:
    """A report of schema 1, which knew language models only and kept what is theirs beside the rest."""
    entries = from_json(data, dict[str, Any])
    workload = entries.get("workload")
    moved = {name: entries.pop(name) for name in ("context_tokens", "predicted") if name in entries}
    entries["schema_version"] = SCHEMA_VERSION
    entries["details"] = {"kind": "llm", **moved}
    if isinstance(workload, dict):
        entries["workload"] = {"kind": "llm", **workload}
    return msgspec.convert(entries, Report)
