"""An ONNX file from elsewhere as the start of a conversion: judged, cleaned, and checked against itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.checks import check_skeleton
from edgeq.converters.onnx.export.export import Exported
from edgeq.converters.onnx.export.quiet import quiet
from edgeq.converters.onnx.export.recognise import recognise
from edgeq.converters.onnx.export.tidy import names_kept, tidy
from edgeq.converters.onnx.export.verify import Call, check_outputs, session_caller
from edgeq.converters.onnx.export.write import describe_graph, fresh_output, shape_notes, write_graph
from edgeq.converters.onnx.skeleton import Skeleton, read_skeleton, walk_nodes
from edgeq.errors import ConversionError, SourceError, UnsupportedModelError, require_package
from edgeq.inputs.arrays import check_arrays
from edgeq.tensor_types import TensorArtifact, TensorSpec

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["adopt_onnx", "check_adopted"]

Arrays = Mapping[str, NDArray[Any]]

_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})  # what ONNX Runtime ships kernels for
_LEAST_OPSET = 13  # the first with scales per channel in QuantizeLinear
# The first with Gelu, and what the oldest TensorRT that counts takes; grids take scales in FP16 since 19.
_RAISED_TO = 20
_QUANTIZED = frozenset(
    {"ConvInteger", "DequantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulNBits", "QLinearConv"}
    | {"QLinearMatMul", "QuantizeLinear"}
)
_CONTROL = frozenset({"If", "Loop", "Scan"})
_MOST_CONVERTED_BYTES = 1 << 30  # onnx's converter of opsets takes the whole model as one message
_PROTOBUF_LIMIT = 1 << 31
_SIZES = (2, 3)  # of an open axis, in the calls that are compared
_SEED = 21
_ASSERTION = re.compile(r"^\S+:\d+: \w+: Assertion .* failed: ")  # where in onnx's own sources an error arose
_REMEDY = "Export the model again, with the newest exporter of its framework"
_LEFT_OUT = "Random inputs were left out of the check"
_NOT_COMPARED = "The cleaned graph was not compared with the original: no random input could be used"


def adopt_onnx(file: Path, out: Path, *, inputs: Iterable[Arrays] = (), newest_opset: int | None = None) -> Exported:
    """Take an ONNX file over.

    Local functions are inlined, constants folded, and weights of more than 64 MiB put beside the model. Opsets below 20
    are raised to it, or to the newest that the target takes; those from 13 on stay as they are if that fails, and a
    note says why. Opsets that the target does not take are lowered. The result is compared with the original on random
    inputs, but for those that the original refuses or answers with NaN or infinity (the logarithm of a negative
    number); a note says so. `check_adopted` compares with real ones later. What the model is for is looked for in its
    outputs and in config.json beside it (`edgeq.converters.onnx.export.recognise`).

    Args:
        file: with external data, if it has any, in the same folder.
        out: the ``.onnx`` file to write; it must not exist.
        inputs: real calls to compare with, beside random ones.
        newest_opset: that the target takes; None for any.

    Raises:
        UsageError: inputs that the model does not take.
        SourceError: no ONNX, damaged, weights that are NaN, NaN or infinity for real inputs, or data that is missing or
            lies outside of the file's folder.
        UnsupportedModelError: operators that ONNX Runtime has not, named with their node, inputs and outputs that are
            no tensors of numbers, or a model that draws random numbers.
        ConversionError: the cleaned graph answers differently, or the opset cannot be raised or lowered.
        MissingPackageError: the extra ``export`` is not installed.
    """
    require_package("onnxscript", "export", "to clean ONNX models")
    skeleton = read_skeleton(file)
    check_skeleton(skeleton, file.name)
    _refuse_too_large(file)
    _refuse_custom(skeleton.model)
    describe_graph(file)
    calls = [dict(call) for call in inputs]
    before = _opset_of(skeleton.model)
    opset = max(before, _RAISED_TO) if newest_opset is None else min(max(before, _RAISED_TO), newest_opset)
    try:
        return _adopted(file, out, skeleton, calls, opset)
    except ConversionError as error:
        if not _LEAST_OPSET <= before < opset:
            raise
        reason = error.cause
    kept = _adopted(file, out, skeleton, calls, before)
    return dataclasses.replace(kept, notes=(f"The opset stays {before}, less than {opset}: {reason}", *kept.notes))


def _opset_of(model: onnx.ModelProto) -> int:
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _adopted(file: Path, out: Path, skeleton: Skeleton, inputs: Sequence[Arrays], opset: int) -> Exported:
    """See `adopt_onnx`; in this opset."""
    notes = list(_notes(skeleton.model))
    with fresh_output(out):
        model = _loaded(file, skeleton, opset, notes)
        _clean(model, file.name)
        write_graph(model, out)
        specs, answers, written = describe_graph(out)
        known = recognise(file.parent, specs, answers)
        original = session_caller(file, remedy=_REMEDY)
        calls, dropped = _usable_calls(original, specs)
        if not calls:
            _refuse_nan(model)
        calls += _real_calls(inputs, specs)
        notes += [dropped] if dropped else []
        if not calls:
            notes.append(_NOT_COMPARED)
        checks = check_outputs(original, session_caller(out, remedy=_REMEDY), calls, remedy=_REMEDY)
    artifact = TensorArtifact(
        architecture="onnx", task=known.task, opset=written, inputs=specs, outputs=answers, labels=known.labels
    )
    return Exported(out, artifact, checks, (*known.notes, *notes, *shape_notes(out)), known.n_classes)


def check_adopted(file: Path, adopted: Exported, inputs: Iterable[Arrays]) -> Exported:
    """Compare a file that was taken over with the original again, on real inputs.

    Args:
        file: the original.
        adopted: what `adopt_onnx` made of it.
        inputs: real calls.

    Returns:
        It, with these checks in place of those on random inputs.

    Raises:
        UsageError: inputs that the model does not take.
        SourceError: the original gives NaN or infinity for them.
        UnsupportedModelError: it draws random numbers.
        ConversionError: the graph answers differently, or ONNX Runtime cannot run one of them.
    """
    original, cleaned = (session_caller(path, remedy=_REMEDY) for path in (file, adopted.path))
    checks = check_outputs(original, cleaned, _real_calls(inputs, adopted.artifact.inputs), remedy=_REMEDY)
    if not checks:
        return adopted
    notes = tuple(note for note in adopted.notes if not note.startswith((_NOT_COMPARED, _LEFT_OUT)))
    return dataclasses.replace(adopted, checks=checks, notes=notes)


def _refuse_too_large(file: Path) -> None:
    size = file.stat().st_size
    if size >= _PROTOBUF_LIMIT:
        raise SourceError(
            f"{file.name} has {size / 2**30:.2f} GiB in one file, and a protobuf message ends at 2 GiB",
            "Save it with its weights as external data: onnx.save(model, path, save_as_external_data=True)",
        )


def _refuse_custom(model: onnx.ModelProto) -> None:
    local = {(function.domain, function.name) for function in model.functions}
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    for nodes in bodies:
        for node in walk_nodes(nodes):
            if node.domain not in _DOMAINS and (node.domain, node.op_type) not in local:
                raise UnsupportedModelError(
                    f"The node {node.name or node.output[0]!r} is {node.domain}.{node.op_type}, an operator that only "
                    "its maker's library can run",
                    "Export the model with standard operators",
                )


def _notes(model: onnx.ModelProto) -> Iterator[str]:
    quantized = [node for node in model.graph.node if node.op_type in _QUANTIZED]
    if quantized:
        name = quantized[0].name or quantized[0].output[0]
        yield f"The file is quantized already ({quantized[0].op_type} at {name!r}); it is compared as it is"
    control = [node for node in model.graph.node if node.op_type in _CONTROL]
    if control:
        name = control[0].name or control[0].output[0]
        yield f"The file has control flow ({control[0].op_type} at {name!r}): what a call takes cannot be foretold"


def _loaded(file: Path, skeleton: Skeleton, opset: int, notes: list[str]) -> ir.Model:
    """The model in an opset, which is noted if it is another one."""
    import onnx_ir as ir

    try:
        model = ir.load(file)
    except (ValueError, TypeError, KeyError, OSError, ir.serde.SerdeError) as error:
        raise SourceError(f"{file.name} cannot be read: {_innermost(error)}", "Export the model again") from error
    before = _opset_of(skeleton.model)
    if before < opset:
        _refuse_control(skeleton.model, before, opset)
        cannot = f"The opset {before} of {file.name} cannot be raised"
        remedy = f"Export the model with opset {opset}"
        told = f"The opset was raised from {before} to {opset}"
    elif before > opset:
        cannot = f"{file.name} uses opset {before}, the target takes up to {opset}, and it cannot be lowered"
        remedy = f"Export the model with opset {opset}"
        told = f"The opset was lowered from {before} to {opset}, the newest that the target takes"
    else:
        return model
    converted = _in_opset(file, skeleton.file_bytes, opset, cannot, remedy)
    notes.append(told)
    return ir.from_proto(converted)


def _refuse_control(model: onnx.ModelProto, before: int, opset: int) -> None:
    """Onnx's converter leaves what lies in the bodies of control flow as it is, whatever it then means."""
    control = next((node for node in model.graph.node if node.op_type in _CONTROL), None)
    if before >= _LEAST_OPSET and control is not None:
        name = control.name or control.output[0]
        raise ConversionError(
            f"{control.op_type} at {name!r} is control flow, whose bodies cannot be raised",
            f"Export the model with opset {opset}",
        )


def _in_opset(file: Path, n_bytes: int, opset: int, cannot: str, remedy: str) -> onnx.ModelProto:
    """The model in another opset, by onnx's own converter."""
    import onnx
    import onnx.inliner
    import onnx.version_converter

    if n_bytes > _MOST_CONVERTED_BYTES:
        raise ConversionError(f"{cannot}: it is larger than {_MOST_CONVERTED_BYTES >> 30} GiB", remedy)
    try:
        with quiet():
            model = onnx.load(file)
            if model.functions:  # the converter knows none
                model = onnx.inliner.inline_local_functions(model)
            converted: onnx.ModelProto = onnx.version_converter.convert_version(model, opset)
            onnx.checker.check_model(converted)  # an operator that the older opset has not is copied as it is
    except Exception as error:  # the converter's errors have no common base
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConversionError(f"{cannot}: {_ASSERTION.sub('', reason)}", remedy) from error
    return converted


def _innermost(error: BaseException) -> str:
    """What the first error of a chain says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def _clean(model: ir.Model, file: str) -> None:
    from onnx_ir.passes import PassError, common
    from onnxscript import optimizer

    names = [(node, node.name) for node in model.graph]
    try:
        with quiet():
            common.RemoveInitializersFromInputsPass()(model)
            with names_kept(model):
                optimizer.optimize(model)
            with names_kept(model):
                tidy(model, rename=False)
    except PassError as error:
        raise SourceError(f"{file} cannot be cleaned: {_innermost(error)}", _REMEDY) from error
    kept = dict(names)
    taken: set[str] = set()
    for index, node in enumerate(model.graph):
        name = kept.get(node) or node.name or f"{node.op_type}_{index}"
        node.name = name if name not in taken else f"{name}_{index}"
        taken.add(node.name)


def _refuse_nan(model: ir.Model) -> None:
    for name, value in model.graph.initializers.items():
        array = None if value.const_value is None else value.const_value.numpy()
        if array is not None and array.dtype.kind == "f" and np.isnan(array).any():
            raise SourceError(f"The weight {name!r} holds NaN", "Train or download the model again")


def _real_calls(inputs: Iterable[Arrays], specs: Sequence[TensorSpec]) -> list[Arrays]:
    calls: list[Arrays] = []
    for call in inputs:
        check_arrays(call, specs, finite=True, source="an input to check with")
        calls.append(dict(call))
    return calls


def _usable_calls(original: Call, specs: tuple[TensorSpec, ...]) -> tuple[list[Arrays], str]:
    """Random calls that the original answers with numbers, those without negative numbers where others are dropped.

    Also a note on what was dropped, or an empty text.
    """
    calls: list[Arrays] = []
    dropped = ""
    for drawn in _random_calls(specs):
        for call in (drawn, {name: np.abs(array) for name, array in drawn.items()}):
            wrong = _unusable(original, call)
            if wrong is None:
                calls.append(call)
                break
            dropped = dropped or wrong
    return calls, f"{_LEFT_OUT}: {dropped}" if dropped else ""


def _unusable(original: Call, inputs: Arrays) -> str | None:
    """Why a random call is none to check with; None if it is one."""
    try:
        answers = original(inputs)
    except ConversionError:  # it may want sizes that its file does not say
        return "the model refuses them"
    wrong = next((n for n, a in answers.items() if a.dtype.kind in "fc" and not np.isfinite(a).all()), None)
    return None if wrong is None else f"the model itself gives NaN or infinity for them at {wrong!r}"


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
