"""Plans and bundles as lines for people."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from edgeq.cli.tables import format_table, terminal_width
from edgeq.types import BUDGET_LINES
from edgeq.units import format_bytes, format_quantity

if TYPE_CHECKING:
    from edgeq.planner.search import Goal
    from edgeq.quality import Interval, Quality
    from edgeq.search_record import SearchRecord
    from edgeq.types import Budget, Fallback, ModelSource, Plan

__all__ = [
    "fallback_lines",
    "plan_lines",
    "prediction_lines",
    "quality_lines",
    "search_lines",
    "sections",
    "trial_lines",
    "type_lines",
]

_LAYER = re.compile(r"^blk\.([0-9]{1,9})\.")
_NONE = "-"
_INDENT = " " * 9
_OBJECTIVES = {
    "kld": "least mean KL divergence",
    "file_bytes": "smallest file",
    "memory_bytes": "least memory",
    "ns": "least time a token",
}


def sections(*blocks: Sequence[str]) -> list[str]:
    """Blocks of lines with an empty line between them, without those that have none."""
    lines: list[str] = []
    for block in blocks:
        lines += ["", *block] if lines and block else block
    return lines


def plan_lines(plan: Plan, source: ModelSource) -> list[str]:
    """The decisions, the search, the fallbacks, what was rejected, and the converter's notes."""
    kv = plan.kv_type_k if plan.kv_type_k == plan.kv_type_v else f"{plan.kv_type_k}/{plan.kv_type_v}"
    counts = Counter(plan.tensor_types.values())
    mix = ", ".join(f"{count} x {kind}" for kind, count in counts.most_common())
    origin = plan.preset or ("recipe" if plan.search is None else "searched mix")
    lines = [
        f"model    {source.id}, {source.architecture}, {source.n_params / 1e6:.1f} M weights in {source.dtype}",
        f"types    {origin}: {mix}",
        f"session  context {plan.context_tokens}, KV cache {kv}, {plan.ubatch_tokens} prompt tokens at once",
    ]
    lines += [] if plan.search is None else search_lines(plan.search)
    lines += fallback_lines(plan.fallbacks)
    lines += [f"rejected {item.option}: {item.reason}" for item in plan.rejected]
    return lines + [f"note     {note}" for note in plan.notes]


def search_lines(search: SearchRecord) -> list[str]:
    """What a search minimised, what it stands on, and what it found."""
    text = search.calibration
    wrote = "that the model wrote itself" if text.source == "self" else f"of {text.name}"
    seed = "" if text.seed is None else f", seed {text.seed}"
    near = "the optimum" if search.gap <= 0 else f"at most {search.gap:.2%} from the optimum"
    rounding = "errors made up for by the columns that follow" if search.compensated else "each block by itself"
    lines = [
        f"search   {_OBJECTIVES[search.objective]} within the limits, {near} of what is predicted",
        f"{_INDENT}predicted mean KL {search.predicted_kld:.4g} nats",
        f"{_INDENT}sensitivities by {search.estimator} on {text.tokens} tokens {wrote}, in {text.chunks} texts{seed}",
        f"{_INDENT}rounding weighted by {text.importance}, {rounding}",
        f"{_INDENT}times: {search.costs}",
    ]
    if search.trials:
        tried = f"{len(search.trials)} mixes made and compared" if len(search.trials) > 1 else "1 mix made and measured"
        lines.append(f"{_INDENT}{tried} on {search.selection_tokens} tokens of {search.selection}")
    return lines


def trial_lines(search: SearchRecord | None) -> list[str]:
    """A table of the mixes that were really made, in the order of their trial; nothing where none was."""
    if search is None or not search.trials:
        return []
    rows = [
        [
            trial.label,
            format_bytes(trial.file_bytes),
            f"{trial.predicted_kld:.4g}",
            f"{trial.measured_kld:.4g}",
            "chosen" if trial.chosen else "",
        ]
        for trial in search.trials
    ]
    return format_table(["trial", "file", "predicted KL", "measured KL", ""], rows, right=(1, 2, 3))


def fallback_lines(fallbacks: tuple[Fallback, ...]) -> list[str]:
    """One line for each kind of fallback, with the tensors by role."""
    groups: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for item in fallbacks:
        groups[item.wanted, item.got, item.reason][_role(item.tensor)] += 1
    return [
        f"fallback {wanted} became {got} in {sum(roles.values())} tensors ({reason}): "
        + ", ".join(f"{count} x {role}" if count > 1 else role for role, count in sorted(roles.items()))
        for (wanted, got, reason), roles in groups.items()
    ]


def _role(tensor: str) -> str:
    """``blk.*.ffn_up.weight`` for that tensor of any layer."""
    return _LAYER.sub("blk.*.", tensor)


def type_lines(plan: Plan) -> list[str]:
    """A table with a row for each role, in the file's order, and its types by layer where layers differ."""
    roles: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name, kind in plan.tensor_types.items():
        layer = _LAYER.match(name)
        roles[_role(name)].append((int(layer[1]) if layer else 0, kind))
    left = [[role, str(len(layers))] for role, layers in roles.items()]
    first = max((len(role) for role, _ in left), default=0)
    room = terminal_width() - max(first, len("tensors")) - len("count") - 4
    rows = []
    for (role, count), layers in zip(left, roles.values(), strict=True):
        for n, line in enumerate(_wrapped(_runs(layers), room)):
            rows.append([role if n == 0 else "", count if n == 0 else "", line])
    return format_table(["tensors", "count", "types"], rows, right=(1,))


def _runs(layers: Sequence[tuple[int, str]]) -> list[str]:
    """``["0-3 q5_1", "4 q8_0"]``, or ``["q8_0"]`` where all layers agree."""
    if len({kind for _, kind in layers}) == 1:
        return [layers[0][1]]
    runs: list[tuple[int, int, str]] = []
    for layer, kind in sorted(layers):
        if runs and runs[-1][2] == kind and runs[-1][1] == layer - 1:
            runs[-1] = runs[-1][0], layer, kind
        else:
            runs.append((layer, layer, kind))
    return [f"{start} {kind}" if start == end else f"{start}-{end} {kind}" for start, end, kind in runs]


def _wrapped(items: Iterable[str], room: int) -> list[str]:
    """Items with commas between them, on as many lines as they need; an item is never cut."""
    lines: list[list[str]] = [[]]
    for item in items:
        used = sum(len(word) + 2 for word in lines[-1])
        if lines[-1] and used + len(item) + 1 > room:
            lines.append([])
        lines[-1].append(item)
    joined = [", ".join(line) for line in lines]
    return [*(f"{line}," for line in joined[:-1]), joined[-1]]


def prediction_lines(plan: Plan, budget: Budget, goal: Goal | None = None) -> list[str]:
    """A table of what is predicted against budget and goal, and what memory consists of."""
    # What is predicted is a mean, and of which workload; the limit's percentile is for the measurement.
    means = {
        "ttft_ms": f"time to first token, {plan.predicted.prompt_tokens} prompt tokens",
        "itl_ms": f"inter-token latency, context of {plan.context_tokens} full",
        "tokens_per_s": f"decode speed, context of {plan.context_tokens} full",
    }
    rows = _goal_rows(plan, goal)
    for line in BUDGET_LINES:
        limit, predicted = budget.limit(line), getattr(plan.predicted, line.field, None)
        if limit is None and predicted is None:
            continue
        sign = "≤" if line.at_most else "≥"
        rows.append(
            [
                means.get(line.field, line.label),
                _NONE if predicted is None else format_quantity(predicted, line.unit),
                _NONE if limit is None else f"{sign} {format_quantity(limit, line.unit)}",
            ]
        )
    p = plan.predicted
    memory = (
        f"memory: weights {format_bytes(p.weights_bytes)}, KV cache {format_bytes(p.kv_cache_bytes)}, compute "
        f"{format_bytes(p.compute_bytes)}, runtime {format_bytes(p.runtime_bytes)}"
    )
    return [*format_table(["budget line", "predicted mean", "limit"], rows, right=(1, 2)), memory]


def _goal_rows(plan: Plan, goal: Goal | None) -> list[list[str]]:
    """The file's size, and quality where it is predicted or limited."""
    size, kld, top1 = (None, None, None) if goal is None else (goal.max_file_bytes, goal.max_kld, goal.min_top1)
    limit = _NONE if size is None else f"≤ {format_bytes(size)}"
    rows = [["file size", format_bytes(plan.predicted.file_bytes), limit]]
    if plan.search is not None or kld is not None:
        predicted = _NONE if plan.search is None else f"{plan.search.predicted_kld:.4g} nats"
        rows.append(["mean KL divergence", predicted, _NONE if kld is None else f"≤ {kld:g} nats"])
    if top1 is not None:
        rows.append(["same top token", _NONE, f"≥ {top1:.1%}"])
    return rows


def quality_lines(quality: Quality | None) -> list[str]:
    """What was measured against the unquantized model, with confidence intervals; nothing if nothing was."""
    if quality is None:
        return []
    overlap = "" if quality.overlap is None else f", {quality.overlap:.2%} of it calibrated on"
    read = f"{quality.tokens} tokens in {quality.chunks} chunks of {quality.text}{overlap}"
    tails = f"99 % {quality.p99_kld:.3f}, 99.9 % {quality.p999_kld:.3f}, max {quality.max_kld:.2f}"
    mean = f"{quality.mean_kld:.4f}{_interval(quality.mean_kld_interval, '.4f')}"
    top1 = f"{quality.top1:.1%}{_interval(quality.top1_interval, '.1%')}"
    ratio = f"{quality.ppl_ratio:.4f}{_interval(quality.ppl_ratio_interval, '.4f')}"
    cache = "" if quality.kv_type == "f16" else f", with a KV cache in {quality.kv_type}"
    return [
        f"quality  against the {quality.reference} reference over {read}{cache}",
        f"{_INDENT}mean KL {mean}, {tails}, noise floor {quality.noise_floor_kld:.1e} nats",
        f"{_INDENT}same top token {top1}, perplexity ratio {ratio}; intervals at {quality.confidence:.0%}",
    ]


def _interval(interval: Interval, form: str) -> str:
    if interval.low is None or interval.high is None:
        return ""
    return f" ({interval.low:{form}} to {interval.high:{form}})"
