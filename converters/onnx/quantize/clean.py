"""Cleaning a float graph for a backend, so that what follows sees few patterns: exact rewritings, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgeq.converters.onnx.quantize.convolutions import fold_affine, fold_pads
from edgeq.converters.onnx.quantize.folding import fold_constants
from edgeq.converters.onnx.quantize.graph import Editor, infer_shapes, open_editor, save_model
from edgeq.converters.onnx.quantize.simplify import (
    drop_inactive,
    drop_neutral,
    drop_softmax_guards,
    flatten_biases,
    fuse_gelu,
    pool_globally,
)
from edgeq.converters.onnx.quantize.wide import join_products
from edgeq.errors import ConversionError

__all__ = ["BACKENDS", "clean_for"]

BACKENDS = ("onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")

_Pass = tuple[str, Callable[[Editor], int]]
_PASSES: tuple[_Pass, ...] = (
    ("nodes that do nothing dropped", drop_inactive),
    ("nodes of constants computed", fold_constants),
    ("sums with zeros and products with ones dropped", drop_neutral),
    ("biases written as vectors", flatten_biases),
    ("normalizations and factors folded into convolutions", fold_affine),
    ("paddings folded into convolutions", fold_pads),
    ("means over pixels pooled globally", pool_globally),
    ("Gelu put together", fuse_gelu),
    ("guards dropped behind Softmax", drop_softmax_guards),
)


def clean_for(model: Path, out: Path, backend: str, *, join: bool = False) -> tuple[str, ...]:
    """Write a model that computes the same with fewer nodes.

    Args:
        model: floats.
        out: is written; weights beside it if they are large.
        backend: that it is made for.
        join: whether products of one input with several weights become one wide product.

    Returns:
        What was done, one line each.

    Raises:
        ConversionError: an unknown backend, or a file that cannot be written.
        MissingPackageError: onnx_ir is not installed.
        SourceError: no sound ONNX file.
    """
    if backend not in BACKENDS:
        raise ConversionError(f"There is no backend {backend!r}", f"Choose one of {', '.join(BACKENDS)}")
    editor = open_editor(model)
    before = len(editor.graph)
    infer_shapes(editor)
    passes = (*_PASSES, ("products of one input joined", join_products)) if join else _PASSES
    notes = []
    for what, rewrite in passes:
        count = rewrite(editor)
        if count:
            editor.tidy()
            notes.append(f"{count} {what}")
    editor.tidy()
    after = len(editor.graph)
    if after != before:
        notes.append(f"{before} nodes became {after}")
    save_model(editor, out)
    return tuple(notes)
