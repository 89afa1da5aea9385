"""What Linux tells about the processor: name, cores, caches, features, frequency scaling."""

from __future__ import annotations

import re
from collections import Counter

from edgeq.profiles.facts.fact_reader import FactReader
from edgeq.record import Record
from edgeq.system_files import SystemFiles, cpu_list, fields_of

__all__ = ["CpuCache", "CpuFacts", "CpuPolicy", "architecture", "is_virtual", "read_cpu"]

_CPUS = "/sys/devices/system/cpu"
_CPUINFO = "/proc/cpuinfo"
# Flags of /proc/cpuinfo that decide which kernels llama.cpp and ONNX Runtime choose. arch/x86/include/asm/cpufeatures.h
_X86_FEATURES = (
    *("ssse3", "sse4_2", "avx", "f16c", "fma", "bmi2", "avx2", "avx_vnni", "avx_vnni_int8"),
    *("avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
)
# Documentation/arch/arm64/elf_hwcaps.rst; asimdhp is FP16 arithmetic, asimddp the dot product.
_ARM_FEATURES = (
    *("asimd", "fphp", "asimdhp", "asimdrdm", "atomics", "asimddp", "asimdfhm", "i8mm", "bf16"),
    *("sve", "sve2", "svei8mm", "svebf16", "sme", "sme2"),
)
# arch/arm64/include/asm/cputype.h: (implementer, part)
_ARM_PARTS = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4B): "Cortex-A78C",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD83): "Neoverse-V3AE",
    (0x41, 0xD84): "Neoverse-V3",
    (0x4E, 0x003): "NVIDIA Denver 2",
    (0x4E, 0x004): "NVIDIA Carmel",
}
_SIZE = re.compile(r"([0-9]{1,9})([KMG]?)")
_CACHE_KINDS = {"Data": "data", "Instruction": "instruction", "Unified": "unified"}


class CpuCache(Record, frozen=True, kw_only=True):
    """Caches of one level and size.

    Attributes:
        level: 1 is the nearest to the core.
        kind: ``"data"``, ``"instruction"`` or ``"unified"``.
        size_bytes: of one cache.
        instances: how many there are; each is shared by the CPUs around it.
    """

    level: int
    kind: str
    size_bytes: int
    instances: int


class CpuPolicy(Record, frozen=True, kw_only=True):
    """Frequency scaling of CPUs that share a clock (Documentation/admin-guide/pm/cpufreq.rst).

    Attributes:
        cpus: that share it.
        governor: that chooses the frequency.
        min_mhz: the lowest that scaling allows now.
        max_mhz: the highest that scaling allows now, by the power mode for example.
        hardware_max_mhz: the highest of the processor.
        current_mhz: at the moment of reading.
    """

    cpus: tuple[int, ...]
    governor: str | None = None
    min_mhz: float | None = None
    max_mhz: float | None = None
    hardware_max_mhz: float | None = None
    current_mhz: float | None = None


class CpuFacts(Record, frozen=True, kw_only=True):
    """The processor. None or empty stands for what the machine does not tell.

    Attributes:
        name: of the processor; kinds of ARM cores joined by " + ".
        logical_cpus: that are online.
        usable_cpus: that this process may use (affinity, container).
        physical_cores: online ones.
        features: what matters to inference, by the kernel's names.
        caches: by level.
        policies: frequency scaling.
        virtual: a hypervisor is known to run this machine; it tells less then.
    """

    name: str | None = None
    logical_cpus: int | None = None
    usable_cpus: int | None = None
    physical_cores: int | None = None
    features: tuple[str, ...] = ()
    caches: tuple[CpuCache, ...] = ()
    policies: tuple[CpuPolicy, ...] = ()
    virtual: bool = False

    @property
    def governor(self) -> str | None:
        """Governors of all policies, joined by " + "; None if there is no frequency scaling."""
        return " + ".join(dict.fromkeys(p.governor for p in self.policies if p.governor)) or None

    @property
    def last_level_cache_bytes(self) -> int | None:
        """All caches of the highest level together."""
        level = max((cache.level for cache in self.caches), default=0)
        return sum(c.size_bytes * c.instances for c in self.caches if c.level == level) or None


def architecture(files: SystemFiles) -> str | None:
    """``"x86_64"`` or ``"aarch64"`` by what /proc/cpuinfo looks like; None for anything else."""
    text = files.text(_CPUINFO)
    fields = fields_of(text)
    if " lm " in f" {fields.get('flags', '')} ":
        return "x86_64"
    # AArch64 kernels print 8 and the implementer's number; 32-bit ones print a "Processor" line and half-words.
    return "aarch64" if fields.get("CPU architecture") in ("8", "AArch64") and "CPU implementer" in fields else None


def is_virtual(files: SystemFiles) -> bool:
    """Whether the processor says that a hypervisor runs it; only x86 says so."""
    return "hypervisor" in fields_of(files.text(_CPUINFO)).get("flags", "").split()


def read_cpu(reader: FactReader, arch: str) -> CpuFacts:
    """Facts about the processor; each part is read on its own, so that one odd file costs only its part.

    Args:
        reader: gets a statement for what should be there and is not.
        arch: ``"x86_64"`` and ``"aarch64"`` have features that are looked for.
    """
    files = reader.files
    blocks = [fields_of(block) for block in (files.text(_CPUINFO) or "").split("\n\n")]
    nothing: tuple[int, ...] = ()
    online = reader.attempt("CPUs online", f"{_CPUS}/online", lambda: _online(files, blocks), nothing)
    facts = CpuFacts(
        name=reader.attempt("CPU name", _CPUINFO, lambda: _name(blocks), None),
        logical_cpus=len(online) or None,
        usable_cpus=len(cpu_list(files.fields("/proc/self/status").get("Cpus_allowed_list"))) or None,
        physical_cores=reader.attempt("physical cores", _CPUS, lambda: _cores(files, blocks, online), None),
        features=reader.attempt("CPU features", _CPUINFO, lambda: _features(blocks, arch), ()),
        caches=reader.attempt("CPU caches", _CPUS, lambda: cpu_caches(files, online), ()),
        policies=reader.attempt("CPU frequencies", f"{_CPUS}/cpufreq", lambda: _policies(files), ()),
        virtual=is_virtual(files),
    )
    if not facts.logical_cpus:
        reader.lacks("number of CPUs", f"{_CPUS}/online", _CPUINFO, remedy="mount /proc and /sys")
    if not facts.features and arch in ("x86_64", "aarch64"):
        reader.lacks("CPU features", _CPUINFO, remedy="mount /proc")
    if not facts.caches:
        folder = f"{_CPUS}/cpu{online[0] if online else 0}/cache"
        files.names(folder)
        reader.lacks("CPU caches", folder, remedy="state them in the profile by hand")
    if not facts.policies and not facts.virtual:
        reader.lacks("CPU governor and frequencies", f"{_CPUS}/cpufreq", remedy="enable cpufreq in the kernel")
    return facts


def _online(files: SystemFiles, blocks: list[dict[str, str]]) -> tuple[int, ...]:
    listed = cpu_list(files.text(f"{_CPUS}/online"))
    return listed or tuple(int(b["processor"]) for b in blocks if re.fullmatch("[0-9]{1,5}", b.get("processor", "")))


def _name(blocks: list[dict[str, str]]) -> str | None:
    parts: dict[str | None, None] = {}
    for block in blocks:
        if "CPU part" in block:
            key = (int(block.get("CPU implementer", "0"), 16), int(block["CPU part"], 16))
            parts[_ARM_PARTS.get(key)] = None
    known = [name for name in parts if name]
    if known:
        return " + ".join(known)
    # The last block of a Raspberry Pi holds "Model", which is the board's name, not the processor's.
    return next((b[key] for key in ("model name", "Hardware") for b in blocks if b.get(key)), None)


def _cores(files: SystemFiles, blocks: list[dict[str, str]], online: tuple[int, ...]) -> int | None:
    siblings = {files.text(f"{_CPUS}/cpu{cpu}/topology/thread_siblings_list") for cpu in online} - {None}
    if siblings:
        return len(siblings)
    return len({(b["physical id"], b["core id"]) for b in blocks if "physical id" in b and "core id" in b}) or None


def _features(blocks: list[dict[str, str]], arch: str) -> tuple[str, ...]:
    known = {"x86_64": _X86_FEATURES, "aarch64": _ARM_FEATURES}.get(arch, ())
    flags = [
        set((b.get("flags") or b.get("Features") or "").split()) for b in blocks if "flags" in b or "Features" in b
    ]
    # What runs anywhere must run everywhere: threads move between cores.
    common = set.intersection(*flags) if flags else set()
    return tuple(name for name in known if name in common)


def cpu_caches(files: SystemFiles, online: tuple[int, ...]) -> tuple[CpuCache, ...]:
    seen: dict[tuple[int, str, tuple[int, ...]], int] = {}
    for cpu in online:
        folder = f"{_CPUS}/cpu{cpu}/cache"
        for index in files.names(folder, "index*"):
            level = files.number(f"{folder}/{index}/level")
            kind = _CACHE_KINDS.get(files.text(f"{folder}/{index}/type") or "")
            size = _SIZE.fullmatch(files.text(f"{folder}/{index}/size") or "")
            if level is None or kind is None or size is None:
                continue
            shared = cpu_list(files.text(f"{folder}/{index}/shared_cpu_list")) or (cpu,)
            unit = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[size[2]]
            seen[min(int(level), 9), kind, shared] = int(size[1]) * unit
    counted = Counter((level, kind, size) for (level, kind, _), size in seen.items())
    return tuple(
        CpuCache(level=level, kind=kind, size_bytes=size, instances=count)
        for (level, kind, size), count in sorted(counted.items())
    )


def _policies(files: SystemFiles) -> tuple[CpuPolicy, ...]:
    folder = f"{_CPUS}/cpufreq"

    def mhz(path: str) -> float | None:
        khz = files.number(path)
        return None if khz is None else khz / 1000

    return tuple(
        CpuPolicy(
            cpus=cpu_list(files.text(f"{folder}/{name}/affected_cpus")),
            governor=files.text(f"{folder}/{name}/scaling_governor"),
            min_mhz=mhz(f"{folder}/{name}/scaling_min_freq"),
            max_mhz=mhz(f"{folder}/{name}/scaling_max_freq"),
            hardware_max_mhz=mhz(f"{folder}/{name}/cpuinfo_max_freq"),
            current_mhz=mhz(f"{folder}/{name}/scaling_cur_freq"),
        )
        for name in files.names(folder, "policy*")
    )
