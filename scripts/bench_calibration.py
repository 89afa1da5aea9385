#!/usr/bin/env python3
"""Peak memory and time of calibrating ResNet-50, one method after the other.

    scripts/bench_calibration.py [--samples 512] [--model FILE] [--onnxruntime 32] [--json FILE]

Each method runs in a process of its own: VmHWM, and the processor's time, of which what the model alone takes is shown
too. ResNet-50 is exported with random weights unless ``--model`` names a file; images are noise. ``--onnxruntime``
also runs onnxruntime's own percentile calibrator on that many samples (4 GiB at 32).

Exit code 3 when a peak is above 700 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeq.converters.onnx.calibration.observers import METHODS
from edgeq.converters.onnx.skeleton import read_skeleton
from edgeq.errors import EdgeqError

LIMIT_BYTES = 700_000_000
MODEL_ALONE, ONNXRUNTIME = "model alone", "onnxruntime percentile"
# Operators whose inputs and outputs are quantized.
QUANTIZED = frozenset(["Add", "AveragePool", "Conv", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool", "Relu"])
OPSET = 20

HEAD = """
import json, sys, time
from pathlib import Path
import numpy as np

model, samples, method, tensors = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4].split(",")

def images():
    rng = np.random.default_rng(0)
    for _ in range(samples):
        yield {NAME: rng.standard_normal(SHAPE, np.float32)}

def main():
    wall, processor = time.perf_counter(), time.process_time()
    work()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    figures = {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}
    print(json.dumps({"peak_bytes": peak, **figures}))
"""
CALIBRATE = """
from edgeq.converters.onnx.calibration.collect import collect_ranges

def work():
    collect_ranges(model, tensors, images(), method=method, symmetric=False, threads=1)

main()
"""
RUN = """
from edgeq.profiles.onnx.session import open_onnx_session

def work():
    session = open_onnx_session(model, 1)
    for feeds in images():
        session.run(None, feeds)

main()
"""
BY_ONNXRUNTIME = """
import contextlib, io, tempfile
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

class Reader(CalibrationDataReader):
    def __init__(self):
        self.left = images()

    def get_next(self):
        return next(self.left, None)

def work():
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        calibrator = create_calibrator(
            model, None, f"{folder}/augmented.onnx", CalibrationMethod.Percentile, providers=["CPUExecutionProvider"]
        )
        calibrator.collect_data(Reader())
        calibrator.compute_data()

main()
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One run."""

    label: str
    samples: int
    tensors: int
    peak_bytes: int
    wall_s: float
    processor_s: float


def export_resnet(folder: Path) -> Path:
    """ResNet-50 with random weights; its input is one image."""
    import torch
    import transformers

    class Logits(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(pixel_values=pixel_values).logits
            return logits

    torch.manual_seed(0)
    path = folder / "resnet-50.onnx"
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig()).eval()
        program = torch.onnx.export(
            Logits(model).eval(),
            (torch.zeros(1, 3, 224, 224),),
            dynamo=True,
            input_names=["pixel_values"],
            output_names=["logits"],
            opset_version=OPSET,
            verbose=False,
        )
        if program is None:
            raise RuntimeError("torch.onnx.export returned no program")
        program.save(path)
    return path


def activations(model: Path) -> list[str]:
    """Inputs and outputs of quantized operators, without weights."""
    graph = read_skeleton(model).model.graph
    weights = {tensor.name for tensor in graph.initializer}
    names = [name for n in graph.node if n.op_type in QUANTIZED for name in (*n.input, *n.output)]
    return [name for name in dict.fromkeys(names) if name and name not in weights]


def measure(code: str, model: Path, samples: int, method: str, tensors: Sequence[str]) -> Row:
    """Run a method in a process of its own."""
    (value,) = read_skeleton(model).model.graph.input
    shape = tuple(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
    head = HEAD.replace("NAME", repr(value.name)).replace("SHAPE", repr(shape))
    command = [sys.executable, "-c", head + code, str(model), str(samples), method, ",".join(tensors)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures = json.loads(done.stdout)
    return Row(method, samples, len(tensors), **figures)


def run(
    model: Path,
    samples: int,
    methods: Sequence[str],
    *,
    onnxruntime_samples: int = 0,
    told: Callable[[Row], None] = lambda _: None,
) -> list[Row]:
    """The model alone, then every method, then onnxruntime's own if asked for."""
    tensors = activations(model)
    plan = [(RUN, samples, MODEL_ALONE), *((CALIBRATE, samples, method) for method in methods)]
    if onnxruntime_samples:
        plan.append((BY_ONNXRUNTIME, onnxruntime_samples, ONNXRUNTIME))
    rows = []
    for code, count, method in plan:
        rows.append(measure(code, model, count, method, tensors))
        told(rows[-1])
    return rows


def show(row: Row) -> None:
    """One line of the table."""
    print(
        f"{row.label:<24}{row.samples:>8}{row.tensors:>9}{row.peak_bytes / 1e6:>10.0f}"
        f"{row.wall_s:>9.1f}{row.processor_s:>9.1f}{1e3 * row.processor_s / row.samples:>11.0f}",
        flush=True,
    )


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512, metavar="N", help="images (default: 512)")
    parser.add_argument("--model", type=Path, metavar="FILE", help="an ONNX file with one input of floats")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="M", help=", ".join(METHODS))
    parser.add_argument("--onnxruntime", type=int, default=0, metavar="N", help="samples for its own calibrator")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="edgeq-bench-") as folder:
            model = arguments.model or export_resnet(Path(folder))
            print(f"{'':<24}{'':>8}{'':>9}{'peak':>10}{'wall':>9}{'CPU':>9}{'CPU, ms':>11}")
            print(f"{'':<24}{'samples':>8}{'tensors':>9}{'MB':>10}{'s':>9}{'s':>9}{'a sample':>11}")
            rows = run(
                model, arguments.samples, arguments.methods, onnxruntime_samples=arguments.onnxruntime, told=show
            )
    except EdgeqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json is not None:
        text = json.dumps([dataclasses.asdict(row) for row in rows], indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    ours = [row for row in rows if row.label in METHODS]
    return 3 if any(row.peak_bytes > LIMIT_BYTES for row in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
