"""What each quantizable node costs in floats and in 8 bits: measured here, or from a probe, or assumed.

Kernels that ran are attributed to the nodes of the model that was quantized. A product belongs to the node whose name,
output or weight it carries; rounding and laying out, to the products that they serve; anything else, to the nearest
product before it, so that what one graph does in a kernel of its own and the other inside the product is counted for
both. Before the first product only what it reads at once belongs to it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from edgeq.converters.onnx.graph import read_onnx
from edgeq.converters.onnx.quantize.sites import NodeSite
from edgeq.converters.onnx.skeleton import read_skeleton
from edgeq.planner.tensors.mixed import NodeCost
from edgeq.planner.tensors.timing import Call, Kernel, kernel_times
from edgeq.profiles.onnx.cost import OnnxFigures, predict_node_us

__all__ = ["Attribution", "Clock", "attribute", "measured", "node_costs", "probed"]

_ASSUMED_SPEEDUP = 2.0  # of products of integers over float ones, where nothing is known
_PRODUCT_NAMES = """
    Attention Conv ConvInteger DynamicQuantizeMatMul FusedConv FusedGemm FusedMatMul Gemm MatMul MatMulInteger
    MatMulIntegerToFloat MatMulNBits NhwcFusedConv QAttention QGemm QLinearConv QLinearMatMul
"""
_PRODUCTS = frozenset(_PRODUCT_NAMES.split())
# They serve whoever reads what they make.
_CONVERSIONS = frozenset({"DynamicQuantizeLinear", "QuantizeLinear", "ReorderInput"})
# Between a conversion and the product that it serves.
_MOVES = _CONVERSIONS | {"Flatten", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
# What ONNX Runtime's fusions and layouts add to names.
_ADDED = re.compile(r"(_token_\d+|_nchwc|_nhwc|_out\d*)$")


@dataclasses.dataclass(frozen=True)
class Attribution:
    """Kernels by the nodes that they belong to.

    Attributes:
        us: microseconds of a call by node; nodes without a kernel of their own are not there.
        rest_us: of kernels that belong to none.
    """

    us: Mapping[str, float]
    rest_us: float

    @property
    def total_us(self) -> float:
        """Of all kernels."""
        return sum(self.us.values()) + self.rest_us


class _Names:
    """From names in the graph that is executed to nodes of the one that was quantized."""

    def __init__(self, model: Path, sites: Sequence[NodeSite]) -> None:
        graph = read_skeleton(model).model.graph
        self.rank = {site.name: index for index, site in enumerate(sites)}
        self.weights = {site.weight: site.name for site in sites}
        self.nodes = {node.name for node in graph.node if node.name}
        self.makers = {value: node.name for node in graph.node for value in node.output if value}
        self.near: dict[str, str] = {}  # tensor to the last node before it
        for node in graph.node:
            found = node.name if node.name in self.rank else self.latest(self.near.get(name) for name in node.input)
            if found is not None:
                self.near.update(dict.fromkeys(node.output, found))

    def latest(self, names: Iterable[str | None]) -> str | None:
        """The one that comes last in the graph; None if there is none."""
        return max((name for name in names if name is not None), key=lambda name: self.rank[name], default=None)

    def of(self, kernel: Kernel) -> str | None:
        """The node that a product computes; None if its names say nothing."""
        for name in (kernel.name, *kernel.outputs):
            found = self._written(name)
            if found is not None:
                return found
        return next((self.weights[name] for name in kernel.weights if name in self.weights), None)

    def _written(self, name: str) -> str | None:
        """The node that has this name, or the longest beginning of it, or that made the value of this name."""
        short = name
        while match := _ADDED.search(short):
            short = short[: match.start()]
        if short in self.near:
            return self.near[short]
        while short:
            if short in self.nodes:
                return short if short in self.rank else None
            cut = max(short.rfind("_"), short.rfind("/"))
            short = short[:cut] if cut > 0 else ""
        return None


def attribute(kernels: Sequence[Kernel], model: Path, sites: Sequence[NodeSite]) -> Attribution:
    """Attribute kernels to the nodes of a model.

    Args:
        kernels: of the float model, or of one that was made of it by quantizing, in the order of execution.
        model: the float model.
        sites: its nodes, from `edgeq.converters.onnx.quantize.sites.quantizable`.
    """
    names = _Names(model, sites)
    own = [names.of(kernel) if _is_product(kernel) else None for kernel in kernels]
    served = _served(kernels, own)
    near: dict[str, str] = {}
    totals: dict[str, float] = {}
    rest = 0.0
    for kernel, site, readers in zip(kernels, own, served, strict=True):
        before = site or names.latest(near.get(name) for name in kernel.inputs)
        if before is not None:
            near.update(dict.fromkeys(kernel.outputs, before))
        if site is None and readers and (before is None or kernel.op_type in _CONVERSIONS):
            owners = sorted(readers)
        else:
            owners = [] if before is None else [before]
        for owner in owners:
            totals[owner] = totals.get(owner, 0.0) + kernel.us / len(owners)
        rest += 0.0 if owners else kernel.us
    return Attribution(totals, rest)


def _is_product(kernel: Kernel) -> bool:
    return kernel.op_type in _PRODUCTS and bool(kernel.weights)


def _served(kernels: Sequence[Kernel], own: Sequence[str | None]) -> list[set[str]]:
    """The nodes whose products read what a kernel makes, at once or behind what only moves elements."""
    readers: dict[str, set[str]] = {}
    served = []
    for kernel, site in zip(reversed(kernels), reversed(own), strict=True):
        found = {name for value in kernel.outputs for name in readers.get(value, ())}
        served.append(found)
        passed = {site} if site is not None else found if kernel.op_type in _MOVES else set()
        for value in kernel.inputs if passed else ():
            readers.setdefault(value, set()).update(passed)
    return served[::-1]


@dataclasses.dataclass(frozen=True)
class Clock:
    """Where times of kernels come from.

    Attributes:
        kernels: those of a model, in the order of execution.
        is_measured: on a machine like the target, rather than foretold from a probe of it.
        overhead_us: of a call beside its kernels.
    """

    kernels: Callable[[Path], tuple[Kernel, ...]]
    is_measured: bool
    overhead_us: float = 0.0

    def call_ms(self, model: Path) -> float:
        """What a call takes."""
        return (self.overhead_us + math.fsum(kernel.us for kernel in self.kernels(model))) / 1e3


def measured(calls: Sequence[Call], *, threads: int, disabled_optimizers: Sequence[str]) -> Clock:
    """Kernels timed here, those of each model once.

    Args:
        calls: inputs of the models.
        threads: of a call.
        disabled_optimizers: of ONNX Runtime.
    """

    def kernels(model: Path) -> tuple[Kernel, ...]:
        return kernel_times(model, calls, threads=threads, disabled_optimizers=disabled_optimizers)

    return Clock(functools.cache(kernels), is_measured=True)


def probed(figures: OnnxFigures, dims: Mapping[str, int]) -> Clock:
    """Kernels with the times that a probe of the target foretells.

    Its calls raise UnsupportedModelError for an operator that the cost model does not know.

    Args:
        figures: of the target.
        dims: sizes of dynamic axes.
    """

    def kernels(model: Path) -> tuple[Kernel, ...]:
        return _probed_kernels(model, dims, figures)

    return Clock(functools.cache(kernels), is_measured=False, overhead_us=figures.call_overhead_us)


def _probed_kernels(model: Path, dims: Mapping[str, int], figures: OnnxFigures) -> tuple[Kernel, ...]:
    shape = read_onnx(model, dims)
    constants = {parameter.name for parameter in shape.parameters}
    kernels = []
    for node, us in zip(shape.nodes, predict_node_us(shape, figures), strict=True):
        is_weighted = node.flops > 0 and node.product != "activations"
        weights = tuple(name for name in node.inputs if name in constants) if is_weighted else ()
        kernels.append(Kernel("", node.op_type, node.inputs, node.outputs, weights, us))
    return tuple(kernels)


def node_costs(
    sites: Sequence[NodeSite],
    errors: Mapping[str, float],
    floats: Attribution | None,
    integers: Attribution | None,
) -> list[NodeCost]:
    """What the choice of a mix must know of every node.

    Args:
        sites: the nodes.
        errors: of each when it alone is quantized.
        floats: kernels of the float model; None to assume times by multiply-adds.
        integers: kernels of the model with every node in 8 bits; likewise.

    Nodes that no kernel was attributed to have times by multiply-adds, at the speed of the others.
    """
    work = {site.name: float(site.macs or site.weights) for site in sites}
    float_us = _complete(work, {} if floats is None else floats.us, 1.0)
    int8_us = _complete(work, {} if integers is None else integers.us, _ASSUMED_SPEEDUP)
    return [
        NodeCost(
            site.name,
            errors.get(site.name, 0.0),
            float_us[site.name],
            int8_us[site.name],
            4 * site.weights,
            site.weights,
        )
        for site in sites
    ]


def _complete(work: Mapping[str, float], known: Mapping[str, float], factor: float) -> dict[str, float]:
    """Times of all nodes; those that are not known in proportion to their work."""
    there = [name for name in work if name in known]
    total = math.fsum(work[name] for name in there)
    rate = math.fsum(known[name] for name in there) / total if total else 1 / factor
    return {name: known.get(name, rate * amount) for name, amount in work.items()}
