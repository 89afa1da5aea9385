"""An ONNX file from elsewhere as the start of a conversion: judged, cleaned, and checked against itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.checks import check_skeleton
from edgeq.converters.onnx.export.export import Exported
from edgeq.converters.onnx.export.quiet import quiet
from edgeq.converters.onnx.export.tidy import tidy
from edgeq.converters.onnx.export.verify import Call, check_outputs, session_caller
from edgeq.converters.onnx.export.write import describe_graph, fresh_output, shape_notes, write_graph
from edgeq.converters.onnx.skeleton import read_skeleton
from edgeq.errors import ConversionError, SourceError, UnsupportedModelError, require_package
from edgeq.inputs.arrays import check_arrays
from edgeq.tensor_types import TensorArtifact, TensorSpec

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["adopt_onnx"]

_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})  # what ONNX Runtime ships kernels for
_LEAST_OPSET = 13  # the first with scales per channel in QuantizeLinear
_RAISED_TO = 17  # the first with LayerNormalization, and what the oldest TensorRT that counts takes
_QUANTIZED = frozenset(
    {"ConvInteger", "DequantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulNBits", "QLinearConv"}
    | {"QLinearMatMul", "QuantizeLinear"}
)
_CONTROL = frozenset({"If", "Loop", "Scan"})
_MOST_RAISED_BYTES = 1 << 30  # onnx's converter of opsets takes the whole model as one message
_SIZES = (2, 3)  # of an open axis, in the calls that are compared
_SEED = 21
_REMEDY = "Export the model again, with the newest exporter of its framework"


def adopt_onnx(file: Path, out: Path, *, inputs: Iterable[Mapping[str, NDArray[Any]]] = ()) -> Exported:
    """Take an ONNX file over.

    Local functions are inlined, constants folded, and weights of more than 64 MiB put beside the model. Opsets below 13
    are raised to 17. The result is compared with the original on random inputs.

    Args:
        file: with external data, if it has any, in the same folder.
        out: the ``.onnx`` file to write; it must not exist.
        inputs: real calls to compare with, beside random ones.

    Raises:
        UsageError: inputs that the model does not take.
        SourceError: no ONNX, damaged, or data that is missing or lies outside of the file's folder.
        UnsupportedModelError: operators that ONNX Runtime has not, named with their node, or inputs and outputs that
            are no tensors of numbers.
        ConversionError: the cleaned graph answers differently, or the opset cannot be raised.
        MissingPackageError: the extra ``export`` is not installed.
    """
    require_package("onnxscript", "export", "to clean ONNX models")
    skeleton = read_skeleton(file)
    check_skeleton(skeleton, file.name)
    _refuse_custom(skeleton.model)
    describe_graph(file)
    notes = list(_notes(skeleton.model))
    with fresh_output(out):
        model = _loaded(file, skeleton.file_bytes, notes)
        _clean(model)
        write_graph(model, out)
        specs, answers, opset = describe_graph(out)
        original = session_caller(file, remedy=_REMEDY)
        calls = [call for call in _random_calls(specs) if _runs(original, call)]
        for call in inputs:
            check_arrays(call, specs, finite=True, source="an input to check with")
            calls.append(dict(call))
        if not calls:
            notes.append("It refuses random inputs, so the cleaned graph was not compared with the original")
        checks = check_outputs(original, session_caller(out, remedy=_REMEDY), calls, remedy=_REMEDY)
    artifact = TensorArtifact(architecture="onnx", task="tensor", opset=opset, inputs=specs, outputs=answers)
    return Exported(out, artifact, checks, (*notes, *shape_notes(out)))


def _refuse_custom(model: onnx.ModelProto) -> None:
    local = {(function.domain, function.name) for function in model.functions}
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    for nodes in bodies:
        for node in _walk(nodes):
            if node.domain not in _DOMAINS and (node.domain, node.op_type) not in local:
                raise UnsupportedModelError(
                    f"The node {node.name or node.output[0]!r} is {node.domain}.{node.op_type}, an operator that only "
                    "its maker's library can run",
                    "Export the model with standard operators",
                )


def _walk(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _walk(graph.node)


def _notes(model: onnx.ModelProto) -> Iterator[str]:
    quantized = [node for node in model.graph.node if node.op_type in _QUANTIZED]
    if quantized:
        name = quantized[0].name or quantized[0].output[0]
        yield f"The file is quantized already ({quantized[0].op_type} at {name!r}); it is compared as it is"
    control = [node for node in model.graph.node if node.op_type in _CONTROL]
    if control:
        name = control[0].name or control[0].output[0]
        yield f"The file has control flow ({control[0].op_type} at {name!r}): what a call takes cannot be foretold"


def _loaded(file: Path, n_bytes: int, notes: list[str]) -> ir.Model:
    """The model, in a new enough opset."""
    import onnx
    import onnx_ir as ir

    try:
        model = ir.load(file)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise SourceError(f"{file.name} cannot be read: {error}", "Export the model again") from error
    before = model.graph.opset_imports.get("", 0)
    if before >= _LEAST_OPSET:
        return model
    remedy = f"Export the model with opset {_RAISED_TO} or later"
    if n_bytes > _MOST_RAISED_BYTES:
        raise ConversionError(f"{file.name} uses opset {before}, and is too large to be raised", remedy)
    try:
        with quiet():
            raised = onnx.version_converter.convert_version(onnx.load(file), _RAISED_TO)
    except Exception as error:  # the converter's errors have no common base
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConversionError(f"The opset {before} of {file.name} cannot be raised: {reason}", remedy) from error
    notes.append(f"The opset was raised from {before} to {_RAISED_TO}")
    return ir.from_proto(raised)


def _clean(model: ir.Model) -> None:
    from onnx_ir.passes import common
    from onnxscript import optimizer

    common.RemoveInitializersFromInputsPass()(model)
    names = [(node, node.name) for node in model.graph]
    with quiet():
        optimizer.optimize(model)
    tidy(model, rename=False)
    kept = dict(names)
    taken: set[str] = set()
    for index, node in enumerate(model.graph):
        name = kept.get(node) or node.name or f"{node.op_type}_{index}"
        node.name = name if name not in taken else f"{name}_{index}"
        taken.add(node.name)


def _random_calls(inputs: tuple[TensorSpec, ...]) -> Iterator[dict[str, NDArray[Any]]]:
    """Inputs with small numbers, which most models take; every open axis has two sizes."""
    for size in _SIZES:
        rng = np.random.default_rng(_SEED + size)
        yield {spec.name: _random(spec, size, rng) for spec in inputs}
        if not any(isinstance(axis, str) for spec in inputs for axis in spec.shape):
            return


def _random(spec: TensorSpec, size: int, rng: np.random.Generator) -> NDArray[Any]:
    shape = tuple(size if isinstance(axis, str) else axis for axis in spec.shape)
    kind = np.dtype(spec.dtype)
    if kind.kind in "iub":
        return rng.integers(0, 2, shape).astype(kind)
    return rng.standard_normal(shape).astype(kind)


def _runs(call: Call, inputs: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the original takes random inputs: it may want sizes that its file does not say."""
    try:
        call(inputs)
    except ConversionError:
        return False
    return True
