"""Which of a bundle's graphs this machine can run, and which one a user names."""

from __future__ import annotations

import platform
from collections.abc import Sequence

from edgeq.errors import SessionError
from edgeq.profiles.onnx.session import Provider
from edgeq.runtime.tensor.settings import BACKEND_PROVIDERS
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
        providers: of ONNX Runtime that the user wants: a graph that was made for the first of them comes first.
        arch: of the CPU; None for this machine's.
        gpu: whether there is a GPU; None to look, where a graph depends on it.

    Raises:
        SessionError: there is a GPU, and it does not answer.
    """
    if not manifest.others:
        return manifest.built_for
    parts = [manifest.made_for(device) for device in manifest.devices]
    if providers is not None:
        first = tuple(one if isinstance(one, str) else one[0] for one in providers[:1])
        made = [part for part in parts if BACKEND_PROVIDERS.get(part.plan.backend) == first]
        return (made or parts)[0].built_for
    here = platform.machine() if arch is None else arch
    fitting = [part for part in parts if part.target.arch in (here, "any")]
    for part in fitting:
        if part.plan.on_gpu and gpu is None:
            gpu = _has_gpu(manifest.devices)
        if gpu or not part.plan.on_gpu:
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


def _has_gpu(devices: Sequence[str]) -> bool:
    from edgeq.runtime.tensorrt.driver import find_gpu

    try:
        return find_gpu() is not None
    except SessionError as error:
        raise SessionError(
            f"This machine has a GPU that cannot be used, so which of the bundle's graphs to take is not certain: "
            f"{error.cause}",
            f"{error.remedy}; or name the graph, {' or '.join(f'device={name!r}' for name in devices)} (edgeq bench: "
            "--device)",
        ) from error
