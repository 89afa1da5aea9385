"""A device profile as tables whose numbers point at a numbered list of their sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from edgeq.cli.tables import format_table
from edgeq.types import BUDGET_LINES
from edgeq.units import format_bytes, format_quantity

if TYPE_CHECKING:
    from edgeq.profiles.device import Backend, DeviceProfile, PowerMode

__all__ = ["ProfileText", "format_field"]

_NONE = "-"
_FACTS: tuple[tuple[str, str], ...] = (
    ("cpu.name", "CPU"),
    ("cpu.cores", "CPU cores"),
    ("cpu.clock_hz", "CPU clock"),
    ("threads", "threads of a session"),
    ("gpu.name", "GPU"),
    ("gpu.compute_capability", "compute capability"),
    ("gpu.sms", "SMs"),
    ("gpu.clock_hz", "GPU clock"),
    ("gpu.int8_ops_per_s", "INT8, dense"),
    ("gpu.fp8_ops_per_s", "FP8, dense"),
    ("gpu.fp4_ops_per_s", "FP4, dense"),
    ("gpu.sm_bytes_per_clock", "bytes an SM draws in a clock"),
    ("dla.cores", "DLA cores"),
    ("dla.int8_ops_per_s", "DLA INT8, dense"),
    ("memory.total_bytes", "memory"),
    ("memory.visible_bytes", "visible to Linux"),
    ("memory.reserved_bytes", "reserved for the system"),
    ("memory.bandwidth_bytes_per_s", "bandwidth, peak"),
    ("memory.measured_bandwidth_bytes_per_s", "bandwidth, measured"),
)
_MODE_COLUMNS = (
    ("nvpmodel_id", "id"),
    ("power_w", "power"),
    ("cpu_cores", "CPUs"),
    ("cpu_clock_hz", "CPU clock"),
    ("sms", "SMs"),
    ("gpu_clock_hz", "GPU clock"),
    ("int8_ops_per_s", "INT8"),
    ("bandwidth_bytes_per_s", "bandwidth"),
    ("measured_bandwidth_bytes_per_s", "measured"),
)
_BACKEND_COLUMNS = (
    ("decode_efficiency", "decode"),
    ("compute_efficiency", "prompt"),
    ("compute_flops_per_s", "prompt rate"),
    ("token_overhead_ms", "a token"),
    ("layer_overhead_ms", "a layer"),
    ("runtime_bytes", "process"),
    ("device_overhead_bytes", "driver"),
)
_SOFTWARE_COLUMNS = ("jetpack", "l4t", "cuda", "tensorrt", "ubuntu", "kernel")
_HEADINGS = {"jetpack": "JetPack", "l4t": "L4T", "cuda": "CUDA", "tensorrt": "TensorRT", "ubuntu": "Ubuntu"}


# Longest suffix first.
_UNITS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("_bytes_per_s", lambda value: f"{value / 1e9:.1f} GB/s"),
    ("_flops_per_s", lambda value: f"{value / 1e9:.0f} GFLOP/s"),
    ("_ops_per_s", lambda value: f"{value / 1e12:.0f} TOPS" if value >= 1e14 else f"{value / 1e12:.3g} TOPS"),
    ("_bytes", format_bytes),
    ("_hz", lambda value: f"{value / 1e6:.0f} MHz"),
    ("_ms", lambda value: f"{value:g} ms"),
    ("_w", lambda value: f"{value:g} W"),
    ("_efficiency", lambda value: f"{value:.0%}"),
)


class ProfileText:
    """Lines of one profile. Sources are numbered as they come up.

    Args:
        profile: what to show.
    """

    def __init__(self, profile: DeviceProfile) -> None:
        self.profile = profile
        self._numbers: dict[str, int] = {}

    def head(self) -> list[str]:
        """What it is called and what it stands on."""
        profile = self.profile
        called = f" ({', '.join(profile.aliases)})" if profile.aliases else ""
        figures = (
            "measured by edgeq devices probe" if profile.provenance == "measured" else "data sheets and allowances"
        )
        mode = "" if profile.power_mode is None else f", power mode {profile.power_mode}"
        limited = profile.bandwidth_bytes_per_s < profile.peak_bandwidth_bytes_per_s
        limit = ", as much as the GPU draws in that mode" if limited else ""
        usable = format_field("usable_bytes", profile.memory.usable_bytes)
        bandwidth = format_field("bandwidth_bytes_per_s", profile.bandwidth_bytes_per_s)
        return [
            f"{profile.name}{called}: {profile.summary}",
            f"figures  {figures}",
            f"plans    {profile.accelerator}, {profile.backends[0].name}{mode}: {usable} usable, {bandwidth}{limit}",
        ]

    def facts(self) -> list[str]:
        """Processor, GPU and memory: one line for each value."""
        rows = []
        for path, label in _FACTS:
            value: Any = self.profile
            for part in path.split("."):
                value = None if value is None else getattr(value, part)
            if value is not None:
                rows.append([label, format_field(path, value), self._ref([path])])
        rows.append(["one memory for CPU and GPU", "yes" if self.profile.memory.unified else "no", ""])
        lines = format_table(["device", "value", "source"], rows)
        features = self.profile.cpu.features
        return [*lines, f"features {' '.join(features)} {self._ref(['cpu.features'])}"] if features else lines

    def power_modes(self) -> list[str]:
        """A table of nvpmodel's modes, the active one marked; nothing on a device without."""
        modes = sorted(self.profile.power_modes, key=lambda mode: mode.power_w or float("inf"))
        return self._table("power mode", _MODE_COLUMNS, "power_modes", modes, marked=self.profile.power_mode)

    def backends(self) -> list[str]:
        """A table in the order of preference."""
        lines = self._table("backend", _BACKEND_COLUMNS, "backends", self.profile.backends)
        names = max(len(backend.name) for backend in self.profile.backends)
        runs = [f"{b.name.ljust(names)}  {', '.join(b.precisions)}" for b in self.profile.backends]
        return [*lines, "", *runs]

    def _table(
        self,
        heading: str,
        columns: Sequence[tuple[str, str]],
        path: str,
        records: Sequence[PowerMode | Backend],
        *,
        marked: str | None = None,
    ) -> list[str]:
        """One row for each record; columns that none of them fills are left out."""
        if not records:
            return []
        used = [(f, label) for f, label in columns if any(_is_told(r, f) for r in records)]
        rows = []
        for record in records:
            filled = [f for f, _ in used if _is_told(record, f)]
            cells = [format_field(f, getattr(record, f)) if f in filled else _NONE for f, _ in used]
            name = f"{record.name} *" if record.name == marked else record.name
            rows.append([name, *cells, self._ref(f"{path}.{record.name}.{f}" for f in filled)])
        lines = format_table([heading, *(label for _, label in used), "source"], rows, right=range(1, len(used) + 1))
        return [*lines, "* the figures are for this one"] if marked is not None else lines

    def budgets(self) -> list[str]:
        """A robot's default limits."""
        rows = []
        for name in ("planner", "perception", "policy"):
            budget = getattr(self.profile.budgets, name)
            for line in BUDGET_LINES:
                limit = budget.limit(line)
                if limit is not None:
                    sign = "≤" if line.at_most else "≥"
                    shown = f"{sign} {format_quantity(limit, line.unit)}"
                    rows.append([name, line.label, shown, self._ref([f"budgets.{name}.{line.field}"])])
        return format_table(["work", "budget line", "limit", "source"], rows, right=(2,)) if rows else []

    def software(self) -> list[str]:
        """Versions that belong together."""
        records = self.profile.software
        used = [f for f in _SOFTWARE_COLUMNS if any(getattr(record, f) is not None for record in records)]
        rows = [[getattr(record, f) or _NONE for f in used] for record in records]
        if not rows:
            return []
        ref = self._ref(["software"])
        return format_table([*(_HEADINGS.get(f, f) for f in used), "source"], [[*row, ref] for row in rows])

    def measured(self) -> list[str]:
        """When the probe ran, and what speaks against its figures."""
        found = self.profile.measured
        if found is None:
            return []
        lines = [f"measured {found.taken_utc} with edgeq {found.edgeq} on {found.threads} threads"]
        return lines + [f"doubt    {doubt}" for doubt in found.doubts]

    def sources(self) -> list[str]:
        """The numbered list of all that came up."""
        width = len(f"[{len(self._numbers)}]")
        return ["sources"] + [f"{f'[{number}]'.rjust(width)} {text}" for text, number in self._numbers.items()]

    def _ref(self, paths: Iterable[str]) -> str:
        """``[3]`` for the source of these values, ``[3, 5]`` where they have several."""
        texts = [text for text in map(self.profile.source_of, paths) if text is not None]
        numbers = sorted({self._numbers.setdefault(text, len(self._numbers) + 1) for text in texts})
        return f"[{', '.join(map(str, numbers))}]" if numbers else ""


def _is_told(record: PowerMode | Backend, field: str) -> bool:
    """Whether a record says something of a field; an overhead of 0 is its default."""
    value = getattr(record, field)
    return value is not None and not (value == 0 and "overhead" in field)


def format_field(path: str, value: float | str) -> str:
    """A value of a profile for people, by the unit in its key."""
    if isinstance(value, str):
        return value
    write = next((write for suffix, write in _UNITS if path.endswith(suffix)), None)
    return f"{value:g}" if write is None else write(value)
