"""Versions of NVIDIA's software, from files alone: Jetson Linux (L4T), JetPack, CUDA, TensorRT. Nothing is started."""

from __future__ import annotations

import json
import re

from edgeq.profiles.facts.fact_reader import FactReader
from edgeq.system_files import SystemFiles

__all__ = ["JETPACK", "cuda_version", "installed_packages", "jetpack_version", "l4t_release", "tensorrt_version"]

_L4T_FILE = "/etc/nv_tegra_release"
_DPKG = "/var/lib/dpkg/status"
_TENSORRT_HEADERS = (
    "/usr/include/aarch64-linux-gnu/NvInferVersion.h",
    "/usr/include/x86_64-linux-gnu/NvInferVersion.h",
    "/usr/include/NvInferVersion.h",
    "/usr/local/tensorrt/include/NvInferVersion.h",
)
# "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: ..."
_RELEASE = re.compile(r"\bR([0-9]{1,3})\b[^,\n]*,\s*REVISION:\s*([0-9]{1,3}(?:\.[0-9]{1,3}){0,2})", re.IGNORECASE)
_VERSION = re.compile(r"[0-9]+(?:\.[0-9]+)+")
_DEFINE = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)[ \t]+(\w+)", re.MULTILINE)

# NVIDIA's JetPack archive (developer.nvidia.com/embedded/jetpack-archive); 36.5.2, 39.2.0 and 39.2.1 by the layers
# that package them (OE4T meta-tegra, jetpack-nixos). Other releases are looked up in the package nvidia-jetpack.
JETPACK = {
    "32.4.3": "4.4",
    "32.4.4": "4.4.1",
    "32.5.0": "4.5",
    "32.5.1": "4.5.1",
    "32.5.2": "4.5.1",
    "32.6.1": "4.6",
    "32.7.1": "4.6.1",
    "32.7.2": "4.6.2",
    "32.7.3": "4.6.3",
    "32.7.4": "4.6.4",
    "32.7.5": "4.6.5",
    "32.7.6": "4.6.6",
    "35.1.0": "5.0.2",
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "35.6.1": "5.1.5",
    "35.6.2": "5.1.5",
    "35.6.3": "5.1.5",
    "35.6.4": "5.1.6",
    "36.2.0": "6.0 DP",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5.0": "6.2.2",
    "36.5.2": "6.2.3",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.2.2": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}


def installed_packages(files: SystemFiles) -> dict[str, str]:
    """Package to version of what dpkg has installed (dpkg-query(1)); empty where there is no dpkg."""
    found = {}
    for paragraph in re.split(r"\n[ \t]*\n", files.text(_DPKG) or ""):
        fields = dict(re.findall(r"^(Package|Status|Version):[ \t]*(.+?)[ \t]*$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed") and {"Package", "Version"} <= fields.keys():
            found[fields["Package"]] = fields["Version"]
    return found


def l4t_release(reader: FactReader, packages: dict[str, str]) -> str | None:
    """Jetson Linux as three numbers, ``"36.4.3"``: from /etc/nv_tegra_release, else of the package nvidia-l4t-core."""
    text = reader.files.text(_L4T_FILE)
    match = _RELEASE.search(text or "")
    if match is None and text is not None:
        reader.files.refuse(_L4T_FILE, text)
    # "36.4.3-20250107174145"
    package = _VERSION.match(packages.get("nvidia-l4t-core", ""))
    numbers = [match[1], *match[2].split(".")] if match else package[0].split(".") if package else []
    if numbers:
        return ".".join([*numbers, "0", "0"][:3])
    reader.lacks(
        "Jetson Linux (L4T) release",
        _L4T_FILE,
        remedy="start the container with -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro",
    )
    return None


def jetpack_version(reader: FactReader, l4t: str | None, packages: dict[str, str]) -> str | None:
    """JetPack that brings this release of Jetson Linux, else the version of the package nvidia-jetpack."""
    if l4t in JETPACK:
        return JETPACK[l4t]
    package = _VERSION.match(packages.get("nvidia-jetpack", ""))
    if package:
        return package[0]
    if l4t is not None:
        reader.files.refuse(_L4T_FILE, f"no JetPack is known for L4T {l4t}")
        reader.lacks("JetPack version", _L4T_FILE, remedy="")
    return None


def cuda_version(files: SystemFiles, packages: dict[str, str]) -> str | None:
    """CUDA toolkit, ``"12.6.68"``: from version.json, version.txt (CUDA 10) or the package of the runtime."""
    for folder in ("cuda", *reversed(files.names("/usr/local", "cuda-*"))):
        stated = files.text(f"/usr/local/{folder}/version.json")
        if stated is not None:
            version = _cuda_json(stated)
            if version:
                return version
            files.refuse(f"/usr/local/{folder}/version.json", stated)
        match = re.search(r"CUDA Version ([0-9]+(?:\.[0-9]+)+)", files.text(f"/usr/local/{folder}/version.txt") or "")
        if match:
            return match[1]
    return _highest([v for name, v in packages.items() if re.fullmatch(r"cuda-cudart-[0-9]+-[0-9]+", name)])


def _cuda_json(text: str) -> str | None:
    try:
        stated = json.loads(text)
    except (ValueError, RecursionError):
        return None
    entry = stated.get("cuda") if isinstance(stated, dict) else None
    version = entry.get("version") if isinstance(entry, dict) else None
    return version if isinstance(version, str) and _VERSION.fullmatch(version) else None


def tensorrt_version(files: SystemFiles, packages: dict[str, str]) -> str | None:
    """TensorRT as ``"10.3.0.30"``: the installed library's package, else NvInferVersion.h."""
    installed = _highest([v for name, v in packages.items() if re.fullmatch(r"libnvinfer[0-9]+", name)])
    if installed:
        return installed
    for path in _TENSORRT_HEADERS:
        defines = dict(_DEFINE.findall(files.text(path) or ""))
        parts = [defines.get(f"NV_TENSORRT_{part}", "") for part in ("MAJOR", "MINOR", "PATCH", "BUILD")]
        # Since TensorRT 10.11 the macros name others, which hold the numbers.
        numbers = [defines.get(part, part) for part in parts]
        stated = [number for number in numbers if re.fullmatch("[0-9]{1,9}", number)]
        if len(stated) >= 3 and stated == numbers[: len(stated)]:
            return ".".join(stated)
    return None


def _highest(versions: list[str]) -> str | None:
    """Of Debian versions ("10.3.0.30-1+cuda12.5") the highest, without epoch and revision."""
    upstream = [match[0] for v in versions if (match := _VERSION.match(v.partition(":")[2] or v))]
    return max(upstream, key=lambda v: [(len(p.lstrip("0")), p.lstrip("0")) for p in v.split(".")], default=None)
