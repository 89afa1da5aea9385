#!/usr/bin/env python3
"""CPU time of starting edgeq: `import edgeq` and `edgeq --help`, the median of child processes, held to fixed limits.

CPU time (user and system, from the kernel's account of the child), not wall time, so that a busy machine matters less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

RUNS = 10


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to start, and the CPU time that it may take; None measures only."""

    name: str
    command: tuple[str, ...]
    limit_ms: float | None


def cases() -> list[Case]:
    """What is measured; the bare interpreter is shown for comparison."""
    edgeq = str(Path(sys.executable).with_name("edgeq"))
    return [
        Case("python -c pass", (sys.executable, "-c", "pass"), None),
        Case("import edgeq", (sys.executable, "-c", "import edgeq"), 60.0),
        Case("edgeq --help", (edgeq, "--help"), 150.0),
    ]


def cpu_ms(command: tuple[str, ...]) -> float:
    """CPU time of one run, children of the child included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def main() -> int:
    """Exit code 3 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS, help=f"child processes each (default: {RUNS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the raw samples")
    arguments = parser.parse_args()
    rows, missed = [], False
    print(f"{'':<16}{'median':>10}{'worst':>10}{'limit':>10}")
    for case in cases():
        cpu_ms(case.command)  # the first run compiles bytecode
        samples = [cpu_ms(case.command) for _ in range(arguments.runs)]
        median = statistics.median(samples)
        late = case.limit_ms is not None and median > case.limit_ms
        missed |= late
        limit = "" if case.limit_ms is None else f"{case.limit_ms:.0f} ms"
        verdict = "" if case.limit_ms is None else "  MISSED" if late else "  ok"
        print(f"{case.name:<16}{f'{median:.1f} ms':>10}{f'{max(samples):.1f} ms':>10}{limit:>10}{verdict}")
        rows.append({"name": case.name, "limit_ms": case.limit_ms, "median_ms": median, "samples_ms": samples})
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"cpu_time": rows}, indent=2) + "\n", encoding="utf-8")
    return 3 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
