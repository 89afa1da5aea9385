"""Reading, editing and writing ONNX graphs: the few verbs that every rewriting of this package is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ConversionError, SourceError, require_package

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "Editor",
    "array_of",
    "attribute_float",
    "attribute_int",
    "attribute_ints",
    "data_file",
    "infer_shapes",
    "is_constant",
    "open_editor",
    "require_opset",
    "save_model",
    "sizes_of",
    "sole_reader",
]

_EXTERNAL_BYTES = 64 << 20
_SMALL_TENSOR_BYTES = 1024
_PAGE_BYTES = 4096  # a mapped tensor of floats must not start in the middle of one
_PROTOBUF_LIMIT = 1 << 31

Attributes = Mapping[str, "int | float | str | Sequence[int]"]


@dataclasses.dataclass
class Editor:
    """A model being rewritten; names of new nodes, values and constants never clash.

    Attributes:
        model: with all its constants as initializers.
        taken: names that are in use.
    """

    model: ir.Model
    taken: set[str]

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.model.graph

    @property
    def opset(self) -> int:
        """Version of the standard domain."""
        return self.model.opset_imports.get("", 1)

    def nodes(self, *op_types: str) -> Iterator[ir.Node]:
        """Nodes of the standard domain and of some types; a copy, so that the graph may change meanwhile."""
        for node in tuple(self.graph):
            if node.graph is self.graph and node.domain == "" and (not op_types or node.op_type in op_types):
                yield node

    def unique(self, name: str) -> str:
        """A name like this one that nothing has."""
        found, count = name, 1
        while found in self.taken:
            found, count = f"{name}_{count}", count + 1
        self.taken.add(found)
        return found

    def constant(self, name: str, array: NDArray[Any], dtype: ir.DataType | None = None) -> ir.Value:
        """A new initializer.

        Args:
            name: a wish.
            array: its elements.
            dtype: where numpy has no such type, as of FP8.
        """
        import onnx_ir as ir

        name = self.unique(name)
        tensor = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), dtype=dtype, name=name)
        value = ir.val(name, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        before: ir.Node | None,
        attributes: Attributes | None = None,
        domain: str = "",
        outputs: int = 1,
        like: ir.Value | None = None,
    ) -> ir.Node:
        """A new node.

        Args:
            op_type: operator.
            inputs: values; None for those left out.
            name: a wish; outputs are named after it.
            before: where it is put; None for the end.
            attributes: by name.
            domain: of the operator.
            outputs: how many.
            like: a value whose type and shape the first output has.
        """
        import onnx_ir as ir

        name = self.unique(name)
        made = ir.node(op_type, inputs, dict(attributes or {}), domain=domain, num_outputs=outputs, name=name)
        for index, value in enumerate(made.outputs):
            value.name = self.unique(f"{name}_{index}" if outputs > 1 else f"{name}_out")
        if like is not None:
            made.outputs[0].type = like.type
            made.outputs[0].shape = like.shape
        if domain:
            self.model.opset_imports.setdefault(domain, 1)
        if before is None:
            self.graph.append(made)
        else:
            self.graph.insert_before(before, made)
        return made

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every reader of one value, and the graph's outputs, take another; the output keeps its name."""
        if old.is_graph_output():
            name = old.name or ""
            old.name = self.unique(f"{name}_before")
            new.name = name
            if new.type is None:
                new.type = old.type
            if new.shape is None:
                new.shape = old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)

    def remove(self, nodes: Iterable[ir.Node]) -> None:
        """Take nodes out that nobody outside of them reads."""
        self.graph.remove(tuple(nodes), safe=True)

    def tidy(self) -> None:
        """Drop nodes and initializers that lead to no output, and sort the rest."""
        from onnx_ir.passes import common

        self.graph.sort()  # the pass walks backwards once: a reader that stands before its maker would keep it
        common.RemoveUnusedNodesPass()(self.model)
        common.RemoveUnusedOpsetsPass()(self.model)


def open_editor(path: Path) -> Editor:
    """Read a model for rewriting; weights in external data are mapped, not read.

    Functions are inlined, constants become initializers, and every node gets a name of its own.

    Raises:
        MissingPackageError: onnx_ir is not installed.
        SourceError: no sound ONNX file.
    """
    ir = require_package("onnx_ir", "onnx", "to rewrite ONNX models")
    from onnx_ir.passes import common

    try:
        model = ir.load(path)
        if model.functions:
            common.InlinePass()(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    except Exception as error:  # onnx, protobuf and onnx_ir raise many kinds, of no common base
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"{path.name} is no sound ONNX model ({reason})", "Export the model again") from error
    editor = Editor(model, set())
    for value in _values(editor):
        if value.name:
            editor.taken.add(value.name)
    named: set[str] = set()
    for node in editor.graph:
        if not node.name or node.name in named:
            node.name = editor.unique(node.name or f"{node.op_type}_{node.outputs[0].name}")
        named.add(node.name)
    editor.taken |= named
    return editor


def _values(editor: Editor) -> Iterator[ir.Value]:
    yield from editor.graph.inputs
    yield from editor.graph.initializers.values()
    for node in editor.graph.all_nodes():
        yield from node.outputs


def infer_shapes(editor: Editor) -> None:
    """Fill in shapes and element types that follow from the graph."""
    from onnx_ir.passes import common

    infer = common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)
    infer(editor.model)
    while _fill_in(editor):
        infer(editor.model)


def _fill_in(editor: Editor) -> bool:
    """What onnx (1.23) has no rule for; whether something was filled in."""
    filled = False
    for node in editor.nodes("GroupNormalization"):
        source, made = node.inputs[0], node.outputs[0]
        if made.dtype is None and source is not None and source.dtype is not None:
            made.type, made.shape, filled = source.type, source.shape, True
    return filled


def data_file(path: Path) -> Path:
    """Where a model's weights lie if they do not lie in the file itself."""
    return path.with_name(f"{path.name}.data")


def save_model(editor: Editor, path: Path, *, external: bool | None = None) -> None:
    """Write a model; its weights go into a file beside it if they are large.

    Args:
        editor: it is tidied first.
        path: of the ``.onnx`` file; `data_file` is the other one.
        external: True or False to say so; None for weights of more than 64 MiB.

    Raises:
        ConversionError: it cannot be written.
    """
    import onnx_ir as ir

    editor.tidy()
    total = sum(v.const_value.nbytes for v in editor.graph.initializers.values() if v.const_value is not None)
    apart = total > _EXTERNAL_BYTES if external is None else external
    if not apart and total >= _PROTOBUF_LIMIT:
        raise ConversionError(f"{path.name} would have {total >> 20} MiB in one file", "Let its weights lie apart")
    try:
        if apart:
            ir.save(
                editor.model,
                path,
                external_data=data_file(path).name,
                size_threshold_bytes=_SMALL_TENSOR_BYTES,
                alignment=_PAGE_BYTES,
                align_threshold=0,
            )
        else:
            ir.external_data.load_to_model(editor.model)
            ir.save(editor.model, path)
            data_file(path).unlink(missing_ok=True)
    except OSError as error:
        raise ConversionError(
            f"{path} cannot be written: {error}", "Free the disk, or choose another folder"
        ) from error


def require_opset(editor: Editor, least: int, purpose: str) -> None:
    """Refuse a model of an older opset.

    Raises:
        ConversionError: it is older.
    """
    if editor.opset < least:
        raise ConversionError(
            f"The model has opset {editor.opset}, and {purpose} needs {least}", f"Export it with opset {least} or newer"
        )


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is a weight: an initializer that no caller can replace."""
    return value is not None and value.is_initializer() and not value.is_graph_input() and value.const_value is not None


def array_of(value: ir.Value | None) -> NDArray[Any] | None:
    """A constant's elements; None if the value is none."""
    if value is None or not is_constant(value) or value.const_value is None:
        return None
    return value.const_value.numpy()


def sizes_of(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """Sizes of axes, None for those that are not known; None if not even the rank is."""
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else None for dim in value.shape)


def sole_reader(value: ir.Value) -> ir.Node | None:
    """The only node that reads a value, once; None if there are more, or if it leaves the graph."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return next(iter(uses)).node


def attribute_int(node: ir.Node, name: str, default: int) -> int:
    """An attribute of a node."""
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def attribute_float(node: ir.Node, name: str, default: float) -> float:
    """An attribute of a node."""
    found = node.attributes.get(name)
    return default if found is None else found.as_float()


def attribute_ints(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """An attribute of a node; None if it has none."""
    found = node.attributes.get(name)
    return None if found is None else tuple(found.as_ints())
