"""The models that the probe times: chains of one kernel, as perception transformers call it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeq.profiles.onnx.models import OnnxNode, ValueInfo, encode_model

__all__ = ["CHAIN", "KERNELS", "PAIRS", "ProbeModel", "baseline_model", "kernel_model", "product_model", "tiny_chain"]

CHAIN = 4  # kernels in a row, so that what a call costs beside them counts little
PAIRS = 8  # of products in a row: 38 MB of FP32 weights, which no cache of a robot's CPU keeps
_WIDTH, _HEADS, _HEAD = 384, 12, 32  # of all-MiniLM-L6-v2 and of ViT-S with half its heads
_BATCH = 4  # of attention: its scores then fit into no cache of their own, as between other kernels they do not
_TOKENS = 128
_HIDDEN = 4 * _WIDTH
_RUNTIME = "com.microsoft"

Array = NDArray[np.generic]
Feeds = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class ProbeModel:
    """A model to be timed.

    Attributes:
        model: the serialized ``ModelProto``.
        feeds: what it is called with.
        fetch: the one output to ask for; others are computed and dropped.
        nodes: kernels of the kind that is timed.
        elements: of the largest tensor of one of them, or weights of all products.
        quantized: elements that each DynamicQuantizeLinear reads that stands beside the kernels that are timed.
        optimized: whether ONNX Runtime may choose another layout, as it does for convolutions.
    """

    model: bytes
    feeds: Feeds
    fetch: str
    nodes: int
    elements: int
    quantized: tuple[int, ...] = ()
    optimized: bool = False


def _random(shape: Sequence[int], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _chain(
    op_type: str,
    *,
    extra: Sequence[str] = (),
    weights: Mapping[str, Array] | None = None,
    domain: str = "",
    attributes: Mapping[str, int | Sequence[int]] | None = None,
    first: bool = False,
) -> tuple[list[OnnxNode], dict[str, Array], str]:
    """Nodes of which each reads the one before, beside the same extra inputs; ``first`` puts those in front."""
    nodes, name = [], "x"
    for index in range(CHAIN):
        inputs = (*extra, name) if first else (name, *extra)
        nodes.append(OnnxNode(op_type, inputs, (f"y{index}",), dict(attributes or {}), domain))
        name = f"y{index}"
    return nodes, dict(weights or {}), name


def _fan(op_type: str, outputs: int = 1) -> list[OnnxNode]:
    """Nodes that all read the input, for kernels whose output is of another type."""
    return [
        OnnxNode(op_type, ("x",), tuple(f"y{index}" if not o else f"y{index}.{o}" for o in range(outputs)))
        for index in range(CHAIN)
    ]


def kernel_model(op_type: str, elements: int) -> ProbeModel:
    """A chain of one of `KERNELS` over about that many elements."""
    return KERNELS[op_type](elements)


def _plain(nodes: list[OnnxNode], weights: Mapping[str, Array], shape: Sequence[int], out: str) -> ProbeModel:
    x = _random(shape)
    inputs = [ValueInfo("x", "float32", x.shape)]
    model = encode_model(nodes, inputs, [ValueInfo(out, "float32", x.shape)], weights)
    return ProbeModel(model, {"x": x}, out, CHAIN, x.size)


def _rows(elements: int, width: int) -> tuple[int, int]:
    return max(1, elements // width), width


def _add(elements: int) -> ProbeModel:
    shape = _rows(elements, _HIDDEN)
    x = _random(shape)
    nodes, weights, out = _chain("Add", extra=("z",))
    inputs = [ValueInfo("x", "float32", shape), ValueInfo("z", "float32", shape)]
    model = encode_model(nodes, inputs, [ValueInfo(out, "float32", shape)], weights)
    return ProbeModel(model, {"x": x, "z": _random(shape, 1)}, out, CHAIN, x.size)


def _where(elements: int) -> ProbeModel:
    shape = _rows(elements, _TOKENS)
    x = _random(shape)
    nodes, weights, out = _chain("Where", extra=("c", "n"), weights={"n": np.zeros((), np.float32)}, first=True)
    inputs = [ValueInfo("x", "float32", shape), ValueInfo("c", "bool", shape)]
    model = encode_model(nodes, inputs, [ValueInfo(out, "float32", shape)], weights)
    return ProbeModel(model, {"x": x, "c": x > 4}, out, CHAIN, x.size)


def _is_nan(elements: int) -> ProbeModel:
    shape = _rows(elements, _TOKENS)
    x = _random(shape)
    outputs = [ValueInfo(f"y{index}", "bool", shape) for index in range(CHAIN)]
    model = encode_model(_fan("IsNaN"), [ValueInfo("x", "float32", shape)], outputs, {})
    return ProbeModel(model, {"x": x}, "y0", CHAIN, x.size)


def _quantize(elements: int) -> ProbeModel:
    shape = _rows(elements, _WIDTH)
    x = _random(shape)
    outputs = [
        info
        for index in range(CHAIN)
        for info in (
            ValueInfo(f"y{index}", "uint8", shape),
            ValueInfo(f"y{index}.1", "float32", ()),
            ValueInfo(f"y{index}.2", "uint8", ()),
        )
    ]
    model = encode_model(_fan("DynamicQuantizeLinear", 3), [ValueInfo("x", "float32", shape)], outputs, {})
    return ProbeModel(model, {"x": x}, "y0", CHAIN, x.size)


def _softmax(elements: int) -> ProbeModel:
    shape = _rows(elements, _TOKENS)
    nodes, weights, out = _chain("Softmax", attributes={"axis": -1})
    return _plain(nodes, weights, shape, out)


def _gelu(elements: int) -> ProbeModel:
    shape = _rows(elements, _HIDDEN)
    nodes, weights, out = _chain("Gelu")
    return _plain(nodes, weights, shape, out)


def _bias_gelu(elements: int) -> ProbeModel:
    shape = _rows(elements, _HIDDEN)
    nodes, weights, out = _chain("BiasGelu", extra=("b",), weights={"b": _random((_HIDDEN,))}, domain=_RUNTIME)
    return _plain(nodes, weights, shape, out)


def _norm(elements: int) -> ProbeModel:
    shape = _rows(elements, _WIDTH)
    weights: dict[str, Array] = {"g": np.ones(_WIDTH, np.float32), "b": np.zeros(_WIDTH, np.float32)}
    nodes, weights, out = _chain("LayerNormalization", extra=("g", "b"), weights=weights)
    return _plain(nodes, weights, shape, out)


def _skip_norm(elements: int) -> ProbeModel:
    shape = (1, *_rows(elements, _WIDTH))
    x = _random(shape)
    weights: dict[str, Array] = {
        "g": np.ones(_WIDTH, np.float32),
        "b": np.zeros(_WIDTH, np.float32),
        "c": _random((_WIDTH,), 2),
    }
    nodes, weights, out = _chain("SkipLayerNormalization", extra=("z", "g", "b", "c"), weights=weights, domain=_RUNTIME)
    inputs = [ValueInfo("x", "float32", shape), ValueInfo("z", "float32", shape)]
    model = encode_model(nodes, inputs, [ValueInfo(out, "float32", shape)], weights)
    return ProbeModel(model, {"x": x, "z": _random(shape, 1)}, out, CHAIN, x.size)


def _transpose(elements: int) -> ProbeModel:
    """Tokens and heads change places, and change back."""
    tokens = max(1, elements // (_HEADS * _HEAD))
    shape = (1, tokens, _HEADS, _HEAD)
    nodes, weights, out = _chain("Transpose", attributes={"perm": (0, 2, 1, 3)})
    return _plain(nodes, weights, shape, out)


KERNELS: Mapping[str, Callable[[int], ProbeModel]] = {
    "Add": _add,
    "BiasGelu": _bias_gelu,
    "DynamicQuantizeLinear": _quantize,
    "Gelu": _gelu,
    "IsNaN": _is_nan,
    "LayerNormalization": _norm,
    "SkipLayerNormalization": _skip_norm,
    "Softmax": _softmax,
    "Transpose": _transpose,
    "Where": _where,
}


def product_model(kernel: str, kind: str, rows: int) -> ProbeModel:
    """Products in a row, each with weights of its own.

    Args:
        kernel: ``"matmul"``, ``"activations"`` or ``"conv"``.
        kind: ``"fp32"`` or ``"int8"`` (of matmul only).
        rows: of the first factor; pixels of a convolution.
    """
    if kernel == "matmul":
        return _matmuls(kind, rows)
    return _attention(rows) if kernel == "activations" else _convolutions(rows)


def _matmuls(kind: str, rows: int) -> ProbeModel:
    nodes: list[OnnxNode] = []
    weights: dict[str, Array] = {}
    name = "x"
    if kind == "int8":
        weights = {"s": np.full((), 0.01, np.float32), "o": np.zeros((), np.int8)}
    for index in range(2 * PAIRS):
        shape = (_WIDTH, _HIDDEN) if index % 2 == 0 else (_HIDDEN, _WIDTH)
        made, weight = f"y{index}", f"w{index}"
        values = _random(shape, index) * np.float32(0.02)
        if kind == "int8":
            weights[weight] = np.clip(values / 0.0005, -127, 127).astype(np.int8)
            q, scale, zero = (f"q{index}", f"q{index}.s", f"q{index}.o")
            nodes.append(OnnxNode("DynamicQuantizeLinear", (name,), (q, scale, zero)))
            inputs = (q, weight, scale, "s", zero, "o")
            nodes.append(OnnxNode("MatMulIntegerToFloat", inputs, (made,), domain=_RUNTIME))
        else:
            weights[weight] = values
            nodes.append(OnnxNode("MatMul", (name, weight), (made,)))
        name = made
    shape = (rows, _WIDTH)
    model = encode_model(nodes, [ValueInfo("x", "float32", shape)], [ValueInfo(name, "float32", shape)], weights)
    quantized = (rows * _WIDTH, rows * _HIDDEN) * PAIRS if kind == "int8" else ()
    return ProbeModel(model, {"x": _random(shape)}, name, 2 * PAIRS, 2 * PAIRS * _WIDTH * _HIDDEN, quantized)


def _attention(rows: int) -> ProbeModel:
    """Scores and mix of a layer with so many tokens, twice over."""
    queries, keys = (_BATCH, _HEADS, rows, _HEAD), (_BATCH, _HEADS, _HEAD, rows)
    nodes = []
    name = "x"
    for index in range(CHAIN // 2):
        nodes.append(OnnxNode("MatMul", (name, "k"), (f"s{index}",)))
        nodes.append(OnnxNode("MatMul", (f"s{index}", "v"), (f"y{index}",)))
        name = f"y{index}"
    inputs = [ValueInfo("x", "float32", queries), ValueInfo("k", "float32", keys), ValueInfo("v", "float32", queries)]
    feeds = {"x": _random(queries), "k": _random(keys, 1), "v": _random(queries, 2) / np.float32(rows)}
    model = encode_model(nodes, inputs, [ValueInfo(name, "float32", queries)], {})
    return ProbeModel(model, feeds, name, CHAIN, CHAIN * _BATCH * _HEADS * _HEAD * rows)


def _convolutions(rows: int) -> ProbeModel:
    """3 x 3 over a square of so many pixels, 64 channels."""
    side, channels = round(rows**0.5), 64
    shape = (1, channels, side, side)
    weights: dict[str, Array] = {
        f"w{i}": _random((channels, channels, 3, 3), i) * np.float32(0.04) for i in range(CHAIN)
    }
    names = ["x", *(f"y{index}" for index in range(CHAIN))]
    nodes = [
        OnnxNode("Conv", (names[i], f"w{i}"), (names[i + 1],), {"pads": (1, 1, 1, 1), "kernel_shape": (3, 3)})
        for i in range(CHAIN)
    ]
    model = encode_model(nodes, [ValueInfo("x", "float32", shape)], [ValueInfo(names[-1], "float32", shape)], weights)
    return ProbeModel(model, {"x": _random(shape)}, names[-1], CHAIN, CHAIN * channels * channels * 9, optimized=True)


def tiny_chain(rounds: int) -> ProbeModel:
    """Five kinds of nodes in turn on 16 numbers: what a call and a node cost when there is next to nothing to do."""
    weights: dict[str, Array] = {
        "z": _random((1, 16)),
        "tall": np.array([16, 1]),
        "begin": np.array([0]),
        "end": np.array([8]),
        "axis": np.array([1]),
    }
    nodes: list[OnnxNode] = []
    name = "x"
    for r in range(rounds):
        nodes += [
            OnnxNode("Add", (name, "z"), (f"a{r}",)),
            OnnxNode("Reshape", (f"a{r}", "tall"), (f"b{r}",)),
            OnnxNode("Transpose", (f"b{r}",), (f"c{r}",), {"perm": (1, 0)}),
            OnnxNode("Slice", (f"c{r}", "begin", "end", "axis"), (f"d{r}",)),
            OnnxNode("Concat", (f"d{r}", f"d{r}"), (f"e{r}",), {"axis": 1}),
        ]
        name = f"e{r}"
    info = [ValueInfo("x", "float32", (1, 16))], [ValueInfo(name, "float32", (1, 16))]
    return ProbeModel(encode_model(nodes, *info, weights), {"x": _random((1, 16))}, name, len(nodes), 16)


def baseline_model() -> bytes:
    """A transformer block of a few kilobytes, in FP32 and in INT8: it calls the code that real models call.

    Its one input is ``ids`` of [1, 8], each below 16.
    """
    width, tokens = 64, 8
    weights: dict[str, Array] = {
        "table": _random((16, width)),
        "g": np.ones(width, np.float32),
        "b": np.zeros(width, np.float32),
        "half": np.array(0.5, np.float32),
        "zero": np.zeros((), np.float32),
        "split": np.array([1, tokens, 2, width // 2]),
        "join": np.array([1, tokens, width]),
        "s": np.full((), 0.01, np.float32),
        "o": np.zeros((), np.int8),
        "kernel": _random((4, 1, 3, 3)),
        **{name: _random((width, width), seed) for seed, name in enumerate(("wq", "wk", "wv", "wo", "wu"))},
        "wi": np.ones((width, width), np.int8),
    }
    nodes = [
        OnnxNode("Gather", ("table", "ids"), ("e",)),
        OnnxNode("LayerNormalization", ("e", "g", "b"), ("h",)),
    ]
    for name in "qkv":
        nodes += [
            OnnxNode("MatMul", ("h", f"w{name}"), (f"{name}0",)),
            OnnxNode("Add", (f"{name}0", "b"), (f"{name}1",)),
            OnnxNode("Reshape", (f"{name}1", "split"), (f"{name}2",)),
            OnnxNode("Transpose", (f"{name}2",), (name,), {"perm": (0, 2, 3, 1) if name == "k" else (0, 2, 1, 3)}),
        ]
    nodes += [
        OnnxNode("Mul", ("q", "half"), ("qs",)),
        OnnxNode("MatMul", ("qs", "k"), ("scores",)),
        OnnxNode("Softmax", ("scores",), ("p",), {"axis": -1}),
        OnnxNode("IsNaN", ("p",), ("bad",)),
        OnnxNode("Where", ("bad", "zero", "p"), ("attention",)),
        OnnxNode("MatMul", ("attention", "v"), ("m",)),
        OnnxNode("Transpose", ("m",), ("mt",), {"perm": (0, 2, 1, 3)}),
        OnnxNode("Reshape", ("mt", "join"), ("mj",)),
        OnnxNode("MatMul", ("mj", "wo"), ("a0",)),
        OnnxNode("Add", ("a0", "b"), ("a1",)),
        OnnxNode("Add", ("a1", "h"), ("a2",)),
        OnnxNode("LayerNormalization", ("a2", "g", "b"), ("a",)),
        OnnxNode("MatMul", ("a", "wu"), ("u0",)),
        OnnxNode("Add", ("u0", "b"), ("u1",)),
        OnnxNode("Gelu", ("u1",), ("u",)),
        OnnxNode("DynamicQuantizeLinear", ("u",), ("uq", "us", "uo")),
        OnnxNode("MatMulInteger", ("uq", "wi", "uo", "o"), ("d0",)),
        OnnxNode("Cast", ("d0",), ("d1",), {"to": 1}),
        OnnxNode("Mul", ("us", "s"), ("ds",)),
        OnnxNode("Mul", ("d1", "ds"), ("d",)),
        OnnxNode("Unsqueeze", ("d", "axis"), ("image",)),
        OnnxNode("Conv", ("image", "kernel"), ("c0",), {"pads": (1, 1, 1, 1), "kernel_shape": (3, 3)}),
        OnnxNode("Relu", ("c0",), ("c",)),
    ]
    weights["axis"] = np.array([1])
    inputs, outputs = [ValueInfo("ids", "int64", (1, tokens))], [ValueInfo("c", "float32", (1, 4, tokens, width))]
    return encode_model(nodes, inputs, outputs, weights)
