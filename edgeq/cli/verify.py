"""``edgeq verify``: is a bundle what its manifest says?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from edgeq.cli.arguments import add_json_argument

EXAMPLES = """\
edgeq verify bundle
edgeq verify bundle --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("bundle", type=Path, help="folder that edgeq convert wrote")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Hash every file, look for strangers, and compare the model's tensors with the plan."""
    from edgeq.bundle import open_bundle
    from edgeq.cli.output import show
    from edgeq.cli.progress import Progress
    from edgeq.converters.gguf.quantize import assert_types
    from edgeq.types import Manifest
    from edgeq.units import format_bytes

    with Progress(sys.stderr) as progress:
        bundle = open_bundle(args.bundle, verify=True, progress=progress)
    checked = ""
    if isinstance(bundle.manifest, Manifest):
        assert_types(bundle.file("model"), bundle.manifest.plan.tensor_types)
        checked = f", {len(bundle.manifest.plan.tensor_types)} tensors as planned"
    files = bundle.manifest.files
    n_bytes = sum(f.size_bytes for f in files)
    if args.json:
        show(json.dumps({"ok": True, "bundle": str(bundle.path), "files": len(files), "bytes": n_bytes}) + "\n")
    else:
        show(f"ok: {len(files)} files, {format_bytes(n_bytes)}{checked}\n")
    return 0
