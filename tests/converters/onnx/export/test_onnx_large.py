"""Models beyond the 2 GiB that one protobuf message can have, in sparse files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.converters.onnx.export.adopt import adopt_onnx
from edgeq.converters.onnx.graph import read_onnx
from edgeq.converters.onnx.quantize.clean import clean_for
from edgeq.converters.onnx.quantize.coverage import coverage, write_executed
from edgeq.converters.onnx.quantize.dynamic import quantize_dynamic
from edgeq.errors import SourceError
from edgeq.profiles.onnx.wire import encode_varint, int_field, message_field, packed_ints_field

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

WIDTH = 24_000
WEIGHT_BYTES = 4 * WIDTH * WIDTH
ROOM_BYTES = 14 << 30


def product(weights: Any = ()) -> Any:
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    return onnx.helper.make_graph([node], "g", [info("x", 1, [1, WIDTH])], [info("y", 1, [1, WIDTH])], weights)


def model(graph: Any) -> Any:
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def external(path: Path) -> Path:
    """Weights of 2.15 GiB beside the model; all but the first rows are holes in the file."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[WIDTH, WIDTH], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", f"{path.name}.data"), ("offset", "0"), ("length", str(WEIGHT_BYTES))):
        tensor.external_data.add(key=key, value=value)
    with path.with_name(f"{path.name}.data").open("wb") as file:
        file.write(np.random.default_rng(0).standard_normal((8, WIDTH)).astype(np.float32).tobytes())
        file.truncate(WEIGHT_BYTES)
    onnx.save(model(product([tensor])), path)
    return path


def single(path: Path) -> Path:
    """The same in one file, which no protobuf library writes."""
    head = packed_ints_field(1, (WIDTH, WIDTH)) + int_field(2, 1) + message_field(8, "w")
    head += encode_varint(9 << 3 | 2) + encode_varint(WEIGHT_BYTES)
    tensor = encode_varint(5 << 3 | 2) + encode_varint(len(head) + WEIGHT_BYTES) + head
    graph = product().SerializeToString()
    outer = model(product())
    outer.ClearField("graph")
    with path.open("wb") as file:
        file.write(outer.SerializeToString() + encode_varint(7 << 3 | 2))
        file.write(encode_varint(len(graph) + len(tensor) + WEIGHT_BYTES) + graph + tensor)
        file.truncate(file.tell() + WEIGHT_BYTES)
    return path


def test_weights_beyond_2_gib_beside_the_model_are_counted(tmp_path: Path) -> None:
    shape = read_onnx(external(tmp_path / "big.onnx"), {})
    assert shape.parameter_bytes == WEIGHT_BYTES
    assert shape.flops == 2 * WIDTH * WIDTH


def test_a_single_file_beyond_2_gib_is_one_line(tmp_path: Path) -> None:
    path = single(tmp_path / "one.onnx")
    assert path.stat().st_size > 2**31
    with pytest.raises(SourceError, match=r"2\.15 GiB in one file") as caught:
        adopt_onnx(path, tmp_path / "out.onnx")
    assert "external data" in caught.value.remedy
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.slow
def test_weights_beyond_2_gib_go_all_the_way(tmp_path: Path) -> None:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    if int(lines["MemAvailable"].split()[0]) * 1024 < ROOM_BYTES or shutil.disk_usage(tmp_path).free < ROOM_BYTES:
        pytest.skip("14 GiB of memory and of disk are not free")
    for name in ("float", "clean", "int8", "executed"):
        (tmp_path / name).mkdir()
    paths = {name: tmp_path / name / "model.onnx" for name in ("float", "clean", "int8", "executed")}
    adopt_onnx(external(tmp_path / "big.onnx"), paths["float"])
    clean_for(paths["float"], paths["clean"], "onnxruntime-cpu")
    shutil.rmtree(tmp_path / "float")
    quantize_dynamic(paths["clean"], paths["int8"])
    write_executed(paths["int8"], paths["executed"])
    assert coverage(paths["int8"], executed=paths["executed"]).mac_share == 1.0
    assert read_onnx(paths["int8"], {}).parameter_bytes == pytest.approx(WIDTH * WIDTH, rel=0.01)
