"""``edgeq verify``: is a bundle what its manifest says?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.cli.arguments import add_json_argument

if TYPE_CHECKING:
    from edgeq.bundle import Bundle
    from edgeq.tensor_types import TensorArtifact

EXAMPLES = """\
edgeq verify bundle
edgeq verify bundle --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("bundle", type=Path, help="folder that edgeq convert wrote")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Hash every file, look for strangers, and compare the model with what its manifest tells."""
    from edgeq.bundle import open_bundle
    from edgeq.cli.output import show
    from edgeq.cli.progress import Progress
    from edgeq.units import format_bytes

    with Progress(sys.stderr) as progress:
        bundle = open_bundle(args.bundle, verify=True, progress=progress)
    checked = _check_graph(bundle) if bundle.manifest.kind == "tensor" else _check_tensors(bundle)
    files = bundle.all_files
    n_bytes = sum(f.size_bytes for f in files)
    if args.json:
        show(json.dumps({"ok": True, "bundle": str(bundle.path), "files": len(files), "bytes": n_bytes}) + "\n")
    else:
        show(f"ok: {len(files)} files, {format_bytes(n_bytes)}, {checked}\n")
    return 0


def _check_tensors(bundle: Bundle) -> str:
    """Types of all tensors of a language model, and what was found."""
    from edgeq.converters.gguf.quantize import assert_types

    planned = bundle.llm.plan.tensor_types
    assert_types(bundle.file("model"), planned)
    return f"{len(planned)} tensors as planned"


def _check_graph(bundle: Bundle) -> str:
    """Inputs, outputs and opset of a model that is called with arrays, and what was found."""
    from edgeq.errors import require_package

    require_package("onnx", "onnx", "to read ONNX models")
    for device in bundle.tensor.devices:
        made = bundle.made_for(device)
        _compare_graph(made.file("model"), made.tensor.artifact, made.tensor.plan.opset or made.tensor.artifact.opset)
    return "inputs, outputs and opset as the manifest tells"


def _compare_graph(path: Path, told: TensorArtifact, told_opset: int) -> None:
    from edgeq.converters.onnx.export.write import describe_graph
    from edgeq.errors import BundleError
    from edgeq.inputs.arrays import describe_specs

    inputs, outputs, opset = describe_graph(path)
    facts = (
        ("inputs", describe_specs(told.inputs), describe_specs(inputs)),
        ("outputs", describe_specs(told.outputs), describe_specs(outputs)),
        ("opset", str(told_opset), str(opset)),
    )
    for what, there, here in facts:
        if here != there:
            raise BundleError(
                f"The manifest tells the {what} {there}, and the graph has {here}",
                "Do not use this bundle; convert the model again",
            )
