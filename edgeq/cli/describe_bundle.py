"""What every bundle says of itself, whatever kind of model it holds, as lines for people."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from edgeq.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edgeq.bundle import Bundle
    from edgeq.tensor_types import TensorManifest
    from edgeq.types import BundleFile, Manifest

__all__ = ["file_lines", "origin_lines", "report_lines"]


def origin_lines(manifest: Manifest | TensorManifest) -> list[str]:
    """Its name, device and date, the model that it was made of, and the tools."""
    source = manifest.source
    revision = f" at {source.revision}" if source.revision else ""
    tools = ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    return [
        f"bundle   {manifest.name} ({manifest.kind}), built for {manifest.built_for} on {manifest.created_utc}",
        f"source   {source.id}{revision}, licence {source.license or 'not stated'}, sha256 {source.weights_sha256}",
        f"made by  {tools}",
    ]


def file_lines(files: Iterable[BundleFile]) -> list[str]:
    """Each file with its role, size and hash."""
    return [f"file     {f.path} ({f.role}), {format_bytes(f.size_bytes)}, sha256 {f.sha256}" for f in files]


def report_lines(bundle: Bundle) -> list[str]:
    """How many measurements lie beside it."""
    n_reports = len(list(bundle.reports.glob("*-bench.json"))) if bundle.reports.is_dir() else 0
    path = shlex.quote(str(bundle.path))
    shown = f"edgeq report {path} shows the latest" if n_reports else f"make one with edgeq bench {path}"
    return [f"reports  {n_reports}; {shown}"]
