"""The benchmark of a model that is called with arrays: samples, verdicts, and what it refuses."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import psutil
import pytest

from edgeq.bundle import MANIFEST, describe_file, write_manifest
from edgeq.errors import BundleError, EdgeqError, SessionError, UsageError
from edgeq.report import LanguageWorkload, Report, TensorDetails, TensorWorkload
from edgeq.runtime.bench import run_bench
from edgeq.runtime.bench_messages import Call, Called, Fed, Feed, Generate, LoadTensor, Sample, TensorLoaded
from edgeq.runtime.bench_process import WorkerProcess
from edgeq.runtime.bench_tensor import TensorSubject
from edgeq.runtime.tensorrt.driver import find_gpu
from edgeq.tensor_types import AxisRange, Embedding, TensorManifest, TensorPrediction, TensorVariant
from edgeq.types import Budget, Target, from_json, to_json

pytest.importorskip("onnxruntime")

ANY_LOAD = 1.0
AXES = {"batch": AxisRange(least=1, usual=2, most=6)}
SHORT = TensorWorkload(warmup=3, repetitions=300)
PREDICTED = TensorPrediction(
    file_bytes=1, weights_bytes=1, activation_bytes=1, runtime_bytes=1, peak_memory_bytes=4, latency_ms=0.5
)
BUDGET = Budget(peak_memory_bytes=1 << 20, load_ms=120_000, latency_ms=60_000, power_w=15)


@pytest.fixture(scope="module")
def bundle(linear_onnx: Path, make_tensor_bundle: Any) -> Path:
    folder: Path = make_tensor_bundle(linear_onnx, plan={"axes": AXES, "predicted": PREDICTED})
    return folder


@pytest.fixture(scope="module")
def report(bundle: Path) -> Report:
    return run_bench(bundle, SHORT, budget=BUDGET, max_host_load=ANY_LOAD)


def test_every_call_is_a_sample(report: Report) -> None:
    counts = {name: len(entry.samples) for name, entry in report.metrics.items()}
    assert counts == {"latency_ms": 300, "calls_per_s": 1, "load_ms": 8, "peak_memory_bytes": 1}
    assert (report.repetitions, report.planned_repetitions, len(report.warmup["latency_ms"].samples)) == (300, 300, 3)
    latencies = report.metrics["latency_ms"].samples
    assert all(sample > 0 for sample in latencies)
    assert sum(latencies) <= report.duration_s * 1e3
    assert report.metrics["calls_per_s"].samples[0] == pytest.approx(300e3 / sum(latencies))


def test_each_line_has_its_verdict(report: Report) -> None:
    found = {verdict.field: verdict for verdict in report.verdicts}
    assert {name: verdict.result for name, verdict in found.items()} == {
        "peak_memory_bytes": "FAIL",
        "load_ms": "PASS",
        "ttft_ms": None,
        "itl_ms": None,
        "tokens_per_s": None,
        "latency_ms": "PASS",
        "power_w": "INSUFFICIENT",
    }
    assert (found["latency_ms"].predicted, found["peak_memory_bytes"].predicted) == (0.5, 4)
    assert "called with arrays" in found["itl_ms"].reason


def test_the_report_says_what_was_called(report: Report) -> None:
    details = report.details
    assert isinstance(details, TensorDetails)
    assert (details.backend, details.scheme, details.providers) == (
        "onnxruntime-cpu",
        "fp32",
        ("CPUExecutionProvider",),
    )
    assert (details.inputs, details.calls, details.held_bytes) == ("random numbers", 16, 16 * 2 * 8 * 4)
    assert details.shapes == ({"x": (2, 8)},)
    assert {"edgeq", "python", "numpy", "onnxruntime"} <= set(report.tools)
    assert (report.threads, report.simulated, report.valid) == (1, False, True)
    assert report.memory is not None
    assert report.metrics["peak_memory_bytes"].source == "VmHWM of the serving process"
    assert any("largest sizes" in note for note in report.notes)
    assert from_json(to_json(report), Report) == report


def test_the_largest_sizes_for_some_seconds(bundle: Path) -> None:
    workload = TensorWorkload(size="largest", warmup=0, seconds=0.4)
    report = run_bench(bundle, workload, max_host_load=ANY_LOAD)
    assert isinstance(report.details, TensorDetails)
    assert report.details.shapes == ({"x": (6, 8)},)
    assert report.notes == ("Latency is planned for the usual sizes, which were not measured",)
    assert {v.field: v.predicted for v in report.verdicts}["latency_ms"] is None
    assert report.planned_repetitions is None
    assert 0.4 <= report.duration_s < 60
    assert report.repetitions > 1
    assert report.warmup == {}


def test_a_text_encoder_is_loaded_with_its_tokenizer(linear_onnx: Path, make_tensor_bundle: Any) -> None:
    """As `edgeq.load` does; a graph that is none shows that it was asked to be one."""
    embedding = Embedding(pooling="mean", normalize=True, max_tokens=8)
    folder = make_tensor_bundle(linear_onnx, plan={"axes": AXES}, embedding=embedding)
    with pytest.raises(EdgeqError, match="no file with the role 'tokenizer'"):
        run_bench(folder, SHORT, max_host_load=ANY_LOAD)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"workload": LanguageWorkload()}, "is called with arrays, and the workload is for others"),
        ({"budget": Budget(ttft_ms=5)}, "which has no time to first token p95"),
        ({"budget": Budget(itl_ms=5)}, "which has no inter-token latency p99"),
        ({"budget": Budget(tokens_per_s=5)}, "which has no decode speed p50"),
        ({"workload": TensorWorkload(repetitions=0)}, "repetitions are too few"),
        ({"workload": TensorWorkload(axes={"batch": 7})}, "made for 1 to 6"),
        ({"inputs": Path("nothing.npz")}, "does not exist"),
    ],
)
def test_what_makes_no_sense_is_refused(bundle: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        run_bench(bundle, **options)


@pytest.mark.skipif(os.uname().machine == "aarch64", reason="the target would describe this machine")
def test_a_bundle_for_another_machine_never_passes(linear_onnx: Path, make_tensor_bundle: Any) -> None:
    target = Target(arch="aarch64", accelerator="cpu")
    folder = make_tensor_bundle(linear_onnx, plan={"axes": AXES}, target=target, built_for="my-robot")
    report = run_bench(folder, budget=Budget(latency_ms=60_000), max_host_load=ANY_LOAD)
    assert report.simulated
    assert report.planned_repetitions == report.repetitions == 628  # p99 at 95 % with two misses
    assert (len(report.metrics["load_ms"].samples), len(report.warmup["latency_ms"].samples)) == (5, 10)
    assert report.result == "INSUFFICIENT"
    assert "my-robot is aarch64" in report.invalid_reasons[0]


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"])
def test_without_a_gpu_one_line_says_where_to_measure(linear_onnx: Path, make_tensor_bundle: Any, backend: str) -> None:
    folder = make_tensor_bundle(linear_onnx, plan={"axes": AXES, "backend": backend}, built_for="jetson-orin")
    with pytest.raises(SessionError) as caught:
        run_bench(folder, SHORT)
    assert f"was made for {backend} on jetson-orin, and this machine has no NVIDIA GPU" in str(caught.value)
    assert f"run there: edgeq bench {folder.name}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def for_two(linear_onnx: Path, make_tensor_bundle: Any) -> Path:
    """Made for a robot first, which this machine is not, and for machines like this one too."""
    foreign: Literal["x86_64", "aarch64"] = "x86_64" if os.uname().machine == "aarch64" else "aarch64"
    robot = Target(arch=foreign, accelerator="cuda:sm_87")
    folder: Path = make_tensor_bundle(
        linear_onnx, plan={"axes": AXES, "backend": "tensorrt"}, target=robot, built_for="my-robot"
    )
    manifest = from_json((folder / MANIFEST).read_bytes(), TensorManifest)
    (folder / "devices" / "here").mkdir(parents=True)
    shutil.copy(linear_onnx, folder / "devices" / "here" / "model.onnx")
    here = TensorVariant(
        built_for="here",
        target=Target(arch="any", accelerator="cpu"),
        plan=msgspec.structs.replace(manifest.plan, backend="onnxruntime-cpu", predicted=PREDICTED),
        files=(describe_file(folder, "devices/here/model.onnx", "model"),),
        budget=Budget(latency_ms=60_000),
    )
    write_manifest(folder, msgspec.structs.replace(manifest, others=(here,)))
    return folder


def test_of_several_graphs_the_one_is_measured_that_load_takes(for_two: Path) -> None:
    report = run_bench(for_two, TensorWorkload(warmup=0, repetitions=700), max_host_load=ANY_LOAD)
    details = report.details
    assert isinstance(details, TensorDetails)
    assert (report.profile, report.simulated, report.result) == ("here", False, "PASS")
    assert (details.backend, details.providers) == ("onnxruntime-cpu", ("CPUExecutionProvider",))
    assert details.predicted == PREDICTED
    assert {v.field: (v.limit, v.predicted) for v in report.verdicts}["latency_ms"] == (60_000, 0.5)


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU")
def test_the_user_chooses_among_several_graphs(for_two: Path) -> None:
    with pytest.raises(SessionError, match="was made for tensorrt on my-robot, and this machine has no NVIDIA GPU"):
        run_bench(for_two, SHORT, device="my-robot")
    with pytest.raises(BundleError, match=r"not made for 'there'.* my-robot, here"):
        run_bench(for_two, SHORT, device="there")


def test_the_measured_process_takes_the_graph_it_is_told_to(for_two: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(for_two, tmp_path / "bundle")
    graph = folder / "devices" / "here" / "model.onnx"
    graph.write_bytes(b"nonsense".ljust(graph.stat().st_size))
    with WorkerProcess() as worker, pytest.raises(SessionError, match=r"devices/here/model\.onnx"):
        worker.request(LoadTensor(bundle=str(folder), device="here", threads=None), TensorLoaded)


def test_a_graph_that_does_not_load_is_one_line(linear_onnx: Path, make_tensor_bundle: Any) -> None:
    folder = make_tensor_bundle(linear_onnx, plan={"axes": AXES})
    (folder / "model.onnx").write_bytes(b"nonsense")
    files = (describe_file(folder, "model.onnx", "model"),)
    manifest = from_json((folder / MANIFEST).read_bytes(), TensorManifest)
    write_manifest(folder, msgspec.structs.replace(manifest, files=files))
    with pytest.raises(SessionError) as caught:
        run_bench(folder, SHORT, max_host_load=ANY_LOAD)
    assert "\n" not in str(caught.value)
    assert psutil.Process().children() == []


def test_the_worker_takes_inputs_in_turn(bundle: Path, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {f"{index}.x": np.ones((index + 1, 8), np.float32) for index in range(3)}
    np.savez(tmp_path / "inputs.npz", **arrays)
    with WorkerProcess() as worker:
        worker.request(LoadTensor(bundle=str(bundle), device="laptop-cpu", threads=None), TensorLoaded)
        assert worker.ready_ms > 0
        assert worker.request(Feed(inputs=str(tmp_path / "inputs.npz")), Fed).calls == 3
        assert len(worker.request(Call(most=7, seconds=60), Called).latencies_ms) == 7
        assert len(worker.request(Call(most=7, seconds=0), Called).latencies_ms) == 1
        with pytest.raises(SessionError, match="asked this bundle for Generate"):
            worker.request(Generate(prompt=[1], max_tokens=1), Sample)


def test_memory_of_a_gpu_is_never_within_a_limit(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process status tells it; a graph on the CPU stands in for one on a GPU."""
    made = TensorSubject.__init__

    def on_gpu(self: TensorSubject, *some: Any) -> None:
        made(self, *some)
        self.on_gpu = True

    monkeypatch.setattr(TensorSubject, "__init__", on_gpu)
    workload = TensorWorkload(warmup=0, repetitions=1)
    report = run_bench(bundle, workload, budget=Budget(peak_memory_bytes=1 << 40), max_host_load=ANY_LOAD)
    assert "peak_memory_bytes" not in report.metrics
    found = {verdict.field: verdict for verdict in report.verdicts}["peak_memory_bytes"]
    assert (found.result, found.measured, report.result) == ("INSUFFICIENT", None, "INSUFFICIENT")
    assert "is without memory of the GPU" in found.reason
