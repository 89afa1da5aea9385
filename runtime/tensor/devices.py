"""Which of a bundle's graphs this machine can run, and which one a user names."""

from __future__ import annotations

import platform
from collections.abc import Sequence

from edgeq.errors import SessionError
from edgeq.profiles.onnx.session import Provider
from edgeq.runtime.tensor.settings import BACKEND_PROVIDERS, TENSORRT_BACKENDS
from edgeq.tensor_types import TensorManifest

__all__ = ["fitting_device", "named_device"]


def fitting_device(
    manifest: TensorManifest,
    providers: Sequence[Provider] | None = None,
    *,
    arch: str | None = None,
    gpu: bool | None = None,
) -> str:
    """The first device of a bundle that this machine is like; the bundle's own first one if it is like none.

    Args:
        manifest: of the bundle.
        providers: of ONNX Runtime that the user wants: a graph that was made for them comes first.
        arch: of the CPU; None for this machine's.
        gpu: whether there is a GPU; None to look.
    """
    if not manifest.others:
        return manifest.built_for
    parts = [manifest.made_for(device) for device in manifest.devices]
    if providers is not None:
        names = tuple(one if isinstance(one, str) else one[0] for one in providers)
        made = [part for part in parts if BACKEND_PROVIDERS.get(part.plan.backend) == names]
        return (made or parts)[0].built_for
    here = platform.machine() if arch is None else arch
    there = _has_gpu() if gpu is None else gpu
    for part in parts:
        if part.target.arch in (here, "any") and (there or not _on_gpu(part)):
            return part.built_for
    return manifest.built_for


def named_device(manifest: TensorManifest, name: str) -> str:
    """The device of a bundle that a user calls so: by its own name, or by an alias of that profile.

    What no device of the bundle is called is given back as it is.
    """
    from edgeq.profiles.loader import profile_names

    if name in manifest.devices:
        return name
    meant = profile_names().get(name.lower(), name)
    return meant if meant in manifest.devices else name


def _on_gpu(manifest: TensorManifest) -> bool:
    return manifest.plan.backend in TENSORRT_BACKENDS or manifest.plan.backend == "onnxruntime-cuda"


def _has_gpu() -> bool:
    from edgeq.runtime.tensorrt.driver import find_gpu

    try:
        return find_gpu() is not None
    except SessionError:  # there is one that does not answer
        return False
