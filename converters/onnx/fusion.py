"""The fusions that ONNX Runtime makes on a CPU and that change what a call costs or holds.

Known patterns of its optimizer at the level ALL (checked against the graphs that 1.31 writes): a graph is rewritten
until none is left. A fusion that is not known here only makes a prediction a little too high.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

from edgeq.converters.onnx.fusion_graph import Facts, FusionGraph, Made, merged, other_input
from edgeq.converters.onnx.fusion_integers import (
    dynamic_product,
    integer_product,
    moved_bytes,
    quantized_kernel,
    quantized_product,
    reordered_inputs,
    weight_only_product,
)
from edgeq.profiles.onnx.memory import GraphNode

__all__ = ["fuse"]

_PRODUCTS = frozenset({"MatMul", "FusedMatMul"})
_INTEGER_PRODUCTS = frozenset({"MatMulIntegerToFloat", "DynamicQuantizeMatMul"})
# Kernels of convolutions and Gemm apply these themselves.
_ACTIVATIONS = frozenset({"Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"})
_Rule = Callable[[FusionGraph, int, GraphNode], bool]


def fuse(
    ops: Sequence[GraphNode], facts: Facts, *, disabled: Collection[str] = ()
) -> tuple[tuple[GraphNode, ...], dict[str, Made]]:
    """The operators that ONNX Runtime runs instead of these.

    Args:
        ops: in topological order.
        facts: see `Facts`.
        disabled: optimizers of ONNX Runtime that are switched off, by its names.

    Returns:
        The operators in topological order, and weights that they read and the file does not hold.
    """
    graph = FusionGraph(ops, facts)
    for place, written in enumerate(ops):
        reordered_inputs(graph, place, written)
    for stage in _STAGES:
        rules = [rule for rule in stage if _OPTIMIZERS.get(rule) not in disabled]
        changed = True
        while changed:
            changed = False
            for index in sorted(graph.ops):
                op = graph.ops.get(index)
                changed |= op is not None and any(rule(graph, index, op) for rule in rules)
    return tuple(graph.ops[index] for index in sorted(graph.ops)), graph.made


def _product_bias(graph: FusionGraph, index: int, op: GraphNode) -> bool:
    """A bias that the kernel adds: always for integers, for floats when the product can be one of matrices (Gemm)."""
    plain = op.op_type == "MatMul" and graph.facts.is_matrix(op.inputs[1]) and graph.facts.can_flatten(op.inputs[0])
    if not plain and op.op_type not in _INTEGER_PRODUCTS:
        return False
    add = graph.next_of(op, "Add")
    if add is None or not graph.facts.is_bias(other_input(add[1], op.outputs[0])):
        return False
    inputs = (*op.inputs, other_input(add[1], op.outputs[0]))
    graph.replace([index, add[0]], merged(op, add[1], "Gemm" if plain else op.op_type, inputs))
    return True


def _scaled_product(graph: FusionGraph, index: int, op: GraphNode) -> bool:
    """Multiplications by a number before or after a product of floats."""
    if op.op_type not in _PRODUCTS:
        return False
    for name in op.inputs[:2]:
        scale = graph.made_by(name, "Mul", "Div")
        if scale is None or len(scale[1].inputs) != 2:
            continue
        a, b = scale[1].inputs
        number = b if graph.facts.is_scalar(b) else a if scale[1].op_type == "Mul" else ""
        if number and graph.facts.is_scalar(number):
            source = other_input(scale[1], number)
            inputs = tuple(source if i == name else i for i in op.inputs)
            graph.replace([scale[0], index], merged(op, op, "FusedMatMul", inputs))
            return True
    after = graph.next_of(op, "Mul", "Div")
    if after is None:
        return False
    number = other_input(after[1], op.outputs[0])
    if not graph.facts.is_scalar(number) or (after[1].op_type == "Div" and after[1].inputs[1] != number):
        return False
    graph.replace([index, after[0]], merged(op, after[1], "FusedMatMul", op.inputs))
    return True


def _erf_gelu(graph: FusionGraph, index: int, op: GraphNode) -> bool:
    """GELU as exporters before opset 20 wrote it: x / sqrt(2), Erf, + 1, * x, * 0.5 (or x * 0.5 first)."""
    if op.op_type != "Erf":
        return False
    inner = graph.made_by(op.inputs[0], "Div", "Mul")
    plus = graph.next_of(op, "Add")
    times = graph.next_of(plus[1], "Mul") if plus else None
    if inner is None or plus is None or times is None:
        return False
    source = inner[1].inputs[0]
    other = other_input(times[1], plus[1].outputs[0])
    gone, last = [inner[0], index, plus[0], times[0]], times[1]
    if other == source:
        half = graph.next_of(times[1], "Mul")
        if half is None or not graph.facts.is_scalar(other_input(half[1], times[1].outputs[0])):
            return False
        gone.append(half[0])
        last = half[1]
    else:
        half = graph.made_by(other, "Mul")
        if half is None or source not in half[1].inputs:
            return False
        gone.append(half[0])
    graph.replace(gone, merged(op, last, "Gelu", (source,)))
    return True


def _quick_gelu(graph: FusionGraph, index: int, op: GraphNode) -> bool:
    """SiLU: x * sigmoid(x)."""
    times = graph.next_of(op, "Mul") if op.op_type == "Sigmoid" else None
    if times is None or other_input(times[1], op.outputs[0]) != op.inputs[0]:
        return False
    graph.replace([index, times[0]], merged(op, times[1], "QuickGelu", op.inputs))
    return True


def _bias_gelu(graph: FusionGraph, index: int, op: GraphNode) -> bool:
    if op.op_type != "Gelu":
        return False
    add = graph.made_by(op.inputs[0], "Add")
    if add is None or not any(graph.facts.is_bias(name) for name in add[1].inputs):
        return False
    elements = math.prod(graph.facts.shapes[op.outputs[0]])
    fused = merged(op, op, "BiasGelu", add[1].inputs)
    graph.replace([add[0], index], dataclasses.replace(fused, scratch=(4 * elements,)))
    return True


def _skip_norm(graph: FusionGraph, index: int, op: GraphNode) -> bool:
    """A residual that only a LayerNormalization reads, with the bias before it."""
    if op.op_type != "LayerNormalization":
        return False
    add = graph.made_by(op.inputs[0], "Add")
    if add is None:
        return False
    if not graph.facts.same_known_shape(*add[1].inputs):
        return False
    inputs, gone = list(add[1].inputs), [add[0], index]
    for position, name in enumerate(inputs):
        bias = graph.made_by(name, "Add")
        if bias is not None and (found := [n for n in bias[1].inputs if graph.facts.is_bias(n)]):
            inputs[position] = other_input(bias[1], found[0])
            inputs.append(found[0])
            gone.append(bias[0])
            break
    graph.replace(gone, merged(op, op, "SkipLayerNormalization", (*inputs[:2], *op.inputs[1:], *inputs[2:])))
    return True


def _after_convolution(graph: FusionGraph, index: int, op: GraphNode) -> bool:
    """Normalization that folds into the weights, and activations that the kernel applies."""
    if op.op_type not in ("Conv", "Gemm"):
        return False
    kinds = ("BatchNormalization",) if op.op_type == "Conv" else ()
    after = graph.next_of(op, *kinds, *_ACTIVATIONS)
    if after is None:
        return False
    graph.replace([index, after[0]], merged(op, after[1], op.op_type, op.inputs))
    return True


# Later stages see what earlier ones made: a bias goes to an integer product before a norm can take it.
_STAGES: tuple[tuple[_Rule, ...], ...] = (
    (integer_product, quantized_product, quantized_kernel, moved_bytes),
    (weight_only_product, _erf_gelu, _quick_gelu),
    (_product_bias, _scaled_product, _after_convolution),
    (dynamic_product, _bias_gelu, _skip_norm),
)
# Those that a session can be told to leave out.
_OPTIMIZERS: dict[_Rule, str] = {
    _bias_gelu: "BiasGeluFusion",
    _erf_gelu: "GeluFusionL2",
    _quick_gelu: "QuickGeluFusion",
    _scaled_product: "MatMulScaleFusion",
    _skip_norm: "SkipLayerNormFusion",
}
