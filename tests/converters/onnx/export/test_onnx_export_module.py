"""Any PyTorch module, and what is said when one cannot be exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgeq.converters.onnx.export.export import check_exported, export_module
from edgeq.converters.onnx.export.verify import Reference
from edgeq.errors import ConversionError, EdgeqError, UnsupportedModelError, UsageError

pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime as ort
import torch


class Policy(torch.nn.Module):
    """Two inputs, a dictionary of outputs, dropout that must be off."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))
        self.joints = torch.nn.Linear(6, 4)
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, image: torch.Tensor, joints: torch.Tensor) -> dict[str, torch.Tensor]:
        seen = self.camera(image).flatten(1)
        both = self.drop(torch.cat([seen, self.joints(joints)], 1))
        return {"action": self.head(both), "value": both.sum(1)}


def _inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(batch, 3, 8, 8, generator=generator),
        "joints": torch.randn(batch, 6, generator=generator),
    }


_BATCH = {"image": {0: "batch"}, "joints": {0: "batch"}}


def test_a_module_keeps_its_names_its_open_axes_and_its_mode(tmp_path: Path) -> None:
    policy = Policy().train()
    policy.camera.eval()
    exported = export_module(policy, _inputs(), tmp_path / "policy.onnx", dynamic=_BATCH)
    assert policy.training
    assert policy.drop.training
    assert not policy.camera.training
    assert exported.artifact.architecture == "Policy"
    assert exported.artifact.task == "tensor"
    assert {s.name: s.shape for s in exported.artifact.inputs} == {"image": ("batch", 3, 8, 8), "joints": ("batch", 6)}
    assert {s.name: s.shape for s in exported.artifact.outputs} == {"action": ("batch", 2), "value": ("batch",)}
    assert [check.calls for check in exported.checks] == [2, 2]
    session = ort.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    inputs = _inputs(5)
    found = session.run(["action"], {name: tensor.numpy() for name, tensor in inputs.items()})[0]
    with torch.no_grad():
        expected = policy.eval()(**inputs)["action"].numpy()
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)


def test_real_inputs_are_compared_with_torch_again(tmp_path: Path) -> None:
    policy = Policy().train()
    exported = export_module(policy, _inputs(), tmp_path / "policy.onnx", dynamic=_BATCH)
    real = [{name: 100 * tensor.numpy() for name, tensor in _inputs(size).items()} for size in (1, 3)]
    checked = check_exported(exported, real)
    assert policy.training
    assert [check.calls for check in checked.checks] == [4, 4]
    assert all(check.passed for check in checked.checks)
    assert checked.reference is None  # which holds the weights
    assert exported.reference is not None
    call = exported.reference.call
    other = Reference(lambda inputs: {name: array + 1 for name, array in call(inputs).items()})
    with pytest.raises(ConversionError, match="differs from the original"):
        check_exported(dataclasses.replace(exported, reference=other), real)


def test_outputs_are_renamed_in_order_or_chosen_by_name(tmp_path: Path) -> None:
    renamed = export_module(Policy(), _inputs(), tmp_path / "a.onnx", output_names=["torque", "critic"])
    assert [spec.name for spec in renamed.artifact.outputs] == ["torque", "critic"]
    assert [spec.shape for spec in renamed.artifact.outputs] == [(2, 2), (2,)]
    chosen = export_module(Policy(), _inputs(), tmp_path / "b.onnx", output_names=["value"])
    assert [spec.name for spec in chosen.artifact.outputs] == ["value"]
    with pytest.raises(UsageError, match="3 output names were given, and the module has 2 outputs: action, value"):
        export_module(Policy(), _inputs(), tmp_path / "c.onnx", output_names=["a", "b", "c"])


def test_tuples_and_single_tensors_are_numbered(tmp_path: Path) -> None:
    class Pair(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, x * 2

    x = torch.arange(6.0).reshape(2, 3)
    exported = export_module(Pair(), {"x": x}, tmp_path / "pair.onnx")
    assert [spec.name for spec in exported.artifact.outputs] == ["output_0", "output_1"]
    single = export_module(torch.nn.Linear(3, 2), {"input": x}, tmp_path / "single.onnx")
    assert [spec.name for spec in single.artifact.outputs] == ["output"]


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [({"img": {0: "batch"}}, "no input 'img'"), ({"image": {4: "batch"}}, "no axis 4")],
)
def test_axes_that_are_not_there_are_refused(tmp_path: Path, dynamic: dict[str, dict[int, str]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export_module(Policy(), _inputs(), tmp_path / "m.onnx", dynamic=dynamic)


class Branching(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x: torch.Tensor) -> object:
        return self.gate(x)


class Gate(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x - 1


class Unsupported(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.solver = Solver()

    def forward(self, x: torch.Tensor) -> object:
        return self.solver(x)


class Solver(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> object:
        return torch.linalg.eigh(x @ x.transpose(0, 1)).eigenvalues


class Fixed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.ones(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table


@pytest.mark.parametrize(
    ("module", "dynamic", "kind", "message"),
    [
        (Branching(), {}, UnsupportedModelError, r"depends on the data.*gate \(Gate\).*give the ONNX file"),
        (Unsupported(), {}, UnsupportedModelError, r"nothing for aten.*eigh.*solver \(Solver\)"),
        (Fixed(), {"x": {0: "batch"}}, ConversionError, r"one size for axis 0 of x, which should stay open.*--shape"),
    ],
)
def test_failures_of_torch_are_one_line_with_operator_module_and_remedy(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    module: torch.nn.Module,
    dynamic: dict[str, dict[int, str]],
    kind: type[EdgeqError],
    message: str,
) -> None:
    with pytest.raises(kind, match=message) as caught:
        export_module(module, {"x": torch.randn(4, 3)}, tmp_path / "m.onnx", dynamic=dynamic)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_module_that_refuses_its_own_inputs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"Linear itself fails when it is called with input \(2, 5\)"):
        export_module(torch.nn.Linear(3, 2), {"input": torch.randn(2, 5)}, tmp_path / "m.onnx")


def test_shapes_that_depend_on_the_data_are_noted(tmp_path: Path) -> None:
    class Positive(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x > 0] * 2

    exported = export_module(Positive(), {"x": torch.linspace(-1, 2, 6)}, tmp_path / "m.onnx")
    assert "NonZero" in exported.notes[0]
    (axis,) = exported.artifact.outputs[0].shape
    assert isinstance(axis, str)


def test_an_older_opset_is_kept_or_refused_but_never_ignored(tmp_path: Path) -> None:
    exported = export_module(torch.nn.Linear(3, 2), {"input": torch.randn(2, 3)}, tmp_path / "a.onnx", opset=18)
    assert exported.artifact.opset == 18
    assert onnx.load(exported.path).ir_version == 8
