"""Files that are broken in ways that no exporter breaks them: each ends in one line, with a remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeq.converters.onnx.graph import dynamic_axes, read_onnx
from edgeq.errors import EdgeqError, SourceError, UnsupportedModelError, UsageError

onnx = pytest.importorskip("onnx")


def array(name: str, *dims: int, kind: Any = np.float32) -> Any:
    return onnx.numpy_helper.from_array(np.ones(dims, kind), name)


def node(op_type: str, inputs: Sequence[str], outputs: Sequence[str] = ("y",), **more: Any) -> Any:
    return onnx.helper.make_node(op_type, inputs, outputs, **more)


def info(name: str, dims: Sequence[Any] | None = (2, 8), kind: int = 1) -> Any:
    return onnx.helper.make_tensor_value_info(name, kind, dims)


def model(
    nodes: Sequence[Any], weights: Sequence[Any] = (), inputs: Sequence[Any] = (), opset: int = 17, **more: Any
) -> Any:
    graph = onnx.helper.make_graph(
        nodes, "g", list(inputs) or [info("x")], [info("y", None)], list(weights), value_info=more.pop("values", [])
    )
    opsets = [onnx.helper.make_opsetid(domain, 1) for domain in ("local", "com.microsoft")]
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset), *opsets], ir_version=10, **more
    )


def plain() -> Any:
    return model([node("MatMul", ["x", "w"])], [array("w", 8, 8)])


def function(name: str, calls: Sequence[str], opset: int = 17) -> Any:
    names = ["a", *(f"t{i}" for i in range(len(calls) - 1)), "b"]
    nodes = [
        node(call, [names[i]], [names[i + 1]], domain="local" if call.startswith("F") else "")
        for i, call in enumerate(calls)
    ]
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("local", 1)]
    return onnx.helper.make_function("local", name, ["a"], ["b"], nodes, opsets)


def calling(name: str, *functions: Any, opset: int = 17) -> Any:
    return model([node(name, ["x"], domain="local")], functions=list(functions), opset=opset)


def changed(change: Callable[[Any], object]) -> Any:
    broken = plain()
    change(broken)
    return broken


def weight(**fields: Any) -> Any:
    def change(broken: Any) -> None:
        tensor = broken.graph.initializer[0]
        for name, value in fields.items():
            if name == "dims":
                tensor.dims[:] = value
            else:
                setattr(tensor, name, value)

    return changed(change)


def sparse() -> Any:
    broken = model([node("MatMul", ["x", "values"])])
    tensor = onnx.helper.make_sparse_tensor(array("values", 2), array("at", 2, kind=np.int64), [8, 8])
    broken.graph.sparse_initializer.append(tensor)
    return broken


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "output that nobody makes": (lambda: model([node("Relu", ["x"], ["z"])]), "output 'y' is made by no node"),
    "short data": (lambda: weight(raw_data=b"12"), "'w' of shape .* takes 256 bytes"),
    "type 0": (lambda: weight(data_type=0), "'w' has the ONNX element type 0"),
    "type 77": (lambda: weight(data_type=77), "'w' has the ONNX element type 77"),
    "input of type 77": (lambda: model([node("Relu", ["x"])], inputs=[info("x", kind=77)]), "'x' .* type 77"),
    "huge": (lambda: weight(dims=[2**62, 2**62]), "is not what the file holds"),
    "negative weight": (lambda: weight(dims=[-8, 8]), r"'w' has a negative size: \[-8, 8\]"),
    "negative input": (lambda: model([node("Relu", ["x"])], inputs=[info("x", [-1, 8])]), "an axis of size -1"),
    "no opset": (lambda: changed(lambda m: m.ClearField("opset_import")), "does not say which version"),
    "other rank": (
        lambda: model(
            [node("Reshape", ["x", "s"], ["a"]), node("Identity", ["a"])],
            [onnx.numpy_helper.from_array(np.array([-1, 4]), "s")],
            [info("x", ["n", 8])],
            values=[info("a", ["p", "q", "r"])],
        ),
        "says that 'a' has 3 axes, but it has 2",
    ),
    "recursion": (lambda: calling("F", function("F", ["F"])), "'F' of model.onnx calls itself"),
    "recursion of two": (lambda: calling("F", function("F", ["F2"]), function("F2", ["F"])), "calls itself"),
    "doubling": (
        lambda: calling("F15", function("F0", ["Relu"]), *(function(f"F{k}", 2 * [f"F{k - 1}"]) for k in range(1, 16))),
        "become 32768 nodes",
    ),
    "one factor": (lambda: model([node("FusedMatMul", ["x"], domain="com.microsoft")]), "has not two factors"),
    "no such factor": (
        lambda: model([node("FusedMatMul", ["x", "q"], domain="com.microsoft")]),
        "reads 'q', which no earlier node makes",
    ),
}
UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "opset 99": (lambda: model([node("Relu", ["x"])], opset=99), "uses opset 99; onnx .* knows those up to"),
    "sparse": (sparse, r"sparse weights \('values'\)"),
    "function of another opset": (
        lambda: calling("F", function("F", ["Relu"], opset=13)),
        "function 'F' uses opset 13, the model .* opset 17",
    ),
    "attention of ONNX Runtime": (
        lambda: model(
            [node("QAttention", ["x", "x"], ["a"], domain="com.microsoft", name="att"), node("Relu", ["a"])],
            values=[info("a")],
        ),
        r"com\.microsoft\.QAttention \(node 'att'\)",
    ),
    "Fourier": (lambda: model([node("DFT", ["x"], name="fft")]), r"DFT \(node 'fft'\)"),
}


def written(path: Path, broken: Any) -> Path:
    path.write_bytes(broken.SerializeToString())
    return path


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_end_in_one_line(tmp_path: Path, name: str) -> None:
    make, said = BROKEN[name]
    path = written(tmp_path / "model.onnx", make())
    dims = {"n": 2} if name == "other rank" else {}
    with pytest.raises(SourceError, match=said) as raised:
        read_onnx(path, dims)
    assert raised.value.remedy


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_sound_but_not_known(tmp_path: Path, name: str) -> None:
    make, said = UNSUPPORTED[name]
    with pytest.raises(UnsupportedModelError, match=said):
        read_onnx(written(tmp_path / "model.onnx", make()), {})


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = written(tmp_path / "model.onnx", model([node("Relu", ["zzzz"])], inputs=[info("zzzz")]))
    path.write_bytes(path.read_bytes().replace(b"zzzz", b"z\xff\xfez"))
    for call in (lambda: read_onnx(path, {}), lambda: dynamic_axes(path)):
        with pytest.raises(SourceError, match="not UTF-8"):
            call()


def test_a_weight_without_columns(tmp_path: Path) -> None:
    path = written(tmp_path / "model.onnx", model([node("MatMul", ["x", "w"])], [array("w", 8, 0)]))
    assert read_onnx(path, {}).flops == 0


@pytest.mark.parametrize("size", [2**70, 2**62, "4"])
def test_sizes_that_are_none(tmp_path: Path, size: Any) -> None:
    path = written(tmp_path / "model.onnx", model([node("Relu", ["x"])], inputs=[info("x", ["n", 8])]))
    with pytest.raises(UsageError, match="cannot have the size"):
        read_onnx(path, {"n": size})


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"location": "."}, "which is not there, or is no file"),
        ({"location": "w" * 5000}, "which is not there, or is no file"),
        ({"location": "w\0.bin"}, "outside its own folder"),
        ({"location": "loop"}, "outside its own folder"),
        ({"offset": "²"}, "gives 256 bytes at"),
        ({"offset": "9" * 5000}, "gives 256 bytes at 999"),
        ({"length": "-1"}, "gives -1 bytes at 0"),
    ],
)
def test_odd_places_of_external_data(tmp_path: Path, place: dict[str, str], said: str) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(256))
    (tmp_path / "loop").symlink_to("loop")
    broken = plain()
    tensor = broken.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    for key, value in ({"location": "w.bin", "offset": "0", "length": "256"} | place).items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    with pytest.raises(SourceError, match=said):
        read_onnx(written(tmp_path / "model.onnx", broken), {})


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_never_end_in_a_traceback(tmp_path: Path, flips: list[tuple[float, int]]) -> None:
    data = bytearray(plain().SerializeToString())
    for place, byte in flips:
        data[int(place * len(data))] = byte
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(data))
    try:
        shape = read_onnx(path, {})
    except EdgeqError as error:
        assert "\n" not in str(error)
    else:
        assert shape.output_bytes >= 0
