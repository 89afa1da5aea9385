"""Any PyTorch module through the Python API, judged by the user's own measure, for several devices at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import edgeq
from edgeq.bundle import open_bundle
from edgeq.cli import main
from edgeq.errors import BundleError, ConversionError, UsageError
from edgeq.runtime.tensor.devices import fitting_device

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

Arrays = Mapping[str, npt.NDArray[np.generic]]
EXAMPLE = {"image": np.zeros((1, 3, 16, 16), np.float32)}


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 32, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 4),
    )


class Grasp(torch.nn.Module):  # type: ignore[misc,name-defined]
    """Its argument has a name, which the graph's input then has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, image: Any) -> Any:
        return self.net(image)


def pictures(count: int) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
    rng = np.random.default_rng(7)
    for _ in range(count):
        yield {"image": rng.uniform(0, 1, (1, 3, 16, 16)).astype(np.float32)}


def job(target: str = "laptop-cpu", **fields: Any) -> edgeq.TensorJob:
    source = edgeq.ModuleSource(
        Grasp(), EXAMPLE, name="grasp", task="image-classification", output_names=("logits",), labels=tuple("abcd")
    )
    chosen: dict[str, Any] = {
        "precision": "int8-static",
        "calibration": edgeq.Calibration(inputs=pictures(8), held_out=list(pictures(10))[7:], samples=7),
        "gate": edgeq.Gate(min_cosine=0.9, min_coverage=0.5),
        "threads": 1,
    }
    return edgeq.TensorJob(**{"model": source, "target": target, **chosen, **fields})


def margin(_index: int, _inputs: Arrays, outputs: Arrays) -> float:
    """How far the first class is above the second."""
    return float(np.diff(np.asarray(outputs["logits"], np.float64)[0, 1::-1])[0])


def test_a_module_becomes_a_bundle_that_runs(tmp_path: Path) -> None:
    wanted = job(gate=edgeq.Gate(min_cosine=0.9, min_coverage=0.5, metric=margin, max_metric_drop=0.5))
    bundle = edgeq.convert_tensor(wanted, tmp_path / "grasp")
    manifest = open_bundle(bundle.path, verify=True).tensor
    source = manifest.source
    assert (source.id, source.format, source.path, source.dtype) == ("grasp", "module", "", "f32")
    assert source.n_params == sum(p.numel() for p in Grasp().parameters())
    assert manifest.artifact.labels == tuple("abcd")
    assert manifest.quality is not None
    assert manifest.quality.inputs == 3
    assert manifest.quality.top1 is not None
    assert manifest.quality.metric is not None
    call = next(pictures(1))
    with edgeq.load(bundle.path, kind="tensor") as session:
        found = session.run(call)["logits"]
    with torch.no_grad():
        exact = Grasp()(torch.from_numpy(call["image"])).numpy()
    np.testing.assert_allclose(found, exact, atol=0.1)


def test_the_metric_is_a_gate(tmp_path: Path) -> None:
    places: list[int] = []

    def worse_than_floats(index: int, _inputs: Arrays, _outputs: Arrays) -> float:
        places.append(index)
        return -float(len(places) % 2)  # the candidate is asked before the float model

    gate = edgeq.Gate(min_cosine=0.9, metric=worse_than_floats, max_metric_drop=0.25)
    with pytest.raises(ConversionError, match=r"metric -1, the float model has 0: a drop of 0.25 is allowed"):
        edgeq.convert_tensor(job(gate=gate), tmp_path / "grasp")
    assert set(places) == {0, 1, 2}
    with pytest.raises(UsageError, match="there is no metric"):
        edgeq.convert_tensor(job(gate=edgeq.Gate(max_metric_drop=0.1)), tmp_path / "grasp")


def test_what_a_module_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this is a module"):
        edgeq.convert_tensor(job(shapes={"image": (1, 3, 8, 8)}), tmp_path / "grasp")
    wrong: Any = "resnet"
    with pytest.raises(UsageError, match=r"str is no torch\.nn\.Module"):
        edgeq.convert_tensor(job(model=edgeq.ModuleSource(wrong, EXAMPLE)), tmp_path / "grasp")


def test_a_bundle_for_two_devices_has_a_graph_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    bundle = edgeq.convert_tensor(job("laptop-rtx", also_for=("laptop-cpu",)), tmp_path / "grasp")
    manifest = open_bundle(bundle.path, verify=True).tensor
    assert manifest.devices == ("laptop-rtx", "laptop-cpu")
    (other,) = manifest.others
    assert (manifest.plan.activations, other.plan.activations) == ("s8", "u8")
    assert {file.role for file in manifest.files} >= {"model", "engine", "engine-info", "samples", "layers"}
    assert {file.path.split("/")[1] for file in other.files} == {"laptop-cpu"}
    assert fitting_device(manifest, arch="x86_64", gpu=True) == "laptop-rtx"
    assert fitting_device(manifest, arch="x86_64", gpu=False) == "laptop-cpu"
    assert fitting_device(manifest, arch="aarch64", gpu=True) == "laptop-rtx"  # neither fits, and loading says why
    assert fitting_device(manifest, ["CPUExecutionProvider"], gpu=True) == "laptop-cpu"
    with edgeq.load(bundle.path, device="laptop-cpu") as session:
        assert isinstance(session, edgeq.TensorSession)
        assert session.manifest.plan == other.plan
        assert session.run(next(pictures(1)))["logits"].shape == (1, 4)
    with pytest.raises(BundleError, match="not made for 'jetson-orin'"):
        edgeq.load(bundle.path, device="jetson-orin")
    assert main(["inspect", str(bundle.path)]) == 0
    assert "also for laptop-cpu" in capsys.readouterr().out
    assert main(["verify", str(bundle.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == len(manifest.all_files)
    _assert_shipped(trt, bundle, tmp_path / "store")
    (bundle.path / "devices" / "laptop-cpu" / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="its manifest says"):
        open_bundle(bundle.path)


def _assert_shipped(trt: ModuleType, bundle: edgeq.Bundle, folder: Path) -> None:
    """The engine's key is the one that loading looks for, and the inputs to check it with are those held out."""
    from edgeq.runtime.tensorrt.cache import EngineStore
    from edgeq.runtime.tensorrt.samples import bundle_samples
    from edgeq.runtime.tensorrt.serving import engine_for
    from edgeq.runtime.tensorrt.targets import parse_target, settings_for

    manifest, target = bundle.tensor, parse_target("laptop-rtx")
    settings = settings_for(target, manifest.plan, manifest.budget)
    assert engine_for(trt, bundle, settings, target, store=EngineStore(folder)).engine == bundle.file("engine")
    np.testing.assert_array_equal(next(bundle_samples(bundle))["image"], list(pictures(10))[7]["image"])


def test_a_device_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="made for laptop-cpu already"):
        edgeq.convert_tensor(job(also_for=("laptop-cpu",)), tmp_path / "grasp")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_tensorrt_a_note_says_that_no_engine_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise edgeq.MissingPackageError("tensorrt_rtx is not installed", "Install it")

    monkeypatch.setattr("edgeq.runtime.tensorrt.versions.find_tensorrt", missing)
    manifest = edgeq.convert_tensor(job("laptop-rtx"), tmp_path / "grasp").tensor
    assert not {file.role for file in manifest.files} & {"engine", "engine-info"}
    assert any("no engine is shipped" in note for note in manifest.plan.notes)


class Detector(torch.nn.Module):  # type: ignore[misc,name-defined]
    """Five queries of four independent classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pool = torch.nn.AdaptiveAvgPool2d(4)
        self.classes, self.boxes = torch.nn.Linear(48, 20), torch.nn.Linear(48, 20)

    def forward(self, image: Any) -> tuple[Any, Any]:
        found = self.pool(image).flatten(1)
        return 9 * self.classes(found).view(1, 5, 4), self.boxes(found).view(1, 5, 4).sigmoid()


def test_classes_of_a_detector_without_names_are_counted(tmp_path: Path) -> None:
    outputs = ("logits", "pred_boxes")
    source = edgeq.ModuleSource(Detector(), EXAMPLE, task="object-detection", output_names=outputs)
    gate = edgeq.Gate(min_cosine=0.5, min_detection_map=0, min_coverage=0)
    found = edgeq.convert_tensor(job(model=source, precision="int8-dynamic", gate=gate), tmp_path / "found").tensor
    assert found.artifact.labels == ()
    assert found.quality is not None
    assert found.quality.detection_map is not None
    unknown = edgeq.ModuleSource(Detector(), EXAMPLE, task="object-detection", output_names=("a", "b"))
    with pytest.raises(UsageError, match="Nothing says how many classes"):
        edgeq.convert_tensor(job(model=unknown, gate=gate), tmp_path / "unknown")
