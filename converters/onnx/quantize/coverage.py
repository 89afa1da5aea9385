"""What of a model is truly quantized: counted in the graph that the runtime executes, not in the one that was written.

A recipe can leave every linear in floats without a word, when the patterns it writes are none that the runtime fuses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.converters.onnx.quantize.graph import attribute_int, infer_shapes, is_constant, open_editor, sizes_of
from edgeq.errors import ConversionError, SessionError, SourceError
from edgeq.profiles.onnx.session import import_onnxruntime, onnx_session_options, start_session
from edgeq.tensor_types import FLOAT_SCHEMES, Coverage, NodeGroup

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["coverage", "require_coverage", "write_executed"]

# Where the weight stands among the inputs of a product, in the standard and in ONNX Runtime's domains.
_WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "Attention": (1,),
    "Conv": (1,),
    "ConvInteger": (1,),
    "ConvTranspose": (1,),
    "DynamicQuantizeLSTM": (1, 2),
    "DynamicQuantizeMatMul": (1,),
    "FusedConv": (1,),
    "FusedGemm": (0, 1),
    "FusedMatMul": (0, 1),
    "GRU": (1, 2),
    "Gemm": (0, 1),
    "LSTM": (1, 2),
    "MatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "MatMulNBits": (1,),
    "NhwcFusedConv": (1,),
    "QAttention": (1,),
    "QGemm": (0, 3),
    "QLinearConv": (3,),
    "QLinearMatMul": (0, 3),
    "RNN": (1, 2),
}
_INT8 = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QAttention",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
# Two matrices, of which either may be the weight.
_MATRICES = frozenset(
    {
        "DynamicQuantizeMatMul",
        "FusedGemm",
        "FusedMatMul",
        "Gemm",
        "MatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearMatMul",
    }
)
_CONVOLUTIONS = frozenset({"Conv", "ConvInteger", "FusedConv", "NhwcFusedConv", "QLinearConv"})
# What a weight may lie behind.
_FORMS = frozenset({"Cast", "DequantizeLinear", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "ReorderInput"})
# They keep the shape of their first input.
_ROUNDING = frozenset({"Cast", "DequantizeLinear", "DynamicQuantizeLinear", "Identity", "QuantizeLinear"})
_NAMED = 8  # nodes that an error names


@dataclasses.dataclass(frozen=True)
class _Counted:
    name: str
    op_type: str
    precision: str
    weights: int
    weight_bytes: int
    macs: int


def write_executed(
    model: Path,
    out: Path,
    *,
    dims: Mapping[str, int] | None = None,
    disabled_optimizers: Sequence[str] = (),
    signed: bool = False,
) -> None:
    """Write the graph that ONNX Runtime's CPU provider executes, with the sizes of its values.

    Args:
        model: any ONNX file.
        out: is written.
        dims: sizes of dynamic axes.
        disabled_optimizers: as the session will have them.
        signed: as a session on ARM, which computes on signed activations too.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        ConversionError: ONNX Runtime cannot load the model.
    """
    ort = import_onnxruntime()
    options = onnx_session_options(1, dims=dims)
    options.optimized_model_filepath = str(out)
    # The last level only lays out tensors for this very CPU; what is quantized is decided before.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    if signed:
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{out.name}.data")
    try:
        start_session(model, options, disabled_optimizers=disabled_optimizers)
    except SessionError as error:
        cause = error.cause.replace(str(model), model.name)[:300]
        raise ConversionError(cause, "Export the model again") from error


def coverage(
    model: Path,
    *,
    executed: Path | None,
    dims: Mapping[str, int] | None = None,
) -> Coverage:
    """What of a model's weights and multiply-adds is quantized.

    Nodes in the bodies of If, Loop and Scan count as if they ran once; where their sizes are not known, once for each
    weight.

    Args:
        model: the written file; counted itself if ``executed`` is None, as TensorRT executes its Q and DQ.
        executed: what `write_executed` wrote.
        dims: sizes of dynamic axes; an axis that is not named counts once.

    Raises:
        MissingPackageError: onnx_ir is not installed.
        SourceError: no sound ONNX file.
        ConversionError: no product with weights.
    """
    written = open_editor(model)
    infer_shapes(written)
    # What is fused makes a value of the same name, and of what no standard operator makes only this file says sizes.
    shapes = {
        value.name: _sizes(value, dims or {})
        for node in written.graph.all_nodes()
        for value in node.outputs
        if value.shape is not None
    }
    graph = written.graph
    if executed is not None:
        run = open_editor(executed)
        infer_shapes(run)
        graph = run.graph
    counted = [
        found
        for node in graph.all_nodes()
        if (found := _count(node, shapes, executed is None, body=node.graph is not graph)) is not None
    ]
    if not counted:
        raise ConversionError(f"{model.name} holds no matrix product or convolution with weights", "Ship it as it is")
    weights, macs = sum(c.weights for c in counted), sum(c.macs for c in counted)
    names = {node.name for node in written.graph.all_nodes() if node.name}
    small = [c for c in counted if c.precision not in FLOAT_SCHEMES]
    left = sorted((c for c in counted if c.precision in FLOAT_SCHEMES), key=lambda c: (-c.macs, c.name))
    return Coverage(
        weight_share=sum(c.weights for c in small) / weights,
        mac_share=sum(c.macs for c in small) / macs if macs else 0.0,
        groups=_groups(counted),
        left=tuple(_written_name(c.name, names) for c in left),
    )


def require_coverage(found: Coverage, least: float = 0.9) -> None:
    """Refuse a model of which too much stayed in floats.

    Args:
        found: of the model.
        least: share of weights and of multiply-adds that must be quantized.

    Raises:
        ConversionError: less is; it names the nodes.
    """
    share = min(found.weight_share, found.mac_share)
    if share >= least:
        return
    named = ", ".join(found.left[:_NAMED]) + (
        f" and {len(found.left) - _NAMED} more" if len(found.left) > _NAMED else ""
    )
    raise ConversionError(
        f"Only {found.weight_share:.0%} of the weights and {found.mac_share:.0%} of the multiply-adds are quantized "
        f"in the graph that is executed; floats stayed in {named}",
        "Ask for mixed precision to keep them so, or choose another scheme",
        details=found.left,
    )


def _written_name(name: str, names: Set[str]) -> str:
    """A node's name before fusions added theirs to it, behind slashes."""
    short = name
    while short not in names and "/" in short:
        short = short.rpartition("/")[0]
    return short if short in names else name


def _groups(counted: Sequence[_Counted]) -> tuple[NodeGroup, ...]:
    keys = sorted({(c.op_type, c.precision) for c in counted})
    groups = []
    for op_type, precision in keys:
        members = [c for c in counted if (c.op_type, c.precision) == (op_type, precision)]
        groups.append(
            NodeGroup(
                op_type=op_type,
                precision=precision,
                nodes=len(members),
                macs=sum(c.macs for c in members),
                weight_bytes=sum(c.weight_bytes for c in members),
            )
        )
    return tuple(sorted(groups, key=lambda g: -g.macs))


def _count(
    node: ir.Node, shapes: Mapping[str | None, tuple[int, ...]], explicit: bool, *, body: bool
) -> _Counted | None:
    """A node's weights and multiply-adds; None if it is no product with weights."""
    places = [i for i in _WEIGHTS.get(node.op_type, ()) if i < len(node.inputs)]
    sources = {i: found for i in places if (found := _weight_behind(node.inputs[i])) is not None}
    if not sources:
        return None
    weights = sum(_elements(node, source) for source in sources.values())
    if node.op_type in _MATRICES:
        place, source = max(sources.items())
        macs = _matrix_macs(node, place, source, shapes)
    else:
        positions = _positions(node, shapes)
        macs = None if positions is None else weights * positions
    if macs is None and body:
        macs = weights  # shapes are not inferred into every body
    if macs is None:
        raise SourceError(f"The shape at {node.op_type} {node.name!r} is not known", "Give sizes for all dynamic axes")
    return _Counted(
        name=node.name or node.op_type,
        op_type=node.op_type,
        precision=_precision(node, min(sources), explicit),
        weights=weights,
        weight_bytes=sum(source.const_value.nbytes for source in sources.values() if source.const_value is not None),
        macs=macs,
    )


def _matrix_macs(
    node: ir.Node, place: int, weight: ir.Value, shapes: Mapping[str | None, tuple[int, ...]]
) -> int | None:
    """Multiply-adds of a product of two matrices: elements of what it makes, times the axis that is summed over."""
    left = place == 0
    given = sizes_of(node.inputs[place])
    known = tuple(size or 0 for size in (given if given and None not in given else sizes_of(weight)) or ())
    transposed = attribute_int(node, "transA" if left else "transB", 0) != 0
    depth = known[-1 if left != transposed else -2]
    made = _known(node.outputs[0], shapes)
    if made is not None:
        return math.prod(made) * depth
    other = _before(node.inputs[_WEIGHTS[node.op_type][-1] if left else 0], shapes)
    # Every row (or column) of what it reads meets one matrix of weights.
    return None if other is None else math.prod(other) // max(depth, 1) * math.prod(known[-2:])


def _elements(node: ir.Node, weight: ir.Value) -> int:
    if node.op_type == "MatMulNBits":
        return attribute_int(node, "K", 0) * attribute_int(node, "N", 0)
    return math.prod(size or 0 for size in sizes_of(weight) or ())


def _weight_behind(value: ir.Value | None) -> ir.Value | None:
    """The initializer that a value is, or is made of by nodes that change its form alone."""
    while value is not None and not is_constant(value):
        maker = value.producer()
        if maker is None or maker.op_type not in _FORMS:
            return None
        value = maker.inputs[0]
    if value is None or len(sizes_of(value) or ()) < 2:
        return None
    return value


def _precision(node: ir.Node, place: int, explicit: bool) -> str:
    """What a node computes in. Behind explicit Q and DQ, TensorRT computes in what is dequantized on both sides."""
    import onnx_ir as ir

    if node.op_type in _INT8:
        return "int8"
    if node.op_type == "MatMulNBits":
        return f"int{attribute_int(node, 'bits', 4)}"
    if explicit:
        types = [_dequantized_from(value) for value in node.inputs[:2]]
        if all(t in (ir.DataType.INT8, ir.DataType.UINT8) for t in types):
            return "int8"
        if all(t == ir.DataType.FLOAT8E4M3FN for t in types):
            return "fp8"
        if types[1] in (ir.DataType.INT4, ir.DataType.UINT4):
            return "int4"
    weight = node.inputs[place]
    halves = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
    return "fp32" if weight is None or weight.dtype is None else halves.get(weight.dtype, "fp32")


def _dequantized_from(value: ir.Value | None) -> ir.DataType | None:
    maker = None if value is None else value.producer()
    if maker is None or maker.op_type != "DequantizeLinear" or maker.inputs[0] is None:
        return None
    source = maker.inputs[0]
    if source.dtype is None and (quantize := source.producer()) is not None and len(quantize.inputs) > 2:
        zero = quantize.inputs[2]
        return None if zero is None else zero.dtype
    return source.dtype


def _sizes(value: ir.Value, dims: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else dims.get(str(dim.value), 1) for dim in value.shape or ())


def _known(value: ir.Value, shapes: Mapping[str | None, tuple[int, ...]]) -> tuple[int, ...] | None:
    if value.name in shapes:
        return shapes[value.name]
    return None if value.shape is None else _sizes(value, {})


def _positions(node: ir.Node, shapes: Mapping[str | None, tuple[int, ...]]) -> int | None:
    """By how many rows or pixels every weight is multiplied; None if sizes are not known."""
    source = node.inputs[0] if node.op_type == "ConvTranspose" else node.outputs[0]
    sizes = None if source is None else _known(source, shapes)
    if sizes is None and node.op_type not in _CONVOLUTIONS:
        sizes = _before(node.inputs[0], shapes)  # a product has as many rows as what it reads
    if sizes is None:
        return None
    if node.op_type in _CONVOLUTIONS or node.op_type == "ConvTranspose":
        return math.prod((sizes[0], *sizes[2:]))
    return math.prod(sizes[:-1])


def _before(value: ir.Value | None, shapes: Mapping[str | None, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The sizes of a value, or of what it was rounded from: operators of ONNX Runtime's own have none in the file."""
    while value is not None:
        if value.name in shapes:
            return shapes[value.name]
        maker = value.producer()
        if maker is None or maker.op_type not in _ROUNDING:
            return None
        value = maker.inputs[0]
    return None
