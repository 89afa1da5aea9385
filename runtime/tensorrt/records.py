"""What is said about an engine: how to build it, what it is good for, and what came of building it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgeq.record import Count, Record, Sha256, Threads
from edgeq.tensor_types import AxisRange

__all__ = [
    "ComputeCapability",
    "EngineCheck",
    "EngineInfo",
    "EngineKey",
    "EngineSettings",
    "Flavour",
    "InputShapes",
]

Flavour = Literal["tensorrt", "tensorrt_rtx"]
"""Which of NVIDIA's two libraries, by the name of its Python module."""

ComputeCapability = Annotated[str, msgspec.Meta(pattern=r"^\d{1,2}\.\d\Z")]
Shape = tuple[Count, ...]


class EngineSettings(Record, frozen=True, kw_only=True):
    """How an engine is built.

    Attributes:
        compute_capability: that it is for, ``"8.9"``; None for the GPU of this machine.
        axes: sizes of the dynamic axes by name, as the plan has them.
        workspace_bytes: that one layer may take for scratch; None leaves it to TensorRT.
        tactic_bytes: that trying out kernels may take, where the library can be told so; None leaves it to TensorRT.
        hardware_compatibility: run on other GPUs as well, at the cost of speed: ``"ampere-plus"`` or
            ``"same-compute-capability"``; None for this GPU alone.
        dla_core: the deep learning accelerator that layers go to where it can compute them; None for the GPU alone.
        optimization_level: TensorRT's, 0 to 5; None for its default.
        threads: of the builder; None for its default.
        timing_cache: a file with times of kernels, read before and written after; None for none.
    """

    compute_capability: ComputeCapability | None = None
    axes: dict[str, AxisRange] = msgspec.field(default_factory=dict)
    workspace_bytes: Count | None = None
    tactic_bytes: Count | None = None
    hardware_compatibility: Literal["ampere-plus", "same-compute-capability"] | None = None
    dla_core: Annotated[int, msgspec.Meta(ge=0, le=15)] | None = None
    optimization_level: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    threads: Threads | None = None
    timing_cache: str | None = None


class EngineKey(Record, frozen=True, kw_only=True):
    """All that an engine depends on: with another value of any of these it may be invalid, or slower than it could be.

    TensorRT picks kernels by timing them, so that SMs, clocks (the power mode) and driver (L4T) matter. TensorRT-RTX
    compiles kernels on the GPU where it runs, and these are None.

    Attributes:
        artifact_sha256: of the ONNX file, which names its external data by place and size; see `data_sha256`.
        data_sha256: of the external data; None if there is none.
        flavour: the library.
        version: of its build, ``"10.3.0.30"``.
        compute_capability: of the GPU.
        sms: streaming multiprocessors that are switched on.
        power_mode: nvpmodel's name.
        l4t: release of Jetson Linux.
        settings: fingerprint of what the engine was asked to be: axes, accelerator, levels, limits.
    """

    artifact_sha256: Sha256
    data_sha256: Sha256 | None = None
    flavour: Flavour
    version: str
    compute_capability: ComputeCapability
    sms: Count | None = None
    power_mode: str | None = None
    l4t: str | None = None
    settings: str


class InputShapes(Record, frozen=True, kw_only=True):
    """Shapes of one input that an engine takes.

    Attributes:
        name: of the input.
        least: the smallest.
        usual: that kernels were chosen for.
        most: the largest.
    """

    name: str
    least: Shape
    usual: Shape
    most: Shape


class EngineCheck(Record, frozen=True, kw_only=True):
    """An engine's outputs against those of the ONNX graph on the CPU.

    Attributes:
        inputs: calls compared.
        min_cosine: of the worst output and input.
        max_error: the largest absolute difference.
    """

    inputs: Count
    min_cosine: float
    max_error: float


class EngineInfo(Record, frozen=True, kw_only=True):
    """What came of building: ``engine.json`` beside the engine.

    Attributes:
        schema_version: of this record.
        flavour: the library that built it.
        version: of its build.
        compute_capability: that it was built for; None for the GPU it was built on.
        size_bytes: of the engine.
        sha256: of the engine.
        build_ms: parsing and building, without the start of a process.
        peak_memory_bytes: of the building process; None where the kernel does not tell, or if the process does other
            things too.
        layers: of the network as TensorRT parsed it.
        dla_layers: of those, how many the deep learning accelerator takes; None if it was not asked.
        precisions: tensors of the network by element type, ``{"FLOAT": 40, "INT8": 22}``.
        shapes: of the inputs.
        warnings: of TensorRT, one line each.
        key: what it depends on; None before it is put into a cache.
        created_utc: ISO 8601.
    """

    schema_version: Literal[1] = 1
    flavour: Flavour
    version: str
    compute_capability: ComputeCapability | None
    size_bytes: Count
    sha256: Sha256
    build_ms: float
    peak_memory_bytes: Count | None = None
    layers: Count
    dla_layers: Count | None = None
    precisions: dict[str, Count]
    shapes: tuple[InputShapes, ...]
    warnings: tuple[str, ...] = ()
    key: EngineKey | None = None
    created_utc: str
