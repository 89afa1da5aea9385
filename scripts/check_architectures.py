#!/usr/bin/env python3
"""Export, quantization and TensorRT engines over many architectures: what is covered, and whether engines build.

    scripts/check_architectures.py [NAME ...] [--json FILE]

Each model gets random weights from its configuration, scaled so that signals live, is of a usual width but few layers
where that changes nothing, exported with fixed shapes, compared with torch, quantized for a CPU (U8) and for TensorRT
(symmetric S8 and FP8), and built by TensorRT-RTX without a GPU: INT8 with FP16, FP16, and FP8 with FP16. Exit code 3
when one of them fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from edgeq.converters.onnx.export.export import export_model
from edgeq.converters.onnx.quantize.clean import clean_for
from edgeq.errors import EdgeqError
from edgeq.planner.tensors.candidates import Candidate, Workbench
from edgeq.planner.tensors.job import Calibration
from edgeq.planner.tensors.samples import gather_samples
from edgeq.planner.tensors.writing import Dialect
from edgeq.runtime.tensorrt.builder import build_engine
from edgeq.runtime.tensorrt.records import EngineSettings
from edgeq.tensor_types import Scheme
from edgeq.types import runs_on_gpu

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts.architectures import architectures
from scripts.random_models import save_random

COMPUTE_CAPABILITY = "8.9"  # the least that has FP8
PRECISIONS: tuple[Literal["int8"] | Scheme, ...] = ("int8", "fp16", "bf16", "fp8")


@dataclasses.dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        name: of it.
        exported: worst difference to torch, absolute.
        cpu_coverage: share of multiply-adds in INT8 in the graph that ONNX Runtime executes.
        cpu_cosine: of static INT8 on random inputs.
        trt_coverage: share of multiply-adds behind Q/DQ; None where that could not be written.
        trt_cosine: likewise, of symmetric INT8 with FP16.
        builds: precision to processor seconds; an error's text where it failed.
    """

    name: str
    exported: float
    cpu_coverage: float | None
    cpu_cosine: float | None
    trt_coverage: float | None
    trt_cosine: float | None
    builds: dict[str, float | str]


def _bench(model: Path, work: Path, backend: str, samples: Any, task: str) -> Workbench:  # noqa: ANN401
    clean = work / backend
    clean.mkdir()
    clean_for(model, clean / "model.onnx", backend)
    return Workbench(
        reference=clean / "model.onnx",
        model=clean / "model.onnx",
        folder=work / f"{backend}-candidates",
        dialect=Dialect(backend, "s8" if runs_on_gpu(backend) else "u8"),
        samples=samples,
        task="tensor" if task == "object-detection" else task,
        classes=None,
        dims={},
        percentile=99.99,
        threads=1,
        progress=lambda *_: None,
    )


def _built(trt: Any, model: Path, out: Path) -> float | str:  # noqa: ANN401
    """Seconds of processor time, all threads together, which other programs lengthen little; or the error."""
    start = time.process_time()
    try:
        build_engine(trt, model, out, EngineSettings(compute_capability=COMPUTE_CAPABILITY))
    except EdgeqError as error:
        return str(error)
    return time.process_time() - start


def _engines(gpu: Workbench, trt: Any, work: Path) -> tuple[Candidate | None, dict[str, float | str]]:  # noqa: ANN401
    """INT8 as it was judged, and seconds or the error of each precision."""
    symmetric: Candidate | None = None
    builds: dict[str, float | str] = {}
    for precision in PRECISIONS:
        try:
            if precision == "int8":
                symmetric = gpu.static(gpu.ranges(("minmax",))["minmax"], {}, precision)
                path = symmetric.path
            else:
                path = gpu.written(precision)
        except EdgeqError as error:
            builds[precision] = str(error)
            continue
        builds[precision] = _built(trt, path, work / f"{precision}.engine")
    return symmetric, builds


def checked(name: str, trt: Any, work: Path) -> Row:  # noqa: ANN401
    """All steps for one architecture."""
    architecture = architectures()[name]
    folder = save_random(architecture.make, architecture.shapes, work / "model", architecture.part)
    exported = export_model(folder, work / "float.onnx", shapes=architecture.shapes)
    samples = gather_samples(exported.artifact, folder, {}, Calibration(samples=4, judged=2))
    cpu = _bench(exported.path, work, "onnxruntime-cpu", samples, exported.artifact.task)
    static = cpu.static(cpu.ranges(("minmax",))["minmax"], {}, "int8")
    symmetric, builds = _engines(
        _bench(exported.path, work, "tensorrt-rtx", samples, exported.artifact.task), trt, work
    )
    return Row(
        name=name,
        exported=max((check.max_error for check in exported.checks), default=0.0),
        cpu_coverage=_share(static),
        cpu_cosine=_cosine(static),
        trt_coverage=_share(symmetric),
        trt_cosine=_cosine(symmetric),
        builds=builds,
    )


def _share(found: Candidate | None) -> float | None:
    return None if found is None or found.coverage is None else found.coverage.mac_share


def _cosine(found: Candidate | None) -> float | None:
    return None if found is None or found.quality is None else min(o.mean_cosine for o in found.quality.outputs)


def _seconds(value: float | str) -> str:
    return f"{value:.1f} s" if isinstance(value, float) else "fails"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{round(100 * value)} %"


def _line(row: Row) -> str:
    cosines = [f"{cosine:.4f}" if cosine is not None else "" for cosine in (row.cpu_cosine, row.trt_cosine)]
    cells = [f"{row.exported:.0e}", _percent(row.cpu_coverage), cosines[0], _percent(row.trt_coverage), cosines[1]]
    return f"{row.name:<16}" + "".join(f"{cell:>9}" for cell in (*cells, *map(_seconds, row.builds.values())))


def _markdown(rows: Sequence[Row]) -> str:
    """The table of docs/tensorrt.md."""
    lines = [
        "| architecture | covered on a CPU | covered for TensorRT | INT8 | FP16 | BF16 | FP8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (_percent(row.cpu_coverage), _percent(row.trt_coverage), *map(_seconds, row.builds.values()))
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Exit code 3 when something fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table of the documentation")
    arguments = parser.parse_args()
    known = architectures()
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        parser.error(f"there is no architecture {unknown[0]!r}; choose among {', '.join(known)}")
    try:
        import tensorrt_rtx as trt
    except ImportError:
        print("error: install tensorrt-rtx-cu13 first", file=sys.stderr)
        return 1
    rows, failed = [], False
    heads = ("to torch", "CPU INT8", "cosine", "TRT INT8", "cosine", *PRECISIONS)
    print(f"{'architecture':<16}" + "".join(f"{head:>9}" for head in heads), flush=True)
    for name in arguments.names or known:
        try:
            with tempfile.TemporaryDirectory(prefix="edgeq-check-") as folder:
                row = checked(name, trt, Path(folder))
        except (EdgeqError, ValueError) as error:
            print(f"{name:<16}{error}", flush=True)
            failed = True
            continue
        rows.append(row)
        print(_line(row), flush=True)
        for precision, found in row.builds.items():
            if isinstance(found, str):
                failed = True
                print(f"    {precision}: {found}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
    if arguments.markdown is not None:
        arguments.markdown.write_text(_markdown(rows))
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
