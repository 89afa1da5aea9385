#!/usr/bin/env python3
"""Predicted against measured peak memory, over presets, contexts and types of the KV cache.

    scripts/bench_memory.py FOLDER_OR_GGUF [--target laptop-cpu] [--presets q8_0 q4_k_m q4_0] [--json FILE]

Each combination is a session in a process of its own: a prompt of as many tokens as the context holds (2,000 at most),
16 tokens decoded, VmHWM read. The median gap is shown beside the prediction, which is for a full context; on a loaded
machine it means nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgeq.converters.gguf.export import export_gguf
from edgeq.converters.gguf.presets import find_preset
from edgeq.converters.gguf.quantize import quantize
from edgeq.errors import EdgeqError
from edgeq.planner.candidates import Candidate, Menu, Settings
from edgeq.profiles.device import DeviceProfile
from edgeq.profiles.loader import load_profile

CHILD = """
import json, sys
from pathlib import Path
from edgeq.runtime.engine import EngineSettings
from edgeq.runtime.llm import LLMSession

path, context, kv_type, ubatch = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
settings = EngineSettings(
    context_tokens=context, kv_type_k=kv_type, kv_type_v=kv_type, flash_attention=True, ubatch_tokens=ubatch,
    threads=None, gpu_layers=0,
)
with LLMSession(Path(path), settings) as session:
    filled = min(context - 17, 2000)
    tokens = [500 + i % 2000 for i in range(filled)]
    session.render([{"role": "user", "content": "Hello"}])
    answer = session.generate(tokens, max_tokens=17, ignore_eos=True)
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
gaps = sorted(answer.timings.gaps_ms)
print(json.dumps({"peak_bytes": peak, "itl_ms": gaps[len(gaps) // 2], "ttft_ms": answer.timings.ttft_ms}))
"""


def combinations(names: Sequence[str]) -> Iterator[tuple[str, Settings]]:
    """Presets by contexts by KV types, and small prompt chunks once."""
    for name in names:
        for context in (512, 2048, 8192):
            for kv_type in ("f16", "q8_0"):
                yield name, Settings(context, kv_type, 512)
        yield name, Settings(8192, "q8_0", 64)


def measure(model: Path, settings: Settings) -> dict[str, float]:
    """Load, fill and decode in a process of its own."""
    numbers = [str(settings.context_tokens), settings.kv_type, str(settings.ubatch_tokens)]
    command = [sys.executable, "-c", CHILD, str(model), *numbers]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def row(candidate: Candidate, measured: dict[str, float]) -> dict[str, object]:
    """One line of the table, for people and as raw numbers."""
    predicted = candidate.predicted
    error = predicted.peak_memory_bytes / measured["peak_bytes"] - 1
    mib = 2**20
    print(
        f"{candidate.label:<48}{predicted.peak_memory_bytes / mib:>10.1f}{measured['peak_bytes'] / mib:>10.1f}"
        f"{error:>8.1%}{predicted.itl_ms:>9.2f}{measured['itl_ms']:>9.2f}",
        flush=True,
    )
    return {"label": candidate.label, "predicted_bytes": predicted.peak_memory_bytes, "error": error, **measured}


def run(model: Path, profile: DeviceProfile, presets: Sequence[str]) -> list[dict[str, object]]:
    """Quantize once for each preset, then measure every combination."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgeq-bench-") as folder:
        source = model
        if model.is_dir():
            source = export_gguf(model, Path(folder) / "source.gguf").path
        menu = Menu(source, ())
        files: dict[str, Path] = {}
        for name, settings in combinations(presets):
            choice = menu.choice(find_preset(name))
            if name not in files:
                files[name] = Path(folder) / f"{name}.gguf"
                quantize(source, files[name], choice.types)
            rows.append(row(menu.candidate(choice, settings, profile, 128), measure(files[name], settings)))
    return rows


def main() -> int:
    """Exit code 3 when a peak was under-predicted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder or float GGUF")
    parser.add_argument("--target", default="laptop-cpu", help="device profile (default: laptop-cpu)")
    parser.add_argument("--presets", nargs="+", default=["q8_0", "q4_k_m", "q4_0"], metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    arguments = parser.parse_args()
    print(f"{'':<48}{'predicted':>10}{'measured':>10}{'':>8}{'predicted':>9}{'measured':>9}")
    print(f"{'':<48}{'MiB':>10}{'MiB':>10}{'error':>8}{'ms/tok':>9}{'ms/tok':>9}")
    try:
        rows = run(arguments.model, load_profile(arguments.target), arguments.presets)
    except EdgeqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    errors = [float(str(r["error"])) for r in rows]
    print(f"{len(rows)} combinations: error {min(errors):+.1%} to {max(errors):+.1%}")
    return 3 if min(errors) < 0 else 0


if __name__ == "__main__":
    sys.exit(main())
