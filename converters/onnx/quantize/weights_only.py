"""Weight-only quantization: matrix products whose weights have 4 or 8 bits, and whose activations stay floats.

The operator is ONNX Runtime's ``MatMulNBits``: the weight of [K, N] lies as [N, blocks, bytes] with ``block`` elements
of K in a row, of two 4-bit numbers the lower first; a block has one float32 scale, and its zero is ``2^(bits - 1)``
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits).
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.quantize.dynamic import matrix_products
from edgeq.converters.onnx.quantize.embeddings import quantize_embeddings
from edgeq.converters.onnx.quantize.graph import Editor, array_of, open_editor, save_model, sizes_of
from edgeq.converters.onnx.quantize.heads import read_heads_in_place
from edgeq.converters.onnx.quantize.sites import Product
from edgeq.errors import ConversionError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Bits", "pack_blocks", "quantize_weights", "unpack_blocks"]

Bits = Literal[4, 8]
_Packed = dict[tuple["ir.Value", int], tuple["ir.Value", "ir.Value"]]  # by weight and its axis of output channels

_DOMAIN = "com.microsoft"
_COMPUTE_INT8 = 4  # accuracy_level: activations of a block are put on a grid too, which VNNI multiplies
# By so much the largest number of a block is cut, for the sake of all others; the best is kept.
_CUTS = (1.0, 0.95, 0.9, 0.85, 0.8)


def quantize_weights(
    model: Path,
    out: Path,
    *,
    bits: Bits,
    block: int = 32,
    keep_float: Set[str] = frozenset(),
    embeddings: bool = True,
    integer_compute: bool = True,
) -> None:
    """Write a model whose matrix products have weights of 4 or 8 bits; convolutions stay floats.

    Args:
        model: cleaned floats.
        out: is written; weights beside it if they are large.
        bits: of a weight.
        block: elements that share a scale, a power of two of 16 or more.
        keep_float: names of nodes that stay floats.
        embeddings: whether tables that are looked up become 8-bit integers, with a scale for each row.
        integer_compute: whether the kernel may compute on 8-bit activations.

    Raises:
        ConversionError: names that no node has, a block of another size, or nothing to quantize.
        SourceError: no sound ONNX file.
    """
    if block < 16 or block & (block - 1):
        raise ConversionError(f"Blocks of {block} weights do not exist", "Choose 16, 32, 64, 128 or 256")
    editor = open_editor(model)
    packed: _Packed = {}
    for product in matrix_products(editor, keep_float):
        key = (product.weight, product.axis)
        if key not in packed:
            packed[key] = _pack(editor, product, bits, block)
        _rewrite(editor, product, packed[key], bits, block, integer_compute)
    if embeddings:
        quantize_embeddings(editor, keep_float)
    read_heads_in_place(editor)
    save_model(editor, out)


def _pack(editor: Editor, product: Product, bits: Bits, block: int) -> tuple[ir.Value, ir.Value]:
    """The numbers of a weight and their scales, which all products with it share."""
    weight = array_of(product.weight)
    if weight is None:
        raise ConversionError(f"The weight of {product.name!r} is not constant", "Export the model again")
    packed, scales = pack_blocks(weight if product.axis == 0 else weight.T, bits, block)
    base = product.weight.name or product.name
    return editor.constant(f"{base}_{bits}bit", packed), editor.constant(f"{base}_scales", scales.reshape(-1))


def _rewrite(
    editor: Editor,
    product: Product,
    packed: tuple[ir.Value, ir.Value],
    bits: Bits,
    block: int,
    integer_compute: bool,
) -> None:
    node, name = product.node, product.name
    sizes = [size or 0 for size in sizes_of(product.weight) or ()]
    columns, rows = sizes if product.axis == 0 else sizes[::-1]
    attributes = {"K": rows, "N": columns, "bits": int(bits), "block_size": block}
    if integer_compute:
        attributes["accuracy_level"] = _COMPUTE_INT8
    made = editor.node(
        "MatMulNBits",
        [product.activation, *packed],
        f"{name}_{bits}bit",
        before=node,
        domain=_DOMAIN,
        attributes=attributes,
        like=node.outputs[0],
    )
    if product.bias is not None:
        made = editor.node("Add", [made.outputs[0], product.bias], f"{name}_biased", before=node, like=node.outputs[0])
    editor.replace(node.outputs[0], made.outputs[0])
    editor.remove([node])


def pack_blocks(weight: NDArray[Any], bits: Bits, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantize and pack a weight.

    Args:
        weight: floats of shape [N, K]: one row for each output.
        bits: of a number.
        block: numbers of a row that share a scale; the last block is filled up with zeros.

    Returns:
        Bytes of shape [N, blocks, block * bits / 8], scales of shape [N, blocks].
    """
    rows, columns = weight.shape
    blocks = -(-columns // block)
    padded = np.zeros((rows, blocks * block), np.float32)
    padded[:, :columns] = weight
    grouped = padded.reshape(rows, blocks, block)
    scales = _best_scales(grouped, bits)
    steps = _steps(grouped, scales, bits)
    numbers: NDArray[np.uint8] = (steps + (1 << (bits - 1))).astype(np.uint8)
    if bits == 4:
        numbers = (numbers[..., 0::2] | (numbers[..., 1::2] << 4)).astype(np.uint8)
    return np.ascontiguousarray(numbers), scales


def unpack_blocks(
    packed: NDArray[np.uint8], scales: NDArray[np.float32], bits: Bits, columns: int
) -> NDArray[np.float32]:
    """The floats that a packed weight stands for, of shape [N, K]."""
    pairs = [packed & 15, packed >> 4] if bits == 4 else [packed]
    numbers = np.stack(pairs, axis=-1).reshape(*packed.shape[:-1], -1)
    steps = numbers.astype(np.int32) - (1 << (bits - 1))
    floats = steps.astype(np.float32) * scales[..., None]
    return np.ascontiguousarray(floats.reshape(packed.shape[0], -1)[:, :columns])


def _best_scales(grouped: NDArray[np.float32], bits: Bits) -> NDArray[np.float32]:
    """Of a few scales the one of least squared error. The number of largest size falls on the end of more room."""
    at = np.abs(grouped).argmax(axis=-1, keepdims=True)
    peak = np.take_along_axis(grouped, at, axis=-1)[..., 0]
    full = (peak / -(1 << (bits - 1))).astype(np.float32)
    best = np.where(full == 0, np.float32(1), full)
    if bits == 8:
        return best
    error = _error(grouped, best, bits)
    for cut in _CUTS[1:]:
        scales = (best if cut == 1.0 else np.where(full == 0, np.float32(1), full * np.float32(cut))).astype(np.float32)
        found = _error(grouped, scales, bits)
        better = found < error
        best, error = np.where(better, scales, best), np.where(better, found, error)
    return best


def _steps(grouped: NDArray[np.float32], scales: NDArray[np.float32], bits: Bits) -> NDArray[np.float32]:
    half = 1 << (bits - 1)
    steps: NDArray[np.float32] = np.clip(np.rint(grouped / scales[..., None]), -half, half - 1)
    return steps


def _error(grouped: NDArray[np.float32], scales: NDArray[np.float32], bits: Bits) -> NDArray[np.float32]:
    floats = _steps(grouped, scales, bits) * scales[..., None]
    error: NDArray[np.float32] = np.square(floats - grouped).sum(axis=-1)
    return error
