"""A real network on real photographs: exported, quantized for a CPU and for TensorRT, judged on other photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import edgeq
from edgeq.converters.onnx.calibration.collect import collect_ranges
from edgeq.converters.onnx.compare import compare_outputs
from edgeq.converters.onnx.export.module_source import ModuleSource
from edgeq.converters.onnx.quantize.bias_correction import channel_means
from edgeq.converters.onnx.quantize.clean import clean_for
from edgeq.converters.onnx.quantize.static import calibration_tensors, quantize_static
from edgeq.planner.tensors.job import Calibration, TensorJob
from edgeq.profiles.onnx.session import open_onnx_session

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")


def _job(lite0: Any, target: str, **fields: Any) -> TensorJob:
    source = ModuleSource(
        lite0.module,
        inputs={"inputs": lite0.judged[0]["inputs"]},
        name="lite0",
        task="image-classification",
        output_names=("logits",),
    )
    calibration = Calibration(inputs=lite0.calibration, held_out=lite0.judged, judged=len(lite0.judged))
    return TensorJob(model=source, target=target, precision="int8-static", calibration=calibration, threads=1, **fields)


def test_it_answers_as_torch_does(lite0: Any) -> None:
    session = open_onnx_session(lite0.onnx, 1)
    for call in lite0.judged[::6]:
        (found,) = session.run(["logits"], call)
        with torch.no_grad():
            exact = lite0.module(torch.from_numpy(call["inputs"])).numpy()
        np.testing.assert_allclose(np.asarray(found), exact, atol=2e-4)
    daisy = np.asarray(session.run(["logits"], lite0.judged[-5])[0])  # the middle of flower.jpg
    assert int(daisy.argmax()) == 985


# A machine like most servers and new laptops: products of bytes are added in 32 bits, so that weights have all 8.
_WITH_VNNI = """\
name: with-vnni
extends: laptop-cpu
summary: a robot
cpu: {name: x86-64 with AVX512-VNNI, features: [avx2, f16c, fma, avx512_vnni]}
provenance: datasheet
sources: {cpu: made up for a test}
"""


@pytest.mark.slow
def test_on_a_cpu_all_of_it_is_int8_and_sees_the_same(lite0: Any, tmp_path: Path) -> None:
    profile = tmp_path / "with-vnni.yaml"
    profile.write_text(_WITH_VNNI)
    manifest = edgeq.convert_tensor(_job(lite0, str(profile)), tmp_path / "bundle").tensor
    assert manifest.quality is not None
    assert manifest.coverage is not None
    assert manifest.coverage.mac_share >= 0.99
    assert manifest.quality.outputs[0].mean_cosine >= 0.995
    assert manifest.quality.top1 is not None
    assert manifest.quality.top1 >= 0.85


@pytest.mark.slow
def test_for_tensorrt_it_sees_the_same_and_brings_its_engine(lite0: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = edgeq.convert_tensor(_job(lite0, "laptop-rtx"), tmp_path / "bundle")
    manifest = bundle.tensor
    assert manifest.quality is not None
    assert manifest.coverage is not None
    assert manifest.coverage.mac_share >= 0.9
    assert manifest.quality.outputs[0].mean_cosine >= 0.995
    assert bundle.file("engine").stat().st_size > 1 << 20


@pytest.mark.parametrize(("backend", "activations"), [("onnxruntime-cpu", "u8"), ("tensorrt-rtx", "s8")])
def test_its_biases_take_back_what_rounding_shifts(
    lite0: Any, tmp_path: Path, backend: str, activations: Literal["u8", "s8"]
) -> None:
    cleaned = tmp_path / "clean.onnx"
    clean_for(lite0.onnx, cleaned, backend)
    some = lite0.calibration[::3]
    asked = calibration_tensors(cleaned, backend)
    ranges = collect_ranges(
        cleaned, asked, some, method="percentile", percentile=99.99, symmetric=activations == "s8", threads=1
    )
    cosines = []
    for means in (None, channel_means(cleaned, some)):
        out = tmp_path / "q.onnx"
        quantize_static(cleaned, out, ranges, backend=backend, activations=activations, means=means)
        cosines.append(compare_outputs(cleaned, out, lite0.judged[::3], threads=1).outputs[0].mean_cosine)
    assert 1 - cosines[1] < 0.5 * (1 - cosines[0])
