"""A small network with all that calibration and comparison meet: convolutions, a residual sum, a matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray


class MakeNetwork(Protocol):
    """The signature of the ``make_network`` fixture."""

    def __call__(self, *, name: str = "model", external: bool = False, extra: Sequence[Any] = ()) -> Path:
        """Write the network, with more nodes at its end, and its weights beside it if asked for."""
        ...


def small_network(extra: Sequence[Any] = ()) -> Any:
    """image (n, 3, 8, 8) -> logits (n, 10); its tensors are c1 r1 c2 sum r2 pool flat logits."""
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)

    def weight(name: str, *dims: int) -> Any:
        values = rng.standard_normal(dims) / np.sqrt(np.prod(dims[1:]))
        return onnx.numpy_helper.from_array(values.astype(np.float32), name)

    def node(op_type: str, inputs: str, output: str, **more: Any) -> Any:
        return onnx.helper.make_node(op_type, inputs.split(), [output], name=f"node_{output}", **more)

    nodes = [
        node("Conv", "image w1 b1", "c1", pads=[1, 1, 1, 1]),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 w2 b2", "c2", pads=[1, 1, 1, 1]),
        node("Add", "c2 r1", "sum"),
        node("Relu", "sum", "r2"),
        node("GlobalAveragePool", "r2", "pool"),
        node("Flatten", "pool", "flat"),
        node("Gemm", "flat w3 b3", "logits", transB=1),
        *extra,
    ]
    weights = [
        weight("w1", 16, 3, 3, 3), weight("b1", 16), weight("w2", 16, 16, 3, 3), weight("b2", 16),
        weight("w3", 10, 16), weight("b3", 10),
    ]  # fmt: skip
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "small", [info("image", 1, ["n", 3, 8, 8])], [info("logits", 1, ["n", 10])], weights
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


@pytest.fixture
def make_network(tmp_path: Path) -> MakeNetwork:
    """``make_network(name=..., external=...)``: the path of the file."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")

    def make(*, name: str = "model", external: bool = False, extra: Sequence[Any] = ()) -> Path:
        path = tmp_path / f"{name}.onnx"
        options = {"save_as_external_data": True, "location": f"{name}.onnx.data", "size_threshold": 1024}
        onnx.save(small_network(extra), path, **(options if external else {}))
        return path

    return make


@pytest.fixture
def images() -> list[dict[str, NDArray[np.float32]]]:
    """Four calls of one or two images."""
    rng = np.random.default_rng(1)
    return [{"image": rng.standard_normal((1 + n % 2, 3, 8, 8), np.float32)} for n in range(4)]
