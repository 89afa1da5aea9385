#!/usr/bin/env python3
"""Export, quantization and TensorRT engines over many architectures: what is covered, and whether engines build.

    scripts/check_architectures.py [NAME ...] [--json FILE]

Each model is initialised at random from its configuration, of a usual size but few layers where that changes nothing,
exported with fixed shapes, compared with torch, quantized for a CPU (U8) and for TensorRT (symmetric S8 and FP8), and
built by TensorRT-RTX without a GPU: INT8, FP16 and FP8. Exit code 3 when one of them fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgeq.converters.onnx.export.export import export_model
from edgeq.converters.onnx.quantize.clean import clean_for
from edgeq.errors import EdgeqError
from edgeq.planner.tensors.candidates import Workbench
from edgeq.planner.tensors.job import Calibration
from edgeq.planner.tensors.samples import gather_samples
from edgeq.runtime.tensorrt.builder import build_engine
from edgeq.runtime.tensorrt.records import EngineSettings

Shapes = Mapping[str, tuple[int, ...]]
CAMERA: Shapes = {"pixel_values": (1, 3, 224, 224)}
WIDE: Shapes = {"pixel_values": (1, 3, 512, 512)}
SOUND: Shapes = {"input_features": (1, 80, 3000)}
TEXT: Shapes = dict.fromkeys(("input_ids", "attention_mask"), (1, 128))
COMPUTE_CAPABILITY = "8.9"  # the least that has FP8


def _architectures() -> Mapping[str, tuple[Callable[[], Any], Shapes]]:
    import transformers as t

    two: dict[str, Any] = {"num_hidden_layers": 2}
    return {
        "ResNet-50": (lambda: t.ResNetForImageClassification(t.ResNetConfig()), CAMERA),
        "MobileNetV1": (lambda: t.MobileNetV1ForImageClassification(t.MobileNetV1Config()), CAMERA),
        "MobileNetV2": (lambda: t.MobileNetV2ForImageClassification(t.MobileNetV2Config()), CAMERA),
        "EfficientNet": (lambda: t.EfficientNetForImageClassification(t.EfficientNetConfig(image_size=224)), CAMERA),
        "ConvNeXt": (lambda: t.ConvNextForImageClassification(t.ConvNextConfig()), CAMERA),
        "ViT": (lambda: t.ViTForImageClassification(t.ViTConfig(**two)), CAMERA),
        "DeiT": (lambda: t.DeiTForImageClassification(t.DeiTConfig(**two)), CAMERA),
        "DINOv2": (lambda: t.Dinov2Model(t.Dinov2Config(image_size=224, **two)), CAMERA),
        "SigLIP": (lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**two)), CAMERA),
        "Swin": (lambda: t.SwinForImageClassification(t.SwinConfig(depths=[1, 1, 2, 1])), CAMERA),
        "SegFormer": (lambda: t.SegformerForSemanticSegmentation(t.SegformerConfig()), WIDE),
        "YOLOS": (lambda: t.YolosForObjectDetection(t.YolosConfig(image_size=[512, 512], **two)), WIDE),
        "BERT": (lambda: t.BertModel(t.BertConfig(**two)), TEXT),
        "RoBERTa": (lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**two)), TEXT),
        "DistilBERT": (lambda: t.DistilBertModel(t.DistilBertConfig(n_layers=2)), TEXT),
        "MPNet": (lambda: t.MPNetModel(t.MPNetConfig(**two)), TEXT),
        "Whisper": (lambda: t.WhisperModel(t.WhisperConfig(encoder_layers=2, decoder_layers=1)), SOUND),
    }


@dataclasses.dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        name: of it.
        exported: worst difference to torch, absolute.
        cpu_coverage: share of multiply-adds in INT8 in the graph that ONNX Runtime executes.
        cpu_cosine: of static INT8 on random inputs.
        trt_coverage: share of multiply-adds behind Q/DQ.
        builds: precision to seconds; an error's text where it failed.
    """

    name: str
    exported: float
    cpu_coverage: float
    cpu_cosine: float
    trt_coverage: float
    builds: dict[str, float | str]


def _bench(model: Path, work: Path, backend: str, samples: Any, task: str) -> Workbench:  # noqa: ANN401
    clean = work / backend
    clean.mkdir()
    clean_for(model, clean / "model.onnx", backend)
    return Workbench(
        reference=clean / "model.onnx",
        model=clean / "model.onnx",
        folder=work / f"{backend}-candidates",
        backend=backend,
        activations="u8" if backend == "onnxruntime-cpu" else "s8",
        samples=samples,
        task="tensor" if task == "object-detection" else task,
        classes=None,
        dims={},
        percentile=99.99,
        threads=1,
        progress=lambda *_: None,
    )


def _built(trt: Any, model: Path, out: Path) -> float | str:  # noqa: ANN401
    start = time.perf_counter()
    try:
        build_engine(trt, model, out, EngineSettings(compute_capability=COMPUTE_CAPABILITY))
    except EdgeqError as error:
        return str(error)
    return time.perf_counter() - start


def checked(name: str, trt: Any, work: Path) -> Row:  # noqa: ANN401
    """All steps for one architecture."""
    import torch

    make, shapes = _architectures()[name]
    torch.manual_seed(0)
    folder = work / "model"
    model = make().eval()
    for module in model.modules():  # the default leaves nothing of a signal after fifty convolutions
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    model.save_pretrained(folder)
    exported = export_model(folder, work / "float.onnx", shapes=shapes or None)
    samples = gather_samples(exported.artifact, folder, {}, Calibration(samples=4, judged=2))
    cpu = _bench(exported.path, work, "onnxruntime-cpu", samples, exported.artifact.task)
    static = cpu.static(cpu.ranges(("minmax",))["minmax"], {}, "int8")
    gpu = _bench(exported.path, work, "tensorrt-rtx", samples, exported.artifact.task)
    symmetric = gpu.static(gpu.ranges(("minmax",))["minmax"], {}, "int8")
    builds: dict[str, float | str] = {"int8": _built(trt, symmetric.path, work / "int8.engine")}
    for precision in ("fp16", "fp8"):
        try:
            path = gpu.written(precision)
        except EdgeqError as error:
            builds[precision] = str(error)
            continue
        builds[precision] = _built(trt, path, work / f"{precision}.engine")
    assert static.coverage is not None
    assert symmetric.coverage is not None
    assert static.quality is not None
    return Row(
        name=name,
        exported=max((check.max_error for check in exported.checks), default=0.0),
        cpu_coverage=static.coverage.mac_share,
        cpu_cosine=min(output.mean_cosine for output in static.quality.outputs),
        trt_coverage=symmetric.coverage.mac_share,
        builds=builds,
    )


def _cell(value: float | str) -> str:
    return f"{value:.1f} s" if isinstance(value, float) else "FAILS"


def main() -> int:
    """Exit code 3 when something fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    arguments = parser.parse_args()
    try:
        import tensorrt_rtx as trt
    except ImportError:
        print("error: install tensorrt-rtx-cu13 first", file=sys.stderr)
        return 1
    known = _architectures()
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        parser.error(f"there is no architecture {unknown[0]!r}; choose among {', '.join(known)}")
    rows: list[Row] = []
    failed = False
    print(
        f"{'architecture':<14}{'to torch':>10}{'CPU INT8':>10}{'cosine':>9}{'TRT INT8':>10}"
        f"{'int8':>8}{'fp16':>8}{'fp8':>8}"
    )
    for name in arguments.names or known:
        try:
            with tempfile.TemporaryDirectory(prefix="edgeq-check-") as folder:
                row = checked(name, trt, Path(folder))
        except EdgeqError as error:
            print(f"{name:<14}{error}", flush=True)
            failed = True
            continue
        rows.append(row)
        cells = "".join(f"{_cell(row.builds[p]):>8}" for p in ("int8", "fp16", "fp8"))
        print(
            f"{name:<14}{row.exported:>10.1e}{row.cpu_coverage:>10.1%}{row.cpu_cosine:>9.4f}{row.trt_coverage:>10.1%}{cells}",
            flush=True,
        )
        for precision, found in row.builds.items():
            if isinstance(found, str):
                failed = True
                print(f"    {precision}: {found}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
