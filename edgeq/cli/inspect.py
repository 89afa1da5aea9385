"""``edgeq inspect``: what a bundle holds."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.cli.arguments import add_json_argument
from edgeq.cli.files import add_export_arguments, check_export, export_types

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeq.bundle import Bundle
    from edgeq.converters.onnx.layers import LayerError

EXAMPLES = """\
edgeq inspect bundle
edgeq inspect bundle --tensors
edgeq inspect bundle --json | jq .plan.predicted
edgeq inspect bundle --export types.txt --format llama.cpp
edgeq inspect camera --layers
edgeq inspect camera --picture layers.png --device laptop-cpu
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("bundle", type=Path, help="folder that edgeq convert wrote")
    parser.add_argument("--tensors", action="store_true", help="list the type of every tensor")
    parser.add_argument(
        "--layers", action="store_true", help="of a model called with arrays: where quantization's error enters"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the layers: .svg or .png; implies --layers")
    parser.add_argument("--device", metavar="NAME", help="of a bundle for several devices, this one alone")
    add_export_arguments(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Show the manifest; nothing is hashed (see ``edgeq verify``)."""
    from edgeq.bundle import open_bundle
    from edgeq.cli.describe import plan_lines, prediction_lines, sections, trial_lines, type_lines
    from edgeq.cli.describe_bundle import origin_lines
    from edgeq.cli.output import show, show_lines
    from edgeq.errors import UsageError
    from edgeq.tensor_types import TensorManifest
    from edgeq.types import to_json

    bundle = open_bundle(args.bundle)
    if isinstance(bundle.manifest, TensorManifest):
        return _show_tensor_bundle(args, bundle)
    if args.layers or args.picture is not None or args.device is not None:
        raise UsageError("--layers, --picture and --device are of models that are called with arrays", "Use --tensors")
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
        [*origin_lines(manifest), *plan_lines(plan, manifest.source)],
        every if args.tensors else type_lines(plan),
        trial_lines(plan.search),
        prediction_lines(plan, manifest.budget),
        [*_checks(bundle), *wrote],
    )
    show_lines(lines)
    return 0


def _refuse_inside(path: Path | None, bundle: Path) -> None:
    """Refuse to write into the bundle: a file that its manifest does not name makes it one that was changed."""
    from edgeq.errors import UsageError

    if path is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(bundle)):
        raise UsageError(f"{path} lies in the bundle, which holds what its manifest names", "Choose a file outside it")


def _checks(bundle: Bundle) -> list[str]:
    from edgeq.cli.describe import quality_lines
    from edgeq.cli.describe_bundle import file_lines, report_lines

    manifest = bundle.llm
    lines = file_lines(manifest.files)
    if manifest.smoke is not None:
        smoke = manifest.smoke
        lines.append(
            f"check    against the unquantized model over {smoke.tokens} tokens: mean KL {smoke.mean_kld:.4f}, "
            f"same top token {smoke.top1_agreement:.1%} (proof of life, no measure of quality)"
        )
    return [*lines, *quality_lines(manifest.quality), *report_lines(bundle)]


def _show_tensor_bundle(args: argparse.Namespace, bundle: Bundle) -> int:
    from edgeq.cli.output import show, show_lines
    from edgeq.errors import UsageError
    from edgeq.runtime.tensor.devices import named_device
    from edgeq.types import to_json

    if args.tensors or args.export is not None or args.format is not None:
        raise UsageError("--tensors, --export and --format are of language models", "Leave them out")
    _check_picture(args.picture, bundle, force=args.force)
    if args.device is not None:
        bundle = bundle.made_for(named_device(bundle.tensor, args.device))
    layers = _layers(bundle) if args.layers or args.picture is not None else {}
    wrote = [] if args.picture is None else _draw(args.picture, bundle, layers, force=args.force)
    if args.json:
        manifest = bundle.manifest
        show(to_json({"manifest": manifest, "layers": layers} if layers else manifest).decode())
    else:
        show_lines([*(_layer_lines(bundle, layers) if layers else _bundle_lines(bundle)), *wrote])
    return 0


def _check_picture(path: Path | None, bundle: Bundle, *, force: bool) -> None:
    """Find out before any work whether the picture can be written."""
    from edgeq.cli.files import check_output
    from edgeq.cli.picture import check_picture

    if path is not None:
        _refuse_inside(path, bundle.path)
        check_picture(path)
        check_output(path, force=force)


def _bundle_lines(bundle: Bundle) -> list[str]:
    from edgeq.cli.describe import sections
    from edgeq.cli.describe_bundle import file_lines, origin_lines, report_lines
    from edgeq.cli.describe_tensor import tensor_lines

    manifest = bundle.tensor
    return sections(
        origin_lines(manifest),
        tensor_lines(manifest),
        [*file_lines(manifest.all_files), *report_lines(bundle)],
    )


def _layer_lines(bundle: Bundle, layers: Mapping[str, Sequence[LayerError]]) -> list[str]:
    """Each device of the bundle, under its name where there are several."""
    from edgeq.cli.describe import sections
    from edgeq.cli.describe_tensor import layer_lines

    devices = bundle.tensor.devices
    if len(devices) == 1:
        return layer_lines(layers[devices[0]])
    blocks = []
    for device in devices:
        found = layers.get(device)
        lines = ["the float model, which has no error"] if found is None else layer_lines(found)
        blocks.append([f"for {device}", *lines])
    return sections(*blocks)


def _layers(bundle: Bundle) -> dict[str, tuple[LayerError, ...]]:
    """Of each device that has a quantized graph."""
    from edgeq.errors import BundleError

    parts = [bundle.made_for(device) for device in bundle.tensor.devices]
    found = {
        part.manifest.built_for: _read_layers(part)
        for part in parts
        if any(entry.role == "layers" for entry in part.manifest.files)
    }
    if not found:
        raise BundleError(f"{bundle.path} holds the float model, which has no error", "Inspect a quantized one")
    return found


def _read_layers(bundle: Bundle) -> tuple[LayerError, ...]:
    import msgspec

    from edgeq.converters.onnx.layers import LayerError
    from edgeq.errors import BundleError
    from edgeq.types import from_json

    try:
        return from_json(bundle.file("layers").read_bytes(), tuple[LayerError, ...])
    except (OSError, msgspec.DecodeError) as error:
        raise BundleError(f"The layers of {bundle.path} cannot be read: {error}", "Convert the model again") from error


def _draw(path: Path, bundle: Bundle, layers: Mapping[str, Sequence[LayerError]], *, force: bool) -> list[str]:
    """Write the picture of the one device; the lines that say so."""
    from edgeq.cli.files import write_output
    from edgeq.converters.onnx.layer_picture import draw_layers
    from edgeq.errors import UsageError

    if len(layers) > 1:
        raise UsageError(
            f"A picture shows one device, and the bundle was made for {' and '.join(layers)}",
            "Choose one with --device",
        )
    ((device, found),) = layers.items()
    manifest = bundle.tensor.made_for(device)
    title = f"{manifest.name} for {device}, {manifest.plan.scheme}"
    write_output(path, draw_layers(found, title, path.suffix), force=force)
    return ["", f"wrote {path}"]
