"""What an engine depends on, and in words what makes another one necessary."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import msgspec

from edgeq.bundle import hash_file
from edgeq.disk_cache import fingerprint
from edgeq.profiles.facts.fact_reader import FactReader
from edgeq.profiles.facts.nvidia_versions import installed_packages
from edgeq.profiles.facts.tegra import is_jetson, read_jetson
from edgeq.runtime.tensorrt.graph_file import external_files
from edgeq.runtime.tensorrt.records import EngineKey, EngineSettings
from edgeq.runtime.tensorrt.versions import flavour_of, version_of
from edgeq.system_files import SystemFiles

__all__ = ["Machine", "differences", "engine_key", "key_name", "read_machine"]

# In the order in which they are told.
_WORDS: dict[str, str] = {
    "artifact_sha256": "model",
    "data_sha256": "model's weights",
    "flavour": "library",
    "version": "TensorRT",
    "compute_capability": "compute capability",
    "sms": "streaming multiprocessors",
    "power_mode": "power mode",
    "l4t": "Jetson Linux",
    "settings": "settings",
}
_HASHES = {"artifact_sha256", "data_sha256", "settings"}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What of a machine an engine of TensorRT depends on.

    Attributes:
        sms: streaming multiprocessors of its GPU that are switched on; None without a GPU.
        power_mode: nvpmodel's name; None off Jetson.
        l4t: Jetson Linux; None off Jetson.
    """

    sms: int | None = None
    power_mode: str | None = None
    l4t: str | None = None


def read_machine(sms: int | None, files: SystemFiles | None = None) -> Machine:
    """This machine, by its files; what they do not tell is None, and then equal to itself."""
    files = SystemFiles() if files is None else files
    if not is_jetson(files):
        return Machine(sms)
    reader = FactReader(files)
    jetson = read_jetson(reader, installed_packages(files))
    mode = jetson.power_mode
    return Machine(sms, None if mode is None else mode.name or f"mode {mode.id}", jetson.l4t)


def engine_key(
    trt: ModuleType,
    onnx: Path,
    settings: EngineSettings,
    capability: str,
    machine: Machine,
    *,
    hashes: tuple[str, str | None] | None = None,
) -> EngineKey:
    """The key of an engine.

    Args:
        trt: the library.
        onnx: the graph.
        settings: that it is built with.
        capability: of the GPU that it is for.
        machine: that it is for; without effect for TensorRT-RTX, which picks kernels where it runs.
        hashes: SHA-256 of the graph and of its external data, where a manifest has them already.

    Raises:
        BundleError: the model cannot be read.
        SourceError: it is no ONNX file, or asks for files outside its folder.
    """
    flavour = flavour_of(trt)
    here = machine if flavour == "tensorrt" else Machine()
    graph, data = (hash_file(onnx), _data_sha256(external_files(onnx))) if hashes is None else hashes
    return EngineKey(
        artifact_sha256=graph,
        data_sha256=data,
        flavour=flavour,
        version=version_of(trt),
        compute_capability=capability,
        sms=here.sms,
        power_mode=here.power_mode,
        l4t=here.l4t,
        settings=_asked(settings),
    )


def _data_sha256(files: Sequence[Path]) -> str | None:
    if not files:
        return None
    hashes = [hash_file(path) for path in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _asked(settings: EngineSettings) -> str:
    """What the engine is asked to be; limits, threads and caches only shape the way to it."""
    axes = sorted((name, size.least, size.usual, size.most) for name, size in settings.axes.items())
    return fingerprint(axes, settings.hardware_compatibility, settings.dla_core, settings.optimization_level)


def key_name(key: EngineKey) -> str:
    """A short name for a key, for files."""
    return fingerprint(*msgspec.structs.astuple(key))


def differences(built: EngineKey, wanted: EngineKey) -> tuple[str, ...]:
    """Why an engine with the key ``built`` is not the one that is wanted, in words; empty if it is."""
    told = []
    for field, words in _WORDS.items():
        old, new = getattr(built, field), getattr(wanted, field)
        if old == new:
            continue
        told.append(f"another {words}" if field in _HASHES else f"{words} {old or 'unknown'}, now {new or 'unknown'}")
    return tuple(told)
