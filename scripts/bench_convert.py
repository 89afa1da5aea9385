#!/usr/bin/env python3
"""Time and memory of Hugging Face to GGUF, without quantization; each run in a child process of its own.

    scripts/bench_convert.py FOLDER [--float-type f16] [--runs 5] [--json FILE]

Peak memory is VmHWM of the child, interpreter and libraries included; what the model adds is shown beside it. Exit
code 3 if the peak exceeds 600 MB plus twice the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from edgeq.converters.checkpoint import Checkpoint
from edgeq.errors import EdgeqError

ALLOWANCE_BYTES = 600 * 10**6

CHILD = """
import json, resource, sys, time
from pathlib import Path
from edgeq.converters.gguf.export import export_gguf

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = peak()
began = time.perf_counter()
result = export_gguf(Path(sys.argv[1]), Path(sys.argv[2]), float_type=sys.argv[3])
wall_s = time.perf_counter() - began
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"wall_s": wall_s, "cpu_s": used.ru_utime + used.ru_stime, "before_bytes": before,
                  "peak_bytes": peak(), "file_bytes": result.file_bytes}))
"""


def main() -> int:
    """Exit code 3 when the limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder")
    parser.add_argument("--float-type", default="f16", choices=["source", "f16", "bf16", "f32"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the raw samples")
    arguments = parser.parse_args()
    try:
        largest = max(entry.nbytes for entry in Checkpoint.open(arguments.folder).entries.values())
    except EdgeqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    runs = []
    with tempfile.TemporaryDirectory(prefix="edgeq-bench-") as folder:
        for _ in range(arguments.runs):
            out = str(Path(folder) / "model.gguf")
            command = [sys.executable, "-c", CHILD, str(arguments.folder), out, arguments.float_type]
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    limit = ALLOWANCE_BYTES + 2 * largest
    peak = max(run["peak_bytes"] for run in runs)
    mib = 2**20
    print(f"to {arguments.float_type}: {runs[0]['file_bytes'] / mib:.1f} MiB, largest tensor {largest / mib:.1f} MiB")
    print(
        f"  time     median {statistics.median(r['wall_s'] for r in runs):.2f} s wall, "
        f"{statistics.median(r['cpu_s'] for r in runs):.2f} s CPU (start-up of Python included in the latter)"
    )
    print(f"  memory   peak {peak / mib:.1f} MiB, {runs[0]['before_bytes'] / mib:.1f} MiB of it before the conversion")
    print(f"  limit    {limit / mib:.1f} MiB: {'met' if peak <= limit else 'MISSED'}")
    if arguments.json is not None:
        result = {
            "float_type": arguments.float_type,
            "limit_bytes": limit,
            "largest_tensor_bytes": largest,
            "runs": runs,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if peak <= limit else 3


if __name__ == "__main__":
    sys.exit(main())
