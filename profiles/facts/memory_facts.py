"""What Linux tells about memory, and what a container (cgroup) is allowed of the machine."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from edgeq.profiles.facts.fact_reader import FactReader
from edgeq.record import Record
from edgeq.system_files import SystemFiles

__all__ = ["ContainerLimits", "MemoryFacts", "read_container", "read_memory"]

_MEMINFO = "/proc/meminfo"
_CGROUP = "/sys/fs/cgroup"
_KIB = re.compile(r"([0-9]{1,12}) ?kB")
_COUNT = re.compile(r"[0-9]{1,19}")
# Version 1 writes "no limit" as the largest multiple of the page size; no machine of ours has an exbibyte.
_UNLIMITED_BYTES = 1 << 60
_NOTHING: tuple[int | None, int | None] = (None, None)


class MemoryFacts(Record, frozen=True, kw_only=True):
    """Memory of the machine (proc_meminfo(5)). None stands for what the kernel does not tell.

    Attributes:
        total_bytes: MemTotal; what firmware carved out is not in it.
        available_bytes: MemAvailable, what can be had now without swapping.
        swap_total_bytes: all swap, zram included.
        swap_used_bytes: of it.
        zram_bytes: size of the compressed swap devices in memory, before compression.
        zram_used_bytes: memory that they occupy now.
        cma_total_bytes: contiguous memory allocator; drivers fail when it is full, however much else is free.
        cma_free_bytes: of it.
        transparent_huge_pages: ``"always"``, ``"madvise"`` or ``"never"``.
        huge_pages: reserved ones.
        huge_page_bytes: size of one.
    """

    total_bytes: int | None = None
    available_bytes: int | None = None
    swap_total_bytes: int | None = None
    swap_used_bytes: int | None = None
    zram_bytes: int | None = None
    zram_used_bytes: int | None = None
    cma_total_bytes: int | None = None
    cma_free_bytes: int | None = None
    transparent_huge_pages: str | None = None
    huge_pages: int | None = None
    huge_page_bytes: int | None = None


class ContainerLimits(Record, frozen=True, kw_only=True):
    """What the control group of this process allows (Documentation/admin-guide/cgroup-v2.rst; cgroup-v1/memory.rst).

    Attributes:
        container: marks of a container were found (docker, podman, kubernetes, lxc).
        memory_limit_bytes: the least of the group and all above it; None if unlimited.
        memory_used_bytes: charged to the group with that limit, without page cache that can be dropped.
        cpus: processor time per time, the least of the group and all above it; None if unlimited.
    """

    container: bool = False
    memory_limit_bytes: int | None = None
    memory_used_bytes: int | None = None
    cpus: float | None = None


def read_memory(reader: FactReader) -> MemoryFacts:
    """Memory of the machine; a container sees the same figures, its own are in `ContainerLimits`."""
    files = reader.files
    fields = files.fields(_MEMINFO)

    def kib(name: str) -> int | None:
        match = _KIB.fullmatch(fields.get(name, ""))
        return int(match[1]) * 1024 if match else None

    total, free = kib("SwapTotal"), kib("SwapFree")
    zram = reader.attempt("zram", "/sys/block", lambda: _zram(files), _NOTHING)
    setting = re.search(r"\[(\w+)\]", files.text("/sys/kernel/mm/transparent_hugepage/enabled") or "")
    reserved = fields.get("HugePages_Total", "")
    facts = MemoryFacts(
        total_bytes=kib("MemTotal"),
        available_bytes=kib("MemAvailable"),
        swap_total_bytes=total,
        swap_used_bytes=None if total is None or free is None else max(0, total - free),
        zram_bytes=zram[0],
        zram_used_bytes=zram[1],
        cma_total_bytes=kib("CmaTotal"),
        cma_free_bytes=kib("CmaFree"),
        transparent_huge_pages=setting[1] if setting else None,
        huge_pages=int(reserved) if re.fullmatch("[0-9]{1,12}", reserved) else None,
        huge_page_bytes=kib("Hugepagesize"),
    )
    if facts.total_bytes is None or facts.available_bytes is None:
        reader.lacks("total and available memory", _MEMINFO, remedy="mount /proc")
    return facts


def _zram(files: SystemFiles) -> tuple[int | None, int | None]:
    """Size and memory in use of all zram devices that are set up."""
    sizes, used = [], []
    for name in files.names("/sys/block", "zram*"):
        size = _count(files, f"/sys/block/{name}/disksize")
        if size:
            sizes.append(size)
            # orig_data_size, compr_data_size, mem_used_total, … (Documentation/admin-guide/blockdev/zram.rst)
            columns = (files.text(f"/sys/block/{name}/mm_stat") or "").split()
            if len(columns) > 2 and _COUNT.fullmatch(columns[2]):
                used.append(int(columns[2]))
    return (sum(sizes) if sizes else None, sum(used) if used else None)


def _count(files: SystemFiles, path: str) -> int | None:
    text = files.text(path) or ""
    return int(text) if _COUNT.fullmatch(text) and int(text) < _UNLIMITED_BYTES else None


def read_container(reader: FactReader) -> ContainerLimits:
    """Limits of the control group that this process is in, of either version."""
    files = reader.files
    text = files.text("/proc/self/cgroup") or ""
    groups = _groups(text)
    marks = re.search(r"docker|kubepods|containerd|libpod|/lxc", text) is not None
    limit, used = reader.attempt("container's memory limit", _CGROUP, lambda: _memory(files, groups), _NOTHING)
    return ContainerLimits(
        container=marks or files.exists("/.dockerenv") or files.exists("/run/.containerenv"),
        memory_limit_bytes=limit,
        memory_used_bytes=used,
        cpus=reader.attempt("container's CPU quota", _CGROUP, lambda: _cpus(files, groups), None),
    )


def _groups(text: str) -> dict[str, str]:
    """Controller to path of the group from ``/proc/self/cgroup``; the controller of version 2 is ``""``."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        parts = line.split(":", maxsplit=2)
        if len(parts) == 3:
            found.update((controller, parts[2]) for controller in parts[1].split(","))
    return found


def _folders(files: SystemFiles, groups: dict[str, str], controller: str) -> tuple[list[str], bool]:
    """Folders of the group and all above it, and whether they are of version 1.

    A container without a namespace of its own reads the host's path, but finds itself at the top of the mount: the
    folders of that path are not there then, and the last one, the top, is the container's own.
    """
    version1 = controller in groups
    mounts = [f"{_CGROUP}/{controller}", f"{_CGROUP}/cpu,cpuacct"] if version1 else [_CGROUP]
    mount = next((folder for folder in mounts if files.exists(folder)), mounts[0])
    path = PurePosixPath(
        "/", *(p for p in PurePosixPath(groups.get(controller, groups.get("", "/"))).parts if p != "..")
    )
    return [mount if str(p) == "/" else f"{mount}{p}" for p in (path, *path.parents)], version1


def _memory(files: SystemFiles, groups: dict[str, str]) -> tuple[int | None, int | None]:
    folders, version1 = _folders(files, groups, "memory")
    limit_file, usage_file = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version1 else ("memory.max", "memory.current")
    )
    limits = [(limit, folder) for folder in folders if (limit := _count(files, f"{folder}/{limit_file}")) is not None]
    if not limits:
        return None, None
    limit, folder = min(limits)
    usage = _count(files, f"{folder}/{usage_file}")
    droppable = 0
    for line in (files.text(f"{folder}/memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == ("total_inactive_file" if version1 else "inactive_file") and _COUNT.fullmatch(value):
            droppable = int(value)
    return limit, None if usage is None else max(0, usage - droppable)


def _cpus(files: SystemFiles, groups: dict[str, str]) -> float | None:
    folders, version1 = _folders(files, groups, "cpu")
    found = []
    for folder in folders:
        if version1:
            pair = [files.text(f"{folder}/cpu.cfs_quota_us") or "", files.text(f"{folder}/cpu.cfs_period_us") or ""]
        else:
            pair = (files.text(f"{folder}/cpu.max") or "").split()
        # "max" and -1 stand for no limit.
        if len(pair) == 2 and all(_COUNT.fullmatch(part) for part in pair) and int(pair[1]) > 0:
            found.append(int(pair[0]) / int(pair[1]))
    return min(found, default=None)
