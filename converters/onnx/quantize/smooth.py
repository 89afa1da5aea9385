"""SmoothQuant: outliers of activations moved into weights, where a scale for each channel can hold them.

``x W = ((x - z) / s) (s W) + z W``: the division goes into the scale and bias of the normalization that makes x, the
product with s into the weight, and z W into the bias, so that the graph computes the same at no cost. The scales are
those of SmoothQuant (arXiv:2211.10438, equation 4), ``s = max|x|^a / max|W|^(1-a)`` of each channel; the shift by the
middle of each channel's range is that of Outlier Suppression+ (arXiv:2304.09145), and takes what is constant over all
tokens, as massive activations of vision transformers are, out of the grid altogether. Behind other operators than
normalizations the few channels of massive size are multiplied in floats, as in LLM.int8() (arXiv:2208.07339).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.quantize.affine import affine_of, fake_quantize, quantize_weight
from edgeq.converters.onnx.quantize.channels import ChannelSample
from edgeq.converters.onnx.quantize.graph import (
    Editor,
    array_of,
    attribute_float,
    attribute_int,
    is_constant,
    open_editor,
    save_model,
    sizes_of,
)
from edgeq.converters.onnx.quantize.sites import Product, bias_behind, editor_products, product_of
from edgeq.converters.onnx.quantize.values import values_of
from edgeq.errors import ConversionError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ALPHAS", "Smoothed", "channel_tensors", "smooth"]

ALPHAS = tuple(round(0.3 + 0.1 * i, 1) for i in range(8))
_LEAST, _MOST = 1e-5, 1e5
_SPLITS = (0, 1, 2, 4, 8)
_NEARLY = 1.5  # times the least error is good enough where fewer channels are multiplied apart
_PAID_SHARE = 2 / 3  # of the error may be left where smoothing costs a node


_Kind = Literal["norm", "value", "copy", "scale"]
_FREE = frozenset({"norm", "value"})  # these change constants alone


@dataclasses.dataclass(frozen=True)
class Smoothed:
    """What was done behind one normalization.

    Attributes:
        tensor: its output.
        alpha: of the scales; None if it was left as it is.
        split: channels that are multiplied apart, in floats.
        error: of the products with 8-bit grids on the sample, relative to the products themselves.
        before: likewise, without smoothing.
    """

    tensor: str
    alpha: float | None
    split: int
    error: float
    before: float


@dataclasses.dataclass(frozen=True)
class _Site:
    kind: _Kind
    maker: ir.Node  # of a value behind attention the product that makes what is mixed
    value: ir.Value
    products: tuple[Product, ...]


@dataclasses.dataclass(frozen=True)
class _Move:
    """Scales and shifts of channels, shape [channels] each, and channels that are multiplied apart, in floats."""

    scale: NDArray[np.float64]
    shift: NDArray[np.float64]
    split: NDArray[np.intp]

    @property
    def factors(self) -> NDArray[np.float64]:
        """What channels are multiplied with before they go on a grid."""
        factors: NDArray[np.float64] = 1.0 / self.scale
        factors[self.split] = 0.0
        return factors


def channel_tensors(model: Path, *, paid: bool = False) -> tuple[str, ...]:
    """Names of the values that `smooth` asks samples of.

    Args:
        model: cleaned floats.
        paid: see `smooth`.

    Raises:
        SourceError: no sound ONNX file.
    """
    return tuple(site.value.name or "" for site in _sites(open_editor(model), paid))


def smooth(
    model: Path,
    out: Path,
    samples: Mapping[str, ChannelSample],
    *,
    alpha: float | None = None,
    shift: bool = True,
    paid: bool = False,
) -> tuple[Smoothed, ...]:
    """Write a model that computes the same and is easier to quantize.

    Args:
        model: cleaned floats.
        out: is written; weights beside it if they are large.
        samples: of each of `channel_tensors`.
        alpha: how much of an outlier goes into the weights, 0 to 1; None to try `ALPHAS` for each normalization and
            keep the one of least error, or none if nothing is better.
        shift: whether channels behind normalizations are shifted to the middle of their ranges too.
        paid: whether to smooth what costs a node too, where that takes away a third of the error: normalizations that
            residual sums read as well get a copy for the products, and other activations a product with a constant, or
            their largest channels a product in floats.

    Raises:
        ConversionError: a sample that is missing, or an alpha out of range.
        SourceError: no sound ONNX file.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ConversionError(f"alpha is {alpha:g}", "Choose 0 to 1")
    editor = open_editor(model)
    sites = _sites(editor, paid)
    missing = [site.value.name for site in sites if site.value.name not in samples]
    if missing:
        raise ConversionError(
            f"{len(missing)} values have no sample, such as {missing[0]!r}", "Sample all of channel_tensors()"
        )
    done = []
    for found in sites:
        site = _current(found)  # an earlier site may have changed weights of this one
        weights = [_by_input(product) for product in site.products]
        chosen, result = _choose(site, samples[site.value.name or ""], weights, alpha, shift and site.kind != "scale")
        if chosen is not None:
            _apply(editor, site, weights, chosen)
        done.append(result)
    save_model(editor, out)
    return tuple(done)


def _sites(editor: Editor, paid: bool) -> tuple[_Site, ...]:
    read: dict[ir.Value, list[Product]] = {}
    products = editor_products(editor)
    for product in products.values():
        if product.node.op_type != "Conv" and product.activation.producer() is not None:
            read.setdefault(product.activation, []).append(product)
    sites = []
    for value, readers in read.items():
        maker = value.producer()
        kind: _Kind = "scale"
        alone = len(value.consumers()) == len(readers) and not value.is_graph_output()
        values = values_of(value, products) if alone else None
        if values is not None:
            maker, kind = values.node, "value"
        elif maker is not None and _is_norm(maker, value):
            kind = "norm" if alone else "copy"
        if maker is not None and (kind in _FREE or paid):
            sites.append(_Site(kind, maker, value, tuple(readers)))
    return tuple(sites)


def _current(site: _Site) -> _Site:
    """With the weights and biases that its products have by now."""
    products = (product_of(product.node) for product in site.products)
    return dataclasses.replace(site, products=tuple(product for product in products if product is not None))


def _is_norm(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node is a normalization of the last axis with constants of its own."""
    if node.op_type != "LayerNormalization" or node.domain != "":
        return False
    axis, rank = attribute_int(node, "axis", -1), len(sizes_of(value) or ())
    last = axis == -1 or (rank > 0 and axis == rank - 1)
    return last and all(is_constant(given) for given in node.inputs[1:] if given is not None)


def _by_input(product: Product) -> NDArray[np.float32]:
    """A weight as [inputs, outputs]."""
    weight = array_of(product.weight)
    if weight is None:
        raise ConversionError(f"The weight of {product.name!r} is not constant", "Export the model again")
    return weight if product.axis == 1 else weight.T


def _choose(
    site: _Site, sample: ChannelSample, weights: Sequence[NDArray[np.float32]], alpha: float | None, shift: bool
) -> tuple[_Move | None, Smoothed]:
    """The cheapest of all moves that are nearly as good as the best one."""
    name, channels = site.value.name or "", sample.low.shape[0]
    plain = _Move(np.ones(channels), np.zeros(channels), np.zeros(0, np.intp))
    before = _error(name, sample, weights, plain)
    peaks = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    found: list[tuple[float, float, _Move]] = []
    for count in _SPLITS if site.kind == "scale" and alpha is None else (0,):
        split = np.argsort(-np.maximum(np.abs(sample.low), np.abs(sample.high)))[:count]
        for a in ALPHAS if alpha is None else (alpha,):
            move = _move(sample, peaks, a, shift, split)
            found.append((_error(name, sample, weights, move), a, move))
    best = min(error for error, _, _ in found)
    worth = before if site.kind in _FREE else before * _PAID_SHARE
    if alpha is None and best >= worth:
        return None, Smoothed(name, None, 0, before, before)
    error, a, move = min((f for f in found if f[0] <= _NEARLY * best), key=lambda f: (f[2].split.size, f[0]))
    return move, Smoothed(name, a, move.split.size, error, before)


def _move(
    sample: ChannelSample, weight_peaks: NDArray[np.float32], alpha: float, shift: bool, split: NDArray[np.intp]
) -> _Move:
    low, high = sample.low.astype(np.float64), sample.high.astype(np.float64)
    middle = (low + high) / 2 if shift else np.zeros(low.shape)
    peaks = np.maximum(high - middle, middle - low)
    # Quiet channels stay so: what was seen of them says little of the largest that will come.
    peaks = np.maximum(peaks, np.median(peaks))
    usable = (peaks > 0) & (weight_peaks > 0)
    scale = np.ones(low.shape)
    scale[usable] = peaks[usable] ** alpha / weight_peaks[usable].astype(np.float64) ** (1 - alpha)
    return _Move(np.clip(scale, _LEAST, _MOST), middle, split)


def _error(name: str, sample: ChannelSample, weights: Sequence[NDArray[np.float32]], move: _Move) -> float:
    """Squared error of products on 8-bit grids over the energy of the products: of all rows, and the mean over rows.

    A few tokens may hold most of the energy, while what follows normalizes each for itself; and most tokens may be
    padding. The geometric mean of both shares lets neither decide alone. What is the same in all rows is no energy.
    """
    x, factors = sample.rows.astype(np.float64), move.factors
    moved = ((x - move.shift) * factors).astype(np.float32)
    low, high = (sample.low - move.shift) * factors, (sample.high - move.shift) * factors
    grid = affine_of(name, _Span(float(low.min()), float(high.max())), "uint8", symmetric=False)
    rounded = fake_quantize(moved, grid)
    shares, errors_all, energy_all = [], 0.0, 0.0
    for weight in weights:
        scaled = (weight * np.where(factors > 0, move.scale, 0.0)[:, None]).astype(np.float32)
        integers, scales = quantize_weight(scaled, 1)
        errors = np.square(rounded @ (integers.astype(np.float32) * scales) - moved @ scaled).sum(axis=1)
        made = sample.rows @ weight
        energies = np.square(made - made.mean(axis=0)).sum(axis=1)
        shares.append(errors / np.maximum(energies, 1e-6 * energies.max(initial=1e-30)))
        errors_all, energy_all = errors_all + float(errors.sum()), energy_all + float(energies.sum())
    return math.sqrt(float(np.mean(shares)) * errors_all / max(energy_all, 1e-30))


@dataclasses.dataclass(frozen=True)
class _Span:
    low: float
    high: float


def _apply(editor: Editor, site: _Site, weights: Sequence[NDArray[np.float32]], move: _Move) -> None:
    if site.kind == "scale":
        factor = editor.constant(f"{site.value.name}_smooth_factor", move.factors.astype(np.float32))
        made = editor.node(
            "Mul", [site.value, factor], f"{site.value.name}_smooth", before=site.products[0].node, like=site.value
        )
        smoothed = made.outputs[0]
    elif site.kind == "value":
        _scale_values(editor, site.maker, move)
        smoothed = site.value
    else:
        smoothed = _smooth_norm(editor, site, move)
    for product, weight in zip(site.products, weights, strict=True):
        scaled = (weight * np.where(move.factors > 0, move.scale, 0.0)[:, None]).astype(np.float32)
        value = editor.constant(f"{product.weight.name}_smooth", scaled if product.axis == 1 else scaled.T)
        product.node.replace_input_with(0, smoothed)
        product.node.replace_input_with(1, value)
        if move.split.size:
            _multiply_apart(editor, site.value, product, weight, move.split)
        if move.shift.any():
            _add_bias(editor, product, (move.shift @ weight.astype(np.float64)).astype(np.float64))


def _smooth_norm(editor: Editor, site: _Site, move: _Move) -> ir.Value:
    """The normalization with other constants: in its place, or beside it where others read it too."""
    norm = site.maker
    scale = array_of(norm.inputs[1])
    bias = array_of(norm.inputs[2]) if len(norm.inputs) > 2 else None
    if scale is None:
        raise ConversionError(f"The scale of {norm.name!r} is not constant", "Export the model again")
    old = np.zeros(scale.shape) if bias is None else bias.astype(np.float64)
    constants = (
        editor.constant(f"{norm.name}_scale_smooth", (scale.astype(np.float64) / move.scale).astype(np.float32)),
        editor.constant(f"{norm.name}_bias_smooth", ((old - move.shift) / move.scale).astype(np.float32)),
    )
    if site.kind == "copy":
        copy = editor.node(
            "LayerNormalization", [norm.inputs[0], *constants], f"{norm.name}_smooth", before=norm, like=site.value
        )
        copy.attributes.update(norm.attributes)
        return copy.outputs[0]
    if len(norm.inputs) < 3:
        norm.resize_inputs(3)
    norm.replace_input_with(1, constants[0])
    norm.replace_input_with(2, constants[1])
    return site.value


def _scale_values(editor: Editor, node: ir.Node, move: _Move) -> None:
    """Let a product make values that are shifted and divided; they pass through attention so."""
    product = product_of(node)
    weight = None if product is None else array_of(product.weight)
    if product is None or weight is None:
        raise ConversionError(f"The weight of {node.name!r} is not constant", "Export the model again")
    factors = 1.0 / move.scale
    scaled = weight * (factors if product.axis == 1 else factors[:, None])
    node.replace_input_with(1, editor.constant(f"{product.weight.name}_values", scaled.astype(np.float32)))
    found = bias_behind(product)
    bias = array_of(product.bias if found is None else found[1])
    old = np.zeros(move.scale.shape) if bias is None else bias.astype(np.float64)
    _add_bias(editor, product, (old - move.shift) * factors - old)


def _multiply_apart(
    editor: Editor, value: ir.Value, product: Product, weight: NDArray[np.float32], channels: NDArray[np.intp]
) -> None:
    """Multiply a few channels in floats, and add that to what all others make."""
    name = product.name
    places = editor.constant(f"{name}_outliers", channels.astype(np.int64))
    rows = editor.constant(f"{name}_outlier_weight", np.ascontiguousarray(weight[channels]))
    picked = editor.node("Gather", [value, places], f"{name}_outlier_inputs", before=None, attributes={"axis": -1})
    apart = editor.node("MatMul", [picked.outputs[0], rows], f"{name}_outlier_products", before=None)
    found = None if product.bias is not None else bias_behind(product)
    old = (product.node if found is None else found[0]).outputs[0]
    _sum_with(editor, old, apart.outputs[0], f"{name}_with_outliers")


def _sum_with(editor: Editor, old: ir.Value, more: ir.Value, name: str) -> None:
    """Let all readers of a value read its sum with another one."""
    uses = old.uses()
    made = editor.node("Add", [old, more], name, before=None, like=old)
    for use in uses:
        use.node.replace_input_with(use.idx, made.outputs[0])
    if old.is_graph_output():
        editor.replace(old, made.outputs[0])
        made.replace_input_with(0, old)


def _add_bias(editor: Editor, product: Product, more: NDArray[np.float64]) -> None:
    """Add a constant to the bias that a product has, or give it one."""
    node = product.node
    if product.bias is not None:
        total = _sum(array_of(product.bias), more)
        node.replace_input_with(2, editor.constant(f"{product.bias.name}_smooth", total))
        return
    if node.op_type == "Gemm" and attribute_float(node, "beta", 1.0) == 1.0:
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, editor.constant(f"{product.name}_bias", more.astype(np.float32)))
        return
    found = bias_behind(product)
    if found is not None:
        after, bias = found
        place = 1 if after.inputs[1] is bias else 0
        after.replace_input_with(place, editor.constant(f"{after.name}_smooth", _sum(array_of(bias), more)))
        return
    more_value = editor.constant(f"{product.name}_bias", more.astype(np.float32))
    _sum_with(editor, node.outputs[0], more_value, f"{product.name}_biased")


def _sum(bias: NDArray[np.float32] | None, more: NDArray[np.float64]) -> NDArray[np.float32]:
    if bias is None:
        return more.astype(np.float32)
    return (bias.astype(np.float64) + more).astype(np.float32)
