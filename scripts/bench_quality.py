#!/usr/bin/env python3
"""Judge edgeq's mixes against llama.cpp's presets on held-out text, paired by token: the table of docs/quality.md.

Every contender gets the same column weights (importance). The two main presets are also made with the mean squared
activations that llama-imatrix collects, and the better of the two sets the limits of KL. Presets are written by
llama.cpp's own quantizer, mixes and controls by edgeq. Mixes are chosen among their trials, and limits of KL are set,
on another text than the one that all are judged by. Nothing else should run meanwhile: the speeds are interleaved token
by token, but not immune.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.converters.gguf.assemble import assemble, read_tensor
from edgeq.converters.gguf.divergence import Divergence, Judge
from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.imatrix import Activations, ImportanceMatrix
from edgeq.converters.gguf.judgement import paired_difference
from edgeq.converters.gguf.observe import collect_imatrix
from edgeq.converters.gguf.presets import PRESETS
from edgeq.converters.gguf.quantize import preview, quantize
from edgeq.converters.gguf.sensitivity.evidence import Evidence, EvidenceRequest, Workshop
from edgeq.converters.gguf.sensitivity.matrix import Matrix
from edgeq.converters.gguf.sensitivity.store import BlockStore
from edgeq.converters.source import resolve, weights_sha256
from edgeq.llama import Context, Model, default_threads
from edgeq.planner.decide import demand_of, export_reference
from edgeq.planner.knapsack import Item
from edgeq.planner.plan import Request
from edgeq.planner.problem import Problem, SearchOptions, pose
from edgeq.planner.search import Goal, held_out_text, search, selection_text
from edgeq.profiles.llm.model_memory import file_bytes
from edgeq.profiles.loader import load_profile
from edgeq.types import Budget

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts.quality_controls import greedy_by_size, mse_only, random_mixes

_CONTROL_TOKENS, _SINGLE_TOKENS = 2048, 1024
_SPEED_TOKENS = 96
_ROOM = 0.92
_MAIN = ("q4_k_m", "iq4_xs")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One file to be judged."""

    label: str
    path: Path
    predicted_kld: float | None


@dataclasses.dataclass(frozen=True)
class Lab:
    """What all contenders share."""

    reference: Path
    problem: Problem
    shop: Workshop
    trials: int

    @property
    def evidence(self) -> Evidence:
        """Of the model."""
        return self.problem.evidence

    def write(self, label: str, types: Mapping[str, str], store: BlockStore) -> Path:
        """A file with these types, rounded by edgeq."""
        out = self.shop.folder / f"{label.replace(' ', '-').replace('/', '-')}.gguf"
        complete = {**self.problem.base, **types}
        store.prepare(complete, self.shop.threads)
        assemble(self.evidence.header, complete, store.blocks, out)
        return out


def main() -> int:
    """Measure, print, write JSON."""
    args = _arguments()
    clock: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="edgeq-quality-") as folder:
        phases: dict[str, float] = {}
        lab = _timed(clock, "evidence", lambda: _prepare(args, Path(folder), phases))
        presets = _timed(clock, "presets", lambda: _presets(lab, args.presets))
        sizes = {c.label: c.path.stat().st_size for c in presets}
        budgets: dict[str, float] = {}
        mixes = _timed(clock, "mixes", lambda: _mixes(lab, presets, budgets))
        contenders = [*presets, *mixes]
        result: dict[str, Any] = {"clock_s": clock, "phases_s": phases, "further_budget_s": budgets}
        result["contenders"] = _timed(clock, "judge", lambda: _judge(lab, contenders, args.tokens))
        _print_contenders(result["contenders"])
        if not args.no_speed:
            result["speed"] = _timed(clock, "speed", lambda: _speeds(contenders))
            _print_speeds(result["speed"])
        if not args.no_controls:
            result["controls"] = _timed(clock, "controls", lambda: _controls(lab, sizes["q4_k_m"]))
            result["single_changes"] = _timed(clock, "single changes", lambda: _single_changes(lab, args.seed))
        result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"\npeak RSS {result['peak_rss_mib']} MiB; " + ", ".join(f"{k} {v:.1f} s" for k, v in clock.items()))
    print("evidence: " + ", ".join(f"{k} {v:.1f} s" for k, v in phases.items()))
    print("a further budget, solved: " + ", ".join(f"{k} {v:.2f} s" for k, v in budgets.items()))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder or id, or a float GGUF")
    parser.add_argument("--target", default="laptop-cpu", help="device profile (default: %(default)s)")
    parser.add_argument("--estimator", default="auto", choices=("auto", "fisher", "imatrix"))
    parser.add_argument("--calibration", type=Path, help="text file (default: the model writes it)")
    parser.add_argument("--presets", nargs="+", default=["q4_k_m", "q5_k_m", "q3_k_m", "q4_0", "iq4_xs"])
    parser.add_argument("--tokens", type=int, default=5120, help="of held-out text (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=6, help="mixes measured for each goal (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-speed", action="store_true", help="do not time decoding")
    parser.add_argument("--no-controls", action="store_true", help="leave out controls and single-tensor changes")
    parser.add_argument("--json", type=Path, help="write everything here")
    return parser.parse_args()


def _timed(clock: dict[str, float], name: str, call: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the call returns
    began = time.monotonic()
    value = call()
    clock[name] = time.monotonic() - began
    print(f"[{name}: {clock[name]:.1f} s]", file=sys.stderr, flush=True)
    return value


def _prepare(args: argparse.Namespace, folder: Path, phases: dict[str, float]) -> Lab:
    """Everything before a budget matters; ``phases`` gets the seconds of each part that was not in the cache."""
    source = resolve(args.model)
    started = {"other": time.monotonic()}

    def progress(stage: str, _done: int, _total: int, _detail: str) -> None:
        if stage not in started:
            started[stage] = time.monotonic()
            print(f"  {stage}", file=sys.stderr, flush=True)

    reference = Path(source.path)
    if source.format == "hf":
        reference = folder / "reference.gguf"
        export_reference(Path(source.path), reference, progress)
    shop = Workshop(folder, weights_sha256(source), default_threads(), progress)
    evidence = EvidenceRequest(estimator=args.estimator, calibration=args.calibration, seed=args.seed)
    options = SearchOptions(evidence=evidence)
    hf_folder = Path(source.path) if source.format == "hf" else None
    problem = pose(reference, hf_folder, load_profile(args.target), (), options, shop)
    ends = [*list(started.values())[1:], time.monotonic()]
    phases.update({stage: end - begin for (stage, begin), end in zip(started.items(), ends, strict=True)})
    return Lab(reference, problem, shop, args.trials)


def _presets(lab: Lab, names: Sequence[str]) -> list[Contender]:
    """With the search's column weights, and those that matter most with llama-imatrix's kind of weights as well."""
    entries = {
        name: Activations(weights[None].astype(np.float32), np.ones(1, np.int64))
        for name, weights in lab.evidence.importance.items()
    }
    made = [_preset(lab, name, name, ImportanceMatrix(entries, 1, 1)) for name in names]
    activations = collect_imatrix(lab.reference, lab.evidence.text.chunks)
    made += [_preset(lab, f"{name}, activations", name, activations) for name in names if name in _MAIN]
    return made


def _preset(lab: Lab, label: str, name: str, matrix: ImportanceMatrix) -> Contender:
    types = preview(lab.reference, PRESETS[name], imatrix=matrix).types
    out = lab.shop.folder / f"{label.replace(', ', '-')}.gguf"
    quantize(lab.reference, out, types, imatrix=matrix)
    return Contender(label, out, None)


def _mixes(lab: Lab, presets: Sequence[Contender], budgets: dict[str, float]) -> list[Contender]:
    """At the bytes of two presets, and with the KL of q4_k_m in the least bytes and in the least time."""
    by_name = {c.label: c for c in presets}
    goals = {
        f"mix at {name}'s bytes": Goal(max_file_bytes=by_name[name].path.stat().st_size)
        for name in _MAIN
        if name in by_name
    }
    if "q4_k_m" in by_name:
        # On the text of the trials, with some room for the difference between that and the one that all are judged by.
        with Judge(lab.reference, selection_text(lab.reference).chunks) as judge:
            rivals = [c.path for c in presets if c.label.startswith("q4_k_m")]
            limit = _ROOM * min(d.mean_kld for d in judge.compare(rivals))
        goals["least bytes at q4_k_m's KL"] = Goal(max_kld=limit, minimize="file_bytes")
        goals["least time at q4_k_m's KL"] = Goal(max_kld=limit, minimize="ns")
    made = []
    for label, goal in goals.items():
        demand = demand_of(lab.reference, lab.problem.pricing.profile, Budget(), Budget(), Request(), goal)
        began = time.monotonic()
        search(lab.problem, demand, trials=0, shop=lab.shop)
        budgets[label] = time.monotonic() - began
        found = search(lab.problem, demand, trials=lab.trials, shop=lab.shop)
        if found.file is None:
            raise SystemExit("a search with trials made no file")
        out = lab.shop.folder / f"{label.replace(' ', '-')}.gguf"
        found.file.replace(out)
        if out.stat().st_size != file_bytes(lab.problem.pricing.shape, found.types):
            raise SystemExit(f"{label}: predicted file bytes are not exact")
        made.append(Contender(label, out, found.record.predicted_kld))
    return made


def _judge(lab: Lab, contenders: Sequence[Contender], tokens: int) -> list[dict[str, Any]]:
    text = held_out_text(lab.reference, None, tokens)
    with Judge(lab.reference, text.chunks) as judge:
        found = [d for group in _grouped(contenders) for d in judge.compare([c.path for c in group])]
    base = found[0]
    return [_row(c, d, base) for c, d in zip(contenders, found, strict=True)]


def _grouped(contenders: Sequence[Contender]) -> list[Sequence[Contender]]:
    return [contenders[i : i + 3] for i in range(0, len(contenders), 3)]


def _row(contender: Contender, d: Divergence, base: Divergence) -> dict[str, Any]:
    difference, low, high = paired_difference(d, base)
    return {
        "label": contender.label,
        "mib": contender.path.stat().st_size / 2**20,
        "predicted_kld": contender.predicted_kld,
        "kld": d.mean_kld,
        "against_first": d.mean_kld / base.mean_kld - 1,
        "difference": [difference, low, high],
        "p99": float(np.quantile(d.kld, 0.99)),
        "p999": float(np.quantile(d.kld, 0.999)),
        "top1": float(d.same_top.mean()),
        "tokens": len(d.kld),
    }


def _print_contenders(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"\n{'contender':<28}{'MiB':>8}{'KL':>9}{'vs first':>10}{'p99':>8}{'p99.9':>8}{'top-1':>8}{'predicted':>11}")
    for row in rows:
        predicted = "-" if row["predicted_kld"] is None else f"{row['predicted_kld']:.4f}"
        print(
            f"{row['label']:<28}{row['mib']:>8.2f}{row['kld']:>9.4f}{row['against_first']:>+10.1%}{row['p99']:>8.3f}"
            f"{row['p999']:>8.3f}{row['top1']:>8.1%}{predicted:>11}",
            flush=True,
        )


def _speeds(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """Decoding, one token of each in turn; ratios are medians over tokens of first / this."""
    times: list[list[float]] = [[] for _ in contenders]
    models = [Model.load(c.path) for c in contenders]
    contexts = [Context(model, context_tokens=256, batch_tokens=32) for model in models]
    token = models[0].bos or 1
    for position in range(_SPEED_TOKENS + 8):
        for index in random.Random(position).sample(range(len(contexts)), len(contexts)):
            # Twice: the first pass brings back what the others pushed out of the caches.
            contexts[index].decode_one(token, 2 * position)
            began = time.perf_counter()
            contexts[index].decode_one(token, 2 * position + 1)
            if position >= 8:
                times[index].append(time.perf_counter() - began)
    for handle in (*contexts, *models):
        handle.close()
    return [
        {
            "label": contender.label,
            "tokens_per_s": 1 / statistics.median(mine),
            "against_first": statistics.median(a / b for a, b in zip(times[0], mine, strict=True)),
        }
        for contender, mine in zip(contenders, times, strict=True)
    ]


def _print_speeds(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"\n{'decoding':<28}{'tok/s':>8}{'vs first':>10}")
    for row in rows:
        print(f"{row['label']:<28}{row['tokens_per_s']:>8.1f}{row['against_first']:>9.2f}x", flush=True)


def _controls(lab: Lab, limit: int) -> dict[str, Any]:
    """Other ways to spend the bytes of q4_k_m, with edgeq's rounding, on fewer tokens."""
    store = BlockStore(lab.evidence)
    items = lab.problem.items
    constant = file_bytes(lab.problem.pricing.shape, lab.problem.base) - sum(
        lab.problem.pricing.file_bytes(item.name, lab.problem.base[item.name]) for item in items
    )
    room = limit - constant
    demand = demand_of(
        lab.reference, lab.problem.pricing.profile, Budget(), Budget(), Request(), Goal(max_file_bytes=limit)
    )
    ours = search(lab.problem, demand, trials=0, shop=lab.shop).types
    mixes: dict[str, Mapping[str, str]] = {
        "edgeq, predicted optimum": ours,
        "greedy by size": greedy_by_size(items, room),
        "weighted MSE only": mse_only(items, _relative_mse(lab, items), room),
    }
    mixes |= {f"random {i}": mix for i, mix in enumerate(random_mixes(items, room, 20, 0))}
    text = held_out_text(lab.reference, None, _CONTROL_TOKENS)
    result = {}
    with Judge(lab.reference, text.chunks) as judge:
        for label, types in mixes.items():
            path = lab.write(label, types, store)
            result[label] = judge.compare([path])[0].mean_kld
            print(f"  {label}: {result[label]:.4f}", file=sys.stderr, flush=True)
            path.unlink()
    randoms = [kld for label, kld in result.items() if label.startswith("random")]
    print(f"\ncontrols at q4_k_m's bytes ({text.n_tokens} tokens):")
    for label in list(mixes)[:3]:
        print(f"  {label:<28}{result[label]:.4f}")
    print(f"  {'20 random mixes':<28}best {min(randoms):.4f}, median {statistics.median(randoms):.4f}", flush=True)
    return result


def _relative_mse(lab: Lab, items: Sequence[Item]) -> dict[tuple[str, str], float]:
    """Importance-weighted squared error of each (tensor, type) over the weighted square of the tensor."""
    result = {}
    for item in items:
        matrix = Matrix.of(
            lab.evidence.header,
            item.name,
            lab.evidence.curvatures.by_tensor[item.name],
            lab.evidence.importance.get(item.name),
        )
        columns = lab.evidence.importance[item.name]
        # A quarter of the rows says enough about an average.
        weights = matrix.rows(np.arange(0, len(matrix.raw), 4))
        whole = float((np.square(weights) @ columns).sum())
        for option in item.options:
            error = float((np.square(matrix.errors(weights, option.type)) @ columns).sum())
            result[item.name, option.type] = error / whole
    return result


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, for figures without ties."""
    first, second = (np.argsort(np.argsort(values)).astype(np.float64) for values in (a, b))
    first -= first.mean()
    second -= second.mean()
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


def _single_changes(lab: Lab, seed: int, count: int = 30) -> dict[str, Any]:
    """Predicted and measured KL when one tensor alone changes its type."""
    rng = random.Random(seed)
    text = held_out_text(lab.reference, None, _SINGLE_TOKENS)
    store = BlockStore(lab.evidence)
    header = read_header(lab.reference)
    rows: list[tuple[str, str, float, float]] = []
    with Judge(lab.reference, text.chunks) as judge:
        while len(rows) < count:
            item = rng.choice(lab.problem.items)
            option = rng.choice([o for o in item.options if o.type != header.tensors[item.name].type])
            types = {n: t.type for n, t in header.tensors.items()} | {item.name: option.type}
            path = lab.shop.folder / "single.gguf"
            assemble(
                header,
                types,
                lambda n, k: read_tensor(header, n) if k == header.tensors[n].type else store.blocks(n, k),
                path,
            )
            rows.append((item.name, option.type, option.kld, judge.compare([path])[0].mean_kld))
    rho = _rank_correlation([r[2] for r in rows], [r[3] for r in rows])
    ratios = [r[2] / r[3] for r in rows]
    print(f"\n{count} single changes: Spearman {rho:.3f}, predicted / measured median {statistics.median(ratios):.2f}")
    return {"spearman": rho, "changes": rows}


if __name__ == "__main__":
    sys.exit(main())
