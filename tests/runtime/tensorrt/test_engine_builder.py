"""Engines are really built, by TensorRT-RTX without a GPU, for every GPU that it knows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType

import pytest

from edgeq.errors import ConversionError, SessionError, SourceError, UnsupportedModelError, UsageError
from edgeq.runtime.tensorrt.builder import build_engine
from edgeq.runtime.tensorrt.driver import find_gpu
from edgeq.runtime.tensorrt.records import EngineSettings
from edgeq.runtime.tensorrt.versions import capability_names
from edgeq.tensor_types import AxisRange

AXES = {"batch": AxisRange(least=1, usual=2, most=4)}
ADA = EngineSettings(compute_capability="8.9", axes=AXES)


def _for(capability: str) -> EngineSettings:
    return EngineSettings(compute_capability=capability, axes=AXES)


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "8.9", "12.0"])
def test_int8_and_fp16_build_for_every_gpu(rtx: ModuleType, tiny: ModuleType, tmp_path: Path, capability: str) -> None:
    assert capability in capability_names(rtx)
    graphs = {"INT8": tiny.int8_graph(tmp_path / "int8.onnx", half=True), "HALF": tiny.half_graph(tmp_path / "h.onnx")}
    for kind, graph in graphs.items():
        out = tmp_path / "model.engine"
        info = build_engine(rtx, graph, out, _for(capability))
        assert info.compute_capability == capability
        assert info.precisions[kind] >= 2
        assert info.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
        assert info.size_bytes == out.stat().st_size
        assert [path.name for path in tmp_path.iterdir() if ".part" in path.name] == []


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "12.0"])
def test_floats_beside_int8_build_from_ampere_on(
    rtx: ModuleType, tiny: ModuleType, tmp_path: Path, capability: str
) -> None:
    for graph in (tiny.int8_graph(tmp_path / "int8.onnx"), tiny.float_graph(tmp_path / "float.onnx")):
        assert build_engine(rtx, graph, tmp_path / "model.engine", _for(capability)).precisions["FLOAT"] >= 2


@pytest.mark.parametrize("capability", ["8.9", "12.0"])
def test_fp8_builds_where_there_is_fp8(rtx: ModuleType, tiny: ModuleType, tmp_path: Path, capability: str) -> None:
    info = build_engine(rtx, tiny.fp8_graph(tmp_path / "fp8.onnx"), tmp_path / "fp8.engine", _for(capability))
    assert info.precisions["FP8"] >= 2


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6"])
def test_fp8_is_refused_where_there_is_none(rtx: ModuleType, tiny: ModuleType, tmp_path: Path, capability: str) -> None:
    out = tmp_path / "fp8.engine"
    with pytest.raises(UnsupportedModelError, match=r"FP8, which sm_\d\d does not have .* Ada Lovelace, sm_89"):
        build_engine(rtx, tiny.fp8_graph(tmp_path / "fp8.onnx"), out, _for(capability))
    assert not out.exists()


def test_the_graph_alone_says_what_is_quantized(rtx: ModuleType, tiny: ModuleType, tmp_path: Path) -> None:
    plain = build_engine(rtx, tiny.float_graph(tmp_path / "f.onnx"), tmp_path / "f.engine", ADA)
    assert set(plain.precisions) <= {"FLOAT", "INT64", "INT32", "BOOL"}


def test_shapes_follow_the_axes(rtx: ModuleType, tiny: ModuleType, tmp_path: Path) -> None:
    info = build_engine(rtx, tiny.float_graph(tmp_path / "f.onnx"), tmp_path / "f.engine", ADA)
    (shape,) = info.shapes
    assert (shape.name, shape.least, shape.usual, shape.most) == ("images", (1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))
    fixed = build_engine(
        rtx, tiny.float_graph(tmp_path / "g.onnx", 3), tmp_path / "g.engine", EngineSettings(compute_capability="8.9")
    )
    assert fixed.shapes[0].least == fixed.shapes[0].most == (3, 3, 8, 8)


def test_a_dynamic_axis_without_sizes_is_named(rtx: ModuleType, tiny: ModuleType, tmp_path: Path) -> None:
    settings = EngineSettings(compute_capability="8.9", axes={"height": AxisRange(least=1, usual=1, most=2)})
    with pytest.raises(UsageError, match=r"axis 'batch' of the input 'images' \(known are height\)"):
        build_engine(rtx, tiny.float_graph(tmp_path / "f.onnx"), tmp_path / "f.engine", settings)


def test_a_node_that_is_not_supported_is_named_with_its_operator(
    rtx: ModuleType, tiny: ModuleType, tmp_path: Path
) -> None:
    told = r"node 'the_determinant' \(Det\): there is no such operator in it\."
    with pytest.raises(UnsupportedModelError, match=told) as raised:
        build_engine(rtx, tiny.unsupported_graph(tmp_path / "u.onnx"), tmp_path / "u.engine", ADA)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_asymmetric_int8_is_refused_with_the_node(rtx: ModuleType, tiny: ModuleType, tmp_path: Path) -> None:
    graph = tiny.int8_graph(tmp_path / "a.onnx", zero_point=7)
    with pytest.raises(UnsupportedModelError, match=r"node 'x\.Q' \(QuantizeLinear\)"):
        build_engine(rtx, graph, tmp_path / "a.engine", ADA)


def test_weights_beside_the_graph_are_read(rtx: ModuleType, tiny: ModuleType, tmp_path: Path) -> None:
    graph = tiny.external_graph(tmp_path / "model.onnx", "weights.data")
    info = build_engine(rtx, graph, tmp_path / "model.engine", ADA)
    assert info.layers > 3


@pytest.mark.parametrize("location", ["../weights.data", "/etc/passwd", ""])
def test_weights_outside_the_folder_are_refused(
    rtx: ModuleType, tiny: ModuleType, tmp_path: Path, location: str
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    graph = tiny.external_graph(inside / "model.onnx", location)
    with pytest.raises(SourceError, match="outside its own folder"):
        build_engine(rtx, graph, tmp_path / "model.engine", ADA)


def test_what_is_no_graph_is_one_line(rtx: ModuleType, tmp_path: Path) -> None:
    for name, data in (("empty", b""), ("text", b"no graph at all"), ("cut", b"\x3a\xff\x7f")):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(data)
        with pytest.raises((SourceError, UnsupportedModelError)):
            build_engine(rtx, path, tmp_path / "x.engine", ADA)


def test_orin_is_told_to_build_on_orin(rtx: ModuleType, tiny: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not build for sm_87.*on a Jetson, build there with TensorRT"):
        build_engine(rtx, tiny.float_graph(tmp_path / "f.onnx"), tmp_path / "f.engine", _for("8.7"))


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_without_a_gpu_the_target_must_be_named(rtx: ModuleType, tiny: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SessionError, match=r"no GPU .* one of sm_75, sm_80"):
        build_engine(rtx, tiny.float_graph(tmp_path / "f.onnx"), tmp_path / "f.engine", EngineSettings(axes=AXES))


def test_a_dla_that_is_not_there_is_told(rtx: ModuleType, tiny: ModuleType, tmp_path: Path) -> None:
    settings = EngineSettings(compute_capability="8.9", axes=AXES, dla_core=0)
    with pytest.raises(SessionError, match="0 DLA cores here, and core 0 is asked for"):
        build_engine(rtx, tiny.float_graph(tmp_path / "f.onnx"), tmp_path / "f.engine", settings)


def test_limits_and_levels_are_taken(rtx: ModuleType, tiny: ModuleType, tmp_path: Path) -> None:
    settings = EngineSettings(
        compute_capability="8.9", axes=AXES, workspace_bytes=64 << 20, tactic_bytes=1 << 30, threads=1,
        optimization_level=1, timing_cache=str(tmp_path / "times"),
    )  # fmt: skip
    info = build_engine(rtx, tiny.float_graph(tmp_path / "f.onnx"), tmp_path / "f.engine", settings)
    assert info.size_bytes > 0
    assert not (tmp_path / "times").exists()  # TensorRT-RTX times nothing


def test_an_engine_that_cannot_be_written_leaves_nothing(rtx: ModuleType, tiny: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="cannot be written"):
        build_engine(rtx, tiny.float_graph(tmp_path / "f.onnx"), tmp_path / "file" / "f.engine", ADA)
