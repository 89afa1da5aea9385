"""Why an export failed, in one line: the operator, the module it is in, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from edgeq.errors import ConversionError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

__all__ = ["explain", "is_unsupported_operator"]

_SELF = "Export it yourself and give the ONNX file"
_FIX = "Fix the shapes with --shape (shapes=), or export it yourself and give the ONNX file"
# Classes of torch, by name: most are private.
_DATA_DEPENDENT = frozenset(
    {"DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode"}
    | {"UnsupportedOperatorException"}
)
_CONSTRAINT = frozenset({"ConstraintViolationError"})
_FIXED_AXIS = ("Constraints violated", "inferred a static shape", "conflicts between user-specified ranges")
_AXIS = re.compile(r"\['tensors'\]\[(\d+)\](?:\.shape|\.size\(\))\[(\d+)\]")
_OPERATOR = re.compile(r"(?:torch\.ops\.)?\b((?:aten|prims|torchvision|quantized|torch_\w+)[.:]+\w+(?:\.\w+)?)")
_NO_FUNCTION = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")
_LONGEST = 240


def explain(
    error: BaseException, model: torch.nn.Module, inputs: Sequence[str]
) -> ConversionError | UnsupportedModelError:
    """An error that names operator and module, for whatever torch raised while it exported.

    Args:
        error: by torch.
        model: that was exported, for the names of its modules.
        inputs: of the graph, in order.
    """
    chain = list(_chain(error))
    kinds = {type(link).__name__ for link in chain}
    text = " ".join(str(link) for link in chain)
    place = _place(chain, model)
    missing = _NO_FUNCTION.search(text)
    if missing:
        return UnsupportedModelError(f"ONNX has nothing for {missing[1]}{place}", _SELF)
    if kinds & _DATA_DEPENDENT or "data-dependent" in text.lower():
        operator = _operator(chain)
        return UnsupportedModelError(
            f"A shape or a branch depends on the data{f' at {operator}' if operator else ''}{place}", _FIX
        )
    if kinds & _CONSTRAINT or any(mark in text for mark in _FIXED_AXIS):
        return ConversionError(f"The model has one size for {_axis(text, inputs)}, which should stay open{place}", _FIX)
    operator = _operator(chain)
    return ConversionError(
        f"torch cannot export the model{f', at {operator}' if operator else ''}{place}: {_reason(chain)}", _FIX
    )


def is_unsupported_operator(error: BaseException) -> bool:
    """Whether other shapes cannot help."""
    return any(_NO_FUNCTION.search(str(link)) for link in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _reason(chain: list[BaseException]) -> str:
    """The first line of the innermost error that says something."""
    for link in reversed(chain):
        lines = [line.strip() for line in str(link).splitlines() if line.strip()]
        if lines:
            # A first line that only announces says nothing alone.
            said = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
            found = f"{type(link).__name__}: {said}"
            return found if len(found) <= _LONGEST else f"{found[:_LONGEST]}…"
    return type(chain[-1]).__name__


def _axis(text: str, inputs: Sequence[str]) -> str:
    """``axis 0 of pixel_values``; torch speaks of ``inputs['tensors'][0].shape[0]``."""
    found = _AXIS.search(text)
    if not found or int(found[1]) >= len(inputs):
        return "an axis"
    return f"axis {found[2]} of {inputs[int(found[1])]}"


def _operator(chain: list[BaseException]) -> str | None:
    for link in reversed(chain):
        found = _OPERATOR.search(str(link))
        if found:
            return found[1]
    return None


def _place(chain: list[BaseException], model: torch.nn.Module) -> str:
    """`` in encoder.layer.0 (BertLayer)``: the innermost module whose code ran, or an empty text."""
    names = {id(module): name for name, module in model.named_modules()}
    for link in reversed(chain):
        found = ""
        for frame_locals in _frames(link.__traceback__):
            found = _of_node(frame_locals.get("node")) or _of_module(frame_locals.get("self"), names) or found
        if found:
            return f" in {found}"
    return ""


def _frames(traceback: TracebackType | None) -> Iterator[dict[str, object]]:
    while traceback is not None:
        yield traceback.tb_frame.f_locals
        traceback = traceback.tb_next


def _of_module(value: object, names: dict[int, str]) -> str:
    name = names.get(id(value), "")
    return f"{name} ({type(value).__name__})" if name else ""


def _of_node(value: object) -> str:
    """Where a node of torch's graph comes from: ``nn_module_stack`` holds (path, class) from the outside in."""
    meta = getattr(value, "meta", None)
    stack = meta.get("nn_module_stack") if isinstance(meta, dict) else None
    if not isinstance(stack, dict) or not stack:
        return ""
    entry = list(stack.values())[-1]
    if not isinstance(entry, tuple) or len(entry) != 2:
        return ""
    path, kind = entry
    kind = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    return f"{str(path).removeprefix('model.')} ({kind.rsplit('.', 1)[-1]})" if path else ""
