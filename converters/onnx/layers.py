"""Where the error of a quantized model enters: each of its layers against the float model's.

A layer is what makes a tensor that both graphs have, from the last such tensors before it. Two errors are measured of
each: the *accumulated* one, with the quantized model's own inputs, and that of the layer *alone*, with the float
model's: what rounding its weights and its output adds. A tensor that is only read quantized is compared as it is read;
if some nodes read it in floats, those that round it are charged with that. So nothing counts twice.

Layers run one at a time and in the file's own operators; the kernels that ONNX Runtime fuses them to round the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.compare import Agreement
from edgeq.converters.onnx.feeds import Feeds, check_feeds
from edgeq.converters.onnx.pieces import CutModel, Piece
from edgeq.converters.onnx.stages import StagedModel
from edgeq.errors import ConversionError, UsageError
from edgeq.record import Record

if TYPE_CHECKING:
    import onnx

__all__ = ["LayerError", "compare_layers", "worst_layers"]

Arrays = Mapping[str, NDArray[np.generic]]
Progress = Callable[[int, int, str], None]

# They move numbers and add no error; what follows them is compared.
_MOVES = frozenset(
    [
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "Dropout",
        "Expand",
        "Flatten",
        "Identity",
        "Pad",
        "QuantizeLinear",
        "Range",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ]
)
_FOLDED = frozenset(["Clip", "Relu"])  # what the limits of a grid can do
_ROUNDS = frozenset(["DequantizeLinear", "QuantizeLinear"])
# They compute on integers, or on weights that are stored so.
_INTEGER = frozenset(
    [
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "GatherBlockQuantized",
        "MatMulBnb4",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QGemm",
    ]
)
_NARROW = frozenset([2, 3, 17, 21, 22])  # TensorProto.DataType: UINT8, INT8, FLOAT8E4M3FN, UINT4, INT4
# Likewise, if they read such numbers or what they stand for.
_PRODUCTS = frozenset(["Conv", "ConvTranspose", "Gather", "Gemm", "MatMul"])
# Likewise, if all that they read and what they make is on grids.
_BETWEEN_GRIDS = frozenset(
    ["Add", "AveragePool", "Clip", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Mul", "Relu", "Sigmoid"]
)


class LayerError(Record, frozen=True, kw_only=True):
    """One layer of a quantized model against the float model's.

    Attributes:
        name: of the tensor that it makes.
        node: of the node that makes it in the float model. Where that adds to a product or to rows of a table which the
            quantized model never holds by themselves, of that one.
        op_type: of that node.
        quantized: whether it computes on integers or on quantized weights; that its result is rounded for others is
            not enough.
        cosine: accumulated, mean over the calls.
        noise: accumulated: energy of the error over energy of the float model's tensor.
        alone: likewise, of the layer alone.
        max_error: accumulated, the largest absolute difference.
    """

    name: str
    node: str
    op_type: str
    quantized: bool
    cosine: float
    noise: float
    alone: float
    max_error: float

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise ratio, accumulated; None without any error."""
        return _decibel(self.noise)

    @property
    def alone_sqnr_db(self) -> float | None:
        """Likewise, of the layer alone."""
        return _decibel(self.alone)


def _decibel(noise: float) -> float | None:
    return -10 * math.log10(noise) if noise else None


def worst_layers(layers: Sequence[LayerError], count: int = 8) -> tuple[LayerError, ...]:
    """The layers that add most error of their own, the worst first; those that add none are left out."""
    return tuple(sorted((layer for layer in layers if layer.alone), key=lambda layer: -layer.alone)[:count])


def compare_layers(
    reference: Path,
    candidate: Path,
    inputs: Iterable[Feeds],
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> tuple[LayerError, ...]:
    """Compare each layer of two models, in the order of the float model.

    All activations of one call are held at once.

    Args:
        reference: the float model.
        candidate: the model that was made from it, in which tensors kept their names.
        inputs: one mapping of names to arrays for each call; a few show what many would.
        threads: of each call.
        progress: told calls done, calls in all (0 if ``inputs`` does not say), and what is going on.

    Raises:
        UsageError: no inputs.
        ConversionError: the models have no tensor in common, one has another shape in the candidate or is not finite
            there, or inputs do not fit.
        SourceError: no sound ONNX file.
        SessionError: ONNX Runtime cannot load a part of a model.
        DiskFullError: no room for temporary files.
        MissingPackageError: the package onnx or onnxruntime is not installed.
    """
    total = len(inputs) if isinstance(inputs, Sized) else 0
    with CutModel(reference, threads=threads) as plain, CutModel(candidate, threads=threads) as other:
        shared = _shared(plain, other)
        specs = other.specs
        if {spec.name for spec in specs} != {spec.name for spec in plain.specs}:
            raise ConversionError(
                f"{candidate.name} has other inputs than the float model", "Compare models made from one another"
            )
        layers: _Layers | None = None
        index = -1
        with StagedModel(plain, list(shared)) as staged:
            for index, feeds in enumerate(inputs):
                check_feeds(feeds, specs, index)
                expected = {name: values for name, values in staged.run(feeds) if values.dtype.kind == "f"}
                if layers is None:
                    layers = _Layers(other, {name: shared[name].read_as for name in expected})
                layers.update(feeds, expected, index)
                if progress is not None:
                    progress(index + 1, total, "Comparing layers")
        if layers is None:
            raise UsageError("No inputs to compare on", "Give at least one")
        return tuple(layers.error(name, some.node) for name, some in shared.items() if name in layers)


@dataclasses.dataclass(frozen=True)
class _Shared:
    """A tensor of the float model that the candidate makes too.

    Attributes:
        node: of the float model, which makes it but for a ReLU.
        read_as: its names in the candidate, where other layers read it.
    """

    node: onnx.NodeProto
    read_as: tuple[str, ...]


def _shared(reference: CutModel, candidate: CutModel) -> dict[str, _Shared]:
    """Tensors that layers of both models make, in the order of the reference."""
    read_by = [_readers(model) for model in (reference, candidate)]
    shared: dict[str, _Shared] = {}
    for name, place in reference.makers.items():
        node = reference.nodes[place]
        if name not in candidate.makers or name in reference.constants | candidate.constants or node.op_type in _MOVES:
            continue
        read_as = _read_as(candidate, read_by[1], name)
        followers = [reference.nodes[place] for place in read_by[0].get(name, ())]
        folded = (
            read_as != (name,)
            and [follower.op_type in _FOLDED for follower in followers] == [True]
            and followers[0].output[0] not in candidate.makers
        )
        # A grid that ends at zero takes over a ReLU: what is read is that one's output.
        shared[followers[0].output[0] if folded else name] = _Shared(_product(reference, candidate, node), read_as)
    if not shared:
        raise ConversionError(
            "The models have no tensor in common, so their layers cannot be compared",
            "Compare a model with the float model that it was made from",
        )
    return shared


def _product(reference: CutModel, candidate: CutModel, node: onnx.NodeProto) -> onnx.NodeProto:
    """What an Add of the float model adds to, if it is a product or a look-up that the candidate has not by itself."""
    makers = [reference.nodes[reference.makers[read]] for read in node.input if read in reference.makers]
    fused = [
        maker for maker in makers if maker.op_type in ("Gather", "MatMul") and maker.output[0] not in candidate.makers
    ]
    return fused[0] if node.op_type == "Add" and fused else node


def _readers(model: CutModel) -> dict[str, list[int]]:
    """Places of the nodes that read each value."""
    readers: dict[str, list[int]] = {}
    for place, reads in enumerate(model.reads):
        for read in reads:
            readers.setdefault(read, []).append(place)
    return readers


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A piece of the candidate that makes one tensor, and how it does.

    Attributes:
        piece: gives the first of `names`.
        names: of the tensor as the candidate's other layers read it.
        accumulated: with the candidate's own inputs.
        alone: with the float model's.
        dropped: values that no later layer reads.
    """

    piece: Piece
    names: tuple[str, ...]
    accumulated: Agreement
    alone: Agreement
    dropped: tuple[str, ...]


class _Layers:
    """All layers of the candidate."""

    def __init__(self, model: CutModel, read_as: Mapping[str, tuple[str, ...]]) -> None:
        stops = frozenset(read for reads in read_as.values() for read in reads)
        ordered = sorted(read_as, key=lambda name: model.makers[read_as[name][0]])
        pieces = {name: _piece(model, read_as[name][0], stops) for name in ordered}
        last = {read: name for name in ordered for read in pieces[name].reads}
        self._model = model
        self._layers: dict[str, _Layer] = {}
        for name, piece in pieces.items():
            held = {*read_as[name], *piece.reads} & stops
            dropped = tuple(value for value in held if last.get(value, name) == name)
            self._layers[name] = _Layer(piece, read_as[name], Agreement(), Agreement(), dropped)

    def __contains__(self, name: str) -> bool:
        return name in self._layers

    def update(self, feeds: Feeds, expected: Arrays, index: int) -> None:
        """Run every layer twice."""
        own, given = dict(feeds), dict(feeds)
        for name, layer in self._layers.items():
            made = layer.piece.run(own)[layer.names[0]]
            same_inputs = all(read in feeds for read in layer.piece.reads)
            alone = made if same_inputs else layer.piece.run(given)[layer.names[0]]
            layer.accumulated.judge(expected[name], made, f"The tensor {name!r}", index)
            layer.alone.judge(expected[name], alone, f"The tensor {name!r}", index)
            own.update(dict.fromkeys(layer.names, made))
            given.update(dict.fromkeys(layer.names, expected[name].astype(made.dtype, copy=False)))
            for gone in layer.dropped:
                own.pop(gone, None)
                given.pop(gone, None)

    def error(self, name: str, node: onnx.NodeProto) -> LayerError:
        """The figures of one layer.

        Args:
            name: of its tensor.
            node: of the float model.
        """
        layer = self._layers[name]
        return LayerError(
            name=name,
            node=node.name,
            op_type=node.op_type,
            quantized=_computes_quantized(self._model, layer.piece, layer.names[0]),
            cosine=layer.accumulated.mean_cosine,
            noise=layer.accumulated.noise,
            alone=layer.alone.noise,
            max_error=layer.accumulated.max_error,
        )


def _read_as(model: CutModel, readers: Mapping[str, Sequence[int]], name: str) -> tuple[str, ...]:
    """The names under which others read a tensor: those of its dequantized values if nobody reads it in floats."""
    values = [name]
    for op_type in ("QuantizeLinear", "DequantizeLinear"):
        nodes = [model.nodes[place] for value in values for place in readers.get(value, ())]
        if not nodes or any(node.op_type != op_type for node in nodes):
            return (name,)
        values = [node.output[0] for node in nodes]
    return tuple(values)


def _piece(model: CutModel, name: str, stops: frozenset[str]) -> Piece:
    """What makes a value from those at which to stop."""
    places = model.above([name], stops)
    return model.piece([n for n in places if not model.is_constant(n)], [name])


def _computes_quantized(model: CutModel, piece: Piece, name: str) -> bool:
    """Whether what makes a value computes on integers or on quantized weights, its rounding for others aside."""
    behind: set[str] = set()
    while name in model.makers and model.nodes[model.makers[name]].op_type in _ROUNDS:
        behind.add(name)
        name = model.nodes[model.makers[name]].input[0]
    stored = {weight.name for weight in piece.weights if weight.data_type in _NARROW}
    return any(
        _is_quantized(model, node, stored, rounded=bool(behind) and node.output[0] == name)
        for node in piece.nodes
        if node.output[0] not in behind
    )


def _is_quantized(model: CutModel, node: onnx.NodeProto, stored: Set[str], *, rounded: bool) -> bool:
    if node.op_type in _INTEGER or node.op_type.startswith("QLinear"):
        return True
    if node.op_type in _PRODUCTS:
        return any(read in stored or _is_dequantized(model, read) for read in node.input[:2])
    given = [read for read in node.input if read and read not in model.constants]
    between = rounded and node.op_type in _BETWEEN_GRIDS and bool(given)
    return between and all(_is_dequantized(model, read) for read in given)


def _is_dequantized(model: CutModel, name: str) -> bool:
    """Whether a value is made of integers by nothing but a scale."""
    while name in model.makers:
        node = model.nodes[model.makers[name]]
        if node.op_type == "DequantizeLinear":
            return True
        if node.op_type not in _MOVES or not node.input:
            return False
        name = node.input[0]
    return False
