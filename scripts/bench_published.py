#!/usr/bin/env python3
"""Predicted against published decode speeds, from a model's config.json and a device profile alone.

    scripts/bench_published.py [--figures FILE] [--fit] [--json FILE]

The figures, their sources and the models' hyperparameters are in scripts/published_figures.yaml; nothing is measured
here. A figure that the profiles cannot predict is listed with the reason. docs/published.md holds what --fit prints.
Exit code 3 when a target is missed by more than 25 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from edgeq.cli.files import check_output, write_output
from edgeq.converters.config_shape import shape_of_config, write_shape_skeleton
from edgeq.converters.gguf.presets import find_preset
from edgeq.converters.gguf.quantize import preview
from edgeq.errors import EdgeqError, ProfileError, UsageError
from edgeq.profiles.device import Backend, DeviceProfile, power_mode_of
from edgeq.profiles.llm.model_shape import ModelShape
from edgeq.profiles.llm.weight_schemes import SCHEMES, decode_ms, ggml_read_bytes, kv_read_bytes, scheme_read_bytes
from edgeq.profiles.loader import load_profile
from edgeq.strict_yaml import load_yaml

FIGURES = Path(__file__).with_name("published_figures.yaml")
LIMIT = 0.25  # of the figures that are targets
COLUMNS = (
    *("device", "power mode", "engine", "model", "weights", "context"),
    *("published", "predicted", "error", "source", "note"),
)
FIT_COLUMNS = (
    "fitted on",
    "figures",
    "decode_efficiency",
    "layer_overhead_ms",
    "their errors",
    "errors of the targets",
)
Speed = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A config.json, as far as it decides shapes, and where it was confirmed."""

    source: str
    config: dict[str, Any]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Figures with everything but the model in common; the keys are explained in the file."""

    device: str
    power_mode: str | None = None
    power_mode_assumed: bool = False
    backend: str
    engine: str
    weights: str
    context_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    source: str
    note: str | None = None
    target: bool = False
    tokens_per_s: dict[str, Speed]


class Selection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Figures of one engine on one device that a fit takes; never targets."""

    engine: str
    device: str
    power_mode: str | None = None
    without: tuple[str, ...] = ()

    def takes(self, row: Row) -> bool:
        """Whether the row is one of them."""
        return (
            not row.target
            and (row.engine, row.device) == (self.engine, self.device)
            and self.power_mode in (None, row.power_mode)
            and row.model not in self.without
        )


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    models: dict[str, Model]
    sources: dict[str, str]
    tables: list[Table]
    fits: dict[str, list[Selection]] = {}
    alternatives: dict[str, list[str]] = {}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One published figure beside its prediction, or why there is none."""

    device: str
    power_mode: str | None
    power_mode_assumed: bool
    backend: str
    engine: str
    model: str
    weights: str
    context_tokens: int
    target: bool
    source: str
    note: str | None
    layers: int
    read_bytes: float
    bandwidth_bytes_per_s: float | None
    published: float
    predicted: float | None
    problem: str | None

    @property
    def error(self) -> float | None:
        """Of the prediction, relative to the published figure."""
        return None if self.predicted is None else self.predicted / self.published - 1

    @property
    def beyond(self) -> bool:
        """Predicted, and further off than the limit."""
        return self.error is not None and abs(self.error) > LIMIT

    @property
    def missed(self) -> bool:
        """A target without a prediction, or with one beyond the limit."""
        return self.target and (self.error is None or self.beyond)


def read_figures(path: Path) -> Figures:
    """The figures of a file, every name in it checked. Raises UsageError."""
    try:
        figures = msgspec.convert(load_yaml(path.read_text(encoding="utf-8"), str(path)), Figures)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "Check the path") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8", "Name a file like scripts/published_figures.yaml") from error
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {error}", "Correct the file") from error
    for table in figures.tables:
        unknown = [name for name in table.tokens_per_s if name not in figures.models]
        unknown += [] if table.source in figures.sources else [table.source]
        if table.power_mode_assumed and table.power_mode is None:
            raise UsageError(f"{path} assumes a power mode of {table.device} without naming it", "Add power_mode")
        if unknown:
            raise UsageError(f"{path} names {', '.join(unknown)} without saying what it is", "Add it to the file")
    return figures


class Weights:
    """Shapes of the models and what a token reads of them, each computed once."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models
        self._shapes: dict[str, ModelShape] = {}
        self._bytes: dict[tuple[str, str], float] = {}

    def shape(self, model: str) -> ModelShape:
        """Of that model."""
        if model not in self._shapes:
            self._shapes[model] = shape_of_config(self._models[model].config)
        return self._shapes[model]

    def read_bytes(self, model: str, weights: str) -> float:
        """Bytes of weights for each token, in a scheme or in the types that llama.cpp's preset gives them."""
        if (model, weights) not in self._bytes:
            self._bytes[model, weights] = self._compute(model, weights)
        return self._bytes[model, weights]

    def _compute(self, model: str, weights: str) -> float:
        if weights in SCHEMES:
            return scheme_read_bytes(self.shape(model), SCHEMES[weights])
        preset = find_preset(weights)
        with tempfile.TemporaryDirectory(prefix="edgeq-published-") as folder:
            skeleton = Path(folder) / "skeleton.gguf"
            write_shape_skeleton(self._models[model].config, skeleton)
            return ggml_read_bytes(self.shape(model), preview(skeleton, preset).types)


def find_backend(table: Table) -> tuple[DeviceProfile, Backend]:
    """The device in its power mode, and the backend whose constants count. Raises ProfileError."""
    profile = load_profile(table.device)
    if table.power_mode is not None:
        profile = power_mode_of(profile, table.power_mode)
    for backend in profile.backends:
        if backend.name == table.backend:
            return profile, backend
    raise ProfileError(f"{table.device} has no backend {table.backend}", "Add it to the profile")


def rows_of(figures: Figures) -> list[Row]:
    """Every figure in the order of the file."""
    weights = Weights(figures.models)
    return [row_of(table, model, weights) for table in figures.tables for model in table.tokens_per_s]


def row_of(table: Table, model: str, weights: Weights) -> Row:
    """One figure; what a profile lacks becomes the row's problem, so that the others can be seen."""
    shape, read = weights.shape(model), weights.read_bytes(model, table.weights)
    kv_read = kv_read_bytes(shape, table.context_tokens)
    predicted, problem, bandwidth = None, None, None
    try:
        profile, backend = find_backend(table)
        bandwidth = profile.bandwidth_bytes_per_s
        predicted = 1e3 / decode_ms(shape, profile, backend, weight_bytes=read, kv_bytes=kv_read)
    except ProfileError as error:
        problem = error.cause
    return Row(
        device=table.device,
        power_mode=table.power_mode,
        power_mode_assumed=table.power_mode_assumed,
        backend=table.backend,
        engine=table.engine,
        model=model,
        weights=table.weights,
        context_tokens=table.context_tokens,
        target=table.target,
        source=table.source,
        note=table.note,
        layers=len(shape.layers),
        read_bytes=read + kv_read,
        bandwidth_bytes_per_s=bandwidth,
        published=table.tokens_per_s[model],
        predicted=predicted,
        problem=problem,
    )


def ideal_ms(row: Row) -> float:
    """Of a token, were the whole bandwidth reached and nothing else took time."""
    return 1e3 * row.read_bytes / (row.bandwidth_bytes_per_s or float("nan"))


@dataclasses.dataclass(frozen=True)
class Fit:
    """Constants that were fitted on some figures."""

    name: str
    rows: tuple[Row, ...]
    decode_efficiency: float
    layer_overhead_ms: float

    def error(self, row: Row) -> float:
        """Of a prediction with these constants, relative to the published figure."""
        token_ms = ideal_ms(row) / self.decode_efficiency + row.layers * self.layer_overhead_ms
        return 1e3 / token_ms / row.published - 1


def find_fits(figures: Figures, rows: Sequence[Row]) -> list[Fit]:
    """Two constants for each selection of the file. Raises UsageError where they cannot be told apart."""
    fits = []
    for name, selections in figures.fits.items():
        chosen = [row for row in rows if any(selection.takes(row) for selection in selections)]
        fits.append(fit_of(name, [row for row in chosen if row.bandwidth_bytes_per_s is not None]))
    return fits


def fit_of(name: str, rows: list[Row]) -> Fit:
    """Least squares on relative errors of a token's time, bytes / (bandwidth x efficiency) + layers x overhead."""
    published_ms = np.array([1e3 / row.published for row in rows])
    parts = np.array([(ideal_ms(row), row.layers) for row in rows]).reshape(-1, 2) / published_ms[:, None]
    (slowness, layer_ms), _, rank, _ = np.linalg.lstsq(parts, np.ones(len(rows)), rcond=None)
    if rank < 2 or slowness <= 0:
        raise UsageError(f"{len(rows)} figures of '{name}' do not settle two constants", "Select more of them")
    return Fit(name, tuple(rows), 1 / float(slowness), float(layer_ms))


def numbered_notes(rows: Sequence[Row]) -> dict[str, int]:
    """Every note, counted in the order of the rows."""
    notes = dict.fromkeys(row.note for row in rows if row.note is not None)
    return {note: number for number, note in enumerate(notes, 1)}


def cells_of(row: Row, notes: Mapping[str, int]) -> tuple[str, ...]:
    """A row of the table as text."""
    predicted, error = ("-", "-") if row.error is None else (f"{row.predicted:.1f}", f"{row.error:+.0%}")
    mode, context = row.power_mode or "-", str(row.context_tokens or "-")
    target = " (target)" if row.target else ""
    return (
        *(row.device, mode + "*" * row.power_mode_assumed, row.engine, row.model, row.weights, context),
        *(f"{row.published:g}", predicted, error + target, row.source),
        "-" if row.note is None else str(notes[row.note]),
    )


def print_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Markdown with aligned columns."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    for line in (header, ["-" * width for width in widths], *lines):
        print(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |")


def print_notes(rows: Sequence[Row], notes: Mapping[str, int]) -> None:
    """What the sources say beside their figures."""
    assumed = sum(row.power_mode_assumed for row in rows)
    if assumed or notes:
        print()
    if assumed:
        print(f"- \\*: the source does not state the power mode ({assumed} figures); this one is assumed")
    for note, number in notes.items():
        print(f"- note {number}: {note}")


def print_summary(rows: Sequence[Row]) -> None:
    """Errors by device and engine."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.error is not None:
            groups.setdefault((row.device, row.engine), []).append(row.error)
    lines = []
    for key, errors in groups.items():
        shown = (statistics.median(errors), statistics.median(map(abs, errors)), min(errors), max(errors))
        beyond = sum(abs(error) > LIMIT for error in errors)
        lines.append((*key, str(len(errors)), *(f"{value:+.0%}" for value in shown), str(beyond)))
    if lines:
        print()
        header = ("device", "engine", "figures", "median", "median size", "lowest", "highest", f"beyond {LIMIT:.0%}")
        print_table(header, lines)


def print_remarks(figures: Figures, rows: Sequence[Row]) -> None:
    """Where the figures come from, and why some have no prediction."""
    print()
    for name, text in figures.sources.items():
        print(f"- {name}: {text}")
    for problem, count in Counter(row.problem for row in rows if row.problem is not None).items():
        print(f"- {count} without a prediction: {problem}")


def print_fits(fits: Sequence[Fit], targets: Sequence[Row]) -> None:
    """What other constants would make of the targets."""
    lines = []
    for fit in fits:
        own = [fit.error(row) for row in fit.rows]
        reach = f"{min(own):+.0%} to {max(own):+.0%}"
        constants = (f"{fit.decode_efficiency:.2f}", f"{fit.layer_overhead_ms:.3f}")
        lines.append(
            (fit.name, str(len(own)), *constants, reach, ", ".join(f"{fit.error(row):+.0%}" for row in targets))
        )
    if lines:
        print()
        print_table(FIT_COLUMNS, lines)


def print_alternatives(figures: Figures, weights: str, others: Sequence[str]) -> None:
    """What the targets' errors were, had their source meant other weights by the same word."""
    tables = [table for table in figures.tables if table.target and table.weights == weights]
    shapes = Weights(figures.models)
    lines = []
    for name in (weights, *others):
        other = [msgspec.structs.replace(table, weights=name) for table in tables]
        rows = [row_of(table, model, shapes) for table in other for model in table.tokens_per_s]
        lines.append((name, *("-" if row.error is None else f"{row.error:+.0%}" for row in rows)))
    print()
    print_table(("weights", *(model for table in tables for model in table.tokens_per_s)), lines)


def main() -> int:
    """Exit code 3 when a target is missed by more than 25 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=FIGURES, metavar="FILE", help="other published figures")
    parser.add_argument("--fit", action="store_true", help="also fit constants on other figures, try other weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    arguments = parser.parse_args()
    try:
        return report(arguments.figures, arguments.json, fit=arguments.fit)
    except EdgeqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def report(path: Path, json_path: Path | None, *, fit: bool) -> int:
    """Print everything; the exit code. Raises EdgeqError."""
    if json_path is not None:
        check_output(json_path, force=True)
    figures = read_figures(path)
    rows = rows_of(figures)
    targets = [row for row in rows if row.target]
    fits = find_fits(figures, rows) if fit else []
    notes = numbered_notes(rows)
    print_table(COLUMNS, [cells_of(row, notes) for row in rows])
    print_notes(rows, notes)
    print_summary(rows)
    print_remarks(figures, rows)
    if fit:
        print_fits(fits, [row for row in targets if row.bandwidth_bytes_per_s is not None])
        for weights, others in figures.alternatives.items():
            print_alternatives(figures, weights, others)
    if json_path is not None:
        plain = [{**msgspec.to_builtins(row), "error": row.error} for row in rows]
        write_output(json_path, (json.dumps(plain, indent=2) + "\n").encode(), force=True)
    beyond, missed = sum(row.beyond for row in rows), sum(row.missed for row in rows)
    print(
        f"\n{len(rows)} figures, {beyond} of them beyond {LIMIT:.0%}; {len(targets)} targets, {missed} of them missed"
    )
    return 3 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
