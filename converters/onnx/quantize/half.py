"""FP16 and BF16: weights and most of the arithmetic in 16 bits, inputs and outputs as they were.

What overflows or rounds away in 16 bits stays float32, between casts: sums over many elements, exponentials, powers and
whatever is computed from indices. Matrix products, convolutions and LayerNormalization accumulate in float32 inside the
kernels themselves (TensorRT, CUDA), so that their inputs and outputs may be halves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.quantize.graph import Editor, array_of, infer_shapes, is_constant, open_editor, save_model
from edgeq.converters.onnx.quantize.half_kinds import FLOAT16, HalfKind
from edgeq.converters.onnx.quantize.half_scales import GRIDS, fine_grids, refit_channels, with_their_grids
from edgeq.converters.onnx.quantize.indices import precise_nodes
from edgeq.converters.onnx.quantize.sites import editor_products, work_of
from edgeq.converters.onnx.quantize.tiny import tiny_numbers
from edgeq.converters.onnx.quantize.type_check import require_types, takes_halves
from edgeq.errors import ConversionError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["to_half"]

_MOST_LOST = 0.5  # of the multiply-adds, that may stay in floats because their operators do not take the type
_RAISED_FROM = 20
_IR_VERSION = 10  # of ONNX files with the opset that takes BF16

# Sums of squares and of many elements, exponentials and their inverses: beyond 65,504 or below 6e-8 in FP16.
_OVERFLOWS = """
    CumSum Exp Log LogSoftmax LpNormalization MeanVarianceNormalization Pow Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMean ReduceProd ReduceSum ReduceSumSquare Softmax Softplus Sqrt
"""
# Counting in FP16 goes wrong above 2,048, in BF16 above 256; these make indices, coordinates, or constants whose type
# is an attribute.
_COUNTS = """
    Bernoulli BlackmanWindow ConstantOfShape DeformConv EyeLike GridSample HammingWindow HannWindow MelWeightMatrix
    Multinomial NonMaxSuppression RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Resize RoiAlign
    STFT DFT TopK Unique Upsample
"""
_KEPT = frozenset((_OVERFLOWS + _COUNTS).split()) | {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}


def to_half(
    model: Path,
    out: Path,
    *,
    kind: HalfKind = FLOAT16,
    keep_float: Set[str] = frozenset(),
    newest_opset: int | None = None,
) -> tuple[str, ...]:
    """Write a model that computes in 16 bits; a QDQ model keeps its grids, with scales in 16 bits if that is FP16.

    Args:
        model: floats, or a QDQ graph made for TensorRT.
        out: is written; weights beside it if they are large.
        kind: the type.
        keep_float: names of nodes that stay float32, with the grids that they read.
        newest_opset: that the target takes, up to which the opset is raised if more operators then take the type; None
            for any.

    Returns:
        Notes: what was cut to the largest number of the type, and what stays float32 for numbers that are too small or
            because its operator does not take the type.

    Raises:
        ConversionError: control flow, a value whose type cannot be inferred, names that no node has, products that
            all take no such halves, or a graph that ONNX's own rules refuse.
        SourceError: no sound ONNX file.
    """
    editor = open_editor(model)
    unknown = sorted(set(keep_float) - {node.name for node in editor.graph if node.name})
    if unknown:
        raise ConversionError(f"No node is named {', '.join(map(repr, unknown[:5]))}", "Name nodes as they are listed")
    _raise_opset(editor, kind.opset, newest_opset)
    infer_shapes(editor)
    kept = with_their_grids(node for node in editor.graph if node.name in keep_float)
    if kind.has_float_range:  # eight bits of a scale's digits would move the whole grid
        halver = _Halver(editor, kind, kept, with_their_grids(editor.nodes(*GRIDS)), {}, precise_nodes(editor))
    else:
        refit_channels(editor)
        no_grids = not takes_halves("DequantizeLinear", editor.opset)
        fine = with_their_grids(editor.nodes(*GRIDS)) if no_grids else fine_grids(editor)
        halver = _Halver(editor, kind, kept, fine, tiny_numbers(editor))
    unable = _unable(halver)
    for node in tuple(editor.graph):
        halver.convert(node)
    halver.outputs()
    # What was declared of values before they moved is no longer of use; it follows from standard operators anyway.
    for value in [v for node in editor.nodes() for v in node.outputs if not v.is_graph_output()]:
        value.type, value.shape = None, None
    save_model(editor, out)
    require_types(out)
    return (*halver.notes(), *unable)


def _unable(halver: _Halver) -> tuple[str, ...]:
    """A note on products whose operators do not take the type in this opset; it is an error if that is most of all."""
    editor, kind = halver.editor, halver.kind
    transposed = editor.nodes("ConvTranspose") if "ConvTranspose" in kind.unbuilt else ()
    work = {node: work_of(product) for node, product in editor_products(editor).items()}
    work |= dict.fromkeys(transposed, 0)
    if kind.has_float_range and not work:
        cause = f"Nothing would compute in {kind.name}: the model has no product with weights in float32"
        raise ConversionError(cause, "Give it in float32, or choose another --precision")
    wanted = [node for node in work if node not in halver.kept]
    unable = [node for node in wanted if not halver.takes(node)]
    if not unable:
        return ()
    first, opset = unable[0], editor.opset
    why = f"{first.op_type} takes no {kind.name} in opset {opset}"
    if first.op_type in kind.unbuilt:
        why = f"TensorRT-RTX does not build {first.op_type} in {kind.name}"
    elif takes_halves(first.op_type, kind.opset, kind.name):
        why = f"{first.op_type} takes {kind.name} from opset {kind.opset} on, and this is {opset}"
    lost, most = sum(work[node] for node in unable), sum(work[node] for node in wanted)
    if lost > _MOST_LOST * most or len(unable) == len(wanted):
        share = f"Only {1 - lost / most:.0%} of the multiply-adds" if lost < most else "Nothing"
        raise ConversionError(f"{share} would compute in {kind.name}: {why}", "Choose --precision fp16")
    return (f"{len(unable)} of {len(wanted)} products compute in float32, such as {first.name!r}: {why}",)


def _raise_opset(editor: Editor, wanted: int, newest: int | None) -> None:
    """From 20 on the opsets up to 22 only let operators take more types.

    GroupNormalization changed, but onnx's checker refuses the old one in opset 20.
    """
    able = newest is None or newest >= wanted
    if not able or not _RAISED_FROM <= editor.opset < wanted:
        return
    editor.model.opset_imports[""] = wanted
    editor.model.ir_version = max(editor.model.ir_version, _IR_VERSION)


@dataclasses.dataclass
class _Halver:
    """Goes through the nodes in order and keeps one cast of each value."""

    editor: Editor
    kind: HalfKind
    kept: Set[ir.Node]  # by the caller's wish
    fine: Set[ir.Node]  # because of their scales
    tiny: Mapping[ir.Node, float]  # because of numbers that they read
    precise: Set[ir.Node] = frozenset()  # because of positions that they compute with
    cut: list[str] = dataclasses.field(default_factory=list)
    casts: dict[tuple[ir.Value, bool], ir.Value] = dataclasses.field(default_factory=dict)
    halves: set[ir.Value] = dataclasses.field(default_factory=set)

    @property
    def half(self) -> ir.DataType:
        return self.kind.dtype

    def convert(self, node: ir.Node) -> None:
        """Let a node read and make halves, or floats if it must."""
        import onnx_ir as ir

        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise ConversionError(f"{node.op_type} {node.name!r} is control flow", "Keep the model in float32")
        wanted = self._is_half(node)
        if node.op_type == "Cast" and node.domain == "":
            self._recast(node, wanted)
            return
        if "Sequence" in node.op_type or node.op_type.startswith("Optional"):
            raise ConversionError(
                f"{node.op_type} {node.name!r} is for other than dense tensors", "Export the model with tensors alone"
            )
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
        if node.domain != "" or any(node in nodes for nodes in (self.kept, self.fine, self.tiny, self.precise)):
            return False
        return node.op_type not in _KEPT and self.takes(node)

    def takes(self, node: ir.Node) -> bool:
        """Whether the operator does."""
        if node.op_type in self.kind.unbuilt:
            return False
        return takes_halves(node.op_type, self.editor.opset, self.kind.name)

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

    def _as(self, value: ir.Value, half: bool, reader: ir.Node | None) -> ir.Value:
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
            made = self.editor.constant(name, self._rounded(array, value.name or ""), dtype)
        else:
            cast = self.editor.node("Cast", [value], name, before=reader, attributes={"to": dtype.value}, like=value)
            made = cast.outputs[0]
            made.type = ir.TensorType(dtype)
        if half:
            self.halves.add(made)
        return made

    def _rounded(self, array: NDArray[Any], name: str) -> NDArray[Any]:
        largest = np.float32(self.kind.largest)
        beyond = np.isfinite(array) & (np.abs(array) > largest)
        if beyond.any():
            if not self.kind.has_float_range:  # BF16 ends within half a percent of float32
                self.cut.append(name)
            array = np.where(beyond, np.copysign(largest, array), array)
        return self.kind.rounded(array)

    def outputs(self) -> None:
        """Give what leaves the graph the type that it had; readers inside keep what they read."""
        graph = self.editor.graph
        for index, value in enumerate(tuple(graph.outputs)):
            if value in self.halves:
                made, name = self._as(value, False, None), value.name or ""
                value.name = self.editor.unique(f"{name}_before")
                made.name = name
                graph.outputs[index] = made

    def notes(self) -> tuple[str, ...]:
        """What a user must know."""
        notes = []
        if self.cut:
            what = "1 constant" if len(self.cut) == 1 else f"{len(self.cut)} constants"
            notes.append(f"{what} beyond {self.kind.name} cut to its largest number, such as {self.cut[0]!r}")
        fine = sorted(node.name or "" for node in self.fine if node.op_type not in GRIDS)
        if fine:
            notes.append(
                f"{len(fine)} nodes read 8 bits but compute in float32, such as {fine[0]!r}: {self._why_fine()}"
            )
        tiny = sorted((node.name or "", number) for node, number in self.tiny.items() if self._halves_else(node))
        if tiny:
            why = f"float16 does not hold {tiny[0][1]:.3g}, which it or what it reads is computed with"
            notes.append(f"{len(tiny)} nodes compute in float32, such as {tiny[0][0]!r}: {why}")
        return tuple(notes)

    def _why_fine(self) -> str:
        if self.kind.has_float_range:
            return f"{self.kind.name} has too few digits for scales"
        if not takes_halves("DequantizeLinear", self.editor.opset):
            return f"its grids take scales in float16 from opset 19 on, the model has {self.editor.opset}"
        return "scales of its grids lie outside of float16's normal numbers"

    def _halves_else(self, node: ir.Node) -> bool:
        """Whether nothing but a tiny number keeps a node in float32."""
        return node not in self.kept and node not in self.fine and node.op_type not in _KEPT
