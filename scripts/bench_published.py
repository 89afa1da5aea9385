#!/usr/bin/env python3
"""Predicted against published decode speeds, from a model's config.json and a device profile alone.

    scripts/bench_published.py [--figures FILE] [--json FILE]

The figures, their sources and the models' hyperparameters are in scripts/published_figures.yaml; nothing is measured
here. A figure that the profiles cannot predict is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

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
COLUMNS = ("device", "power mode", "engine", "model", "weights", "context", "published", "predicted", "error", "source")


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A config.json, as far as it decides shapes, and where it was confirmed."""

    source: str
    config: dict[str, Any]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Figures with everything but the model in common; the keys are explained in the file."""

    device: str
    power_mode: str | None = None
    backend: str
    engine: str
    weights: str
    context_tokens: int = 0
    source: str
    note: str | None = None
    target: bool = False
    tokens_per_s: dict[str, float]


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    models: dict[str, Model]
    sources: dict[str, str]
    tables: list[Table]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One published figure beside its prediction, or why there is none."""

    device: str
    power_mode: str | None
    backend: str
    engine: str
    model: str
    weights: str
    context_tokens: int
    target: bool
    source: str
    note: str | None
    read_bytes: float
    published: float
    predicted: float | None
    problem: str | None

    @property
    def error(self) -> float | None:
        """Of the prediction, relative to the published figure."""
        return None if self.predicted is None else self.predicted / self.published - 1

    @property
    def missed(self) -> bool:
        """A target without a prediction, or with one beyond the limit."""
        return self.target and (self.error is None or abs(self.error) > LIMIT)


def read_figures(path: Path) -> Figures:
    """The figures of a file, every name in it checked. Raises UsageError."""
    try:
        figures = msgspec.convert(load_yaml(path.read_text(encoding="utf-8"), str(path)), Figures)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "Check the path") from error
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {error}", "Correct the file") from error
    for table in figures.tables:
        unknown = [name for name in table.tokens_per_s if name not in figures.models]
        unknown += [] if table.source in figures.sources else [table.source]
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
    predicted, problem = None, None
    try:
        profile, backend = find_backend(table)
        predicted = 1e3 / decode_ms(shape, profile, backend, weight_bytes=read, kv_bytes=kv_read)
    except ProfileError as error:
        problem = error.cause
    return Row(
        device=table.device,
        power_mode=table.power_mode,
        backend=table.backend,
        engine=table.engine,
        model=model,
        weights=table.weights,
        context_tokens=table.context_tokens,
        target=table.target,
        source=table.source,
        note=table.note,
        read_bytes=read + kv_read,
        published=table.tokens_per_s[model],
        predicted=predicted,
        problem=problem,
    )


def cells_of(row: Row) -> tuple[str, ...]:
    """A row of the table as text."""
    predicted, error = ("-", "-") if row.error is None else (f"{row.predicted:.1f}", f"{row.error:+.0%}")
    mode, context = row.power_mode or "-", str(row.context_tokens or "-")
    target = " (target)" if row.target else ""
    return (
        *(row.device, mode, row.engine, row.model, row.weights, context),
        *(f"{row.published:g}", predicted, error + target, row.source),
    )


def print_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Markdown with aligned columns."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    for line in (header, ["-" * width for width in widths], *lines):
        print(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |")


def print_summary(rows: Sequence[Row]) -> None:
    """Errors by device and engine."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.error is not None:
            groups.setdefault((row.device, row.engine), []).append(row.error)
    lines = []
    for key, errors in groups.items():
        shown = (statistics.median(errors), statistics.median(map(abs, errors)), min(errors), max(errors))
        lines.append((*key, str(len(errors)), *(f"{value:+.0%}" for value in shown)))
    if lines:
        print()
        print_table(("device", "engine", "figures", "median", "median size", "lowest", "highest"), lines)


def print_remarks(figures: Figures, rows: Sequence[Row]) -> None:
    """Where the figures come from, and why some have no prediction."""
    print()
    for name, text in figures.sources.items():
        print(f"- {name}: {text}")
    for problem, count in Counter(row.problem for row in rows if row.problem is not None).items():
        print(f"- {count} without a prediction: {problem}")


def main() -> int:
    """Exit code 3 when a target is missed by more than 25 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=FIGURES, metavar="FILE", help="other published figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    arguments = parser.parse_args()
    try:
        figures = read_figures(arguments.figures)
        rows = rows_of(figures)
    except EdgeqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print_table(COLUMNS, [cells_of(row) for row in rows])
    print_summary(rows)
    print_remarks(figures, rows)
    if arguments.json is not None:
        plain = [{**msgspec.to_builtins(row), "error": row.error} for row in rows]
        arguments.json.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    missed = [row for row in rows if row.missed]
    print(f"\n{len(rows)} figures, {sum(row.target for row in rows)} targets, {len(missed)} beyond {LIMIT:.0%}")
    return 3 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
