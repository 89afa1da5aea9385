"""Which calls a model is measured with, and of what sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.bundle import Bundle, open_bundle
from edgeq.errors import BundleError, UsageError
from edgeq.report import TensorWorkload
from edgeq.runtime.bench_inputs import bench_inputs, sizes_of
from edgeq.tensor_types import AxisRange

pytest.importorskip("onnxruntime")

AXES = {"batch": AxisRange(least=1, usual=2, most=6)}


@pytest.fixture(scope="module")
def bundle(linear_onnx: Path, make_tensor_bundle: Any) -> Bundle:
    return open_bundle(make_tensor_bundle(linear_onnx, plan={"axes": AXES}))


@pytest.fixture(scope="module")
def with_samples(linear_onnx: Path, make_tensor_bundle: Any) -> Bundle:
    samples = [{"x": np.full((rows, 8), rows, np.float32)} for rows in (3, 1)]
    return open_bundle(make_tensor_bundle(linear_onnx, plan={"axes": AXES}, samples=samples))


@pytest.mark.parametrize(
    ("workload", "rows"),
    [
        (TensorWorkload(), 2),
        (TensorWorkload(size="usual"), 2),
        (TensorWorkload(size="largest"), 6),
        (TensorWorkload(axes={"batch": 5}), 5),
        (TensorWorkload(size="largest", axes={"batch": 1}), 1),
    ],
)
def test_random_inputs_have_the_sizes_that_were_asked_for(bundle: Bundle, workload: TensorWorkload, rows: int) -> None:
    found = bench_inputs(bundle, workload)
    assert found.source == "random numbers"
    assert found.shapes == ({"x": (rows, 8)},)
    assert found.n_bytes == len(found.calls) * rows * 8 * 4
    assert not np.array_equal(found.calls[0]["x"], found.calls[1]["x"])
    assert sizes_of(found.shapes[0], bundle.tensor.artifact.inputs) == {"batch": rows}


def test_the_bundles_own_inputs_come_first(with_samples: Bundle) -> None:
    found = bench_inputs(with_samples, TensorWorkload())
    assert "bundle brings" in found.source
    assert found.shapes == ({"x": (1, 8)}, {"x": (3, 8)})
    assert [call["x"][0, 0] for call in found.calls] == [3, 1]


def test_sizes_are_those_of_random_inputs(with_samples: Bundle) -> None:
    found = bench_inputs(with_samples, TensorWorkload(size="usual"))
    assert (found.source, found.shapes) == ("random numbers", ({"x": (2, 8)},))


def test_inputs_of_the_user(with_samples: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", x=np.arange(40 * 8, dtype=np.float32).reshape(40, 8))
    found = bench_inputs(with_samples, TensorWorkload(), tmp_path / "mine.npz")
    assert found.source == "mine.npz"
    assert len(found.calls) == 16
    assert found.shapes == ({"x": (1, 8)},)


def test_large_inputs_are_few(linear_onnx: Path, make_tensor_bundle: Any) -> None:
    """The measured process holds them."""
    axes = {"batch": AxisRange(least=1, usual=100_000, most=1_000_000)}
    bundle = open_bundle(make_tensor_bundle(linear_onnx, plan={"axes": axes}))
    assert len(bench_inputs(bundle, TensorWorkload()).calls) == 2  # 3.2 MB each
    assert len(bench_inputs(bundle, TensorWorkload(size="largest")).calls) == 1


@pytest.mark.parametrize(
    ("axes", "match"),
    [
        ({"rows": 1}, "no dynamic axis 'rows'. It has batch"),
        ({"batch": 7}, "cannot have 7: the model was made for 1 to 6"),
        ({"batch": 0}, "cannot have 0"),
    ],
)
def test_sizes_that_the_model_was_not_made_for(bundle: Bundle, axes: dict[str, int], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        bench_inputs(bundle, TensorWorkload(axes=axes))


def test_an_axis_that_the_plan_does_not_know_needs_a_size(linear_onnx: Path, make_tensor_bundle: Any) -> None:
    bundle = open_bundle(make_tensor_bundle(linear_onnx))
    with pytest.raises(UsageError, match=r"no size for the axis 'batch'.*--axis batch=1"):
        bench_inputs(bundle, TensorWorkload())
    assert bench_inputs(bundle, TensorWorkload(axes={"batch": 9})).shapes == ({"x": (9, 8)},)


def test_inputs_have_their_own_sizes(bundle: Bundle, tmp_path: Path) -> None:
    for workload in (TensorWorkload(size="largest"), TensorWorkload(axes={"batch": 1})):
        with pytest.raises(UsageError, match="sizes of its own"):
            bench_inputs(bundle, workload, tmp_path)


def test_samples_that_are_none(linear_onnx: Path, make_tensor_bundle: Any) -> None:
    samples = [{"y": np.ones((1, 8), np.float32)}]
    with pytest.raises(BundleError, match=r"samples\.npz"):
        bench_inputs(open_bundle(make_tensor_bundle(linear_onnx, samples=samples)), TensorWorkload())
