"""Which TensorRT is there: NVIDIA's two libraries have one Python interface under two names.

TensorRT picks kernels by timing them on the GPU at hand. TensorRT-RTX (for GeForce and RTX GPUs, compute capability
7.5 and later) builds without a GPU and compiles kernels where it runs. What differs between versions is asked of the
module itself (``hasattr``), with what it is for; only the versions that cannot work at all are refused by number.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType

from edgeq.errors import MissingPackageError, SessionError, UsageError
from edgeq.profiles.facts.tegra import is_jetson
from edgeq.runtime.tensorrt.records import Flavour
from edgeq.system_files import SystemFiles

__all__ = [
    "FLAVOURS",
    "OLDEST",
    "capability_names",
    "find_tensorrt",
    "flavour_for_backend",
    "flavour_of",
    "refuse_too_old",
    "version_of",
]

FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")
# The first with which strongly typed networks, Q/DQ in FP8 and 64-bit integers came to JetPack (6.1).
OLDEST: dict[Flavour, tuple[int, int]] = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 0)}
_BACKENDS: dict[str, Flavour] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


def find_tensorrt(flavour: Flavour, *, files: SystemFiles | None = None) -> ModuleType:
    """The module, if it is installed and not too old.

    Args:
        flavour: its name.
        files: of this machine, which tell what to install where.

    Raises:
        MissingPackageError: it is not installed, or does not load.
        SessionError: it is too old.
    """
    jetson = is_jetson(SystemFiles() if files is None else files)
    try:
        module = importlib.import_module(flavour)
    except ModuleNotFoundError as error:
        cause = f"The Python module {flavour} is not installed; edgeq needs it to build and run engines"
        if error.name not in {None, flavour}:
            cause = f"{flavour} is installed, but {error.name}, which it needs, is not"
        raise MissingPackageError(cause, _how_to_install(flavour, jetson=jetson)) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingPackageError(
            f"{flavour} is installed but does not load ({error})", _how_to_install(flavour, jetson=jetson)
        ) from error
    refuse_too_old(module)
    return module


def _how_to_install(flavour: Flavour, *, jetson: bool) -> str:
    if jetson and flavour == "tensorrt_rtx":
        return "TensorRT-RTX does not run on a Jetson: use --module tensorrt"
    if jetson:
        # JetPack's own is made for the board; wheels from PyPI lack its GPU and accelerators before JetPack 7.
        return (
            "On a Jetson it is JetPack's own: sudo apt install python3-libnvinfer, and make the virtual environment "
            "with: python3 -m venv --system-site-packages"
        )
    if flavour == "tensorrt_rtx":
        return "Install it with: pip install tensorrt-rtx-cu13 (it builds without a GPU)"
    return "Install it with: pip install tensorrt, on the machine with the GPU"


def flavour_of(trt: ModuleType) -> Flavour:
    """Which library a module is."""
    name = trt.__name__.split(".")[0]
    for flavour in FLAVOURS:
        if flavour == name:
            return flavour
    raise UsageError(f"{trt.__name__} is neither of {', '.join(FLAVOURS)}", "Give the module tensorrt or tensorrt_rtx")


def flavour_for_backend(backend: str) -> Flavour:
    """The library that runs bundles of a backend.

    Raises:
        UsageError: none does; the graph was made for something else.
    """
    if backend not in _BACKENDS:
        raise UsageError(
            f"The bundle's graph is made for {backend}, and TensorRT takes another kind of quantized graph",
            "Convert the model again for a target with TensorRT, such as --target jetson-orin or --target laptop-rtx",
        )
    return _BACKENDS[backend]


def version_of(trt: ModuleType) -> str:
    """Of the build, with all its numbers."""
    version: str = trt.__version__
    return version


def refuse_too_old(trt: ModuleType) -> None:
    """Refuse a library that cannot build strongly typed networks with explicit Q/DQ nodes.

    Raises:
        SessionError: with the version that would do.
    """
    flavour, version = flavour_of(trt), version_of(trt)
    least = OLDEST[flavour]
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < least:
        remedy = "Update JetPack to 6.1 or later" if flavour == "tensorrt" else "Update it with pip"
        wanted = ".".join(map(str, least))
        raise SessionError(
            f"{_NAMES[flavour]} {version} is too old, edgeq needs {wanted} or later",
            f"{remedy}, or install {_NAMES[flavour]} {wanted} or later",
        )


def capability_names(trt: ModuleType) -> tuple[str, ...]:
    """Compute capabilities that the library can build for without that GPU, ``("7.5", …)``; none for TensorRT."""
    kinds = getattr(trt, "ComputeCapability", None)
    numbers = [
        name.removeprefix("SM") for name in getattr(kinds, "__members__", {}) if re.fullmatch(r"SM\d{2,3}", name)
    ]
    return tuple(f"{number[:-1]}.{number[-1]}" for number in sorted(numbers, key=int))
