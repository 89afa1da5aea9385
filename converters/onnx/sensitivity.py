"""How much each node hurts the outputs when it alone is quantized.

One session answers for all nodes: a copy of the float model in which every quantizable node reads its activation and
its weight through a switch, a boolean input that chooses between the value and the value rounded to 8 bits. With one
switch on at a time the outputs show that node's error; errors of single nodes are small and nearly independent, so that
of a mix is about their sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.calibration.ranges import Range
from edgeq.converters.onnx.pieces import named_arrays
from edgeq.converters.onnx.quantize.affine import affine_of
from edgeq.converters.onnx.quantize.fp8 import fp8_scale, round_fp8
from edgeq.converters.onnx.quantize.sites import product_of
from edgeq.errors import require_package
from edgeq.profiles.onnx.session import onnx_session_options, start_session
from edgeq.queries import in_order_of

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

__all__ = ["Switch", "node_errors", "write_switched"]

Progress = Callable[[int, int, str], None]
Call = Mapping[str, NDArray[np.generic]]
Grid = Literal["u8", "s8", "fp8"]

_PREFIX = "edgeq.switch."
_S8 = 127


@dataclasses.dataclass(frozen=True)
class Switch:
    """A node that can be quantized.

    Attributes:
        node: its name; it is one of `edgeq.converters.onnx.quantize.sites.quantizable`.
        range: of the activation; None for a scale that follows each call.
    """

    node: str
    range: Range | None


def write_switched(
    model: Path, out: Path, switches: Sequence[Switch], *, activations: Grid, symmetric: bool = True
) -> dict[str, str]:
    """Write a copy of a float model with a switch for each node.

    Args:
        model: the float model.
        out: the copy; weights lie beside it.
        switches: nodes with constant weights.
        activations: unsigned or signed integers; ``"fp8"`` for E4M3 as `quantize_fp8` writes it, weights likewise.
        symmetric: whether signed integers have no zero point, as TensorRT asks for; on ARM they have one.

    Returns:
        Node to the name of the boolean input that switches it.
    """
    require_package("onnx_ir", "onnx", "to rewrite ONNX models")
    import onnx_ir as ir

    loaded = ir.load(model)
    graph = loaded.graph
    nodes = {node.name: node for node in graph}
    names: dict[str, str] = {}
    for index, switch in enumerate(switches):
        node = nodes[switch.node]
        flag = ir.Value(name=f"{_PREFIX}{index}", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        graph.inputs.append(flag)
        names[switch.node] = f"{_PREFIX}{index}"
        _switch_activation(graph, node, flag, switch.range, activations, symmetric)
        _switch_weight(graph, node, flag, activations)
    ir.save(loaded, out, external_data=f"{out.name}.data")
    return names


def _switch_activation(
    graph: ir.Graph, node: ir.Node, flag: ir.Value, found: Range | None, activations: Grid, symmetric: bool
) -> None:
    import onnx_ir as ir

    value = node.inputs[0]
    if value is None:
        raise ValueError(f"{node.name} reads no activation")
    if found is None:
        rounded = ir.Node("", "DynamicQuantizeLinear", [value], num_outputs=3)
        back = ir.Node("", "DequantizeLinear", rounded.outputs)
    else:
        scale, zero = _scale_and_zero(value.name or "", found, activations, symmetric)
        parameters = [
            _constant(graph, f"{flag.name}.scale", np.array(scale, np.float32)),
            _constant(graph, f"{flag.name}.zero", zero),
        ]
        rounded = ir.Node("", "QuantizeLinear", [value, *parameters])
        back = ir.Node("", "DequantizeLinear", [rounded.outputs[0], *parameters])
    chosen = ir.Node("", "Where", [flag, back.outputs[0], value])
    graph.insert_before(node, [rounded, back, chosen])
    node.replace_input_with(0, chosen.outputs[0])


def _switch_weight(graph: ir.Graph, node: ir.Node, flag: ir.Value, activations: Grid) -> None:
    import onnx_ir as ir

    product = product_of(node)
    stored = None if product is None else product.weight.const_value
    if product is None or stored is None:
        raise ValueError(f"{node.name} has no constant weight")
    value = product.weight
    weight = stored.numpy().astype(np.float32)
    if activations == "fp8":
        step = fp8_scale(value.name or product.name, float(np.abs(weight).max(initial=0.0)))
        near = round_fp8(weight, step).astype(np.float32) * np.float32(step)
    else:
        over = tuple(i for i in range(weight.ndim) if i != product.axis)
        largest = np.abs(weight).max(axis=over, keepdims=True)
        scale = np.where(largest > 0, largest / _S8, 1.0).astype(np.float32)
        near = (np.rint(weight / scale) * scale).astype(np.float32)
    rounded = _constant(graph, f"{flag.name}.weight", near)
    chosen = ir.Node("", "Where", [flag, rounded, value])
    graph.insert_before(node, chosen)
    node.replace_input_with(1, chosen.outputs[0])


def _scale_and_zero(name: str, found: Range, activations: Grid, symmetric: bool) -> tuple[float, ir.TensorProtocol]:
    """As the grids of `quantize_static` and `quantize_fp8`."""
    import ml_dtypes
    import onnx_ir as ir

    if activations == "fp8":
        zero: NDArray[Any] = np.zeros((), ml_dtypes.float8_e4m3fn)
        return fp8_scale(name, found.absolute), ir.Tensor(zero, dtype=ir.DataType.FLOAT8E4M3FN)
    if activations == "s8":
        affine = affine_of(name, found, "int8", symmetric=symmetric)
        return affine.scale, ir.tensor(np.array(affine.zero_point, np.int8))
    affine = affine_of(name, found, "uint8", symmetric=False)
    return affine.scale, ir.tensor(np.array(affine.zero_point, np.uint8))


def _constant(graph: ir.Graph, name: str, array: NDArray[np.generic] | ir.TensorProtocol) -> ir.Value:
    import onnx_ir as ir

    tensor = ir.tensor(array) if isinstance(array, np.ndarray) else array
    tensor.name = name
    value = ir.Value(name=name, const_value=tensor)
    graph.register_initializer(value)
    return value


def node_errors(
    model: Path,
    folder: Path,
    switches: Sequence[Switch],
    inputs: Iterable[Call],
    *,
    activations: Grid = "u8",
    symmetric: bool = True,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, float]:
    """The error at the outputs when one node alone is quantized.

    Args:
        model: the float model.
        folder: for a copy of it with switches, about three times its size.
        switches: the nodes.
        inputs: of the model; every node is tried with each.
        activations: see `write_switched`.
        symmetric: likewise.
        threads: of a call.
        progress: told nodes tried, nodes in all over all inputs, and the node.

    Returns:
        Node to its squared error over the squared output, summed over a call's outputs in floats, mean over the calls;
        infinite where an output is no number any more, or has another shape. A cosine is about one less half of it.

    Raises:
        SessionError: the copy cannot be loaded.
        MissingPackageError: onnx-ir or onnxruntime is not installed.
    """
    calls = [dict(call) for call in inputs]
    copy = folder / "switched.onnx"
    names = write_switched(model, copy, switches, activations=activations, symmetric=symmetric)
    session = _open(copy, threads)
    outputs = [value.name for value in session.get_outputs() if "float" in value.type]
    off = {name: np.array(False) for name in names.values()}
    totals = dict.fromkeys(names, 0.0)
    for index, call in enumerate(calls):
        reference = named_arrays(outputs, session.run(outputs, {**call, **off}))
        for done, (node, name) in enumerate(names.items()):
            if progress is not None:
                progress(index * len(names) + done, len(calls) * len(names), node)
            made = session.run(outputs, {**call, **off, name: np.array(True)})
            found = in_order_of(reference, named_arrays(outputs, made))
            totals[node] += sum(_relative(found[key], array) for key, array in reference.items()) / len(calls)
    return totals


def _open(model: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnx_session_options(threads)
    # What is rounded here is meant to stay apart: nothing is to be fused into integer kernels.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return start_session(model, options)


def _relative(found: NDArray[Any], reference: NDArray[Any]) -> float:
    if found.shape != reference.shape:  # it follows from values, such as how many are not zero
        return math.inf
    exact = reference.astype(np.float64)
    energy = float((exact**2).sum())
    noise = float(((found.astype(np.float64) - exact) ** 2).sum())
    if not math.isfinite(noise) or not math.isfinite(energy):
        return 0.0 if np.array_equal(found, reference, equal_nan=True) else math.inf
    return noise / energy if energy > 0 else float(noise > 0)
