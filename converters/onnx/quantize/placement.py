"""Where quantization goes in a graph: which nodes compute on integers, and which values are put on a grid for whom.

Two schools. ONNX Runtime's CPU kernels take integers and give integers: a node becomes one of them when its inputs and
its output all go through a grid, so that grids chain from convolution to convolution and through the light operators
between them (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). TensorRT wants a grid at
the inputs of products only, none at their outputs, and at the one branch of a residual sum that no convolution is fused
with (https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING

from edgeq.converters.onnx.quantize.graph import Editor, sole_reader
from edgeq.converters.onnx.quantize.sites import (
    Product,
    activation_after,
    clip_bounds,
    editor_products,
    has_dilations,
    is_same_scale,
    light_inputs,
)

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Placement", "Point", "place_for_cpu", "place_for_tensorrt"]


@dataclasses.dataclass(frozen=True)
class Point:
    """A value that is put on a grid.

    Attributes:
        value: it.
        root: the value whose range decides the grid: itself, or what a chain of moving operators began with.
        readers: nodes that take the value from the grid; None for all, and for the graph's output.
        folded: a Relu or Clip that makes the value and that the grid takes over.
        fixed: a range that is known without calibration.
    """

    value: ir.Value
    root: ir.Value
    readers: tuple[ir.Node, ...] | None
    folded: ir.Node | None = None
    fixed: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Placement:
    """What of a graph is quantized.

    Attributes:
        products: whose weights become integers.
        points: values on grids, in the graph's order; each value once.
    """

    products: tuple[Product, ...]
    points: tuple[Point, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of values whose ranges must be known, each once."""
        names = [point.root.name or "" for point in self.points if _root(self, point).fixed is None]
        return tuple(dict.fromkeys(names))

    def limits(self, point: Point) -> tuple[float, float] | None:
        """The bounds that a folded Relu or Clip sets to the range of a point; None if there is none."""
        folded = _root(self, point).folded
        if folded is None:
            return None
        low, high = clip_bounds(folded)
        return (float("-inf") if low is None else low, float("inf") if high is None else high)

    def fixed(self, point: Point) -> tuple[float, float] | None:
        """The range of a point if it is known without calibration."""
        return _root(self, point).fixed


def _root(placement: Placement, point: Point) -> Point:
    if point.root is point.value:
        return point
    return next((other for other in placement.points if other.value is point.root), point)


def place_for_tensorrt(editor: Editor, keep_float: Set[str], *, residuals: bool = True) -> Placement:
    """Grids at the inputs of products.

    Args:
        editor: of the model.
        keep_float: names of nodes that stay as they are.
        residuals: whether the other branch of a sum that a convolution is fused with goes on a grid too.
    """
    products = {n: p for n, p in editor_products(editor).items() if n.name not in keep_float}
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node, product in products.items():
        readers.setdefault(product.activation, []).append(node)
    if residuals:
        for node in editor.nodes("Add"):
            branch = None if node.name in keep_float else _residual_branch(node, products)
            if branch is not None:
                readers.setdefault(branch, []).append(node)
    points = [Point(value, value, tuple(nodes)) for value, nodes in readers.items()]
    return Placement(tuple(products.values()), tuple(points))


def _residual_branch(node: ir.Node, products: Mapping[ir.Node, Product]) -> ir.Value | None:
    """Of a sum with a convolution that nothing else reads, the other summand."""
    first, second = node.inputs
    if first is None or second is None or first is second:
        return None
    for value, other in ((first, second), (second, first)):
        maker = value.producer()
        fused = maker in products and maker is not None and maker.op_type == "Conv" and sole_reader(value) is node
        if fused and other.producer() is not None:
            return other
    return None


def place_for_cpu(editor: Editor, keep_float: Set[str]) -> Placement:
    """Grids from convolution to convolution, and at the inputs of matrix products.

    Args:
        editor: of the model.
        keep_float: names of nodes that stay as they are.
    """
    products = {n: p for n, p in editor_products(editor).items() if n.name not in keep_float}
    made: dict[ir.Value, Point] = {}
    integers: dict[ir.Node, tuple[ir.Value, ...]] = {}
    floats = {node.inputs[0] for node in editor.graph if has_dilations(node)}
    for node in tuple(editor.graph):
        if node.name in keep_float:
            continue
        if node in products:
            integers[node] = (products[node].activation,)
            if node.op_type == "Conv" or _feeds_products(node, products):
                _emit(node, made, floats)
        elif is_same_scale(node) and node.inputs[0] in made:
            source = made[node.inputs[0]]
            integers[node] = (source.value,)
            for value in node.outputs:
                if value not in floats:
                    made[value] = Point(value, source.root, None)
        elif (inputs := light_inputs(node)) and all(value in made for value in inputs):
            integers[node] = inputs
            _emit(node, made, floats)
    taken: dict[ir.Value, list[ir.Node]] = {}
    for node, inputs in integers.items():
        for value in inputs:
            if value not in made:
                taken.setdefault(value, []).append(node)
    points = [Point(value, value, tuple(nodes)) for value, nodes in taken.items()]
    return Placement(tuple(products.values()), (*points, *made.values()))


def _emit(node: ir.Node, made: dict[ir.Value, Point], floats: Set[ir.Value | None]) -> None:
    """Put a node's output on a grid, behind the Relu or Clip that follows it, unless it must stay in floats."""
    after = activation_after(node)
    value = node.outputs[0] if after is None else after.outputs[0]
    if value in floats:
        return
    fixed = (0.0, 1.0) if node.op_type == "Sigmoid" and after is None else None
    made[value] = Point(value, value, None, after, fixed)


def _feeds_products(node: ir.Node, products: Mapping[ir.Node, Product]) -> bool:
    """Whether all that reads a Gemm, behind its activation, are products: only then integers come out of it too."""
    if node.op_type != "Gemm":
        return False
    after = activation_after(node)
    value = node.outputs[0] if after is None else after.outputs[0]
    readers = value.consumers()
    return bool(readers) and not value.is_graph_output() and all(reader in products for reader in readers)
