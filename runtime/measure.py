"""What Linux tells about a process and its machine: memory, processor time, clocks, temperatures.

Every reader takes the root of the file system, so that a machine of another kind can be laid out in a folder. A file
that is not there means "this machine does not tell" and gives None, never a guess.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path

from edgeq.report import Device, HostLoad, Temperature
from edgeq.system_files import SystemFiles, fields_of
from edgeq.types import Target

__all__ = [
    "CpuTimes",
    "ProcessMemory",
    "Snapshot",
    "busy_share",
    "describe_device",
    "disturbances",
    "host_load",
    "process_memory",
    "read_cpu_times",
    "take_snapshot",
    "temperatures",
    "throttle_events",
    "unlike_target",
]

ROOT = Path("/")
_NVIDIA_NODES = ("dev/nvidiactl", "dev/nvhost-gpu", "dev/nvgpu", "dev/nvmap")


@dataclasses.dataclass(frozen=True)
class ProcessMemory:
    """Of one process, from ``/proc/PID/status`` (proc_pid_status(5)).

    Attributes:
        peak_bytes: VmHWM, the high-water mark of the resident set since the program was executed.
        resident_bytes: VmRSS, now.
        anonymous_bytes: RssAnon, now.
        file_bytes: RssFile and RssShmem, now.
    """

    peak_bytes: int
    resident_bytes: int
    anonymous_bytes: int | None
    file_bytes: int | None


@dataclasses.dataclass(frozen=True)
class CpuTimes:
    """Seconds of processor time since boot, summed over the CPUs that this process may use.

    Attributes:
        total_s: idle time included.
        busy_s: spent on any process or in the kernel.
        steal_s: spent on other guests of the hypervisor.
    """

    total_s: float
    busy_s: float
    steal_s: float


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The machine's state at one moment.

    Attributes:
        cpu: None if the kernel does not tell.
        temperatures_c: by thermal zone.
        throttle_count: slow-downs by heat since boot, over all usable CPUs.
        governor: of the first usable CPU.
        frequency_limit_mhz: that scaling allows, per usable CPU.
    """

    cpu: CpuTimes | None
    temperatures_c: dict[str, float]
    throttle_count: int | None
    governor: str | None
    frequency_limit_mhz: tuple[float, ...]


def process_memory(pid: int | None = None, *, root: Path = ROOT) -> ProcessMemory | None:
    """Memory of a process (None for this one); None if the kernel keeps no high-water mark.

    ``ru_maxrss`` is no substitute: it survives ``exec``, so a child starts with the peak of its parent.
    """
    fields = SystemFiles(root).fields(f"/proc/{'self' if pid is None else pid}/status")

    def kib(name: str) -> int | None:
        value = fields.get(name, "").removesuffix("kB").strip()
        return int(value) * 1024 if value.isdigit() else None

    peak, resident = kib("VmHWM"), kib("VmRSS")
    if peak is None or resident is None:
        return None
    file, shared = kib("RssFile"), kib("RssShmem")
    return ProcessMemory(peak, resident, kib("RssAnon"), None if file is None else file + (shared or 0))


def _usable_cpus() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0))


def read_cpu_times(*, root: Path = ROOT, cpus: Iterable[int] | None = None) -> CpuTimes | None:
    """From ``/proc/stat`` (proc_stat(5)): user, nice, system, idle, iowait, irq, softirq, steal, in clock ticks.

    Guest time is part of user time there and not counted twice.
    """
    wanted = {f"cpu{cpu}" for cpu in (_usable_cpus() if cpus is None else cpus)}
    ticks = [0] * 8
    for line in (SystemFiles(root).text("/proc/stat") or "").splitlines():
        name, *values = line.split()
        if name in wanted and len(values) >= 8:
            ticks = [total + int(value) for total, value in zip(ticks, values[:8], strict=True)]
    if not any(ticks):
        return None
    per_second = os.sysconf("SC_CLK_TCK")
    user, nice, system, idle, iowait, irq, softirq, steal = (count / per_second for count in ticks)
    busy = user + nice + system + irq + softirq
    return CpuTimes(total_s=busy + idle + iowait + steal, busy_s=busy, steal_s=steal)


def busy_share(seconds: float, *, root: Path = ROOT) -> float | None:
    """Share of the usable CPUs' time that was taken, by anyone, during the next ``seconds``."""
    before = read_cpu_times(root=root)
    time.sleep(seconds)
    after = read_cpu_times(root=root)
    if before is None or after is None or after.total_s <= before.total_s:
        return None
    used = after.busy_s - before.busy_s + after.steal_s - before.steal_s
    return min(1.0, max(0.0, used / (after.total_s - before.total_s)))


def host_load(
    before: CpuTimes | None, after: CpuTimes | None, *, own_s: float, busy_before: float | None, allowed: float
) -> HostLoad:
    """What others used between two readings.

    Args:
        before: at the beginning of the run.
        after: at its end.
        own_s: processor time that the measured process and its helpers used between the two.
        busy_before: from `busy_share`, before anything of ours ran.
        allowed: see `HostLoad`.
    """
    if before is None or after is None or after.total_s <= before.total_s:
        return HostLoad(before=busy_before, during=None, steal=None, own=None, allowed=allowed)
    capacity = after.total_s - before.total_s
    steal = max(0.0, after.steal_s - before.steal_s)
    # Ticks are sampled and own time is exact, so the difference may come out a little below zero.
    others = max(0.0, after.busy_s - before.busy_s - own_s)
    return HostLoad(
        before=busy_before,
        during=min(1.0, (others + steal) / capacity),
        steal=min(1.0, steal / capacity),
        own=min(1.0, own_s / capacity),
        allowed=allowed,
    )


def take_snapshot(*, root: Path = ROOT) -> Snapshot:
    """The machine's state now."""
    files = SystemFiles(root)
    cpus = sorted(_usable_cpus())
    zones: dict[str, float] = {}
    for zone in files.names("/sys/class/thermal", "thermal_zone*"):
        millidegrees = files.number(f"/sys/class/thermal/{zone}/temp")
        if millidegrees is not None:
            zones[f"{zone} {files.text(f'/sys/class/thermal/{zone}/type') or ''}".strip()] = millidegrees / 1000
    folders = [f"/sys/devices/system/cpu/cpu{cpu}" for cpu in cpus]
    counts = [n for f in folders if (n := files.number(f"{f}/thermal_throttle/core_throttle_count")) is not None]
    limits = [n for f in folders if (n := files.number(f"{f}/cpufreq/scaling_max_freq")) is not None]
    return Snapshot(
        cpu=read_cpu_times(root=root),
        temperatures_c=zones,
        throttle_count=int(sum(counts)) if counts else None,
        governor=files.text(f"{folders[0]}/cpufreq/scaling_governor"),
        frequency_limit_mhz=tuple(khz / 1000 for khz in limits),
    )


def temperatures(before: Snapshot, after: Snapshot) -> tuple[Temperature, ...]:
    """Zones that both snapshots hold."""
    return tuple(
        Temperature(zone=zone, before_c=start, after_c=after.temperatures_c[zone])
        for zone, start in before.temperatures_c.items()
        if zone in after.temperatures_c
    )


def throttle_events(before: Snapshot, after: Snapshot) -> int | None:
    """Slow-downs by heat between two snapshots; None if the kernel does not count them."""
    if before.throttle_count is None or after.throttle_count is None:
        return None
    return after.throttle_count - before.throttle_count


def disturbances(before: Snapshot, after: Snapshot, load: HostLoad) -> tuple[str, ...]:
    """Why a run between two snapshots proves nothing; empty if nothing speaks against it."""
    found = []
    if load.during is None and load.allowed < 1:
        found.append("the load by other processes could not be read from /proc/stat")
    elif load.during is not None and load.during > load.allowed:
        found.append(
            f"host loaded: other processes took {load.during:.0%} of the CPU time, {load.allowed:.0%} is allowed"
        )
    throttled = throttle_events(before, after)
    if throttled:
        found.append(f"throttled: heat slowed the CPUs down {throttled} times")
    if before.governor != after.governor:
        found.append(f"clocks changed: the governor went from {before.governor} to {after.governor}")
    if before.frequency_limit_mhz != after.frequency_limit_mhz:
        highest = [max(state.frequency_limit_mhz, default=0.0) for state in (before, after)]
        found.append(f"clocks changed: the highest frequency went from {highest[0]:.0f} to {highest[1]:.0f} MHz")
    return tuple(found)


def describe_device(*, root: Path = ROOT) -> Device:
    """The fingerprint of this machine. It names no host, user or serial number."""
    import psutil

    cpus = sorted(_usable_cpus())
    files = SystemFiles(root)
    cpuinfo_text = files.text("/proc/cpuinfo") or ""
    cpuinfo = fields_of(cpuinfo_text)
    current = [
        n / 1000
        for cpu in cpus
        if (n := files.number(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq")) is not None
    ]
    if not current:
        blocks = [fields_of(block) for block in cpuinfo_text.split("\n\n")]
        current = [
            float(block["cpu MHz"])
            for block in blocks
            if "cpu MHz" in block and block.get("processor", "").isdigit() and int(block["processor"]) in cpus
        ]
    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        system = None
    state = take_snapshot(root=root)
    return Device(
        machine=platform.machine(),
        model=files.text("/proc/device-tree/model") or files.text("/sys/devices/virtual/dmi/id/product_name"),
        cpu=cpuinfo.get("model name") or cpuinfo.get("Hardware"),
        logical_cpus=len(cpus),
        physical_cores=psutil.cpu_count(logical=False),
        memory_bytes=psutil.virtual_memory().total,
        kernel=platform.release(),
        system=system,
        governor=state.governor,
        frequency_mhz=tuple(current),
        frequency_limit_mhz=state.frequency_limit_mhz,
    )


def unlike_target(name: str, target: Target, machine: str, *, root: Path = ROOT) -> str | None:
    """Why this machine is not the kind of device that is called so; None if nothing speaks against it."""
    if target.arch not in ("any", machine):
        return f"{name} is {target.arch}, this machine is {machine}"
    if target.accelerator.startswith("cuda") and not any((root / node).exists() for node in _NVIDIA_NODES):
        return f"{name} has {target.accelerator}, this machine has no NVIDIA device"
    return None
