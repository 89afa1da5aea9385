"""FP16 and BF16: weights and most of the arithmetic in 16 bits, inputs and outputs as they were.

What overflows or rounds away in 16 bits stays float32, between casts: sums over many elements, exponentials, powers and
whatever is computed from indices. Matrix products, convolutions and LayerNormalization accumulate in float32 inside the
kernels themselves (TensorRT, CUDA), so that their inputs and outputs may be halves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.quantize.graph import Editor, array_of, infer_shapes, is_constant, open_editor, save_model
from edgeq.errors import ConversionError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["HalfType", "to_half"]

_LEAST_HALF = 2.0**-24  # the least of float16 that is not zero

HalfType = Literal["float16", "bfloat16"]

# Sums of squares and of many elements, exponentials and their inverses: beyond 65,504 or below 6e-8 in FP16.
_OVERFLOWS = """
    CumSum Exp Log LogSoftmax LpNormalization MeanVarianceNormalization Pow Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMean ReduceProd ReduceSum ReduceSumSquare Softmax Softplus Sqrt
"""
# Counting in halves goes wrong above 2,048; these make indices, coordinates, or constants whose type is an attribute.
_COUNTS = """
    Bernoulli ConstantOfShape DeformConv EyeLike GridSample Multinomial NonMaxSuppression RandomNormal RandomNormalLike
    RandomUniform RandomUniformLike Range Resize RoiAlign STFT DFT TopK Unique Upsample
"""
# Grids for integers and FP8: scales in halves exist since opset 19.
_GRIDS = frozenset({"DequantizeLinear", "QuantizeLinear"})
_GRIDS_SINCE = 19
_KEPT = frozenset((_OVERFLOWS + _COUNTS).split()) | {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}


def to_half(
    model: Path, out: Path, *, dtype: HalfType = "float16", keep_float: Set[str] = frozenset()
) -> tuple[str, ...]:
    """Write a model that computes in 16 bits; a QDQ model keeps its grids, with scales in 16 bits.

    Args:
        model: floats, or a QDQ graph made for TensorRT.
        out: is written; weights beside it if they are large.
        dtype: ``"float16"`` or ``"bfloat16"``.
        keep_float: names of nodes that stay float32.

    Returns:
        Notes: what was cut to the largest number of the type.

    Raises:
        ConversionError: control flow, a value whose type cannot be inferred, or names that no node has.
        SourceError: no sound ONNX file.
    """
    editor = open_editor(model)
    unknown = sorted(set(keep_float) - {node.name for node in editor.graph if node.name})
    if unknown:
        raise ConversionError(f"No node is named {', '.join(map(repr, unknown[:5]))}", "Name nodes as they are listed")
    infer_shapes(editor)
    halver = _Halver(editor, dtype, keep_float)
    for node in tuple(editor.graph):
        halver.convert(node)
    halver.outputs()
    # Declared types of values that moved would contradict their operators; they follow from those anyway.
    for value in [value for node in editor.graph for value in node.outputs if not value.is_graph_output()]:
        value.type, value.shape = None, None
    save_model(editor, out)
    if not halver.cut:
        return ()
    return (f"{len(halver.cut)} constants beyond {dtype} were cut to its largest number, such as {halver.cut[0]!r}",)


@dataclasses.dataclass
class _Halver:
    """Goes through the nodes in order and keeps one cast of each value."""

    editor: Editor
    dtype: HalfType
    keep_float: Set[str]
    cut: list[str] = dataclasses.field(default_factory=list)
    casts: dict[tuple[ir.Value, bool], ir.Value] = dataclasses.field(default_factory=dict)
    halves: set[ir.Value] = dataclasses.field(default_factory=set)

    @property
    def half(self) -> ir.DataType:
        import onnx_ir as ir

        return ir.DataType.FLOAT16 if self.dtype == "float16" else ir.DataType.BFLOAT16

    def convert(self, node: ir.Node) -> None:
        """Let a node read and make halves, or floats if it must."""
        import onnx_ir as ir

        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise ConversionError(f"{node.op_type} {node.name!r} is control flow", "Keep the model in float32")
        wanted = self._is_half(node)
        if node.op_type == "Cast" and node.domain == "":
            self._recast(node, wanted)
            return
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if is_constant(value) or value in self.halves or self._is_float(value, node):
                node.replace_input_with(index, self._as(value, wanted, node))
        for value in node.outputs:
            if self._is_float(value, node) and wanted:
                value.dtype = self.half
                self.halves.add(value)

    def _is_half(self, node: ir.Node) -> bool:
        if node.name in self.keep_float:
            return False
        if node.domain != "":
            return False
        if node.op_type in _GRIDS:
            return self.editor.opset >= _GRIDS_SINCE
        return node.op_type not in _KEPT

    def _is_float(self, value: ir.Value, node: ir.Node) -> bool:
        import onnx_ir as ir

        if value.dtype is None and (value.uses() or value.is_graph_output()):
            raise ConversionError(
                f"The type of {value.name!r} at {node.op_type} {node.name!r} cannot be inferred",
                "Keep the model in float32, or export it with standard operators",
            )
        return value.dtype == ir.DataType.FLOAT and value not in self.halves

    def _recast(self, node: ir.Node, wanted: bool) -> None:
        """A cast to floats makes halves directly; any other reads what there is."""
        import onnx_ir as ir

        to = node.attributes["to"].as_int()
        if to == ir.DataType.FLOAT.value and wanted:
            node.attributes["to"] = ir.AttrInt64("to", self.half.value)
            node.outputs[0].dtype = self.half
            self.halves.add(node.outputs[0])

    def _as(self, value: ir.Value, half: bool, reader: ir.Node) -> ir.Value:
        """A value as halves or as floats, by a cast if it is not."""
        import onnx_ir as ir

        if value.dtype not in (ir.DataType.FLOAT, self.half) or (value in self.halves) == half:
            return value
        key = (value, half)
        if key not in self.casts:
            self.casts[key] = self._made(value, half, reader)
        return self.casts[key]

    def _made(self, value: ir.Value, half: bool, reader: ir.Node | None) -> ir.Value:
        import onnx_ir as ir

        dtype = self.half if half else ir.DataType.FLOAT
        name = f"{value.name}_{'half' if half else 'float'}"
        array = array_of(value)
        if array is not None and half:
            self._refuse_vanishing(value, array, reader)
            made = self.editor.constant(name, self._rounded(array, value.name or ""), dtype)
        else:
            cast = self.editor.node("Cast", [value], name, before=reader, attributes={"to": dtype.value}, like=value)
            made = cast.outputs[0]
            made.type = ir.TensorType(dtype)
        if half:
            self.halves.add(made)
        return made

    def _refuse_vanishing(self, value: ir.Value, array: NDArray[Any], reader: ir.Node | None) -> None:
        """A scale of zero would make every number of its tensor zero."""
        is_scale = reader is not None and reader.op_type in _GRIDS and value in reader.inputs[1:2]
        if is_scale and self.dtype == "float16" and ((array != 0) & (np.abs(array) < _LEAST_HALF)).any():
            raise ConversionError(
                f"The scale {value.name!r} is {float(np.abs(array).min()):.2g}, which is nothing in FP16",
                "Keep what it rounds in floats, or check the weights: signals of that size are dead",
            )

    def _rounded(self, array: NDArray[Any], name: str) -> NDArray[Any]:
        import ml_dtypes

        if self.dtype == "bfloat16":
            return array.astype(ml_dtypes.bfloat16)
        largest = float(np.finfo(np.float16).max)
        beyond = np.isfinite(array) & (np.abs(array) > largest)
        if beyond.any():
            self.cut.append(name)
            array = np.where(beyond, np.copysign(np.float32(largest), array), array)
        return array.astype(np.float16)

    def outputs(self) -> None:
        """Give what leaves the graph the type that it had."""
        for value in tuple(self.editor.graph.outputs):
            if value in self.halves:
                made = self._made(value, False, None)
                cast = made.producer()
                self.editor.replace(value, made)
                if cast is not None:  # `replace` has turned the cast upon itself
                    cast.replace_input_with(0, value)
