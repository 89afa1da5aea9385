"""A traced graph made fit to live on: nodes named after modules, constants folded, no traces of this machine in it."""

from __future__ import annotations

import ast
import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from edgeq.converters.onnx.export.fold import fold_constants
from edgeq.errors import ConversionError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["IR_VERSIONS", "names_kept", "tidy"]

# IR version that came with an opset (https://onnx.ai/onnx/repo-docs/Versioning.html). TensorRT 10.3 reads up to 10.
IR_VERSIONS: Mapping[int, int] = {**dict.fromkeys(range(7, 19), 8), 19: 9, 20: 9}
_NEWEST_IR = 10
_SCOPES = "pkg.torch.onnx.name_scopes"
_WRAPPER = "model."
_NAMELESS = re.compile(r"val_\d+")


def tidy(model: ir.Model, *, rename: bool = True) -> None:
    """Clean a graph in place: what it computes, its inputs and its outputs stay.

    Args:
        model: with all functions inlined.
        rename: nodes and weights after the modules that torch's exporter wrote down for them.
    """
    from onnx_ir.passes import common

    if rename:
        _name_weights(model)
        _name_nodes(model)
    _pool_globally(model)
    fold_constants(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    _name_axes(model)
    _strip(model)
    model.ir_version = IR_VERSIONS.get(model.graph.opset_imports.get("", 0), _NEWEST_IR)


@contextlib.contextmanager
def names_kept(model: ir.Model) -> Iterator[None]:
    """Keep the names of inputs and outputs while an optimizer works on a model.

    onnxscript's gives an input that is an output too another name, so that an Identity can stand between them; ONNX
    Runtime needs none.

    Raises:
        ConversionError: it changed other names.
    """
    graph = model.graph
    before = _interface(model)
    passed = [(index, value) for index, value in enumerate(graph.outputs) if value.is_graph_input()]
    names = [value.name for _, value in passed]
    yield
    for (index, value), name in zip(passed, names, strict=True):
        made = graph.outputs[index]
        if made is not value:
            graph.outputs[index] = value
            made.name = f"{name}_passed"  # by an Identity that nobody reads any more
        value.name = name
    after = _interface(model)
    if after != before:
        name, other = next(pair for pair in zip(before, after, strict=True) if pair[0] != pair[1])
        raise ConversionError(
            f"Cleaning the graph made {other!r} of its input or output {name!r}", "Rename it in the file"
        )


def _interface(model: ir.Model) -> list[str | None]:
    return [value.name for value in (*model.graph.inputs, *model.graph.outputs)]


def _pool_globally(model: ir.Model) -> None:
    """Windows over whole images that are written as larger ones (EfficientNet: 1280 x 1280), which TensorRT refuses."""
    for node in model.graph:
        if node.op_type != "AveragePool" or node.domain or node.inputs[0] is None:
            continue
        kernel, pads = node.attributes.get("kernel_shape"), node.attributes.get("pads")
        sizes, left = _spatial(node.inputs[0]), _spatial(node.outputs[0])
        if kernel is None or not sizes or set(left) != {1} or (pads is not None and any(pads.as_ints())):
            continue
        if all(window >= size for window, size in zip(kernel.as_ints(), sizes, strict=True)):
            node.op_type = "GlobalAveragePool"
            node.attributes.clear()


def _spatial(value: ir.Value) -> tuple[int, ...]:
    """Height and width, as far as there are no open axes among them."""
    axes = tuple(value.shape)[2:] if value.shape is not None else ()
    sizes = tuple(axis for axis in axes if isinstance(axis, int))
    return sizes if len(sizes) == len(axes) else ()


def _name_nodes(model: ir.Model) -> None:
    """``encoder.layer.0.attention.self.query/MatMul``: the module that a node comes from and its operator."""
    taken: Counter[str] = Counter()
    for node in model.graph:
        scope = _convolution(node) or _scope(node.metadata_props.get(_SCOPES, ""))
        _name_weight(model, node, scope)
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name] - 1}"


def _convolution(node: ir.Node) -> str:
    """The module of a convolution's weight: torch's exporter names it after the normalization that was folded in."""
    weight = node.inputs[1] if node.op_type in {"Conv", "ConvTranspose"} else None
    name = weight.name if weight is not None else None
    return name.removesuffix(".weight") if name is not None and name.endswith(".weight") else ""


def _name_weight(model: ir.Model, node: ir.Node, scope: str) -> None:
    """A matrix that was transposed for a product has lost its name, and gets its module's again."""
    weight = node.inputs[1] if node.op_type == "MatMul" and len(node.inputs) == 2 else None
    if weight is None or not scope or len(weight.uses()) != 1 or not _NAMELESS.fullmatch(weight.name or ""):
        return
    initializers = model.graph.initializers
    if weight.name in initializers and f"{scope}.weight" not in initializers:
        weight.name = f"{scope}.weight"


def _scope(scopes: str) -> str:
    """The innermost module of torch's list of them, whose last entry is the node itself."""
    try:
        names = ast.literal_eval(scopes) if scopes else []
    except (SyntaxError, ValueError):
        return ""
    modules = [name for name in names[:-1] if isinstance(name, str)] if isinstance(names, list) else []
    return modules[-1].removeprefix(_WRAPPER) if modules and modules[-1] != _WRAPPER[:-1] else ""


def _name_weights(model: ir.Model) -> None:
    """Weights by the model's own names: torch saw it as ``model`` of a wrapper."""
    taken = {value.name for node in model.graph for value in node.outputs}
    taken |= {value.name for value in model.graph.inputs} | set(model.graph.initializers)
    for value in tuple(model.graph.initializers.values()):
        name = (value.name or "").removeprefix(_WRAPPER)
        if name and name != value.name and name not in taken:
            value.name = name
            taken.add(name)


def _name_axes(model: ir.Model) -> None:
    """Open axes of inputs and outputs without a name get one, since a session speaks of them by name."""
    import onnx_ir as ir

    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None:
            continue
        axes = [axis if isinstance(axis, int) else axis.value for axis in value.shape]
        if None in axes:
            value.shape = ir.Shape([f"{value.name}_axis_{i}" if axis is None else axis for i, axis in enumerate(axes)])


def _strip(model: ir.Model) -> None:
    """Source lines and paths of this machine, which torch writes at every node."""
    from onnx_ir.passes import common

    common.ClearMetadataAndDocStringPass()(model)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.doc_string = model.doc_string = None
    model.graph.name = "main"
    model.producer_name, model.producer_version = "edgeq", None
