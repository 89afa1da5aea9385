"""What a conversion is given and cannot use ends in one line, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeq.errors import EdgeqError, SourceError, UnsupportedModelError, UsageError
from edgeq.planner.tensors.convert import convert_tensor
from edgeq.planner.tensors.job import Calibration, Precision, TensorJob

Arrays = dict[str, Any]


def network(path: Path, tail: Callable[[str], list[Any]] | None = None, *, external: str | None = None) -> Path:
    """x (1, 3, 8, 8) -> a convolution -> y, with a tail that computes y of it."""
    weight = np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32)
    out = "c" if tail else "y"
    nodes = [helper.make_node("Conv", ["x", "w"], [out], name="conv"), *(tail(out) if tail else [])]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "m", [info("x", 1, [1, 3, 8, 8])],
        [info("y", TensorProto.INT64, [4, "found"]) if tail else info("y", 1, [1, 8, 6, 6])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if external is not None:
        stored = model.graph.initializer[0]
        stored.ClearField("raw_data")
        stored.data_location = TensorProto.EXTERNAL
        stored.external_data.add(key="location", value=external)
    path.write_bytes(model.SerializeToString())
    return path


def convert(
    model: Path, out: Path, target: str = "laptop-cpu", inputs: Path | None = None, precision: Precision = "auto"
) -> None:
    calibration = Calibration(inputs=inputs)
    convert_tensor(
        TensorJob(model=str(model), target=target, threads=1, calibration=calibration, precision=precision), out
    )


def fails(kind: type[EdgeqError], told: str, tmp_path: Path, *args: Any) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=told) as caught:
        convert(args[0], tmp_path / "out", *args[1:])
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    assert sorted(tmp_path.iterdir()) == before


def test_data_dependent_shapes_are_for_onnx_runtime_alone(tmp_path: Path) -> None:
    model = network(tmp_path / "m.onnx", lambda c: [helper.make_node("NonZero", [c], ["y"], name="where_it_is")])
    told = r"node 'where_it_is' \(NonZero\) gives a shape that depends on the data"
    fails(UnsupportedModelError, told, tmp_path, model, "jetson-orin")
    convert(model, tmp_path / "out", precision="fp32")
    assert (tmp_path / "out" / "edgeq.json").is_file()


def test_weights_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(8 * 27 * 4))
    (tmp_path / "model").mkdir()
    for place in ("../secret.bin", str(secret)):
        model = network(tmp_path / "model" / "m.onnx", external=place)
        fails(SourceError, "outside", tmp_path, model)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: {"pixels": x}, "'pixels'|'x'"),
        (lambda x: {"x": x[:, :2]}, r"shape"),
        (lambda x: {"x": x.astype(np.int64)}, "int64"),
        (lambda x: {"x": np.where(x > 2, np.nan, x)}, "NaN"),
        (lambda x: {"x": np.zeros_like(x)}, "is 0 throughout all inputs"),
        (lambda x: {"x": x[:3]}, "Give at least 6"),
    ],
    ids=["name", "shape", "dtype", "nan", "constant", "few"],
)
def test_inputs_that_cannot_be_calibrated_with(
    tmp_path: Path, change: Callable[[NDArray[Any]], Arrays], told: str
) -> None:
    images = np.random.default_rng(1).standard_normal((9, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "in.npz", **change(images))
    fails(UsageError, told, tmp_path, network(tmp_path / "m.onnx"), "laptop-cpu", tmp_path / "in.npz")
