"""``edgeq inspect``: what a bundle holds."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.cli.arguments import add_json_argument

if TYPE_CHECKING:
    from edgeq.bundle import Bundle
    from edgeq.quality import Interval, Quality

EXAMPLES = """\
edgeq inspect bundle
edgeq inspect bundle --tensors
edgeq inspect bundle --json | jq .plan.predicted
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("bundle", type=Path, help="folder that edgeq convert wrote")
    parser.add_argument("--tensors", action="store_true", help="list the type of every tensor")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Show the manifest; nothing is hashed (see ``edgeq verify``)."""
    from edgeq.bundle import open_bundle
    from edgeq.cli.describe import plan_lines, prediction_lines, type_lines
    from edgeq.cli.output import show, show_lines
    from edgeq.types import to_json

    bundle = open_bundle(args.bundle)
    manifest = bundle.manifest
    if args.json:
        show(to_json(manifest).decode())
        return 0
    lines = [*_head(bundle), *plan_lines(manifest.plan, manifest.source), ""]
    if args.tensors:
        lines += [f"{name}  {kind}" for name, kind in manifest.plan.tensor_types.items()]
    else:
        lines += type_lines(manifest.plan)
    lines += ["", *prediction_lines(manifest.plan, manifest.budget), "", *_checks(bundle)]
    show_lines(lines)
    return 0


def _head(bundle: Bundle) -> list[str]:
    manifest, source = bundle.manifest, bundle.manifest.source
    revision = f" at {source.revision}" if source.revision else ""
    tools = ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    return [
        f"bundle   {manifest.name} ({manifest.kind}), built for {manifest.built_for} on {manifest.created_utc}",
        f"source   {source.id}{revision}, licence {source.license or 'not stated'}, sha256 {source.weights_sha256}",
        f"made by  {tools}",
    ]


def _checks(bundle: Bundle) -> list[str]:
    from edgeq.units import format_bytes

    manifest = bundle.manifest
    lines = [f"file     {f.path} ({f.role}), {format_bytes(f.size_bytes)}, sha256 {f.sha256}" for f in manifest.files]
    if manifest.smoke is not None:
        smoke = manifest.smoke
        lines.append(
            f"check    against the unquantized model over {smoke.tokens} tokens: mean KL {smoke.mean_kld:.4f}, "
            f"same top token {smoke.top1_agreement:.1%} (proof of life, no measure of quality)"
        )
    if manifest.quality is not None:
        lines += _quality(manifest.quality)
    n_reports = len(list(bundle.reports.glob("*-bench.json"))) if bundle.reports.is_dir() else 0
    path = shlex.quote(str(bundle.path))
    shown = f"edgeq report {path} shows the latest" if n_reports else f"make one with edgeq bench {path}"
    return [*lines, f"reports  {n_reports}; {shown}"]


def _quality(quality: Quality) -> list[str]:
    overlap = "" if quality.overlap is None else f", {quality.overlap:.2%} of it calibrated on"
    read = f"{quality.tokens} tokens in {quality.chunks} chunks of {quality.text}{overlap}"
    tails = f"99 % {quality.p99_kld:.3f}, 99.9 % {quality.p999_kld:.3f}, max {quality.max_kld:.2f}"
    mean = f"{quality.mean_kld:.4f}{_interval(quality.mean_kld_interval, '.4f')}"
    top1 = f"{quality.top1:.1%}{_interval(quality.top1_interval, '.1%')}"
    ratio = f"{quality.ppl_ratio:.4f}{_interval(quality.ppl_ratio_interval, '.4f')}"
    return [
        f"quality  against the {quality.reference} reference over {read}",
        f"         mean KL {mean}, {tails}, noise floor {quality.noise_floor_kld:.1e} nats",
        f"         same top token {top1}, perplexity ratio {ratio}; intervals at {quality.confidence:.0%}",
    ]


def _interval(interval: Interval, form: str) -> str:
    if interval.low is None or interval.high is None:
        return ""
    return f" ({interval.low:{form}} to {interval.high:{form}})"
