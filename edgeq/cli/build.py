"""``edgeq build``: TensorRT engines of a bundle, for this machine's GPU or for others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.cli.arguments import add_json_argument, thread_count, whole_number

if TYPE_CHECKING:
    from types import ModuleType

    from edgeq.bundle import Bundle
    from edgeq.cli.progress import Progress
    from edgeq.runtime.tensorrt.cache import EngineFolder
    from edgeq.runtime.tensorrt.records import EngineCheck, EngineSettings, Flavour
    from edgeq.runtime.tensorrt.targets import EngineTarget

EXAMPLES = """\
edgeq build bundle
edgeq build bundle --for laptop-rtx -o engines
edgeq build bundle --for sm_75 sm_86 sm_89 sm_120 --module tensorrt_rtx --json
edgeq build bundle --memory-limit 2GiB --workspace 512MiB
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("bundle", type=Path, help="a bundle that convert made for a target with TensorRT")
    parser.add_argument(
        "--for",
        dest="targets",
        nargs="+",
        action="extend",
        metavar="DEVICE",
        help="devices, profiles (.yaml) or compute capabilities such as sm_86; default: this machine's GPU, or what "
        "the bundle was made for if there is none",
    )
    parser.add_argument(
        "--module",
        choices=["tensorrt", "tensorrt_rtx"],
        help="the library; default: the bundle's own. tensorrt builds for the GPU it runs on, tensorrt_rtx for any "
        "RTX GPU and without one",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="write FOLDER/sm_86/model.engine and so on; default: the cache",
    )
    parser.add_argument("--force", action="store_true", help="build again even if the engine is there")
    group = parser.add_argument_group("limits and hardware")
    group.add_argument(
        "--memory-limit", metavar="SIZE", help="of the building process, such as 2GiB; default: what is free now"
    )
    group.add_argument(
        "--workspace", metavar="SIZE", help="scratch memory of a layer; default: by the device's memory and the budget"
    )
    group.add_argument(
        "--dla", type=whole_number, metavar="CORE", help="use this deep learning accelerator, and the GPU for the rest"
    )
    group.add_argument("--threads", type=thread_count, metavar="N", help="of the builder; default: TensorRT's")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Build what is asked for, and check it where this machine can run it."""
    from edgeq.bundle import open_bundle
    from edgeq.cli.output import show, show_lines
    from edgeq.cli.progress import Progress
    from edgeq.runtime.tensorrt.versions import find_tensorrt
    from edgeq.types import to_json

    bundle = _for_tensorrt(open_bundle(args.bundle))
    flavour = _flavour(args, bundle)
    _refuse_inside(args.output, bundle.path)
    trt = find_tensorrt(flavour)
    wanted = [(target, _settings(args, bundle, target)) for target in _targets(args, bundle, flavour)]
    with Progress(sys.stderr) as progress:
        built = [(target, *_build(args, trt, bundle, target, settings, progress)) for target, settings in wanted]
    if args.json:
        show(to_json(_document(bundle, built)).decode())
    else:
        show_lines(_lines(args, built))
    return 0


def _for_tensorrt(bundle: Bundle) -> Bundle:
    """Of a bundle that was made for several devices, the first part that TensorRT runs."""
    from edgeq.runtime.tensor.settings import TENSORRT_BACKENDS

    parts = [bundle.made_for(device) for device in bundle.tensor.devices]
    return next((part for part in parts if part.tensor.plan.backend in TENSORRT_BACKENDS), bundle)


def _flavour(args: argparse.Namespace, bundle: Bundle) -> Flavour:
    from edgeq.runtime.tensorrt.versions import flavour_for_backend

    own = flavour_for_backend(bundle.tensor.plan.backend)  # refuses graphs that are for something else
    given: Flavour | None = args.module
    return own if given is None else given


def _refuse_inside(output: Path | None, bundle: Path) -> None:
    """A bundle is never changed once it is there."""
    from edgeq.errors import UsageError

    if output is not None and output.absolute().resolve().is_relative_to(bundle.resolve()):
        raise UsageError(f"{output} is in the bundle, which never changes", "Choose another folder with -o")


def _targets(args: argparse.Namespace, bundle: Bundle, flavour: Flavour) -> list[EngineTarget]:
    from edgeq.runtime.tensorrt.driver import find_gpu
    from edgeq.runtime.tensorrt.targets import parse_target, target_here

    if args.targets:
        return [parse_target(text) for text in dict.fromkeys(args.targets)]
    gpu = find_gpu()
    if gpu is None and flavour == "tensorrt_rtx":
        return [parse_target(bundle.tensor.built_for)]
    return [target_here(bundle.tensor.built_for, gpu)]


def _settings(args: argparse.Namespace, bundle: Bundle, target: EngineTarget) -> EngineSettings:
    """How to build for a target; one that cannot compute the bundle is refused before anything is built."""
    from edgeq.runtime.tensorrt.targets import settings_for
    from edgeq.units import parse_bytes

    manifest = bundle.tensor
    return settings_for(
        target,
        manifest.plan,
        manifest.budget,
        workspace_bytes=None if args.workspace is None else parse_bytes(args.workspace),
        dla_core=args.dla,
        threads=args.threads,
    )


def _build(
    args: argparse.Namespace,
    trt: ModuleType,
    bundle: Bundle,
    target: EngineTarget,
    settings: EngineSettings,
    shown: Progress,
) -> tuple[EngineFolder, EngineCheck | None, list[str]]:
    """One engine, how it compared with its graph if it could be run here, and why it was built."""
    from edgeq.cli.output import note
    from edgeq.runtime.tensorrt.cache import EngineStore
    from edgeq.runtime.tensorrt.serving import BuildOptions, engine_for, engine_in, serve

    reasons: list[str] = []

    def tell(line: str) -> None:
        reasons.append(line)
        note(line)

    def progress(_seconds: float, _n_bytes: int) -> None:
        shown(0, 0, f"building for {target.sm}")

    options = BuildOptions(limit_bytes=_limit(args), force=args.force, progress=progress, tell=tell)
    store = EngineStore()
    if args.output is None:
        found = engine_for(trt, bundle, settings, target, store=store, options=options)
    else:
        found = engine_in(args.output / target.sm, trt, bundle, settings, target, options=options)
    if target.machine.sms is None:
        return found, None, reasons
    serve(trt, bundle, found, target, store).close()
    return found, store.check_of(found, target.machine.sms, target.compute_capability), reasons


def _limit(args: argparse.Namespace) -> int | None:
    from edgeq.profiles.facts.system_facts import read_facts
    from edgeq.units import parse_bytes

    if args.memory_limit is not None:
        return parse_bytes(args.memory_limit)
    # Ended by us, a build takes nothing else of the robot with it.
    return read_facts().usable_memory_bytes


def _document(
    bundle: Bundle, built: list[tuple[EngineTarget, EngineFolder, EngineCheck | None, list[str]]]
) -> dict[str, Any]:
    return {
        "bundle": _text(bundle.path),
        "engines": [
            {
                "target": target.name,
                "compute_capability": target.compute_capability,
                "engine": _text(found.engine),
                "built": bool(reasons),
                "reasons": reasons,
                "info": found.info,
                "check": check,
            }
            for target, found, check, reasons in built
        ],
    }


def _text(path: Path) -> str:
    return str(path).encode("utf-8", errors="backslashreplace").decode()


def _lines(
    args: argparse.Namespace, built: list[tuple[EngineTarget, EngineFolder, EngineCheck | None, list[str]]]
) -> list[str]:
    from edgeq.units import format_bytes, format_ms

    lines = []
    for target, found, check, reasons in built:
        info = found.info
        name = target.name if target.name == target.sm else f"{target.name}, {target.sm}"
        peak = "" if info.peak_memory_bytes is None else f", peak memory {format_bytes(info.peak_memory_bytes)}"
        how = f"built in {format_ms(info.build_ms)}{peak}" if reasons else "was there"
        kinds = ", ".join(f"{count} {kind}" for kind, count in info.precisions.items())
        lines += [
            f"engine   {found.engine}",
            f"for      {name}, with {info.flavour} {info.version}",
            f"size     {format_bytes(info.size_bytes)}, {how}",
            f"layers   {info.layers}, tensors {kinds}",
        ]
        if info.dla_layers is not None:
            lines.append(f"dla      {info.dla_layers} of {info.layers} layers")
        lines += [f"warning  {warning}" for warning in info.warnings]
        if check is None:
            lines.append("checked  not here: this machine has no such GPU; it is checked there before it first serves")
        else:
            lines.append(f"checked  {check.inputs} inputs against the graph, cosine {check.min_cosine:.5f} or better")
    return lines
