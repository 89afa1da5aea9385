"""``edgeq devices probe``: measure this machine and write its profile."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.cli.arguments import add_json_argument, positive_int, thread_count
from edgeq.cli.files import check_output, write_output

if TYPE_CHECKING:
    from edgeq.profiles.device import DeviceProfile
    from edgeq.profiles.measured import LanguageCosts, Measured
    from edgeq.profiles.onnx.cost import OnnxFigures

EXAMPLES = """\
edgeq devices probe -o my-robot.yaml
edgeq plan ./model --profile my-robot.yaml
edgeq devices probe --threads 4 > four-threads.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where the profile goes (default: standard output)"
    )
    parser.add_argument("--name", metavar="NAME", help="of the profile (default: the file's)")
    parser.add_argument("--threads", type=thread_count, metavar="N", help="of a session; default: the physical cores")
    parser.add_argument(
        "--seconds", type=positive_int, metavar="S", help="about how long to measure (90); less is noisier"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the file if it is there")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write the profile, and say what was found and what speaks against it."""
    from edgeq.cli.output import note, show, show_lines
    from edgeq.cli.progress import Progress
    from edgeq.llama import default_threads
    from edgeq.probe.machine_profile import machine_profile, profile_name
    from edgeq.probe.steps import DEFAULT_SECONDS, probe_machine
    from edgeq.profiles.dump import profile_yaml
    from edgeq.types import to_json

    if args.output is not None:
        check_output(args.output, force=args.force)
    threads = args.threads or default_threads()
    _refuse_more_threads(threads)
    name = profile_name(args.name or (args.output.stem if args.output is not None else "this-machine"))
    with Progress(sys.stderr) as progress:
        measured = probe_machine(
            threads=threads,
            seconds=args.seconds or DEFAULT_SECONDS,
            progress=lambda stage, done, total, detail: progress(done, total, stage),
        )
    profile = machine_profile(name, measured)
    text = profile_yaml(profile, comment=_comment(measured))
    for doubt in measured.doubts:
        note(f"warning: do not trust these figures: {doubt}. Probe again when nothing else runs")
    for missing in (profile.measured or measured).facts.missing:
        note(f"not read: {missing.fact} from {missing.path}: {missing.why}. {missing.remedy}")
    if args.output is not None:
        write_output(args.output, text.encode(), force=args.force)
    _check_readable(text, args.output, name)
    if args.json:
        show(to_json(profile).decode())
    elif args.output is None:
        show(text)
    else:
        wrote = [f"wrote {args.output}", f"next: edgeq plan MODEL --profile {shlex.quote(str(args.output))}"]
        show_lines([*_lines(profile, measured), *wrote])
    return 0


def _refuse_more_threads(threads: int) -> None:
    """Refuse, before two minutes of work, what no profile of this machine may say."""
    from edgeq.errors import UsageError
    from edgeq.profiles.facts.system_facts import read_facts

    cpu = read_facts().cpu
    cores = cpu.usable_cpus or cpu.logical_cpus or threads
    if threads > cores:
        raise UsageError(f"{threads} threads are more than the {cores} CPUs here", f"Choose at most {cores}")


def _check_readable(text: str, output: Path | None, name: str) -> None:
    """What was written can be read; if not, what was measured stays for correction by hand."""
    from edgeq.errors import ProfileError
    from edgeq.profiles.loader import parse_profile

    try:
        parse_profile(text, str(output or name))
    except ProfileError as error:
        kept = "" if output is None else f"; {output} has what was measured"
        raise ProfileError(f"The probed profile contradicts itself: {error.cause}{kept}", error.remedy) from error


def _comment(measured: Measured) -> str:
    lines = [f"Written by edgeq {measured.edgeq} devices probe, {measured.taken_utc}."]
    lines += [f"DO NOT TRUST THE MEASUREMENTS: {doubt}." for doubt in measured.doubts]
    return "\n".join(lines)


def _lines(profile: DeviceProfile, measured: Measured) -> list[str]:
    from edgeq.cli.describe import sections
    from edgeq.units import format_bytes

    cpu, memory = profile.cpu, profile.memory
    head = [
        f"machine  {profile.summary}",
        f"cpu      {cpu.name}, {cpu.cores} cores, {' '.join(cpu.features)}",
        f"memory   {format_bytes(memory.visible_bytes)}, {format_bytes(memory.usable_bytes)} of them for models",
    ]
    return sections(head, _bandwidth_lines(measured), _language_lines(measured.language), _onnx_lines(measured.onnx))


def _bandwidth_lines(measured: Measured) -> list[str]:
    from edgeq.cli.tables import format_table

    rows = [
        [str(p.threads), f"{p.triad_bytes_per_s / 1e9:.1f} GB/s", f"{p.read_bytes_per_s / 1e9:.1f} GB/s"]
        for p in measured.bandwidth
    ]
    return format_table(["threads", "triad", "reading"], rows, right=[0, 1, 2])


def _onnx_lines(found: OnnxFigures | None) -> list[str]:
    if found is None:
        return ["ONNX Runtime: not measured, it is not installed"]
    fp32, int8 = found.fp32_flops_per_s, found.int8_ops_per_s
    return [
        (
            f"ONNX Runtime {found.onnxruntime}, products of 256 rows: FP32 {fp32 / 1e9:.0f} GFLOP/s, "
            f"INT8 {int8 / 1e9:.0f} GOP/s ({int8 / fp32:.2f} times)"
        )
    ]


def _language_lines(costs: LanguageCosts | None) -> list[str]:
    """Types by the speed of a token's weights, with llama.cpp's kernels."""
    from edgeq.cli.tables import format_table
    from edgeq.ggml_types import ggml_type

    if costs is None:
        return ["language models: not measured, llama-cpp-python is not installed"]
    rows = []
    for name in dict.fromkeys(entry.type for entry in costs.decode.entries):
        large = max((e for e in costs.decode.entries if e.type == name), key=lambda e: e.columns * e.rows)
        prompts = [p.flops_per_s for p in costs.matmuls if p.type == name]
        rows.append(
            [
                name,
                f"{ggml_type(name).row_bytes(large.columns) * large.rows / large.ns:.1f} GB/s",
                f"{1 / large.ns_per_weight:.1f} G/s",
                f"{max(prompts) / 1e9:.0f} GFLOP/s" if prompts else "-",
                large.buffer,
            ]
        )
    rows.sort(key=lambda row: -float(row[2].split()[0]))
    table = format_table(["type", "decode", "weights", "prompts", "layout"], rows, right=[1, 2, 3])
    fixed = f"each token {costs.token_ns / 1e3:.0f} us and {costs.layer_ns / 1e3:.1f} us a layer beside its matrices"
    return [*table, fixed]
