"""What a machine says of itself, read from its files in a moment and without starting anything.

Works on a PC, a Jetson, a Raspberry Pi and in containers on them. What a machine of its kind should tell and does not
is stated with the reason and what to do; no file, however odd, stops the rest.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Literal

import msgspec

from edgeq.profiles.facts.cpu_facts import CpuFacts, architecture, is_virtual, read_cpu
from edgeq.profiles.facts.fact_reader import FactReader, MissingFact
from edgeq.profiles.facts.memory_facts import ContainerLimits, MemoryFacts, read_container, read_memory
from edgeq.profiles.facts.nvidia_versions import cuda_version, installed_packages, tensorrt_version
from edgeq.profiles.facts.tegra import JetsonFacts, compatible, is_jetson, read_jetson
from edgeq.record import Record
from edgeq.system_files import SystemFiles

__all__ = ["MachineKind", "MissingFact", "RaspberryPiFacts", "SystemFacts", "read_facts"]

MachineKind = Literal["jetson", "raspberry-pi", "board", "pc"]
_MODELS = ("/proc/device-tree/model", "/sys/firmware/devicetree/base/model", "/sys/devices/soc0/machine")
_DMI = "/sys/devices/virtual/dmi/id"
_PLATFORM = "/sys/devices/platform"
# Bits 0 to 3 are now, 16 to 19 since boot (raspberrypi.com/documentation, vcgencmd get_throttled).
_THROTTLED = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")


class RaspberryPiFacts(Record, frozen=True, kw_only=True):
    """A Raspberry Pi.

    Attributes:
        throttled_now: what slows it down at this moment.
        throttled_since_boot: what slowed it down at any time since it started.
        under_voltage: the supply's voltage was too low since boot, by the kernel's own sensor.
    """

    throttled_now: tuple[str, ...] | None = None
    throttled_since_boot: tuple[str, ...] | None = None
    under_voltage: bool | None = None


class SystemFacts(Record, frozen=True, kw_only=True):
    """What a machine says of itself. It names no host, user or serial number. None stands for what it does not tell.

    Attributes:
        kind: what it is, ``"board"`` for others with a device tree; a container is what its host is.
        arch: ``"x86_64"``, ``"aarch64"`` or what the kernel calls it; ``"unknown"`` if nothing tells.
        model: of the board or product.
        compatible: the device tree's names of the board.
        kernel: its release.
        system: the distribution.
        cpu: the processor.
        memory: of the machine.
        container: what this process is allowed of it.
        cuda_version: of the toolkit.
        tensorrt_version: of the library.
        jetson: None on other machines.
        raspberry_pi: None on other machines.
        missing: what a machine of this kind should tell and did not.
    """

    kind: MachineKind
    arch: str
    model: str | None = None
    compatible: tuple[str, ...] = ()
    kernel: str | None = None
    system: str | None = None
    cpu: CpuFacts
    memory: MemoryFacts
    container: ContainerLimits
    cuda_version: str | None = None
    tensorrt_version: str | None = None
    jetson: JetsonFacts | None = None
    raspberry_pi: RaspberryPiFacts | None = None
    missing: tuple[MissingFact, ...] = ()

    @property
    def usable_memory_bytes(self) -> int | None:
        """What this process can have now without swapping: of the machine, or less if its container allows less."""
        limit, used = self.container.memory_limit_bytes, self.container.memory_used_bytes
        left = None if limit is None else max(0, limit - (used or 0))
        known = [amount for amount in (self.memory.available_bytes, left) if amount is not None]
        return min(known, default=None)


def read_facts(root: Path = Path("/")) -> SystemFacts:
    """Read everything below ``root``, which is another folder for tests and for file systems that are mounted."""
    files = SystemFiles(root)
    reader = FactReader(files)
    stated = reader.attempt("architecture", "/proc/cpuinfo", lambda: architecture(files), None)
    arch = platform.machine() if root == Path("/") else stated or "unknown"
    model = next((text for path in _MODELS if (text := files.text(path))), None)
    kind = _kind(files, model)
    no_packages: dict[str, str] = {}
    packages = reader.attempt("packages", "/var/lib/dpkg/status", lambda: installed_packages(files), no_packages)
    cuda = reader.attempt("CUDA version", "/usr/local/cuda/version.json", lambda: cuda_version(files, packages), None)
    tensorrt = reader.attempt("TensorRT version", "/usr/include", lambda: tensorrt_version(files, packages), None)
    # "Linux version 5.15.148-tegra (buildbrain@…) …", which containers that hide /proc/sys still have.
    version = re.match(r"Linux version (\S+)", files.text("/proc/version") or "")
    release = re.search(r'^PRETTY_NAME="?([^"\n]*)', files.text("/etc/os-release") or "", re.MULTILINE)
    facts = SystemFacts(
        kind=kind,
        arch=arch,
        model=model or _product(reader, kind),
        compatible=compatible(files),
        kernel=files.text("/proc/sys/kernel/osrelease") or (version[1] if version else None),
        system=release[1] if release else None,
        cpu=read_cpu(reader, arch),
        memory=read_memory(reader),
        container=read_container(reader),
        cuda_version=cuda,
        tensorrt_version=tensorrt,
        jetson=read_jetson(reader, packages) if kind == "jetson" else None,
        raspberry_pi=_raspberry_pi(reader) if kind == "raspberry-pi" else None,
    )
    if kind == "jetson":
        install = "install it with: sudo apt install nvidia-jetpack"
        if cuda is None:
            reader.lacks("CUDA version", "/usr/local/cuda/version.json", "/usr/local/cuda/version.txt", remedy=install)
        if tensorrt is None:
            header = "/usr/include/aarch64-linux-gnu/NvInferVersion.h"
            reader.lacks("TensorRT version", header, "/var/lib/dpkg/status", remedy=install)
    return msgspec.structs.replace(facts, missing=tuple(reader.missing))


def _kind(files: SystemFiles, model: str | None) -> MachineKind:
    if is_jetson(files):
        return "jetson"
    names = compatible(files)
    if (model or "").startswith("Raspberry Pi") or any(name.startswith("raspberrypi,") for name in names):
        return "raspberry-pi"
    return "board" if names else "pc"


def _product(reader: FactReader, kind: MachineKind) -> str | None:
    """Maker and product by DMI, which only PCs have; virtual machines may leave it out."""
    files = reader.files
    parts = [files.text(f"{_DMI}/sys_vendor"), files.text(f"{_DMI}/product_name")]
    name = " ".join(part for part in parts if part)
    if not name and (kind != "pc" or not is_virtual(files)):
        path = f"{_DMI}/product_name" if kind == "pc" else _MODELS[0]
        reader.lacks("model", path, remedy="state it in the profile by hand")
    return name or None


def _raspberry_pi(reader: FactReader) -> RaspberryPiFacts:
    files = reader.files
    fact, likely = "throttling flags", f"{_PLATFORM}/soc/soc:firmware/get_throttled"
    mask = reader.attempt(fact, likely, lambda: _throttled_mask(files), None)
    if mask is None:
        files.exists(likely)
        reader.lacks(fact, likely, remedy="run: vcgencmd get_throttled; kernels of a Raspberry Pi 5 have no such file")
    return RaspberryPiFacts(
        throttled_now=None if mask is None else _flags(mask),
        throttled_since_boot=None if mask is None else _flags(mask >> 16),
        under_voltage=reader.attempt("under-voltage", "/sys/class/hwmon", lambda: _under_voltage(files), None),
    )


def _throttled_mask(files: SystemFiles) -> int | None:
    """Hexadecimal, with or without 0x, at a path that contains the firmware's address on some boards."""
    for soc in ("", *(f"/{name}" for name in files.names(_PLATFORM, "soc*"))):
        for firmware in files.names(f"{_PLATFORM}{soc}", "*firmware*"):
            path = f"{_PLATFORM}{soc}/{firmware}/get_throttled"
            text = files.text(path)
            if text is not None:
                return int(text.removeprefix("throttled="), 16)
    return None


def _flags(mask: int) -> tuple[str, ...]:
    return tuple(name for bit, name in enumerate(_THROTTLED) if mask >> bit & 1)


def _under_voltage(files: SystemFiles) -> bool | None:
    for sensor in files.names("/sys/class/hwmon", "hwmon*"):
        if files.text(f"/sys/class/hwmon/{sensor}/name") == "rpi_volt":
            alarm = files.number(f"/sys/class/hwmon/{sensor}/in0_lcrit_alarm")
            return None if alarm is None else alarm != 0
    return None
