"""Patterns that exporters write long: means over pixels, Gelu by the error function, guards behind Softmax."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgeq.converters.onnx.quantize.graph import (
    Editor,
    array_of,
    attribute_int,
    attribute_ints,
    is_constant,
    sizes_of,
    sole_reader,
)

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["drop_inactive", "drop_neutral", "drop_softmax_guards", "flatten_biases", "fuse_gelu", "pool_globally"]

_GELU_SINCE = 20
_CLOSE = 1e-4  # exporters write constants in 3 to 7 digits


def drop_inactive(editor: Editor) -> int:
    """Drop Identity, Dropout, and casts to the type that a value has.

    Returns:
        How many were dropped.
    """
    count = 0
    for node in editor.nodes("Identity", "Dropout", "Cast"):
        source = node.inputs[0]
        if source is None or any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
            continue
        if node.op_type == "Cast" and (source.dtype is None or source.dtype.value != node.attributes["to"].as_int()):
            continue
        if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
            continue
        if node.outputs[0].is_graph_output():
            continue
        editor.replace(node.outputs[0], source)
        editor.remove([node])
        count += 1
    return count


def drop_neutral(editor: Editor) -> int:
    """Drop sums with zeros and products with ones, such as masks that hide nothing.

    Returns:
        How many were dropped.
    """
    count = 0
    for node in editor.nodes("Add", "Sub", "Mul", "Div"):
        places = (0, 1) if node.op_type in ("Add", "Mul") else (1,)
        neutral = 0.0 if node.op_type in ("Add", "Sub") else 1.0
        for place in places:
            other = node.inputs[1 - place]
            if other is None or node.graph is not editor.graph or node.outputs[0].is_graph_output():
                continue
            if _is_all(node.inputs[place], neutral) and _keeps_shape(other, node.inputs[place]):
                editor.replace(node.outputs[0], other)
                editor.remove([node])
                count += 1
    return count


def _is_all(value: ir.Value | None, number: float) -> bool:
    array = array_of(value)
    return array is not None and array.size > 0 and bool((array == number).all())


def _keeps_shape(value: ir.Value, constant: ir.Value | None) -> bool:
    """Whether broadcasting against a constant leaves a value's shape as it is."""
    shape, other = sizes_of(value), sizes_of(constant)
    if shape is None or other is None or len(other) > len(shape):
        return False
    return all(size in (1, own) for size, own in zip(reversed(other), reversed(shape), strict=False))


def flatten_biases(editor: Editor) -> int:
    """Write a Gemm's bias that is the same for all rows, as a matrix of one row or a single number, as a vector.

    Returns:
        How many were written.
    """
    count = 0
    for node in editor.nodes("Gemm"):
        bias, weight = array_of(node.inputs[2] if len(node.inputs) > 2 else None), sizes_of(node.inputs[1])
        if bias is None or weight is None or len(weight) != 2:
            continue
        columns = weight[0 if attribute_int(node, "transB", 0) else 1]
        if columns is None or bias.shape not in ((1, columns), (1, 1), (1,), ()) or bias.shape == (columns,):
            continue
        name = f"{node.name or 'gemm'}_bias"
        node.replace_input_with(2, editor.constant(name, np.broadcast_to(bias.reshape(-1), (columns,))))
        count += 1
    return count


def pool_globally(editor: Editor) -> int:
    """Write means over height and width, and pools over the whole image, as GlobalAveragePool.

    It has an integer kernel, which a mean has not.

    Returns:
        How many were written.
    """
    count = 0
    for node in editor.nodes("ReduceMean", "AveragePool"):
        source = node.inputs[0]
        shape = sizes_of(source)
        if source is None or shape is None or len(shape) != 4:
            continue
        whole = _is_whole_pool(node, shape) if node.op_type == "AveragePool" else _is_pixel_mean(node)
        if not whole:
            continue
        name = node.name or "pool"
        made = editor.node("GlobalAveragePool", [source], f"{name}_global", before=node)
        made.outputs[0].type = node.outputs[0].type
        if node.op_type == "ReduceMean" and attribute_int(node, "keepdims", 1) == 0:
            made = editor.node("Flatten", made.outputs, f"{name}_flat", before=node, attributes={"axis": 1})
        editor.replace(node.outputs[0], made.outputs[0])
        made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        editor.remove([node])
        count += 1
    return count


def _is_pixel_mean(node: ir.Node) -> bool:
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        array = array_of(node.inputs[1])
        axes = None if array is None else tuple(int(axis) for axis in array.reshape(-1))
    else:
        axes = attribute_ints(node, "axes")
    return axes is not None and sorted(axis % 4 for axis in axes) == [2, 3]


def _is_whole_pool(node: ir.Node, shape: tuple[int | None, ...]) -> bool:
    """Whether a pool's one window holds the whole image, or more than it where only what is there is counted."""
    auto = node.attributes.get("auto_pad")
    plain = auto is None or auto.as_string() in ("NOTSET", "VALID")
    dilations = attribute_ints(node, "dilations") or (1, 1)
    return (
        plain
        and not any(attribute_ints(node, "pads") or ())
        and all(d == 1 for d in dilations)
        and _fits(
            attribute_ints(node, "kernel_shape") or (), shape[2:], larger=attribute_int(node, "ceil_mode", 0) == 1
        )
    )


def _fits(window: tuple[int, ...], image: tuple[int | None, ...], *, larger: bool) -> bool:
    if len(window) != len(image):
        return False
    return all(i is not None and (w == i or (larger and w > i)) for w, i in zip(window, image, strict=True))


def fuse_gelu(editor: Editor) -> int:
    """Write ``x * 0.5 * (1 + erf(x / sqrt(2)))`` as Gelu, which exists since opset 20.

    Returns:
        How many were written.
    """
    if editor.opset < _GELU_SINCE:
        return 0
    count = 0
    for node in editor.nodes("Erf"):
        found = _gelu_around(node)
        if found is None:
            continue
        source, last = found
        made = editor.node("Gelu", [source], f"{node.name}_gelu", before=last, like=last.outputs[0])
        editor.replace(last.outputs[0], made.outputs[0])
        editor.tidy()
        count += 1
    return count


def _gelu_around(erf: ir.Node) -> tuple[ir.Value, ir.Node] | None:
    """Input and last node of a Gelu; None if the error function stands elsewhere."""
    inner = None if erf.inputs[0] is None else erf.inputs[0].producer()
    plus = sole_reader(erf.outputs[0])
    if inner is None or plus is None or plus.op_type != "Add" or not _has_number(plus, 1.0):
        return None
    source = inner.inputs[0] if inner.op_type == "Div" else _factor(inner, math.sqrt(0.5))
    if source is None or (inner.op_type == "Div" and not _is_number(inner.inputs[1], math.sqrt(2.0))):
        return None
    times = sole_reader(plus.outputs[0])
    if times is None or times.op_type != "Mul":
        return None
    other = _other(times, plus.outputs[0])
    if other is source:  # x * (1 + erf) * 0.5
        last = sole_reader(times.outputs[0])
        return (source, last) if last is not None and _factor(last, 0.5) is times.outputs[0] else None
    if other is not None and _is_number(other, 0.5):  # (1 + erf) * 0.5 * x
        last = sole_reader(times.outputs[0])
        done = last is not None and last.op_type == "Mul" and _other(last, times.outputs[0]) is source
        return (source, last) if done and last is not None else None
    half = None if other is None else other.producer()  # (x * 0.5) * (1 + erf)
    return (source, times) if half is not None and _factor(half, 0.5) is source else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _is_number(value: ir.Value | None, number: float) -> bool:
    array = array_of(value)
    return array is not None and array.size == 1 and abs(float(array.reshape(-1)[0]) - number) <= _CLOSE * abs(number)


def _has_number(node: ir.Node, number: float) -> bool:
    return any(_is_number(value, number) for value in node.inputs)


def _factor(node: ir.Node, number: float) -> ir.Value | None:
    """What a Mul multiplies with a number; None if it does not."""
    if node.op_type != "Mul" or len(node.inputs) != 2:
        return None
    for value, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        if _is_number(other, number):
            return value
    return None


def drop_softmax_guards(editor: Editor) -> int:
    """Drop ``where(isnan(softmax(x)), 0, softmax(x))`` where no row of x can be all minus infinity.

    Exporters write it for masks that hide everything. It is exact to drop it where x is made of products, and of masks
    whose constants are finite.

    Returns:
        How many were dropped.
    """
    count = 0
    for node in editor.nodes("Where"):
        test = None if node.inputs[0] is None else node.inputs[0].producer()
        if test is None or test.op_type != "IsNaN" or len(node.inputs) != 3:
            continue
        probabilities = test.inputs[0]
        softmax = None if probabilities is None else probabilities.producer()
        guarded = node.inputs[2] is probabilities and _is_zero(node.inputs[1])
        if softmax is None or probabilities is None or softmax.op_type != "Softmax" or not guarded:
            continue
        if not _stays_finite(softmax.inputs[0]) or node.outputs[0].is_graph_output():
            continue
        editor.replace(node.outputs[0], probabilities)
        editor.tidy()
        count += 1
    return count


def _is_zero(value: ir.Value | None) -> bool:
    array = array_of(value)
    return array is not None and not np.any(array)


_PASSES_ON = frozenset(
    {"Add", "Cast", "Concat", "Div", "Expand", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Transpose"}
) | {"Unsqueeze", "Where"}


def _stays_finite(value: ir.Value | None) -> bool:
    """Whether no constant on the way to a value is infinite, and all else comes out of products or from masks."""
    waiting, seen = [value], set[int]()
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if is_constant(current):
            array = array_of(current)
            if array is not None and array.dtype.kind == "f" and not np.isfinite(array).all():
                return False
            continue
        maker = current.producer()
        if maker is None:
            if current.dtype is None or current.dtype.is_floating_point():
                return False  # a mask that the caller gives in floats may hold anything
            continue
        if maker.op_type in ("MatMul", "Gemm") or (current.dtype is not None and not current.dtype.is_floating_point()):
            continue
        if maker.op_type not in _PASSES_ON:
            return False
        waiting.extend(maker.inputs)
    return True
