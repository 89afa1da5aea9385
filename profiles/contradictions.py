"""Numbers of a profile that cannot all be true."""

from __future__ import annotations

from collections.abc import Iterator

from edgeq.profiles.device import BACKENDS, PRECISIONS, Backend, DeviceProfile, Gpu, PowerMode
from edgeq.registry import nearest
from edgeq.types import BUDGET_LINES

__all__ = ["contradictions"]

Problems = Iterator[tuple[str, str]]

# The least compute capability whose tensor cores know a type (CUDA C++ programming guide, tensor core data types).
_NEEDS_CAPABILITY = {"bf16": 8.0, "fp8": 8.9, "fp4": 10.0}
# INT8 operations of an SM in a clock, dense, by compute capability: NVIDIA's peak rates by SMs and boost clock.
_INT8_OPS = {
    "7.2": 2048,
    "7.5": 2048,
    "8.0": 4096,
    "8.6": 2048,
    "8.7": 4096,
    "8.9": 2048,
    "9.0": 8192,
    "11.0": 16384,
    "12.0": 2048,
}
_CLOCK_MARGIN = 1.25  # a maker's throughput may be for a higher boost clock, but never for twice the operations
_ROUNDING = 0.02  # of throughputs, as data sheets print them
_FILES = (".yaml", ".yml")


def contradictions(profile: DeviceProfile) -> Problems:
    """Cause and remedy of every pair of facts that cannot both be, and of every name that means nothing."""
    for name in (profile.name, *profile.aliases):
        if name.endswith(_FILES):
            yield f"the name {name} would be read as a file's", f"Leave out {name[name.rindex('.') :]}"
    if len({profile.name, *profile.aliases}) != 1 + len(profile.aliases):
        yield "it has a name twice", "Correct aliases"
    if profile.threads is not None and profile.threads > profile.cpu.cores:
        yield f"{profile.threads} threads are more than its {profile.cpu.cores} cores", "Lower threads"
    if (profile.provenance == "measured") != (profile.measured is not None):
        yield (
            "provenance and measured do not agree",
            "Write provenance: datasheet; measured is for what edgeq devices probe wrote",
        )
    yield from _memory(profile)
    yield from _budgets(profile)
    yield from _gpu(profile)
    yield from _backends(profile)
    yield from _power_modes(profile)


def _memory(profile: DeviceProfile) -> Problems:
    memory = profile.memory
    if memory.visible_bytes > memory.total_bytes:
        yield "memory.visible_bytes is more than memory.total_bytes", "Correct one of them"
    if memory.reserved_bytes >= memory.visible_bytes:
        yield (
            "memory.reserved_bytes leaves nothing of memory.visible_bytes",
            "Lower it, or raise the other to what the device has",
        )
    measured = memory.measured_bandwidth_bytes_per_s
    if measured is not None and measured > memory.bandwidth_bytes_per_s:
        yield (
            "memory.measured_bandwidth_bytes_per_s is above the peak, memory.bandwidth_bytes_per_s",
            "Correct one of them",
        )


def _budgets(profile: DeviceProfile) -> Problems:
    for name in ("planner", "perception", "policy"):
        budget = getattr(profile.budgets, name)
        for line in BUDGET_LINES:
            limit = budget.limit(line)
            if limit is not None and limit <= 0:
                yield f"budgets.{name}.{line.field} is {limit:g}, which nothing can keep", "Correct or remove it"
        limit = budget.peak_memory_bytes
        if limit is not None and limit > profile.memory.usable_bytes:
            yield (
                f"budgets.{name}.peak_memory_bytes is larger than the usable memory, visible_bytes less reserved_bytes",
                "Lower it",
            )


def _gpu(profile: DeviceProfile) -> Problems:
    gpu = profile.gpu
    if gpu is None:
        return
    for precision in ("fp8", "fp4"):
        if getattr(gpu, f"{precision}_ops_per_s") is not None and not _knows(gpu, precision):
            yield f"gpu.{precision}_ops_per_s: {_lacks(gpu, precision)}", "Remove it"
    per_clock = _INT8_OPS.get(gpu.compute_capability)
    if per_clock is None or gpu.clock_hz is None or gpu.int8_ops_per_s is None:
        return
    most = gpu.sms * gpu.clock_hz * per_clock
    if gpu.int8_ops_per_s > most * _CLOCK_MARGIN:
        given, those = _tops(gpu.int8_ops_per_s), _sms(gpu.sms, gpu.clock_hz)
        yield (
            f"gpu.int8_ops_per_s is {given}, and {those} of sm_{_sm(gpu)} reach {_tops(most)} without sparsity",
            "Correct one of them; half of a figure with sparsity is dense",
        )


def _tops(ops_per_s: float) -> str:
    return f"{ops_per_s / 1e12:.3g} TOPS"


def _sms(sms: int, clock_hz: float) -> str:
    return f"{sms} SMs at {clock_hz / 1e6:.5g} MHz"


def _sm(gpu: Gpu) -> str:
    return gpu.compute_capability.replace(".", "")


def _knows(gpu: Gpu, precision: str) -> bool:
    return float(gpu.compute_capability) >= _NEEDS_CAPABILITY.get(precision, 0.0)


def _lacks(gpu: Gpu, precision: str) -> str:
    return f"a GPU of compute capability {gpu.compute_capability} has no {precision}"


def _backends(profile: DeviceProfile) -> Problems:
    if not profile.backends:
        yield "it names no backend", "Add one under backends"
    for backend in profile.backends:
        where = f"backends.{backend.name}"
        if backend.name not in BACKENDS:
            close = nearest(backend.name, list(BACKENDS)) or list(BACKENDS)
            yield f"{where} is no backend", f"Choose one of {', '.join(close)}"
        if not backend.precisions:
            yield f"{where} has no precisions", f"Choose from {', '.join(PRECISIONS)}"
        for precision in backend.precisions:
            if precision not in PRECISIONS:
                yield f"{where} has the precision {precision!r}", f"Choose from {', '.join(PRECISIONS)}"
            if backend.on_gpu and profile.gpu is not None and not _knows(profile.gpu, precision):
                yield f"{where}: {_lacks(profile.gpu, precision)}", f"Remove {precision}"
        if backend.on_gpu and profile.gpu is None:
            yield f"{where} needs a GPU, and the profile has none", "Add gpu, or remove the backend"
        if backend.compute_efficiency is not None and backend.compute_flops_per_s is not None:
            yield f"{where} has compute_efficiency and compute_flops_per_s", "Keep one of them"
        if backend.runs_gguf:
            yield from _language_backend(profile, backend)


def _language_backend(profile: DeviceProfile, backend: Backend) -> Problems:
    for field in ("decode_efficiency", "runtime_bytes"):
        if getattr(backend, field) is None:
            yield f"backends.{backend.name} lacks {field}", "Add it; plans of language models need it"
    if backend.compute_flops_per_s is None and (backend.compute_efficiency is None or profile.int8_ops_per_s is None):
        yield (
            f"backends.{backend.name} does not say how fast it computes",
            "Add compute_flops_per_s, or compute_efficiency and gpu.int8_ops_per_s",
        )


def _power_modes(profile: DeviceProfile) -> Problems:
    names = [mode.name for mode in profile.power_modes]
    if profile.power_mode is not None and profile.power_mode not in names:
        choice = f"Choose one of {', '.join(names)}" if names else "Remove it, or add power_modes"
        yield f"power_mode is {profile.power_mode!r}, which is not among power_modes", choice
    if names and profile.power_mode is None:
        yield (
            "it has power_modes and does not say which one its figures are for",
            f"Add power_mode: one of {', '.join(names)}",
        )
    folded = {name.lower() for name in names}
    if len(folded) != len(names):
        yield "two power modes differ in nothing but upper and lower case", "Rename one of them"
    ids = [mode.nvpmodel_id for mode in profile.power_modes if mode.nvpmodel_id is not None]
    if len(set(ids)) != len(ids):
        yield "two power modes have one nvpmodel_id", "Correct one of them"
    for mode in profile.power_modes:
        yield from _power_mode(profile, mode)


def _power_mode(profile: DeviceProfile, mode: PowerMode) -> Problems:
    where, cpu, gpu, memory = f"power_modes.{mode.name}", profile.cpu, profile.gpu, profile.memory
    if gpu is None and (mode.sms or mode.gpu_clock_hz or mode.int8_ops_per_s):
        yield f"{where} is about a GPU, and the profile has none", "Add gpu, or remove its figures"
    bounds = [
        ("cpu_cores", mode.cpu_cores, "cpu.cores", cpu.cores),
        ("cpu_clock_hz", mode.cpu_clock_hz, "cpu.clock_hz", cpu.clock_hz),
        ("sms", mode.sms, "gpu.sms", None if gpu is None else gpu.sms),
        ("gpu_clock_hz", mode.gpu_clock_hz, "gpu.clock_hz", None if gpu is None else gpu.clock_hz),
        ("int8_ops_per_s", mode.int8_ops_per_s, "gpu.int8_ops_per_s", None if gpu is None else gpu.int8_ops_per_s),
        (
            "bandwidth_bytes_per_s",
            mode.bandwidth_bytes_per_s,
            "memory.bandwidth_bytes_per_s",
            memory.bandwidth_bytes_per_s,
        ),
        (
            "measured_bandwidth_bytes_per_s",
            mode.measured_bandwidth_bytes_per_s,
            "the mode's peak",
            mode.bandwidth_bytes_per_s or memory.bandwidth_bytes_per_s,
        ),
    ]
    for field, value, limit_name, limit in bounds:
        if value is not None and limit is not None and value > limit:
            yield f"{where}.{field} is more than {limit_name}", "Correct one of them"
    if gpu is not None:
        yield from _mode_throughput(gpu, mode)


def _mode_throughput(gpu: Gpu, mode: PowerMode) -> Problems:
    """A mode's throughput is its share of the GPU's own, by SMs and clock."""
    if mode.int8_ops_per_s is None or gpu.int8_ops_per_s is None or gpu.clock_hz is None:
        return
    sms, clock_hz = mode.sms or gpu.sms, mode.gpu_clock_hz or gpu.clock_hz
    scaled = gpu.int8_ops_per_s * (sms / gpu.sms) * (clock_hz / gpu.clock_hz)
    if abs(mode.int8_ops_per_s - scaled) > _ROUNDING * scaled:
        field, given = f"power_modes.{mode.name}.int8_ops_per_s", _tops(mode.int8_ops_per_s)
        yield (
            f"{field} is {given}, and {_sms(sms, clock_hz)} have {_tops(scaled)} of the GPU's",
            "Correct one of them, or write int8_ops_per_s: null, and it follows SMs and clock",
        )
