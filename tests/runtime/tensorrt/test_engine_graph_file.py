"""Which files a graph reads, found as onnx itself finds them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from edgeq.errors import SourceError
from edgeq.runtime.tensorrt.graph_file import external_files, graph_bytes


def test_a_graph_that_holds_its_weights_reads_nothing_else(tiny: ModuleType, tmp_path: Path) -> None:
    graph = tiny.float_graph(tmp_path / "m.onnx")
    assert external_files(graph) == ()
    assert graph_bytes(graph) == graph.stat().st_size


def test_external_data_counts_once_for_all_its_tensors(tiny: ModuleType, tmp_path: Path) -> None:
    graph = tiny.external_graph(tmp_path / "m.onnx", "weights.data")
    data = tmp_path / "weights.data"
    assert external_files(graph) == (data,)
    assert graph_bytes(graph) == graph.stat().st_size + data.stat().st_size


def test_tensors_in_attributes_and_subgraphs_are_found(tmp_path: Path) -> None:
    def external(name: str, location: str) -> TensorProto:
        tensor = numpy_helper.from_array(np.zeros(4, np.float32), name)
        set_external_data(tensor, location)
        tensor.ClearField("raw_data")
        return tensor

    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["y"], value=external("", "attribute.bin"))], "inner", [], [out]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])], "other", [], [out], [external("w", "sub.bin")]
    )
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=other)], "outer", [condition], [out]
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(SourceError, match=r"'attribute\.bin', which is not there"):
        external_files(path)
    for name in ("attribute.bin", "sub.bin"):
        (tmp_path / name).write_bytes(b"\0" * 16)
    assert external_files(path) == (tmp_path / "attribute.bin", tmp_path / "sub.bin")


@pytest.mark.parametrize("location", ["../w.data", "/etc/passwd", "a/../../w.data", "link/w.data", "", "x" * 400])
def test_places_outside_the_folder_are_refused(tiny: ModuleType, tmp_path: Path, location: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "w.data").write_bytes(b"\0" * 4000)
    (folder / "link").symlink_to(tmp_path)
    graph = tiny.external_graph(folder / "m.onnx", location)
    with pytest.raises(SourceError, match=r"outside its own folder|not there"):
        external_files(graph)


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_graph_or_one_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "m.onnx"
    path.write_bytes(data)
    try:
        assert external_files(path) == ()
    except SourceError as error:
        assert "\n" not in str(error)


def test_a_cut_graph_is_one_error(tiny: ModuleType, tmp_path: Path) -> None:
    whole = tiny.external_graph(tmp_path / "m.onnx", "weights.data").read_bytes()
    for size in range(1, len(whole), 37):
        path = tmp_path / "cut.onnx"
        path.write_bytes(whole[:size])
        try:
            external_files(path)
        except SourceError as error:
            assert "cut off" in str(error)
