"""What can be quantized in a graph, and how: products with weights, and light operators that have integer kernels."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.converters.onnx.quantize.graph import (
    Editor,
    array_of,
    attribute_float,
    attribute_int,
    attribute_ints,
    is_constant,
    open_editor,
    sizes_of,
    sole_reader,
)

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "INTEGER_LIGHT",
    "INTEGER_SAME",
    "NodeSite",
    "Product",
    "activation_after",
    "bias_behind",
    "clip_bounds",
    "editor_products",
    "has_dilations",
    "is_same_scale",
    "light_inputs",
    "product_of",
    "quantizable",
    "work_of",
]

# ONNX Runtime's CPU kernels that compute on integers with scales of their own for each input and output.
INTEGER_LIGHT = frozenset({"Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid"})
# These only move or choose elements, so that input and output share one scale.
INTEGER_SAME = frozenset(
    {"Flatten", "MaxPool", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or convolution with a constant weight.

    Attributes:
        node: of the graph.
        activation: the input that changes with each call.
        weight: the constant one, of two axes or more.
        axis: of the weight's output channels.
        bias: a constant vector that the operator itself adds; None if it has none.
    """

    node: ir.Node
    activation: ir.Value
    weight: ir.Value
    axis: int
    bias: ir.Value | None

    @property
    def name(self) -> str:
        """Of the node."""
        return self.node.name or ""


@dataclasses.dataclass(frozen=True)
class NodeSite:
    """A node that can be quantized.

    Attributes:
        name: of the node.
        op_type: ``"Conv"``, ``"Gemm"`` or ``"MatMul"``.
        activation: name of its input.
        output: name of its output.
        weight: name of its weight.
        weight_shape: sizes of the weight's axes.
        macs: multiply-adds for each call; None if sizes are not known.
    """

    name: str
    op_type: str
    activation: str
    output: str
    weight: str
    weight_shape: tuple[int, ...]
    macs: int | None

    @property
    def weights(self) -> int:
        """How many there are."""
        return math.prod(self.weight_shape)


def quantizable(model: Path) -> tuple[NodeSite, ...]:
    """The nodes of a model that hold weights and can compute in 8 bits, in the graph's order.

    Raises:
        MissingPackageError: onnx_ir is not installed.
        SourceError: no sound ONNX file.
    """
    editor = open_editor(model)
    return tuple(_site(product) for node in editor.nodes() if (product := product_of(node)) is not None)


def product_of(node: ir.Node) -> Product | None:
    """A node as a product with weights; None if it is none, or one that no integer kernel computes.

    Weights must be floats; a Gemm must not scale or transpose what changes, and its bias must be a vector.
    """
    if node.domain != "" or len(node.inputs) < 2:
        return None
    activation, weight = node.inputs[0], node.inputs[1]
    if activation is None or weight is None or is_constant(activation) or not _is_float_weight(weight):
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    axis = _output_axis(node, weight, bias)
    return None if axis is None else Product(node, activation, weight, axis, bias)


def _output_axis(node: ir.Node, weight: ir.Value, bias: ir.Value | None) -> int | None:
    """The weight's axis of output channels; None if the node is no such product."""
    shape = sizes_of(weight) or ()
    if bias is not None and (not is_constant(bias) or len(sizes_of(bias) or ()) != 1):
        return None
    if node.op_type == "Conv":
        return 0 if len(shape) >= 3 else None
    if len(shape) != 2 or node.op_type not in ("Gemm", "MatMul"):
        return None
    axis = 0 if attribute_int(node, "transB", 0) else 1
    plain = attribute_float(node, "alpha", 1.0) == 1.0 and attribute_int(node, "transA", 0) == 0
    if bias is not None:
        plain = plain and attribute_float(node, "beta", 1.0) == 1.0 and sizes_of(bias) == (shape[axis],)
    return axis if plain else None


def _is_float_weight(value: ir.Value) -> bool:
    import onnx_ir as ir

    return is_constant(value) and value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT


def work_of(product: Product) -> int:
    """Multiply-adds; as many as weights where sizes are not known."""
    return _macs(product) or math.prod(size or 0 for size in sizes_of(product.weight) or ())


def _macs(product: Product) -> int | None:
    shape = tuple(size or 0 for size in sizes_of(product.weight) or ())
    made = sizes_of(product.node.outputs[0])
    if made is None or any(size is None for size in made):
        return None
    return math.prod(size or 0 for size in made) // max(shape[product.axis], 1) * math.prod(shape)


def _site(product: Product) -> NodeSite:
    node = product.node
    shape = tuple(size or 0 for size in sizes_of(product.weight) or ())
    return NodeSite(
        name=product.name,
        op_type=node.op_type,
        activation=product.activation.name or "",
        output=node.outputs[0].name or "",
        weight=product.weight.name or "",
        weight_shape=shape,
        macs=_macs(product),
    )


def activation_after(node: ir.Node) -> ir.Node | None:
    """The Relu or Clip that alone reads a node's output and that a grid of integers can take over.

    Such a grid ends at 0 or at the Clip's bounds, and rounding saturates there.
    """
    reader = sole_reader(node.outputs[0])
    if reader is None or reader.domain != "" or reader.graph is not node.graph:
        return None
    if reader.op_type == "Relu":
        return reader
    if reader.op_type != "Clip" or reader.inputs[0] is not node.outputs[0]:
        return None
    low, high = clip_bounds(reader)
    return reader if low is not None and high is not None and low <= 0.0 <= high else None


def clip_bounds(node: ir.Node) -> tuple[float | None, float | None]:
    """What a Relu or Clip limits to; None where a bound is computed or, of a Clip, both are missing."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    bounds: list[float | None] = []
    for index, default in ((1, float("-inf")), (2, float("inf"))):
        given = node.inputs[index] if len(node.inputs) > index else None
        array = array_of(given)
        bounds.append(default if given is None else None if array is None else float(array.reshape(-1)[0]))
    return bounds[0], bounds[1]


def is_same_scale(node: ir.Node) -> bool:
    """Whether a node only moves or chooses elements, so that integers pass through it as they are."""
    if node.domain != "" or node.op_type not in INTEGER_SAME:
        return False
    if node.op_type == "Resize":
        mode = node.attributes.get("mode")
        return mode is None or mode.as_string() == "nearest"
    if node.op_type == "MaxPool":
        return len(node.outputs) == 1
    return True


def light_inputs(node: ir.Node) -> tuple[ir.Value, ...]:
    """Inputs of a light operator that are put on grids; empty if it cannot compute on integers here.

    Constants as factors or summands are left to the float kernel: there is one where exporters write scalars.
    """
    if node.domain != "" or node.op_type not in INTEGER_LIGHT:
        return ()
    given = [value for value in node.inputs if value is not None]
    if any(is_constant(value) for value in given) or len(given) != len(node.inputs):
        return ()
    if node.op_type == "AveragePool" and (attribute_int(node, "ceil_mode", 0) or has_dilations(node)):
        return ()
    return tuple(given)


def has_dilations(node: ir.Node) -> bool:
    """Whether a node is a mean over scattered pixels (opset 19), which ONNX Runtime's integer kernel does not know.

    The runtime puts that kernel between any two grids all the same, and then refuses the graph.
    """
    steps = attribute_ints(node, "dilations") if node.op_type == "AveragePool" and node.domain == "" else None
    return any(step != 1 for step in steps or ())


def bias_behind(product: Product) -> tuple[ir.Node, ir.Value] | None:
    """The Add of a constant vector that alone reads what a MatMul makes, and that vector."""
    value = product.node.outputs[0]
    after = sole_reader(value)
    if after is None or after.op_type != "Add" or after.domain != "" or after.graph is not product.node.graph:
        return None
    other = after.inputs[1] if after.inputs[0] is value else after.inputs[0]
    columns = (sizes_of(product.weight) or (0,))[product.axis]
    return (after, other) if other is not None and is_constant(other) and sizes_of(other) == (columns,) else None


def editor_products(editor: Editor) -> dict[ir.Node, Product]:
    """All products with weights, by node, in the graph's order."""
    found = {}
    for node in editor.nodes():
        product = product_of(node)
        if product is not None:
            found[node] = product
    return found
