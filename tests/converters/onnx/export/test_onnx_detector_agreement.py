"""RT-DETR picks its queries by score: the same detections in another order are the same answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edgeq.converters.onnx.compare import compare_outputs
from edgeq.converters.onnx.export.export import export_model
from edgeq.converters.onnx.sensitivity import Switch, node_errors

pytestmark = pytest.mark.slow

CLASSES, QUERIES = 3, 12
Call = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def detector(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rt-detr") / "model.onnx"
    shapes = {"pixel_values": (1, 3, 64, 64)}
    plain = export_model(tiny_model("rt-detr"), out, task=None, shapes=shapes).path
    # Random heads start at scores of a hundredth, which no detection has.
    return appended(plain, out.with_name("sure.onnx"), "logits", "Add", np.array(4.5, np.float32))


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    rng = np.random.default_rng(0)
    return [{"pixel_values": rng.standard_normal((1, 3, 64, 64)).astype(np.float32)} for _ in range(4)]


def appended(model: Path, out: Path, output: str, op_type: str, operand: NDArray[Any], **attributes: Any) -> Path:
    """The model with one more operator before an output."""
    loaded, before, name = onnx.load(model), f"{output}.before", f"{output}.operand"
    while any(weight.name == name for weight in loaded.graph.initializer):
        before, name = f"{before}.before", f"{name}.other"
    for node in loaded.graph.node:
        for names in (node.input, node.output):
            for index, found in enumerate(names):
                if found == output:
                    names[index] = before
    loaded.graph.initializer.append(onnx.numpy_helper.from_array(operand, name))
    loaded.graph.node.append(onnx.helper.make_node(op_type, [before, name], [output], **attributes))
    onnx.save(loaded, out)
    return out


def permuted(model: Path, out: Path) -> Path:
    """The model with its queries in another order."""
    order = np.random.default_rng(1).permutation(QUERIES)
    return appended(appended(model, out, "logits", "Gather", order, axis=1), out, "pred_boxes", "Gather", order, axis=1)


def disturbed(model: Path, out: Path, share: float) -> Path:
    """The model with noise of that share in its matrices and filters."""
    loaded, rng = onnx.load(model), np.random.default_rng(2)
    for weight in loaded.graph.initializer:
        array = onnx.numpy_helper.to_array(weight)
        if array.dtype == np.float32 and array.ndim > 1:
            noisy = array + rng.standard_normal(array.shape).astype(np.float32) * share * array.std()
            weight.CopyFrom(onnx.numpy_helper.from_array(noisy, weight.name))
    onnx.save(loaded, out)
    return out


def test_the_order_of_queries_means_nothing(detector: Path, calls: list[Call], tmp_path: Path) -> None:
    other = permuted(detector, tmp_path / "permuted.onnx")
    found = compare_outputs(detector, other, calls, task="object-detection", classes=CLASSES)
    assert found.detection_map == pytest.approx(1.0)
    assert found.detection_iou == pytest.approx(1.0)
    assert {output.name: output.max_error for output in found.outputs} == {"logits": 0.0, "pred_boxes": 0.0}


def test_noise_costs_agreement(detector: Path, calls: list[Call], tmp_path: Path) -> None:
    figures = []
    for index, share in enumerate((0.0005, 0.005, 0.05)):  # boxes of random heads are too thin for more
        noisy = permuted(disturbed(detector, tmp_path / f"n{index}.onnx", share), tmp_path / f"p{index}.onnx")
        found = compare_outputs(detector, noisy, calls, task="object-detection", classes=CLASSES)
        assert found.detection_map is not None
        figures.append(found.detection_map)
    assert 1 > figures[0] > figures[1] > figures[2]
    assert figures[0] > 0.7


def test_a_node_that_only_changes_the_order_has_no_error(detector: Path, calls: list[Call], tmp_path: Path) -> None:
    """Queries that swap places when one node is rounded are no error of that node."""
    from edgeq.converters.onnx.quantize.sites import quantizable

    switches = [Switch(site.name, None) for site in quantizable(detector) if site.op_type != "Conv"]
    errors = node_errors(detector, tmp_path, switches, calls[:1])
    assert max(errors.values()) < 0.5
