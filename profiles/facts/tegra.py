"""What a Jetson tells of itself: module, Jetson Linux, power mode with its limits, clocks of GPU and memory.

Node names differ between releases: Orin's GPU is ``17000000.ga10b`` under JetPack 5 and ``17000000.gpu`` since 6,
Thor's are ``gpu-gpc-0``, …, beside ``gpu-nvd-0``, which decodes video. The memory clock (EMC) is only for root below
/sys/kernel/debug until JetPack 6; since 7 it is also ``/sys/class/devfreq/bwmgr``.
"""

from __future__ import annotations

import re

import msgspec

from edgeq.profiles.facts.fact_reader import FactReader
from edgeq.profiles.facts.nvidia_versions import jetpack_version, l4t_release
from edgeq.record import Record
from edgeq.system_files import SystemFiles

__all__ = ["GpuClock", "JetsonFacts", "PowerMode", "compatible", "is_jetson", "parse_power_modes", "read_jetson"]

_DEVICE_TREES = ("/proc/device-tree", "/sys/firmware/devicetree/base")
_DEVFREQ = "/sys/class/devfreq"
_STATUS = "/var/lib/nvpmodel/status"
_MODES = "/etc/nvpmodel.conf"
_GPU_NODE = re.compile(r"(?:[0-9a-f]+\.)?(?:gpu|g[a-z][0-9]{1,3}[a-z])(?:\.[0-9]+)?|gpu-gpc-[0-9]+")
_SECTION = re.compile(r"<\s*(\w+)\s+([^<>]*?)\s*>")
_ATTRIBUTE = re.compile(r"(\w+)\s*=\s*\"?([^\s\"]+)\"?")
# Both in Hz. tegra210's folders come last; bpmp's are those of every later chip.
_EMC_CURRENT = (
    f"{_DEVFREQ}/bwmgr/cur_freq",
    "/sys/kernel/debug/bpmp/debug/clk/emc/rate",
    "/sys/kernel/debug/clk/emc/clk_rate",
    "/sys/kernel/debug/clk/override.emc/clk_rate",
)
_EMC_MAXIMUM = (
    f"{_DEVFREQ}/bwmgr/max_freq",
    "/sys/kernel/debug/bpmp/debug/clk/emc/max_rate",
    "/sys/kernel/debug/tegra_bwmgr/emc_max_rate",
)
# Texture processing clusters that a bit of tpc_pg_mask can switch off; each holds two SMs.
_TPCS = {"tegra234": 8, "tegra194": 4}


class GpuClock(Record, frozen=True, kw_only=True):
    """One clock domain of the GPU, from devfreq.

    Attributes:
        node: below /sys/class/devfreq.
        governor: of its scaling.
        min_mhz: the lowest that scaling allows now.
        max_mhz: the highest that scaling allows now, by the power mode for example.
        current_mhz: at the moment of reading; 0 while the GPU is switched off.
    """

    node: str
    governor: str | None = None
    min_mhz: float | None = None
    max_mhz: float | None = None
    current_mhz: float | None = None


class PowerMode(Record, frozen=True, kw_only=True):
    """A mode of nvpmodel, with its limits as its configuration writes them. None stands for no limit.

    Attributes:
        id: that ``nvpmodel -m`` takes.
        name: ``"MAXN_SUPER"``; None if the configuration does not name the id.
        cpus_off: CPUs that it switches off.
        cpu_max_mhz: the highest that it allows to any kind of core.
        gpu_max_mhz: of the graphics clusters.
        emc_max_mhz: of the memory controller.
        tpc_pg_mask: GPU clusters that it switches off, one bit each.
        settings: every line, parameter and argument to value ("GPU MAX_FREQ" to "612000000").
    """

    id: int
    name: str | None = None
    cpus_off: tuple[int, ...] = ()
    cpu_max_mhz: float | None = None
    gpu_max_mhz: float | None = None
    emc_max_mhz: float | None = None
    tpc_pg_mask: int | None = None
    settings: dict[str, str] = msgspec.field(default_factory=dict)


class JetsonFacts(Record, frozen=True, kw_only=True):
    """A Jetson. None stands for what it does not tell; `SystemFacts.missing` says why.

    Attributes:
        soc: ``"tegra234"`` (Orin), ``"tegra264"`` (Thor), ``"tegra194"`` (Xavier).
        module: part number, ``"p3767-0005"``.
        l4t: release of Jetson Linux, ``"36.4.3"``.
        jetpack: that brings it, ``"6.2"``.
        power_mode: the active one.
        power_modes: all that the board has.
        gpu_clocks: one or, on Thor, several.
        tpc_pg_mask: GPU clusters that are switched off now, one bit each.
        sms_at_most: SMs that the mask leaves; clusters that are fused off need not be in the mask.
        emc_mhz: memory clock now.
        emc_max_mhz: the highest memory clock.
        emc_cap_mhz: limit that the power mode set; None if there is none.
    """

    soc: str | None = None
    module: str | None = None
    l4t: str | None = None
    jetpack: str | None = None
    power_mode: PowerMode | None = None
    power_modes: tuple[PowerMode, ...] = ()
    gpu_clocks: tuple[GpuClock, ...] = ()
    tpc_pg_mask: int | None = None
    sms_at_most: int | None = None
    emc_mhz: float | None = None
    emc_max_mhz: float | None = None
    emc_cap_mhz: float | None = None


def compatible(files: SystemFiles) -> tuple[str, ...]:
    """The device tree's names of this board, the most exact first; empty where there is no device tree."""
    for folder in _DEVICE_TREES:
        text = files.text(f"{folder}/compatible")
        if text:
            return tuple(name for name in text.split("\0") if name)
    return ()


def is_jetson(files: SystemFiles) -> bool:
    """Whether this is a Tegra under Linux, in a container too, where files of the host may be out of sight."""
    if any(name.startswith("nvidia,tegra") for name in compatible(files)) or files.exists("/etc/nv_tegra_release"):
        return True
    return (files.text("/sys/devices/soc0/family") or "").lower() == "tegra"


def read_jetson(reader: FactReader, packages: dict[str, str]) -> JetsonFacts:
    """All facts; each is read on its own, so that one odd file costs only its part.

    Args:
        reader: gets a statement for each fact that is missing.
        packages: of `installed_packages`.
    """
    files = reader.files
    names = compatible(files)
    # Kernels of JetPack 5 name the family too, "nvidia,tegra23x".
    soc = next((m[1] for n in names if (m := re.fullmatch(r"nvidia,(tegra[0-9]{3})", n))), None)
    part = next((m[1] for n in names if (m := re.search(r"(?:\+|,)(p3[0-9]{3}-[0-9]{4})(?!.*\+)", n))), None)
    l4t = reader.attempt("L4T release", "/etc/nv_tegra_release", lambda: l4t_release(reader, packages), None)
    no_modes: tuple[PowerMode, ...] = ()
    modes = reader.attempt("power modes", _MODES, lambda: parse_power_modes(files.text(_MODES) or ""), no_modes)
    mode = reader.attempt("power mode", _STATUS, lambda: _active_mode(reader, modes), None)
    no_clocks: tuple[GpuClock, ...] = ()
    clocks = reader.attempt("GPU clocks", _DEVFREQ, lambda: _gpu_clocks(files), no_clocks)
    if not clocks:
        files.names(_DEVFREQ)
        reader.lacks("GPU clocks", _DEVFREQ, remedy="run it on the host, or start the container with /sys mounted")
    mask = reader.attempt("GPU clusters", _DEVFREQ, lambda: _tpc_mask(reader, soc, clocks, mode), None)
    cap = _first(files, ("/sys/kernel/nvpmodel_clk_cap/emc", "/sys/kernel/nvpmodel_emc_cap/emc_iso_cap"))
    return JetsonFacts(
        soc=soc,
        module=part,
        l4t=l4t,
        jetpack=jetpack_version(reader, l4t, packages),
        power_mode=mode,
        power_modes=modes,
        gpu_clocks=clocks,
        tpc_pg_mask=mask,
        sms_at_most=_sms(soc, mask),
        emc_mhz=_emc(reader, "EMC clock", _EMC_CURRENT),
        emc_max_mhz=_emc(reader, "highest EMC clock", _EMC_MAXIMUM),
        emc_cap_mhz=_limit(cap, 1e6),
    )


def parse_power_modes(text: str) -> tuple[PowerMode, ...]:
    """The ``< POWER_MODEL ID=2 NAME=MAXN_SUPER >`` sections of nvpmodel.conf, in their order.

    The lines of a section are ``PARAMETER ARGUMENT VALUE``; CPU clocks are in kHz, GPU and EMC clocks in Hz, and both 0
    and -1 stand for no limit. Sections and lines of other forms are passed over.
    """
    modes: list[PowerMode] = []
    settings: dict[str, str] | None = None
    for line in text.splitlines():
        bare = line.partition("#")[0].strip()
        section = _SECTION.fullmatch(bare)
        if section is not None:
            attributes = dict(_ATTRIBUTE.findall(section[2]))
            settings = None
            if section[1] == "POWER_MODEL" and re.fullmatch("[0-9]{1,9}", attributes.get("ID", "")):
                settings = {}
                modes.append(PowerMode(id=int(attributes["ID"]), name=attributes.get("NAME"), settings=settings))
        elif settings is not None and len(bare.split()) == 3:
            parameter, argument, value = bare.split()
            settings[f"{parameter} {argument}"] = value
    return tuple(_with_limits(mode) for mode in modes)


def _with_limits(mode: PowerMode) -> PowerMode:
    numbers = {key: int(v) for key, v in mode.settings.items() if re.fullmatch("-?[0-9]{1,15}", v)}

    def limit(parameter: str, scale: float) -> float | None:
        found = [n for key, n in numbers.items() if re.fullmatch(rf"{parameter} MAX_FREQ", key)]
        # One kind of core without a limit has the processor's own.
        return None if not found or min(found) <= 0 else max(found) / scale

    masks = [n for key, n in numbers.items() if key.endswith(" TPC_PG_MASK") and n >= 0]
    off = [m[1] for key, n in numbers.items() if n == 0 and (m := re.fullmatch(r"CPU_ONLINE CORE_([0-9]{1,4})", key))]
    return PowerMode(
        id=mode.id,
        name=mode.name,
        cpus_off=tuple(sorted(int(core) for core in off)),
        cpu_max_mhz=limit(r"CPU(?:_\w+)?", 1e3),
        gpu_max_mhz=limit(r"(?:GPU|GPU_GPC\w*|GPC\w*)", 1e6),
        emc_max_mhz=limit("EMC", 1e6),
        tpc_pg_mask=masks[0] if masks else None,
        settings=mode.settings,
    )


def _active_mode(reader: FactReader, modes: tuple[PowerMode, ...]) -> PowerMode | None:
    """By ``pmode:0002 fmode:quiet`` in nvpmodel's status."""
    files = reader.files
    text = files.text(_STATUS)
    match = re.search(r"pmode:\s*([0-9]{1,9})", text or "", re.IGNORECASE)
    if match is None:
        if text is not None:
            files.refuse(_STATUS, text)
        reader.lacks("power mode", _STATUS, remedy="run: sudo nvpmodel -q, on the host if this is a container")
        return None
    active = int(match[1])
    for mode in modes:
        if mode.id == active:
            return mode
    if files.why_unread(_MODES) is None:
        files.refuse(_MODES, f"no POWER_MODEL has ID {active}")
    reader.lacks(f"name and limits of power mode {active}", _MODES, remedy="run: sudo nvpmodel -p --verbose")
    return PowerMode(id=active)


def _gpu_clocks(files: SystemFiles) -> tuple[GpuClock, ...]:
    def mhz(path: str) -> float | None:
        hertz = files.number(path)
        return None if hertz is None else hertz / 1e6

    found = []
    for node in files.names(_DEVFREQ):
        folder = f"{_DEVFREQ}/{node}"
        # The device tree names the engine where the node's own name is new.
        if _GPU_NODE.fullmatch(node) or _GPU_NODE.fullmatch(files.text(f"{folder}/device/of_node/name") or ""):
            found.append(
                GpuClock(
                    node=node,
                    governor=files.text(f"{folder}/governor"),
                    min_mhz=mhz(f"{folder}/min_freq"),
                    max_mhz=mhz(f"{folder}/max_freq"),
                    current_mhz=mhz(f"{folder}/cur_freq"),
                )
            )
    return tuple(found)


def _tpc_mask(reader: FactReader, soc: str | None, clocks: tuple[GpuClock, ...], mode: PowerMode | None) -> int | None:
    if soc not in _TPCS:
        return None
    paths = [f"{_DEVFREQ}/{clock.node}/device/tpc_pg_mask" for clock in clocks]
    paths += ["/sys/devices/platform/gpu.0/tpc_pg_mask", "/sys/devices/gpu.0/tpc_pg_mask"]
    for path in paths:
        text = reader.files.text(path)
        match = re.fullmatch(r"0x([0-9a-fA-F]{1,8})|([0-9]{1,9})", text or "")
        if match:
            return int(match[1], 16) if match[1] else int(match[2])
        if text is not None:
            reader.files.refuse(path, text)
    if mode is not None and mode.tpc_pg_mask is not None:
        return mode.tpc_pg_mask
    reader.lacks("GPU clusters that are switched on", *paths, remedy="state the SMs in the profile by hand")
    return None


def _sms(soc: str | None, mask: int | None) -> int | None:
    if soc not in _TPCS or mask is None:
        return None
    return 2 * sum(not mask >> tpc & 1 for tpc in range(_TPCS[soc]))


def _first(files: SystemFiles, paths: tuple[str, ...]) -> float | None:
    return next((value for path in paths if (value := files.number(path)) is not None), None)


def _emc(reader: FactReader, fact: str, paths: tuple[str, ...]) -> float | None:
    hertz = _first(reader.files, paths)
    if hertz is None:
        reader.lacks(fact, *paths, remedy="run it with sudo on the host, where /sys/kernel/debug is mounted")
    return _limit(hertz, 1e6)


def _limit(value: float | None, scale: float) -> float | None:
    return None if value is None or value <= 0 else value / scale
