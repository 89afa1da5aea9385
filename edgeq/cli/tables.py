"""Reports as text for people. Columns are as wide as what they hold, so nothing is cut off in a log or a pipe."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from edgeq.units import format_bytes, format_quantity

if TYPE_CHECKING:
    from edgeq.report import Details, Report
    from edgeq.verdicts import Metric, Verdict

__all__ = ["format_table", "render_report", "terminal_width", "verdict_table", "wants_colour"]

# Percentiles that are shown, in this order where a report has them; none for a single figure.
_METRICS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("ttft_ms", "first token", (50, 95)),
    ("itl_ms", "inter-token", (50, 95, 99)),
    ("tokens_per_s", "decode speed", (50,)),
    ("latency_ms", "latency", (50, 90, 99)),
    ("calls_per_s", "throughput", ()),
    ("load_ms", "load time", (50,)),
)
_COLOURS = {"PASS": "\x1b[32m", "FAIL": "\x1b[31m", "INSUFFICIENT": "\x1b[33m"}
_RESET = "\x1b[0m"
_NONE = "-"


def wants_colour() -> bool:
    """Whether stdout is a terminal whose user did not refuse colours (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def terminal_width() -> int:
    """Columns of the terminal, ``$COLUMNS`` first; 100 where there is none. At least 40."""
    return max(40, shutil.get_terminal_size((100, 24)).columns)


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Lines of a table with two spaces between columns; columns in ``right`` are aligned to the right."""
    cells = [list(headers), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    lines = []
    for row in cells:
        aligned = [
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def verdict_table(verdicts: Sequence[Verdict], confidence: float, *, colour: bool) -> list[str]:
    """Every line that has a limit or a measurement: predicted, measured, bound, limit and verdict.

    A prediction that is only the least which datasheet figures allow has "≳" before it.
    The last column is the verdict, so colour does not disturb the widths.
    """
    rows = []
    for verdict in verdicts:
        if verdict.limit is None and verdict.measured is None:
            continue
        sign = "≥" if verdict.field == "tokens_per_s" else "≤"
        limit = _NONE if verdict.limit is None else f"{sign} {format_quantity(verdict.limit, verdict.unit)}"
        figures = [
            _NONE if value is None else format_quantity(value, verdict.unit)
            for value in (verdict.predicted, verdict.measured, verdict.bound)
        ]
        figures[0] = f"≳ {figures[0]}" if verdict.predicted_is_floor else figures[0]
        rows.append([verdict.label, *figures, limit, str(verdict.n_samples), verdict.result or _NONE])
    headers = ["budget line", "predicted", "measured", f"bound {confidence * 100:g} %", "limit", "samples", "verdict"]
    lines = format_table(headers, rows, right=(1, 2, 3, 4, 5))
    return [_coloured(line) for line in lines] if colour else lines


def _coloured(line: str) -> str:
    for word, code in _COLOURS.items():
        if line.endswith(f"  {word}"):
            return f"{line.removesuffix(word)}{code}{word}{_RESET}"
    return line


def render_report(report: Report, *, colour: bool) -> str:
    """A whole report: the verdict table, why lines did not pass, and what was measured. Ends with a newline."""
    device, what = report.device, f"{_session(report.details)}, {report.threads} threads"
    memory = "" if device.memory_bytes is None else f", {format_bytes(device.memory_bytes)}"
    cores = f"{device.logical_cpus} CPUs{memory}"
    lines = [
        f"{report.bundle}, built for {report.profile}, {what}",
        f"measured on {device.model or device.machine}: {device.cpu or device.machine}, {cores}",
        "",
        *verdict_table(report.verdicts, report.confidence, colour=colour),
        "",
    ]
    problems = [f"invalid run, so nothing passes: {reason}" for reason in report.invalid_reasons]
    problems += [
        f"{verdict.result} {verdict.label}: {verdict.reason}"
        for verdict in report.verdicts
        if verdict.result not in (None, "PASS") and not verdict.reason.startswith("invalid run")
    ]
    lines += [*problems, ""] if problems else []
    lines += [*_measurements(report), ""]
    lines += [f"note: {note}" for note in report.notes]
    result = report.result or "nothing is constrained"
    word = f"{_COLOURS[report.result]}{result}{_RESET}" if colour and report.result else result
    return "\n".join([*lines, f"result: {word}"]) + "\n"


def _session(details: Details) -> str:
    from edgeq.report import TensorDetails

    if isinstance(details, TensorDetails):
        return f"{details.scheme} for {details.backend}, {', '.join(details.providers)}"
    return f"context {details.context_tokens}"


def _workload(report: Report) -> Iterator[tuple[str, str]]:
    from edgeq.report import LanguageWorkload, TensorDetails

    workload, details = report.workload, report.details
    what = "calls"
    if isinstance(workload, LanguageWorkload):
        what = f"x {workload.prompt_tokens} prompt + {workload.output_tokens} output tokens"
    yield "workload", f"{report.repetitions} {what} in {report.duration_s:.1f} s, after {workload.warmup} warm-up"
    if isinstance(details, TensorDetails):
        different = f", {details.calls} different calls" if details.calls > 1 else ""
        yield "inputs", f"{details.inputs}{different}: {_shapes(details.shapes)}"


def _shapes(shapes: Sequence[Mapping[str, Sequence[int]]]) -> str:
    """Those of the only call, or of the first and the last."""
    ends = [shapes[0], shapes[-1]] if len(shapes) > 1 else [shapes[0]]
    return " to ".join(
        ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in call.items()) for call in ends
    )


def _measurements(report: Report) -> list[str]:
    load, found = report.host_load, list(_workload(report))
    for field, label, wanted in _METRICS:
        if (entry := report.metrics.get(field)) is not None:
            found.append((label, _figures(entry, wanted)))
    found += [("peak memory", text) for text in _memory(report)]
    if load.during is None:
        found.append(("host load", "unknown"))
    else:
        before = "" if load.before is None else f"; {load.before:.1%} before it"
        steal = f", {load.steal:.1%} of it steal" if load.steal else ""
        found.append(("host load", f"{load.during:.1%} by others during the run{steal}{before}"))
    for zone in report.temperatures:
        found.append(("temperature", f"{zone.zone}: {zone.before_c:.1f} to {zone.after_c:.1f} °C"))
    width = max(len(label) for label, _ in found)
    return [f"{label.ljust(width)}  {text}" for label, text in found]


def _figures(entry: Metric, wanted: Sequence[int]) -> str:
    if len(wanted) > 1:
        return _percentiles(entry, wanted)
    single = _percentiles(entry, wanted) if wanted else format_quantity(entry.samples[0], entry.unit)
    return f"{single} ({entry.source})"


def _percentiles(entry: Metric, wanted: Sequence[int]) -> str:
    return ", ".join(f"p{q} {format_quantity(entry.at(q).value, entry.unit)}" for q in wanted)


def _memory(report: Report) -> list[str]:
    entry, memory = report.metrics.get("peak_memory_bytes"), report.memory
    if entry is None or memory is None:
        return [report.unmeasured.get("peak_memory_bytes", "not measured")]
    parts = [
        f"{name} {format_bytes(value)}"
        for name, value in (
            ("anonymous", memory.anonymous_bytes),
            ("file", memory.file_bytes),
            ("before loading", memory.before_load_bytes),
        )
        if value is not None
    ]
    return [f"{format_bytes(memory.peak_bytes)}, {entry.source} ({', '.join(parts)})"]
