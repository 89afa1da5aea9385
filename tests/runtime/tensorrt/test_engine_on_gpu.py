"""What only a GPU can show: engines that run, calls that are recorded, ONNX Runtime's providers. Skipped without one.

Either library will do: TensorRT on a Jetson or a server, TensorRT-RTX on a laptop.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.bundle import open_bundle
from edgeq.profiles.onnx.session import import_onnxruntime, open_onnx_session
from edgeq.runtime.tensorrt.cache import EngineStore
from edgeq.runtime.tensorrt.check import answered, check_engine
from edgeq.runtime.tensorrt.serving import BuildOptions, open_engine
from edgeq.runtime.tensorrt.targets import this_machine
from edgeq.runtime.tensorrt.versions import FLAVOURS

pytestmark = pytest.mark.cuda
BACKENDS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


@pytest.fixture
def backend() -> str:
    """Of the library that is installed here."""
    found = [flavour for flavour in FLAVOURS if importlib.util.find_spec(flavour) is not None]
    if not found:
        pytest.skip("neither TensorRT nor TensorRT-RTX is installed")
    return BACKENDS[found[0]]


@pytest.fixture
def bundle(tiny: ModuleType, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The classifier in INT8 with halves, for this machine's library, and a cache of its own."""
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "cache"))
    graph = tiny.int8_graph(tmp_path / "int8.onnx", half=True)
    folder: Path = tiny.write_tensor_bundle(tmp_path / "bundle", graph, backend=backend)
    return folder


def _expected(bundle: Path, call: dict[str, Any]) -> Any:
    return open_onnx_session(bundle / "model.onnx", 1).run(["scores"], call)[0]


def _near(found: Any, expected: Any) -> bool:
    """As near as an engine must be to serve: other sums and halves, not another network."""
    a, b = (np.asarray(array, np.float64).ravel() for array in (found, expected))
    return bool(a @ b >= 0.99 * np.linalg.norm(a) * np.linalg.norm(b))


def test_every_way_to_call_a_bundle(tiny: ModuleType, bundle: Path) -> None:
    """Built, compared with its graph, and called: alone, later, joined, and with buffers of its own."""
    with edgeq.load(bundle, kind="tensor") as session:
        calls = tiny.calls([1, 2, 2, 4])
        results = [session.run(call) for call in calls]
        results += [future.result(60) for future in [session.run_async(call) for call in calls]]
        results += session.run_batch(calls)
        for call, result in zip(calls * 3, results, strict=True):
            assert result["scores"].shape == (len(call["images"]), tiny.CLASSES)
            assert _near(result["scores"], _expected(bundle, call))
        binding = session.bind({"images": (2, 3, tiny.SIDE, tiny.SIDE)})
        for call in calls[1:3]:
            binding.inputs["images"][:] = call["images"]
            assert _near(binding.run()["scores"], _expected(bundle, call))


def test_a_recorded_call_computes_the_same(tiny: ModuleType, bundle: Path, tmp_path: Path) -> None:
    """Replays read the new input, and another shape is recorded anew."""
    calls = tiny.calls([2, 2, 2, 2, 3, 3, 3, 2])
    store = EngineStore(tmp_path / "engines")
    found: list[list[Any]] = []
    for cuda_graph in (False, True):
        with open_engine(open_bundle(bundle), store=store, cuda_graph=cuda_graph) as session:
            found.append([session.run(call)["scores"] for call in calls])
            assert session.notes == []
    for plain, recorded in zip(*found, strict=True):
        np.testing.assert_allclose(recorded, plain, rtol=1e-3, atol=1e-3)
    assert not np.allclose(found[1][2], found[1][3])  # other images, other scores


def test_the_second_start_builds_and_compares_nothing(bundle: Path, tmp_path: Path) -> None:
    store, told = EngineStore(tmp_path / "engines"), list[str]()
    here = this_machine()
    for _ in range(2):
        open_engine(open_bundle(bundle), store=store, options=BuildOptions(tell=told.append)).close()
    assert len(told) == 1
    assert told[0].endswith("no engine was built of this model yet")
    (folder,) = (path for path in (tmp_path / "engines").iterdir() if (path / "engine.json").is_file())
    assert here.compute_capability in (folder / "engine.json").read_text()


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_onnx_runtimes_providers_compute_what_the_cpu_does(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    if provider not in import_onnxruntime().get_available_providers():
        pytest.skip(f"this onnxruntime was built without {provider}")
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "cache"))
    backend, scheme = ("onnxruntime-cuda", "fp32") if provider.startswith("CUDA") else ("tensorrt", "int8-static")
    graph = tiny.float_graph(tmp_path / "m.onnx") if scheme == "fp32" else tiny.int8_graph(tmp_path / "m.onnx")
    bundle = tiny.write_tensor_bundle(tmp_path / "bundle", graph, backend=backend, scheme=scheme)
    with edgeq.load(bundle, kind="tensor", providers=[provider, "CPUExecutionProvider"]) as session:
        assert session.providers[0] == provider
        check = check_engine(session.run, answered(bundle / "model.onnx", tiny.calls([1, 2, 4])))
        assert check.inputs == 3
