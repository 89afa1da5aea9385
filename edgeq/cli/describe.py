"""Plans and bundles as lines for people."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeq.cli.tables import format_table
from edgeq.types import BUDGET_LINES
from edgeq.units import format_bytes, format_quantity

if TYPE_CHECKING:
    from edgeq.types import Budget, Fallback, ModelSource, Plan

__all__ = ["fallback_lines", "plan_lines", "prediction_lines", "type_lines"]

_LAYER = re.compile(r"^blk\.\d+\.")


def plan_lines(plan: Plan, source: ModelSource) -> list[str]:
    """The decisions, the fallbacks, what was rejected, and the converter's notes."""
    kv = plan.kv_type_k if plan.kv_type_k == plan.kv_type_v else f"{plan.kv_type_k}/{plan.kv_type_v}"
    counts = Counter(plan.tensor_types.values())
    mix = ", ".join(f"{count} x {kind}" for kind, count in counts.most_common())
    lines = [
        f"model    {source.id}, {source.architecture}, {source.n_params / 1e6:.1f} M weights in {source.dtype}",
        f"types    {plan.preset or 'recipe'}: {mix}",
        f"session  context {plan.context_tokens}, KV cache {kv}, {plan.ubatch_tokens} prompt tokens at once",
    ]
    lines += fallback_lines(plan.fallbacks)
    lines += [f"rejected {item.option}: {item.reason}" for item in plan.rejected]
    return lines + [f"note     {note}" for note in plan.notes]


def fallback_lines(fallbacks: tuple[Fallback, ...]) -> list[str]:
    """One line for each kind of fallback, with the tensors by role."""
    groups: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for item in fallbacks:
        groups[item.wanted, item.got, item.reason][_LAYER.sub("blk.*.", item.tensor)] += 1
    return [
        f"fallback {wanted} became {got} in {sum(roles.values())} tensors ({reason}): "
        + ", ".join(f"{count} x {role}" if count > 1 else role for role, count in sorted(roles.items()))
        for (wanted, got, reason), roles in groups.items()
    ]


def type_lines(plan: Plan) -> list[str]:
    """A table of types by role, and by layer where layers differ."""
    roles: dict[str, Counter[str]] = defaultdict(Counter)
    for name, kind in plan.tensor_types.items():
        roles[_LAYER.sub("blk.*.", name)][kind] += 1
    rows = [[role, _mix(kinds), str(sum(kinds.values()))] for role, kinds in sorted(roles.items())]
    return format_table(["tensors", "types", "count"], rows, right=(2,))


def _mix(kinds: Mapping[str, int]) -> str:
    if len(kinds) == 1:
        return next(iter(kinds))
    return ", ".join(f"{count} x {kind}" for kind, count in Counter(kinds).most_common())


def prediction_lines(plan: Plan, budget: Budget) -> list[str]:
    """A table of what is predicted against the budget, and what memory consists of."""
    # What is predicted is a mean, and of which workload; the limit's percentile is for the measurement.
    means = {
        "ttft_ms": f"time to first token, {plan.predicted.prompt_tokens} prompt tokens",
        "itl_ms": f"inter-token latency, context of {plan.context_tokens} full",
        "tokens_per_s": f"decode speed, context of {plan.context_tokens} full",
    }
    rows = []
    for line in BUDGET_LINES:
        limit, predicted = budget.limit(line), getattr(plan.predicted, line.field, None)
        if limit is None and predicted is None:
            continue
        sign = "≤" if line.at_most else "≥"
        rows.append(
            [
                means.get(line.field, line.label),
                "-" if predicted is None else format_quantity(predicted, line.unit),
                "-" if limit is None else f"{sign} {format_quantity(limit, line.unit)}",
            ]
        )
    p = plan.predicted
    memory = (
        f"file {format_bytes(p.file_bytes)}; memory: weights {format_bytes(p.weights_bytes)}, KV cache "
        f"{format_bytes(p.kv_cache_bytes)}, compute {format_bytes(p.compute_bytes)}, runtime "
        f"{format_bytes(p.runtime_bytes)}"
    )
    return [*format_table(["budget line", "predicted mean", "limit"], rows, right=(1, 2)), memory]
