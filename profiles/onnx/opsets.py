"""The newest opset that a backend takes."""

from __future__ import annotations

import re

from edgeq.profiles.device import DeviceProfile

__all__ = ["newest_opset"]

# What the ONNX parser of a TensorRT promises to take at most, by the version that said so first: docs/operators.md of
# github.com/onnx/onnx-tensorrt at 8.0, 8.4, 9.0, 10.0 and 10.15; what lies between is not known. All take 9 and newer.
_OF_TENSORRT = {(8, 0): 13, (8, 4): 17, (9, 0): 19, (10, 0): 20, (10, 15): 24}
_COUNTS = (10, 0)  # an older one decides only where there is no newer one: JetPack 6.0 and before, since superseded
_OF_TENSORRT_RTX = 24  # tried: the parser of 1.7 takes models of it


def newest_opset(profile: DeviceProfile, backend: str) -> int | None:
    """The newest opset that all software versions of a device take; None if nothing limits it.

    Args:
        profile: the device; without versions of TensorRT, 10.0 is assumed.
        backend: its name.
    """
    if backend == "tensorrt-rtx":
        return _OF_TENSORRT_RTX
    if backend != "tensorrt":
        return None
    versions = [version for entry in profile.software if (version := _version(entry.tensorrt or "")) is not None]
    counting = [version for version in versions if version >= _COUNTS] or versions or [_COUNTS]
    oldest = min(counting)
    return max((opset for since, opset in _OF_TENSORRT.items() if since <= oldest), default=min(_OF_TENSORRT.values()))


def _version(text: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)(?:\.(\d+))?", text)
    return None if found is None else (int(found[1]), int(found[2] or 0))
