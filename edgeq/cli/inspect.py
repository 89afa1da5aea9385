"""``edgeq inspect``: what a bundle holds."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.cli.arguments import add_json_argument
from edgeq.cli.files import add_export_arguments, check_export, export_types

if TYPE_CHECKING:
    from edgeq.bundle import Bundle
    from edgeq.converters.onnx.layers import LayerError
    from edgeq.tensor_types import TensorManifest

EXAMPLES = """\
edgeq inspect bundle
edgeq inspect bundle --tensors
edgeq inspect bundle --json | jq .plan.predicted
edgeq inspect bundle --export types.txt --format llama.cpp
edgeq inspect camera --layers
edgeq inspect camera --picture layers.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("bundle", type=Path, help="folder that edgeq convert wrote")
    parser.add_argument("--tensors", action="store_true", help="list the type of every tensor")
    parser.add_argument(
        "--layers", action="store_true", help="of a model called with arrays: where quantization's error enters"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the layers: .svg or .png; implies --layers")
    add_export_arguments(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Show the manifest; nothing is hashed (see ``edgeq verify``)."""
    from edgeq.bundle import open_bundle
    from edgeq.cli.describe import plan_lines, prediction_lines, sections, trial_lines, type_lines
    from edgeq.cli.output import show, show_lines
    from edgeq.errors import UsageError
    from edgeq.tensor_types import TensorManifest
    from edgeq.types import to_json

    bundle = open_bundle(args.bundle)
    if isinstance(bundle.manifest, TensorManifest):
        return _show_tensor_bundle(args, bundle, bundle.manifest)
    if args.layers or args.picture is not None:
        raise UsageError("--layers and --picture are of models that are called with arrays", "Use --tensors")
    manifest = bundle.llm
    _refuse_inside(args.export, bundle.path)
    check_export(args)
    wrote = export_types(args, manifest.plan.tensor_types, manifest.plan.preset)
    if args.json:
        show(to_json(manifest).decode())
        return 0
    plan = manifest.plan
    every = [f"{name}  {kind}" for name, kind in plan.tensor_types.items()]
    lines = sections(
        [*_head(bundle), *plan_lines(plan, manifest.source)],
        every if args.tensors else type_lines(plan),
        trial_lines(plan.search),
        prediction_lines(plan, manifest.budget),
        [*_checks(bundle), *wrote],
    )
    show_lines(lines)
    return 0


def _refuse_inside(path: Path | None, bundle: Path) -> None:
    """Refuse an export into the bundle: a file that its manifest does not name makes it one that was changed."""
    from edgeq.errors import UsageError

    if path is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(bundle)):
        raise UsageError(f"{path} lies in the bundle, which holds what its manifest names", "Choose a file outside it")


def _head(bundle: Bundle) -> list[str]:
    manifest, source = bundle.manifest, bundle.llm.source
    revision = f" at {source.revision}" if source.revision else ""
    tools = ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    return [
        f"bundle   {manifest.name} ({manifest.kind}), built for {manifest.built_for} on {manifest.created_utc}",
        f"source   {source.id}{revision}, licence {source.license or 'not stated'}, sha256 {source.weights_sha256}",
        f"made by  {tools}",
    ]


def _checks(bundle: Bundle) -> list[str]:
    from edgeq.cli.describe import quality_lines
    from edgeq.units import format_bytes

    manifest = bundle.llm
    lines = [f"file     {f.path} ({f.role}), {format_bytes(f.size_bytes)}, sha256 {f.sha256}" for f in manifest.files]
    if manifest.smoke is not None:
        smoke = manifest.smoke
        lines.append(
            f"check    against the unquantized model over {smoke.tokens} tokens: mean KL {smoke.mean_kld:.4f}, "
            f"same top token {smoke.top1_agreement:.1%} (proof of life, no measure of quality)"
        )
    lines += quality_lines(manifest.quality)
    n_reports = len(list(bundle.reports.glob("*-bench.json"))) if bundle.reports.is_dir() else 0
    path = shlex.quote(str(bundle.path))
    shown = f"edgeq report {path} shows the latest" if n_reports else f"make one with edgeq bench {path}"
    return [*lines, f"reports  {n_reports}; {shown}"]


def _show_tensor_bundle(args: argparse.Namespace, bundle: Bundle, manifest: TensorManifest) -> int:
    from edgeq.cli.describe_tensor import layer_lines, tensor_lines
    from edgeq.cli.output import show, show_lines
    from edgeq.errors import UsageError
    from edgeq.types import to_json

    if args.tensors or args.export is not None:
        raise UsageError("--tensors and --export are of language models", "Leave them out")
    layers = _layers(bundle) if args.layers or args.picture is not None else ()
    wrote = [] if args.picture is None else _draw(args.picture, layers, f"{manifest.name}, {manifest.plan.scheme}")
    if args.json:
        show(to_json({"manifest": manifest, "layers": layers} if layers else manifest).decode())
    else:
        show_lines([*(layer_lines(layers) if layers else tensor_lines(manifest)), *wrote])
    return 0


def _layers(bundle: Bundle) -> tuple[LayerError, ...]:
    import msgspec

    from edgeq.converters.onnx.layers import LayerError
    from edgeq.errors import BundleError
    from edgeq.types import from_json

    if not any(entry.role == "layers" for entry in bundle.manifest.files):
        raise BundleError(f"{bundle.path} holds the float model, which has no error", "Inspect a quantized one")
    try:
        return from_json(bundle.file("layers").read_bytes(), tuple[LayerError, ...])
    except (OSError, msgspec.DecodeError) as error:
        raise BundleError(f"The layers of {bundle.path} cannot be read: {error}", "Convert the model again") from error


def _draw(path: Path, layers: tuple[LayerError, ...], title: str) -> list[str]:
    from edgeq.cli.files import write_output
    from edgeq.cli.picture import check_picture
    from edgeq.converters.onnx.layer_picture import draw_layers

    check_picture(path)
    write_output(path, draw_layers(layers, title, path.suffix), force=True)
    return ["", f"wrote {path}"]
