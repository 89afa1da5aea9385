"""Calibration of whole models against all tensors at once, and what it says of inputs that do not fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters.onnx.calibration.collect import (
    calibrate,
    collect_by_method,
    collect_channel_ranges,
    collect_ranges,
)
from edgeq.converters.onnx.calibration.observers import METHODS, Method
from edgeq.converters.onnx.calibration.ranges import Range
from edgeq.errors import ConversionError, UsageError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

Feeds = dict[str, NDArray[np.float32]]
TENSORS = ["image", "r1", "sum", "pool", "logits"]


class MakeNetwork(Protocol):
    def __call__(self, *, name: str = "model", external: bool = False, extra: Any = ()) -> Path: ...


def all_at_once(path: Path, names: list[str], images: list[Feeds]) -> dict[str, NDArray[np.float32]]:
    """Tensors of all calls, from one session with all of them as outputs."""
    model = onnx.load(path)
    outputs = {value.name for value in model.graph.output}
    made = [name for name in names if name != "image"]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in outputs)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: dict[str, list[Any]] = {name: [] for name in names}
    for feeds in images:
        for name, value in zip(made, session.run(made, feeds), strict=True):
            found[name].append(value.reshape(-1))
        if "image" in names:
            found["image"].append(feeds["image"].reshape(-1))
    return {name: np.concatenate(values) for name, values in found.items()}


@pytest.mark.parametrize("symmetric", [False, True])
def test_limits_are_those_of_all_tensors_at_once(
    make_network: MakeNetwork, images: list[Feeds], symmetric: bool
) -> None:
    path = make_network()
    found = collect_ranges(path, TENSORS, images, method="minmax", symmetric=symmetric)
    for name, values in all_at_once(path, TENSORS, images).items():
        expected = Range(float(values.min()), float(values.max())).quantizable(symmetric=symmetric)
        assert (found[name].low, found[name].high) == pytest.approx((expected.low, expected.high), rel=1e-5, abs=1e-6)
    assert list(found) == TENSORS


def test_percentiles_are_numpys_over_all_calls(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network()
    found = calibrate(path, TENSORS, images, method="percentile", symmetric=True, percentile=95.0)
    for name, values in all_at_once(path, TENSORS, images).items():
        assert found.ranges[name].high == pytest.approx(np.percentile(np.abs(values), 95), rel=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_external_weights_and_streams_make_no_difference(
    make_network: MakeNetwork, images: list[Feeds], method: Method
) -> None:
    plain, external = make_network(), make_network(name="external", external=True)
    told: list[tuple[int, int, str]] = []
    one = calibrate(plain, TENSORS, images, method=method, symmetric=False, progress=lambda *some: told.append(some))
    other = calibrate(external, TENSORS, iter(images), method=method, symmetric=False)
    assert one == other
    assert one.calls == 4
    assert told == [(n, 4, "Calibrating") for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_pass_serves_all_methods(make_network: MakeNetwork, images: list[Feeds], symmetric: bool) -> None:
    path = make_network()
    found = collect_by_method(path, TENSORS, iter(images), symmetric=symmetric, percentile=99.0)
    assert list(found) == list(METHODS)
    for method in METHODS:
        assert found[method] == collect_ranges(
            path, TENSORS, images, method=method, symmetric=symmetric, percentile=99.0
        )
    for method in METHODS:  # asked for alone, "minmax" keeps limits without a histogram
        only: list[Method] = [method]
        alone = collect_by_method(path, TENSORS, images, methods=only, symmetric=symmetric, percentile=99.0)
        assert alone == {method: found[method]}


def test_dead_layers_are_named_and_can_be_quantized(make_network: MakeNetwork, images: list[Feeds]) -> None:
    extra = [onnx.helper.make_node("Sub", ["pool", "pool"], ["dead"])]
    found = calibrate(make_network(extra=extra), ["dead", "pool"], images, method="mse", symmetric=False)
    assert found.constants == ("dead",)
    ranges = collect_ranges(make_network(extra=extra), ["dead"], images, method="mse", symmetric=False)
    assert ranges == {"dead": Range(0.0, 1.0)}


def test_channels_are_those_of_all_tensors_at_once(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network()
    found = collect_channel_ranges(path, {"r1": 1, "flat": -1}, images)
    r1 = all_at_once(path, ["r1"], images)["r1"].reshape(-1, 16, 64)
    assert found["r1"].absolute == pytest.approx(np.abs(r1).max(axis=(0, 2)), rel=1e-5)
    assert found["flat"].low.shape == (16,)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_named(make_network: MakeNetwork, images: list[Feeds], wrong: float) -> None:
    images[2]["image"][0, 1, 2, 3] = wrong
    with pytest.raises(ConversionError, match="'image' of input 2 holds NaN or infinite"):
        collect_ranges(make_network(), TENSORS, images, method="minmax", symmetric=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("op_type", "what"), [("Log", "NaN"), ("Reciprocal", "infinite")])
def test_tensors_that_are_not_finite_are_named_with_the_input(
    make_network: MakeNetwork, images: list[Feeds], op_type: str, what: str, method: Method
) -> None:
    # c1 has negative numbers, r1 - r1 has nothing but zeros.
    extra = [
        onnx.helper.make_node("Sub", ["r1", "r1"], ["zero"]),
        onnx.helper.make_node(op_type, ["c1" if op_type == "Log" else "zero"], ["odd"]),
    ]
    with pytest.raises(ConversionError, match=f"Calibration input 0 makes .* of 'odd' {what}"):
        collect_ranges(make_network(extra=extra), ["r1", "odd"], images, method=method, symmetric=False)


def test_inputs_that_do_not_fit_are_named(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network()

    def refused(feeds: dict[str, Any]) -> str:
        with pytest.raises(ConversionError) as caught:
            collect_ranges(path, TENSORS, [images[0], feeds], method="minmax", symmetric=False)
        return str(caught.value)

    assert "Input 1 has not the names of the model's inputs: 'image' is missing, 'pixels'" in refused(
        {"pixels": images[0]["image"]}
    )
    assert "'image' of input 1 is float64, the model takes float32" in refused({"image": np.zeros((1, 3, 8, 8))})
    text = refused({"image": np.zeros((1, 3, 8), np.float32)})
    assert "'image' of input 1 has the shape [1, 3, 8], the model takes n x 3 x 8 x 8" in text
    assert "[1, 4, 8, 8]" in refused({"image": np.zeros((1, 4, 8, 8), np.float32)})


def test_requests_that_make_no_sense_are_refused(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network(extra=[onnx.helper.make_node("Shape", ["logits"], ["sizes"])])
    for tensors, inputs, message in (
        (TENSORS, [], "No calibration inputs"),
        ([], images, "No tensors"),
        (["logit"], images, "no tensor 'logit'. Did you mean 'logits'"),
        (["w1"], images, "'w1' is a weight"),
    ):
        with pytest.raises(UsageError, match=message):
            collect_ranges(path, tensors, inputs, method="minmax", symmetric=False)
    with pytest.raises(ConversionError, match="'sizes' holds int64"):
        collect_ranges(path, ["sizes"], images, method="minmax", symmetric=False)


class StopError(Exception):
    """Raised in the middle of the inputs."""


def stopped(images: list[Feeds], after: int) -> Iterator[Feeds]:
    yield from images[:after]
    raise StopError


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_calibration_goes_on(
    make_network: MakeNetwork, images: list[Feeds], tmp_path: Path, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeq.converters.onnx.calibration.collect._SAVE_EVERY_S", -1.0)
    path, state = make_network(), tmp_path / "state.npz"
    whole = calibrate(path, TENSORS, images, method=method, symmetric=False)
    with pytest.raises(StopError):
        calibrate(path, TENSORS, stopped(images, 3), method=method, symmetric=False, state=state)
    again = calibrate(path, TENSORS, images, method=method, symmetric=False, state=state)
    # The first call after the break runs in other stages, which round otherwise in the last bit.
    assert (again.calls, again.sha256) == (whole.calls, whole.sha256)
    for name, some in whole.ranges.items():
        assert (again.ranges[name].low, again.ranges[name].high) == pytest.approx((some.low, some.high), rel=5e-3)
    assert [file.name for file in tmp_path.glob("*partial*")] == []
    # Once more: nothing is left to run.
    assert calibrate(path, TENSORS, images, method=method, symmetric=False, state=state) == again


def test_the_state_of_another_calibration_is_refused(
    make_network: MakeNetwork, images: list[Feeds], tmp_path: Path
) -> None:
    path, state = make_network(), tmp_path / "state.npz"
    calibrate(path, TENSORS, images, method="mse", symmetric=False, state=state)
    # Another way to clip looks at the same histograms.
    found = calibrate(path, TENSORS, images, method="percentile", symmetric=True, state=state)
    assert found == calibrate(path, TENSORS, images, method="percentile", symmetric=True)
    for tensors, inputs, method, message in (
        (TENSORS, images, "minmax", "another model or with other settings"),
        (TENSORS[1:], images, "mse", "another model or with other settings"),
        (TENSORS, images[::-1], "mse", "other inputs"),
        (TENSORS, images[:2], "mse", "other inputs"),
    ):
        with pytest.raises(ConversionError, match=message):
            calibrate(path, tensors, inputs, method=method, symmetric=False, state=state)  # type: ignore[arg-type]
    state.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ConversionError, match="cannot be read"):
        calibrate(path, TENSORS, images, method="mse", symmetric=False, state=state)


CHILD = """
import resource, sys
import numpy as np
from pathlib import Path
from edgeq.converters.onnx.calibration.collect import collect_ranges

def inputs(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {"image": rng.standard_normal((256, 3, 8, 8), np.float32)}

path, names = Path(sys.argv[1]), sys.argv[2].split(",")
collect_ranges(path, names, inputs(4), method="percentile", symmetric=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
collect_ranges(path, names, inputs(60), method="percentile", symmetric=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_inputs(make_network: MakeNetwork) -> None:
    path = make_network()
    command = [sys.executable, "-c", CHILD, str(path), ",".join(TENSORS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    # 60 calls make 60 x 4 tensors of up to a mebibyte each.
    assert int(done.stdout) < 8 * 1024
