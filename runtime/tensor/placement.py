"""On which provider ONNX Runtime really put each node of a session.

A provider that has no kernel for a node leaves it to the CPU without a word, and every call then waits for copies there
and back. ``session.disable_cpu_ep_fallback`` is no way to refuse that: CUDA's provider puts nodes that compute shapes
on the CPU on purpose, where they are faster, and the option refuses those too. So the placement is asked for, and only
what computes no shapes has to be where it was meant to be.

Placement is what ONNX Runtime decides after its basic optimizations. An operator that computes shapes and values alike,
such as Add or Gather, is let through: its name alone does not tell which.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from edgeq.errors import SessionError
from edgeq.profiles.onnx.session import PROVIDERS, Provider, import_onnxruntime

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["placement_config", "refuse_fallback", "strays"]

(_CPU,) = PROVIDERS
_MOST_NAMED = 5
# What exporters compute shapes and indices with, and branches, whose nodes are told one by one.
_OF_SHAPES = frozenset({
    "Abs", "Add", "Ceil", "Clip", "CumSum", "Div", "Floor", "Max", "Min", "Mod", "Mul", "Neg", "Range", "ReduceMax",
    "ReduceMin", "ReduceProd", "ReduceSum", "Round", "Sign", "Sqrt", "Sub",
    "And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Where", "Xor",
    "Cast", "CastLike", "Compress", "Concat", "Constant", "ConstantOfShape", "Expand", "EyeLike", "Flatten", "Gather",
    "GatherElements", "GatherND", "Identity", "NonZero", "OneHot", "Reshape", "ScatterElements", "ScatterND", "Shape",
    "Size", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze",
    "ConcatFromSequence", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceLength",
    "SplitToSequence",
    "If", "Loop", "Scan",
})  # fmt: skip


def placement_config(providers: Sequence[Provider]) -> dict[str, str]:
    """ONNX Runtime's configuration that makes it keep what `refuse_fallback` reads."""
    return {} if _may_use_cpu(providers) else {"session.record_ep_graph_assignment_info": "1"}


def refuse_fallback(session: onnxruntime.InferenceSession, providers: Sequence[Provider]) -> None:
    """Refuse a session that computes on the CPU what others were asked to compute.

    A list of providers that names the CPU's allows it to take what the others lack. ONNX Runtime before 1.24 does not
    tell where nodes are; that is logged as a warning.

    Args:
        session: opened with `placement_config`.
        providers: that it was opened with.

    Raises:
        SessionError: nodes that compute no shapes are on the CPU.
    """
    if _may_use_cpu(providers):
        return
    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    wanted = ", ".join(names) or "no provider"
    if not hasattr(session, "get_provider_graph_assignment_info"):
        logging.getLogger("edgeq").warning(
            "onnxruntime %s does not tell which nodes run on the CPU instead of %s: install 1.24 or newer to have it "
            "checked",
            import_onnxruntime().__version__,
            wanted,
        )
        return
    found = strays(
        (part.ep_name, node.name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    )
    if not found:
        return
    told = ", ".join(f"{name or 'a node without a name'} ({kind})" for name, kind in found[:_MOST_NAMED])
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    allowed = ", ".join(repr(name) for name in (*names, _CPU))
    raise SessionError(
        f"ONNX Runtime was asked for {wanted}, and computes on the CPU what that has no kernels for: {told}{more}",
        f"Convert again in another --precision, or allow it: edgeq.load(bundle, providers=[{allowed}])",
    )


def strays(placed: Iterable[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """Name and operator of the nodes on the CPU that compute no shapes.

    Args:
        placed: provider, name and operator of each node.
    """
    return [(name, kind) for provider, name, kind in placed if provider == _CPU and kind not in _OF_SHAPES]


def _may_use_cpu(providers: Sequence[Provider]) -> bool:
    return any((provider if isinstance(provider, str) else provider[0]) == _CPU for provider in providers)
