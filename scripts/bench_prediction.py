#!/usr/bin/env python3
"""Predicted against measured: file, peak memory, decode speed and time to first token of a language model.

    scripts/bench_prediction.py MODEL [--profile FILE] [--json FILE]

MODEL is a Hugging Face folder or a float GGUF. Without a profile this machine is probed first, as ``edgeq devices
probe`` does. Every combination of types, context and KV cache is planned as ``edgeq plan`` does and served by the
process that ``edgeq bench`` measures: short prompts first, then one that fills the context. Run it on a quiet machine.
Each quantity has four columns: predicted, measured, error, and the error at the speed that the machine had for the
probe, by two kernels that are timed around every answer: memory that is shared with other machines changes its speed.
Exit code 3 when a peak is above its prediction.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from edgeq.converters.gguf.export import export_gguf
from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.presets import find_preset
from edgeq.converters.gguf.quantize import quantize
from edgeq.converters.gguf.recipe import Override
from edgeq.converters.gguf.shape import describe_artifact, model_shape
from edgeq.errors import EdgeqError, ProfileError
from edgeq.llama import default_threads
from edgeq.planner.candidates import Menu
from edgeq.planner.plan import Request, make_plan
from edgeq.probe.machine_profile import machine_profile
from edgeq.probe.reference import Reading, SpeedReference, between
from edgeq.probe.session_costs import MODEL_FILE, describe_bundle
from edgeq.probe.steps import probe_machine
from edgeq.profiles.device import DeviceProfile
from edgeq.profiles.llm.model_latency import decode_ms, speeds_of, ttft_ms
from edgeq.profiles.loader import load_profile
from edgeq.profiles.measured import LanguageCosts
from edgeq.runtime.bench_messages import Finished, Generate, Load, Loaded, Sample, Usage
from edgeq.runtime.bench_process import WorkerProcess
from edgeq.types import Budget, Plan

# A mix of six types, repacked ones and others, as a search may choose.
MIX = (
    Override("token_embd", "q5_0"),
    Override("ffn_gate", "iq4_nl"),
    Override("ffn_up", "q4_0"),
    Override("ffn_down", "q4_k"),
    Override("attn_v", "q8_0"),
    Override("attn_k", "q5_1"),
    Override("attn_[qo]", "q5_0"),
)
CHOICES: dict[str, tuple[str, tuple[Override, ...]]] = {
    "q8_0": ("q8_0", ()),
    "q4_k_m": ("q4_k_m", ()),
    "q4_0": ("q4_0", ()),
    "mixed": ("q8_0", MIX),
}
CONTEXTS, KV_TYPES = (512, 2048, 8192), ("f16", "q8_0")
SHORT_PROMPT, OUTPUT = 128, 33
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Pair:
    """One quantity.

    Attributes:
        predicted: from the profile.
        measured: as it happened.
        steady: what would have been measured, had the machine been as fast as it was for the probe.
    """

    predicted: float
    measured: float
    steady: float | None = None

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1

    @property
    def steady_error(self) -> float:
        """Relative to what a steady machine would have shown."""
        return self.error if self.steady is None else self.predicted / self.steady - 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One combination; speeds are those of a short and of a full context."""

    types: str
    context: int
    kv: str
    file_bytes: Pair
    peak_bytes: Pair
    short_tps: Pair
    full_tps: Pair
    short_ttft_ms: Pair
    full_ttft_ms: Pair


@dataclasses.dataclass(frozen=True)
class Timed:
    """One answer, and how fast the machine was around it."""

    sample: Sample
    before: Reading
    after: Reading


def served(
    folder: Path, context: int, repetitions: int, reference: SpeedReference
) -> tuple[list[Timed], list[Timed], Finished]:
    """Short answers, answers after a prompt that fills the context, and what the process took."""
    with WorkerProcess() as worker:
        worker.request(Load(bundle=str(folder), threads=None, context_tokens=None, text=""), Loaded)

        def ask(length: int, turn: int) -> Timed:
            prompt = [500 + (turn + 7 * position) % 20000 for position in range(length)]
            before = reference.read()
            sample = worker.request(Generate(prompt=prompt, max_tokens=OUTPUT), Sample)
            return Timed(sample, before, reference.read())

        ask(SHORT_PROMPT, 0)
        short = [ask(SHORT_PROMPT, 1 + turn) for turn in range(repetitions)]
        full = [ask(context - OUTPUT + 1, 100 + turn) for turn in range(1 if context > 4096 else 3)]
        return short, full, worker.request(Usage(), Finished)


def token_speed(predicted: float, found: Sequence[Timed], costs: LanguageCosts) -> Pair:
    """Of the median gap; on a steady machine each gap divided by the slowness of memory around it."""
    gaps = [gap for timed in found for gap in timed.sample.gaps_ms]
    steady = [
        gap * costs.reference_decode_ns / between(timed.before, timed.after).decode_ns
        for timed in found
        for gap in timed.sample.gaps_ms
    ]
    return Pair(predicted, 1e3 / statistics.median(gaps), 1e3 / statistics.median(steady))


def first_token(predicted: float, found: Sequence[Timed], costs: LanguageCosts) -> Pair:
    """The median; on a steady machine each time divided by the slowness of computing around it."""
    steady = [
        timed.sample.ttft_ms * costs.reference_prompt_ns / between(timed.before, timed.after).prompt_ns
        for timed in found
    ]
    return Pair(predicted, statistics.median(t.sample.ttft_ms for t in found), statistics.median(steady))


def compare(
    gguf: Path, plan: Plan, profile: DeviceProfile, folder: Path, repetitions: int, reference: SpeedReference
) -> dict[str, Pair]:
    """Serve a plan, and set what it predicted beside what happened."""
    header = read_header(gguf)
    folder.mkdir()
    os.link(gguf, folder / MODEL_FILE)
    describe_bundle(folder, plan, describe_artifact(header))
    short, full, usage = served(folder, plan.context_tokens, repetitions, reference)
    shape, types, speeds, costs = model_shape(header), plan.tensor_types, speeds_of(profile), language_costs(profile)
    kv = (plan.kv_type_k, plan.kv_type_v)

    def decode(prompt: int) -> float:
        return 1e3 / decode_ms(shape, types, speeds, kv_types=kv, cached_tokens=prompt + OUTPUT // 2)

    def first(prompt: int) -> float:
        return ttft_ms(shape, types, speeds, kv_types=kv, prompt_tokens=prompt, ubatch_tokens=plan.ubatch_tokens)

    filling = plan.context_tokens - OUTPUT + 1
    assert usage.peak_bytes is not None
    return {
        "file_bytes": Pair(plan.predicted.file_bytes, gguf.stat().st_size),
        "peak_bytes": Pair(plan.predicted.peak_memory_bytes, usage.peak_bytes),
        "short_tps": token_speed(decode(SHORT_PROMPT), short, costs),
        "full_tps": token_speed(decode(filling), full, costs),
        "short_ttft_ms": first_token(first(SHORT_PROMPT), short, costs),
        "full_ttft_ms": first_token(first(filling), full, costs),
    }


def language_costs(profile: DeviceProfile) -> LanguageCosts:
    """What the probe found.

    Raises:
        ProfileError: the profile was not made by the probe.
    """
    if profile.measured is None or profile.measured.language is None:
        raise ProfileError(f"{profile.name} was not probed", "Use a profile that edgeq devices probe wrote")
    return profile.measured.language


def rows(
    model: Path, profile: DeviceProfile, contexts: Sequence[int], repetitions: int, reference: SpeedReference
) -> Iterator[Row]:
    """Every combination, each in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="edgeq-bench-") as name:
        work = Path(name)
        source = export_gguf(model, work / "source.gguf").path if model.is_dir() else model
        for label, (preset, overrides) in CHOICES.items():
            gguf = work / f"{label}.gguf"
            quantize(source, gguf, Menu(source, overrides).choice(find_preset(preset)).types)
            for context in contexts:
                for kv in KV_TYPES:
                    request = Request(preset=preset, overrides=overrides, context_tokens=context, kv_type=kv)
                    plan = make_plan(source, profile, Budget(), request)
                    folder = work / f"{label}-{context}-{kv}"
                    yield Row(label, context, kv, **compare(gguf, plan, profile, folder, repetitions, reference))
            gguf.unlink()


def line(row: Row) -> str:
    """For people."""
    cells = [f"{row.types:<8}{row.context:>6}{row.kv:>6}"]
    cells.append("exact" if row.file_bytes.error == 0 else f"{row.file_bytes.error:+.2%}")
    for pair, factor, digits in (
        (row.peak_bytes, MIB, 1),
        (row.short_tps, 1, 1),
        (row.full_tps, 1, 1),
        (row.short_ttft_ms, 1, 0),
        (row.full_ttft_ms, 1, 0),
    ):
        figures = f"{pair.predicted / factor:>9.{digits}f}{pair.measured / factor:>9.{digits}f}"
        cells.append(f"{figures}{pair.error:>7.1%}{pair.steady_error:>7.1%}")
    return "  ".join(cells)


def summary(found: Sequence[Row]) -> list[str]:
    """The range of every quantity's error."""
    lines = []
    for field in ("peak_bytes", "short_tps", "full_tps", "short_ttft_ms", "full_ttft_ms"):
        for what, name in (("as measured", "error"), ("at the probe's speed", "steady_error")):
            errors = [getattr(getattr(row, field), name) for row in found]
            middle = statistics.median(errors)
            lines.append(f"{field:<14} {what:<21} {min(errors):+.1%} to {max(errors):+.1%}, median {middle:+.1%}")
    return lines


def main() -> int:
    """Exit code 3 when a peak was under-predicted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder or float GGUF")
    parser.add_argument("--profile", metavar="FILE", help="of this machine (default: probe it)")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS), metavar="N")
    parser.add_argument("--repetitions", type=int, default=6, metavar="N", help="short answers of each combination")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    arguments = parser.parse_args()
    try:
        if arguments.profile is not None:
            profile = load_profile(arguments.profile)
        else:
            measured = probe_machine(threads=default_threads(), progress=lambda *_: None)
            for doubt in measured.doubts:
                print(f"warning: {doubt}", file=sys.stderr)
            profile = machine_profile("this-machine", measured)
        print(f"{'':<22}file   {'peak memory, MiB':>32}  {'tok/s at 144':>32}  {'tok/s when full':>32}", end="")
        print(f"  {'TTFT of 128, ms':>32}  {'TTFT when full, ms':>32}")
        found = []
        with SpeedReference(profile.threads or default_threads()) as reference:
            for row in rows(arguments.model, profile, arguments.contexts, arguments.repetitions, reference):
                print(line(row), flush=True)
                found.append(row)
    except EdgeqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(summary(found)))
    if arguments.json is not None:
        plain = msgspec.to_builtins([dataclasses.asdict(row) for row in found])
        arguments.json.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    return 3 if any(row.peak_bytes.error < 0 for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
