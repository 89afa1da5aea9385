"""What a device is: the records of a profile. Every quantity has one unit, in its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from edgeq.errors import ProfileError
from edgeq.profiles.measured import Measured
from edgeq.record import Count, Record, Threads
from edgeq.registry import nearest
from edgeq.types import Budget, runs_on_gpu

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Backend",
    "Budgets",
    "Cpu",
    "DeviceProfile",
    "Dla",
    "Gpu",
    "Memory",
    "PowerMode",
    "Software",
    "nearest_source",
    "power_mode_of",
]

BACKENDS = (
    "llama.cpp-cpu",
    "llama.cpp-cuda",
    "onnxruntime-cpu",
    "onnxruntime-cuda",
    "tensorrt",
    "tensorrt-edge-llm",
    "tensorrt-rtx",
)
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8", "fp4")

_Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e18)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0, lt=1e18)]
_Efficiency = Annotated[float, msgspec.Meta(gt=0, le=1)]
_Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z")]


class Cpu(Record, frozen=True, kw_only=True):
    """A device's processor.

    Attributes:
        name: as its maker calls it.
        cores: that a program can use.
        clock_hz: highest.
        features: of the instruction set, as ``/proc/cpuinfo`` names them.
    """

    name: str
    cores: Threads
    clock_hz: _Positive | None = None
    features: tuple[str, ...] = ()


class Gpu(Record, frozen=True, kw_only=True):
    """A CUDA device.

    Attributes:
        name: of its architecture.
        compute_capability: such as ``"8.7"``.
        sms: streaming multiprocessors, all of them; a power mode may switch some off.
        clock_hz: highest.
        int8_ops_per_s: dense, without sparsity and without accelerators beside the GPU, at its best; FP16 is half.
        fp8_ops_per_s: the same; None where it has no FP8.
        fp4_ops_per_s: the same; None where it has no FP4.
        sm_bytes_per_clock: that one SM draws from memory in a clock. At low clocks it is less than the bus has; None
            where that is not known.
    """

    name: str
    compute_capability: Annotated[str, msgspec.Meta(pattern=r"^\d{1,2}\.\d\Z")]
    sms: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    clock_hz: _Positive | None = None
    int8_ops_per_s: _Positive | None = None
    fp8_ops_per_s: _Positive | None = None
    fp4_ops_per_s: _Positive | None = None
    sm_bytes_per_clock: _Positive | None = None


class Dla(Record, frozen=True, kw_only=True):
    """Deep learning accelerators beside the GPU.

    Attributes:
        cores: how many.
        int8_ops_per_s: of all of them, dense, at their best.
    """

    cores: Annotated[int, msgspec.Meta(ge=1, le=16)]
    int8_ops_per_s: _Positive | None = None


class Memory(Record, frozen=True, kw_only=True):
    """The memory that models live in: the GPU's own where it has one.

    Attributes:
        total_bytes: what is soldered on.
        visible_bytes: what the operating system sees of it, ``MemTotal``.
        reserved_bytes: kept free for the operating system and the rest of the robot's software.
        unified: one memory for CPU and GPU.
        bandwidth_bytes_per_s: peak of the bus.
        measured_bandwidth_bytes_per_s: what a benchmark of memory reaches; None where none is known.
    """

    total_bytes: Count
    visible_bytes: Count
    reserved_bytes: Count
    unified: bool
    bandwidth_bytes_per_s: _Positive
    measured_bandwidth_bytes_per_s: _Positive | None = None

    @property
    def usable_bytes(self) -> int:
        """What a bundle may take."""
        return self.visible_bytes - self.reserved_bytes


class PowerMode(Record, frozen=True, kw_only=True):
    """A power mode as nvpmodel has it. What it leaves out is as the rest of the profile says.

    Attributes:
        name: nvpmodel's.
        nvpmodel_id: that ``nvpmodel -m`` takes.
        power_w: of the module.
        cpu_cores: that are switched on.
        cpu_clock_hz: highest.
        sms: streaming multiprocessors that are switched on.
        gpu_clock_hz: highest.
        int8_ops_per_s: dense, of the GPU; None for its best, scaled by SMs and clock.
        bandwidth_bytes_per_s: peak of the bus.
        measured_bandwidth_bytes_per_s: what a benchmark of memory reaches; None where none is known.
    """

    name: str
    nvpmodel_id: Annotated[int, msgspec.Meta(ge=0, le=1024)] | None = None
    power_w: _Positive | None = None
    cpu_cores: Threads | None = None
    cpu_clock_hz: _Positive | None = None
    sms: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    gpu_clock_hz: _Positive | None = None
    int8_ops_per_s: _Positive | None = None
    bandwidth_bytes_per_s: _Positive | None = None
    measured_bandwidth_bytes_per_s: _Positive | None = None


class Software(Record, frozen=True, kw_only=True):
    """Versions that belong together.

    Attributes:
        jetpack: None off Jetson.
        l4t: None off Jetson.
        cuda: toolkit.
        tensorrt: that JetPack installs.
        ubuntu: release.
        kernel: of Linux.
    """

    jetpack: str | None = None
    l4t: str | None = None
    cuda: str | None = None
    tensorrt: str | None = None
    ubuntu: str | None = None
    kernel: str | None = None


class Backend(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One way to run models on a device.

    Attributes:
        name: one of `BACKENDS`.
        precisions: of `PRECISIONS`: what it computes in, or what weights it reads natively.
        decode_efficiency: share of the peak bandwidth that decoding reaches, 0 to 1; language models only.
        compute_efficiency: share of the GPU's dense FP16 throughput (half of INT8) that prompts reach, 0 to 1.
        compute_flops_per_s: sustained operations a second when a prompt is processed, two for a multiply-add; instead
            of ``compute_efficiency``.
        token_overhead_ms: per decoded token, whatever the model's size.
        layer_overhead_ms: per decoded token and layer: launches, norms, attention of a short context.
        runtime_bytes: of the process beside the model, its buffers and its vocabulary.
        device_overhead_bytes: driver, context and workspace on the accelerator.
    """

    name: str
    precisions: tuple[str, ...]
    decode_efficiency: _Efficiency | None = None
    compute_efficiency: _Efficiency | None = None
    compute_flops_per_s: _Positive | None = None
    token_overhead_ms: _NotNegative = 0.0
    layer_overhead_ms: _NotNegative = 0.0
    runtime_bytes: Count | None = None
    device_overhead_bytes: Count = 0

    @property
    def decodes(self) -> bool:
        """Whether it runs language models."""
        return self.decode_efficiency is not None

    @property
    def runs_gguf(self) -> bool:
        """Whether it runs GGUF bundles."""
        return self.name.startswith("llama.cpp-")

    @property
    def on_gpu(self) -> bool:
        """Whether weights lie on the GPU."""
        return runs_on_gpu(self.name)


class Budgets(Record, frozen=True, kw_only=True):
    """A robot's default limits for its typical work.

    Attributes:
        planner: a language model that plans or answers.
        perception: a tensor model for every camera frame.
        policy: a tensor model in the control loop.
    """

    planner: Budget = Budget()
    perception: Budget = Budget()
    policy: Budget = Budget()


class DeviceProfile(Record, frozen=True, kw_only=True):
    """What a device is, with a source for each number.

    Attributes:
        name: the profile's own name.
        aliases: other names that users type.
        summary: one line for people.
        arch: ``"x86_64"``, ``"aarch64"`` or ``"any"``.
        cpu: see `Cpu`.
        threads: how many a session uses; None leaves it to the machine's physical cores.
        gpu: None without CUDA.
        dla: None without.
        memory: see `Memory`.
        power_modes: see `PowerMode`.
        power_mode: name of the one that the figures are for; None without power modes.
        software: versions that run on it, newest first.
        backends: in order of preference.
        budgets: a robot's default limits.
        provenance: ``"datasheet"``, or ``"measured"`` by ``edgeq devices probe``.
        measured: what the probe found; None for a datasheet.
        sources: dotted path of a number, or of what it is part of, to where it comes from.
    """

    name: _Name
    aliases: tuple[_Name, ...] = ()
    summary: str
    arch: Literal["x86_64", "aarch64", "any"]
    cpu: Cpu
    threads: Threads | None = None
    gpu: Gpu | None = None
    dla: Dla | None = None
    memory: Memory
    power_modes: tuple[PowerMode, ...] = ()
    power_mode: str | None = None
    software: tuple[Software, ...] = ()
    backends: tuple[Backend, ...]
    budgets: Budgets = Budgets()
    provenance: Literal["datasheet", "measured"]
    measured: Measured | None = None
    sources: dict[str, str]

    def source_of(self, path: str) -> str | None:
        """Where the value at a dotted path comes from, such as ``"power_modes.15W.sms"``; None if that is not told."""
        return nearest_source(path, self.sources)

    @property
    def accelerator(self) -> str:
        """What language models run on: ``"cpu"``, or ``"cuda:sm_87"`` and its like."""
        if self.gpu is None or not self._preferred.on_gpu:
            return "cpu"
        return f"cuda:sm_{self.gpu.compute_capability.replace('.', '')}"

    @property
    def backend(self) -> Backend:
        """The preferred one for GGUF bundles. Raises ProfileError if none runs them."""
        if self._preferred.runs_gguf:
            return self._preferred
        raise ProfileError(
            f"{self.name} has no backend for language models", "Add llama.cpp-cpu or llama.cpp-cuda under backends"
        )

    @property
    def _preferred(self) -> Backend:
        """The first for GGUF bundles; the first of all if none runs them."""
        return next((backend for backend in self.backends if backend.runs_gguf), self.backends[0])

    @property
    def budget(self) -> Budget:
        """The default limits of a language model."""
        return self.budgets.planner

    @property
    def mode(self) -> PowerMode | None:
        """The power mode that the figures are for."""
        return next((mode for mode in self.power_modes if mode.name == self.power_mode), None)

    @property
    def peak_bandwidth_bytes_per_s(self) -> float:
        """Of the memory's bus in the power mode."""
        mode = self.mode
        own = None if mode is None else mode.bandwidth_bytes_per_s
        return self.memory.bandwidth_bytes_per_s if own is None else own

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Peak in the power mode: of the bus, or of what the GPU's SMs draw at their clock if that is less.

        Where the latter was measured in that mode, that figure stands for it.
        """
        peak, gpu = self.peak_bandwidth_bytes_per_s, self.gpu
        if gpu is None or gpu.sm_bytes_per_clock is None or not self._preferred.on_gpu:
            return peak
        sms, clock_hz = self._sms_and_clock(gpu)
        if clock_hz is None or sms * clock_hz * gpu.sm_bytes_per_clock >= peak:
            return peak
        mode = self.mode
        seen = None if mode is None else mode.measured_bandwidth_bytes_per_s
        return sms * clock_hz * gpu.sm_bytes_per_clock if seen is None else seen

    @property
    def int8_ops_per_s(self) -> float | None:
        """Dense, of the GPU in the power mode; None where it is not known."""
        mode, gpu = self.mode, self.gpu
        if mode is not None and mode.int8_ops_per_s is not None:
            return mode.int8_ops_per_s
        if gpu is None or gpu.int8_ops_per_s is None:
            return None
        sms, clock_hz = self._sms_and_clock(gpu)
        slower = 1.0 if clock_hz is None or gpu.clock_hz is None else clock_hz / gpu.clock_hz
        return gpu.int8_ops_per_s * slower * sms / gpu.sms

    def _sms_and_clock(self, gpu: Gpu) -> tuple[int, float | None]:
        """Of the GPU in the power mode."""
        mode = self.mode
        if mode is None:
            return gpu.sms, gpu.clock_hz
        return mode.sms or gpu.sms, mode.gpu_clock_hz or gpu.clock_hz

    def flops_per_s(self, backend: Backend) -> float:
        """Sustained operations a second of a backend when a prompt is processed.

        Those of a GPU follow the power mode; ``compute_flops_per_s`` is taken as it stands.

        Raises:
            ProfileError: the profile does not tell.
        """
        if backend.compute_flops_per_s is not None:
            return backend.compute_flops_per_s
        if backend.compute_efficiency is None or self.int8_ops_per_s is None:
            raise ProfileError(
                f"{self.name} does not say how fast {backend.name} computes",
                "Add compute_flops_per_s, or compute_efficiency and the GPU's int8_ops_per_s",
            )
        return backend.compute_efficiency * self.int8_ops_per_s / 2


def nearest_source(path: str, sources: Mapping[str, str]) -> str | None:
    """The source at a dotted path, or else the nearest above it."""
    covering = [source for source in sources if path == source or path.startswith(f"{source}.")]
    return sources[max(covering, key=len)] if covering else None


def power_mode_of(profile: DeviceProfile, name: str) -> DeviceProfile:
    """The profile in another power mode.

    Args:
        profile: with power modes.
        name: as `PowerMode` has it, whatever the case.

    Raises:
        ProfileError: it has no such mode, with the nearest names.
    """
    names = {mode.name.lower(): mode.name for mode in profile.power_modes}
    if name.lower() not in names:
        if not names:
            raise ProfileError(f"{profile.name} has no power modes", "Leave out --power-mode")
        close = nearest(name, list(names.values())) or list(names.values())
        raise ProfileError(f"{profile.name} has no power mode {name!r}", f"Choose one of {', '.join(close)}")
    return msgspec.structs.replace(profile, power_mode=names[name.lower()])
