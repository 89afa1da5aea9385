"""Dynamic INT8 and weight-only quantization, run and counted by ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeq.converters.onnx.quantize.clean import clean_for
from edgeq.converters.onnx.quantize.coverage import coverage, write_executed
from edgeq.converters.onnx.quantize.dynamic import quantize_dynamic
from edgeq.converters.onnx.quantize.embeddings import quantize_embeddings
from edgeq.converters.onnx.quantize.graph import data_file, open_editor, save_model
from edgeq.converters.onnx.quantize.sites import quantizable
from edgeq.converters.onnx.quantize.weights_only import pack_blocks, quantize_weights, unpack_blocks
from edgeq.errors import ConversionError

pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_products_of_transformers_compute_on_integers(
    tiny: Callable[[str], Path],
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    cosine: Callable[..., float],
    tmp_path: Path,
    name: str,
    join: bool,
) -> None:
    clean, out, executed = (tmp_path / f"{part}.onnx" for part in ("clean", "int8", "executed"))
    clean_for(tiny(name), clean, "onnxruntime-cpu", join=join)
    quantize_dynamic(clean, out)
    onnx.checker.check_model(out, full_check=True)
    write_executed(out, executed)
    found = coverage(out, executed=executed)
    assert found.weight_share == 1.0 if name == "bert" else found.weight_share > 0.8  # its patches are a convolution
    kinds = Counter(node.op_type for node in onnx.load(executed).graph.node)
    assert kinds["DynamicQuantizeMatMul"] + kinds["MatMulIntegerToFloat"] == sum(
        site.op_type != "Conv" for site in quantizable(clean)
    )
    assert not kinds["MatMulInteger"]
    feeds = make_feeds(clean, 1)
    assert cosine(run_model(out, feeds), run_model(clean, feeds)) > 0.995


def test_a_node_that_is_named_stays_float(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    clean, out, executed = (tmp_path / f"{part}.onnx" for part in ("clean", "int8", "executed"))
    clean_for(tiny("bert"), clean, "onnxruntime-cpu")
    keep = {quantizable(clean)[2].name}
    quantize_dynamic(clean, out, keep_float=keep)
    write_executed(out, executed)
    assert len(coverage(out, executed=executed).left) == 1
    with pytest.raises(ConversionError, match="nobody"):
        quantize_dynamic(clean, out, keep_float={"nobody"})


def test_a_model_of_convolutions_has_nothing_for_it(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    keep = {site.name for site in quantizable(tiny("resnet")) if site.op_type != "Conv"}
    with pytest.raises(ConversionError, match="no matrix product"):
        quantize_dynamic(tiny("resnet"), tmp_path / "q.onnx", keep_float=keep)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 100),
    st.sampled_from([4, 8]),
    st.sampled_from([16, 32, 64]),
    st.integers(0, 2**31),
)
def test_packed_weights_unpack_to_what_they_were(rows: int, columns: int, bits: Any, block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-4, 4)).astype(np.float32)
    packed, scales = pack_blocks(weight, bits, block)
    assert packed.shape == (rows, -(-columns // block), block * bits // 8)
    found = unpack_blocks(packed, scales, bits, columns)
    step = np.repeat(np.abs(scales), block, axis=1)[:, :columns]
    # Four bits may cut the largest numbers by a fifth, for the sake of the others.
    room = 0.51 * step if bits == 8 else np.maximum(0.51 * step, 0.26 * np.abs(weight) + 0.51 * step)
    ends = np.abs(np.abs(weight) - 128 * step) <= step if bits == 8 else np.zeros_like(weight, bool)
    assert (np.abs(found - weight) <= np.where(ends, 1.01 * step, room)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(96, 24), (50, 8)])
def test_packed_weights_are_read_by_onnx_runtime(
    tmp_path: Path, run_model: Callable[..., NDArray[Any]], bits: Any, shape: tuple[int, int]
) -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal(shape).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="linear")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, shape[1]])],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(rng.standard_normal(shape[1]).astype("f4"), "b"),
        ],
    )
    model, out = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), model)
    quantize_weights(model, out, bits=bits, block=32, integer_compute=False)
    x = rng.standard_normal((3, shape[0])).astype(np.float32)
    packed, scales = pack_blocks(weight.T, bits, 32)
    bias = numpy_helper.to_array(graph.initializer[1])
    expected = x @ unpack_blocks(packed, scales, bits, shape[0]).T + bias
    np.testing.assert_allclose(run_model(out, {"x": x}), expected, rtol=1e-4, atol=1e-4)
    found = coverage(out, executed=None)
    assert found.weight_share == 1.0
    assert found.groups[0].precision == f"int{bits}"


def test_blocks_of_odd_sizes_are_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="Blocks of 48"):
        quantize_weights(tiny("bert"), tmp_path / "q.onnx", bits=4, block=48)


@pytest.mark.parametrize(("bits", "least"), [(8, 0.999), (4, 0.9)])
def test_transformers_keep_their_outputs_with_few_bits(
    tiny: Callable[[str], Path],
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    cosine: Callable[..., float],
    tmp_path: Path,
    bits: Any,
    least: float,
) -> None:
    source, out = tiny("bert"), tmp_path / "q.onnx"
    quantize_weights(source, out, bits=bits)
    feeds = make_feeds(source, 1)
    assert cosine(run_model(out, feeds), run_model(source, feeds)) > least


def test_tables_become_integers_with_a_scale_for_each_row(
    tiny: Callable[[str], Path],
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    tmp_path: Path,
) -> None:
    source, out = tiny("bert"), tmp_path / "q.onnx"
    editor = open_editor(source)
    assert quantize_embeddings(editor, least=400 * 64) == 1
    save_model(editor, out)
    assert out.stat().st_size < source.stat().st_size - 2.5 * 400 * 64
    feeds = make_feeds(source, 1)
    np.testing.assert_allclose(run_model(out, feeds), run_model(source, feeds), atol=0.1)


def test_large_weights_lie_in_a_file_beside(
    tiny: Callable[[str], Path],
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    tmp_path: Path,
) -> None:
    source, apart, together = tiny("bert"), tmp_path / "apart.onnx", tmp_path / "together.onnx"
    save_model(open_editor(source), apart, external=True)
    assert data_file(apart).stat().st_size > 300 << 10
    tensors = [value.const_value for value in ir.load(apart).graph.initializers.values()]
    offsets = [tensor.offset for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    assert offsets
    assert all(offset is not None and offset % 4096 == 0 for offset in offsets)
    save_model(open_editor(apart), together)
    feeds = make_feeds(source)
    expected = run_model(source, feeds)
    np.testing.assert_array_equal(run_model(apart, feeds), expected)
    np.testing.assert_array_equal(run_model(together, feeds), expected)
    assert not data_file(together).exists()
