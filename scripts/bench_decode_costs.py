#!/usr/bin/env python3
"""The decode-cost table of this machine, and tokens a second predicted from it against really decoded ones.

    scripts/bench_decode_costs.py REFERENCE.gguf [--threads N] [--tokens 64] [--folder DIR] [--json FILE]

The reference (a float GGUF) is quantized to one type throughout, for several types, and to Q4_K_M. All files are
decoded in turn, a few tokens each, with the table measured in between, so that drifts of the machine hit everything
alike. A type's prediction is its sum over the table plus the median of the other types' overheads (what a token takes
beyond its sum), so no type is judged by its own measurement. Exit code 3 if a prediction errs by more than the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.presets import PRESETS
from edgeq.converters.gguf.quantize import preview, quantizable_tensors, quantize
from edgeq.errors import EdgeqError
from edgeq.ggml_types import TYPES
from edgeq.llama import Context, Model, default_threads
from edgeq.profiles.kernels.cost_measure import (
    decode_times,
    legal_matrices,
    measure_matrices,
    other_busy_cpus,
    undisturbed,
)
from edgeq.profiles.kernels.cost_table import DecodeCosts, Matrix, decoded_matrices

PURE = ("q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0")
MIXED = ("q4_k_m",)
BUSY_CPUS = 0.25
WARM_UP = 4


@dataclasses.dataclass(frozen=True)
class Row:
    """One file: measured against predicted."""

    name: str
    weights_mib: float
    token_ms: float
    matrices_ms: float
    predicted_ms: float

    @property
    def error(self) -> float:
        """Of the predicted tokens a second."""
        return self.token_ms / self.predicted_ms - 1


def make_files(reference: Path, folder: Path, threads: int) -> dict[str, Path]:
    """The reference in every contender's types; files that are there are used."""
    header = read_header(reference)
    free = quantizable_tensors(reference)
    files: dict[str, Path] = {}
    for name in (*PURE, *MIXED):
        if name in PURE and any(header.tensors[t].shape[0] % TYPES[name].block_weights for t in free):
            print(f"{name} does not fit every tensor and is left out", file=sys.stderr)
            continue
        files[name] = folder / f"{reference.stem}-{name}.gguf"
        if files[name].exists():
            continue
        print(f"quantizing to {name}", file=sys.stderr)
        types = preview(reference, PRESETS[name]).types
        if name in PURE:
            types = {t: name if t in free else types[t] for t in types}
        quantize(reference, files[name], types, threads=threads)
    return files


def matrices_of(path: Path) -> dict[Matrix, int]:
    """What a token of that file is multiplied with."""
    tensors = read_header(path).tensors
    return decoded_matrices({n: t.type for n, t in tensors.items()}, {n: t.shape for n, t in tensors.items()})


def decode_all(files: Mapping[str, Path], threads: int, tokens: int, rounds: int, budget_s: float) -> Measured:
    """Decode all files in turn, with the table measured half-way."""
    matrices = {name: matrices_of(path) for name, path in files.items()}
    shapes = list(dict.fromkeys(shape for counts in matrices.values() for _, shape in counts))
    sizes = [path.stat().st_size for path in files.values()]
    times: dict[str, list[float]] = {name: [] for name in files}
    costs: DecodeCosts | None = None
    each = -(-tokens // rounds)
    with contextlib.ExitStack() as stack:
        contexts = {
            name: stack.enter_context(
                Context(
                    stack.enter_context(Model.load(path)),
                    context_tokens=WARM_UP + each,
                    batch_tokens=32,
                    threads=threads,
                )
            )
            for name, path in files.items()
        }
        for turn in range(rounds):
            if turn == rounds // 2:
                costs = measure_matrices(
                    legal_matrices(shapes, list(TYPES)),
                    threads=threads,
                    working_set_bytes=int(statistics.median(sizes)),
                    progress=show_progress,
                    budget_s=budget_s,
                )
            for name, context in contexts.items():
                times[name] += decode_times(context, WARM_UP + each)[WARM_UP:]
    assert costs is not None
    return Measured(costs, matrices, {name: undisturbed(t)[0] for name, t in times.items()})


@dataclasses.dataclass(frozen=True)
class Measured:
    """The table, and for each file its matrices and the undisturbed time of a token in nanoseconds."""

    costs: DecodeCosts
    matrices: Mapping[str, Mapping[Matrix, int]]
    token_ns: Mapping[str, float]


def compare(measured: Measured) -> list[Row]:
    """Predictions, each with the median overhead of the others."""
    sums = {name: measured.costs.token_ns(counts) for name, counts in measured.matrices.items()}
    rows = []
    for name, token_ns in measured.token_ns.items():
        overhead = statistics.median(measured.token_ns[other] - sums[other] for other in sums if other != name)
        weights = sum(
            n * shape[1] * TYPES[kind].row_bytes(shape[0]) for (kind, shape), n in measured.matrices[name].items()
        )
        rows.append(Row(name, weights / 2**20, token_ns / 1e6, sums[name] / 1e6, (sums[name] + overhead) / 1e6))
    return rows


def show_progress(done: int, total: int, name: str) -> None:
    """One line on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{done}/{total} {name}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def print_table(costs: DecodeCosts) -> None:
    """Microseconds of each matrix, types down and shapes across."""
    shapes = sorted({(e.columns, e.rows) for e in costs.entries}, key=lambda s: (s[0] * s[1], s))
    print(f"microseconds a matrix ({costs.threads} threads, {costs.machine}, llama.cpp {costs.llama_cpp})")
    print(f"{'type':>8} {'buffer':>12} " + " ".join(f"{f'{c}x{r}':>12}" for c, r in shapes) + f" {'spread':>7}")
    for name in dict.fromkeys(e.type for e in costs.entries):
        found = {(e.columns, e.rows): e for e in costs.entries if e.type == name}
        cells = " ".join(f"{found[s].ns / 1e3:>12.1f}" if s in found else f"{'-':>12}" for s in shapes)
        buffers = "/".join(dict.fromkeys(e.buffer for e in found.values()))
        print(f"{name:>8} {buffers:>12} {cells} {max(e.spread for e in found.values()):>6.1%}")


def print_rows(rows: list[Row]) -> None:
    """Measured against predicted, and what a token takes beside its matrices."""
    print(f"\n{'file':>8} {'MiB':>7} {'tok/s':>7} {'predicted':>10} {'error':>7} {'matrices':>9} {'overhead':>9}")
    for r in rows:
        print(
            f"{r.name:>8} {r.weights_mib:>7.1f} {1e3 / r.token_ms:>7.1f} {1e3 / r.predicted_ms:>10.1f} {r.error:>+7.1%}"
            f" {r.matrices_ms:>6.2f} ms {r.token_ms - r.matrices_ms:>6.2f} ms"
        )


def main() -> int:
    """Command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, help="a float GGUF")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--tokens", type=int, default=64, help="decoded of each file (default 64)")
    parser.add_argument("--rounds", type=int, default=4, help="in which the files take turns (default 4)")
    parser.add_argument("--budget", type=float, default=45.0, help="seconds for the table (default 45)")
    parser.add_argument("--folder", type=Path, help="where the quantized files are kept, or are already")
    parser.add_argument("--limit", type=float, default=0.1, help="largest error of a prediction (default 0.1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write table and comparison there")
    args = parser.parse_args()
    before = other_busy_cpus(1.0)
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        files = make_files(args.reference, folder, args.threads)
        measured = decode_all(files, args.threads, args.tokens, max(2, args.rounds), args.budget)
    rows = compare(measured)
    print_table(measured.costs)
    print_rows(rows)
    worst = max(rows, key=lambda row: abs(row.error))
    busy = max(before, measured.costs.busy_cpus or 0.0)
    print(f"\nworst error: {worst.error:+.1%} ({worst.name}, limit {args.limit:.0%}); others kept {busy:.2f} CPUs busy")
    if busy > BUSY_CPUS:
        print("The machine was not quiet: these figures say little. Run it again when nothing else runs.")
    if args.json is not None:
        data = {
            "costs": msgspec.to_builtins(measured.costs),
            "rows": [dataclasses.asdict(row) | {"error": row.error} for row in rows],
            "busy_cpus": busy,
        }
        args.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return 0 if abs(worst.error) <= args.limit else 3


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EdgeqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
