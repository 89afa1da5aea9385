"""What machines say of themselves: recorded samples of the documented formats, this machine, and odd files.

A sample holds ``== /path`` lines, each followed by the file's contents; ``\\0`` there stands for a NUL.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import system_files
from edgeq.profiles.facts import cpu_facts, tegra
from edgeq.profiles.facts.cpu_facts import CpuCache
from edgeq.profiles.facts.memory_facts import ContainerLimits
from edgeq.profiles.facts.nvidia_versions import JETPACK
from edgeq.profiles.facts.system_facts import SystemFacts, read_facts
from edgeq.profiles.facts.tegra import parse_power_modes
from edgeq.types import from_json, to_json

SAMPLES = Path(__file__).parents[1] / "samples"
NAMES = sorted(path.stem for path in SAMPLES.glob("*.txt"))
JETSONS = [name for name in NAMES if "jetpack" in name]


def sample_files(name: str) -> dict[str, str]:
    parts = re.split(r"^== (/.*)\n", (SAMPLES / f"{name}.txt").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        place = root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text.replace("\\0", "\0"))
    return root


def facts_of(
    tmp_path: Path, name: str, changed: dict[str, str] | None = None, *, without: tuple[str, ...] = ()
) -> SystemFacts:
    files = {path: text for path, text in sample_files(name).items() if not path.startswith(without or ("//",))}
    return read_facts(lay_out(tmp_path, files | (changed or {})))


def missing(facts: SystemFacts) -> dict[str, tuple[str, str]]:
    return {lack.fact: (lack.path, lack.why) for lack in facts.missing}


@pytest.mark.parametrize("name", [name for name in NAMES if "container" not in name])
def test_complete_machines_miss_nothing_and_survive_json(tmp_path: Path, name: str) -> None:
    facts = facts_of(tmp_path, name)
    assert facts.missing == ()
    assert from_json(to_json(facts), SystemFacts) == facts


def test_orin_nano(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, "orin-nano-jetpack-6.2")
    assert (facts.kind, facts.arch) == ("jetson", "aarch64")
    assert facts.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert (facts.kernel, facts.system) == ("5.15.148-tegra", "Ubuntu 22.04.5 LTS")
    assert (facts.cuda_version, facts.tensorrt_version) == ("12.6.11", "10.3.0.30")
    cpu = facts.cpu
    assert (cpu.name, cpu.logical_cpus, cpu.physical_cores, cpu.usable_cpus) == ("Cortex-A78AE", 6, 6, 6)
    assert cpu.features == ("asimd", "fphp", "asimdhp", "asimdrdm", "atomics", "asimddp")
    assert CpuCache(level=3, kind="unified", size_bytes=2 << 20, instances=2) in cpu.caches
    assert cpu.last_level_cache_bytes == 4 << 20
    assert (cpu.governor, [policy.cpus for policy in cpu.policies]) == ("schedutil", [(0, 1, 2, 3), (4, 5)])
    assert (cpu.policies[0].min_mhz, cpu.policies[0].max_mhz, cpu.policies[0].current_mhz) == (729.6, 1728, 1344)
    memory = facts.memory
    assert (memory.total_bytes, memory.available_bytes) == (7802256 * 1024, 5873520 * 1024)
    assert (memory.swap_total_bytes, memory.swap_used_bytes) == (3901120 * 1024, 100000 * 1024)
    assert (memory.zram_bytes, memory.zram_used_bytes) == (6 * 665792512, 6 * 1540096)
    assert (memory.cma_total_bytes, memory.cma_free_bytes) == (256 << 20, 180224 * 1024)
    assert (memory.transparent_huge_pages, memory.huge_pages, memory.huge_page_bytes) == ("always", 0, 2 << 20)
    assert facts.usable_memory_bytes == memory.available_bytes
    jetson = facts.jetson
    assert jetson is not None
    assert (jetson.soc, jetson.module, jetson.l4t, jetson.jetpack) == ("tegra234", "p3767-0005", "36.4.3", "6.2")
    assert jetson.power_mode is not None
    assert (jetson.power_mode.id, jetson.power_mode.name) == (2, "MAXN_SUPER")
    assert (jetson.power_mode.gpu_max_mhz, jetson.power_mode.emc_max_mhz) == (None, None)
    assert [clock.node for clock in jetson.gpu_clocks] == ["17000000.gpu"]
    assert (jetson.gpu_clocks[0].max_mhz, jetson.gpu_clocks[0].current_mhz) == (1020, 306)
    assert (jetson.tpc_pg_mask, jetson.sms_at_most) == (240, 8)
    assert (jetson.emc_mhz, jetson.emc_max_mhz, jetson.emc_cap_mhz) == (3199, 3199, None)
    fifteen = jetson.power_modes[0]
    assert (fifteen.name, fifteen.cpu_max_mhz, fifteen.gpu_max_mhz, fifteen.emc_max_mhz) == ("15W", 1497.6, 612, 2133)
    assert fifteen.settings["GPU MAX_FREQ"] == "612000000"


def test_orin_nx_with_half_of_the_gpu_off(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, "orin-nx-jetpack-5.1")
    jetson = facts.jetson
    assert jetson is not None
    assert (jetson.soc, jetson.module, jetson.l4t, jetson.jetpack) == ("tegra234", "p3767-0000", "35.2.1", "5.1")
    assert jetson.gpu_clocks[0].node == "17000000.ga10b"
    assert (jetson.tpc_pg_mask, jetson.sms_at_most) == (252, 4)
    mode = jetson.power_mode
    assert mode is not None
    assert (mode.name, mode.cpus_off, mode.tpc_pg_mask, mode.gpu_max_mhz) == ("15W", (4, 5, 6, 7), 252, 612)
    assert facts.tensorrt_version == "8.5.2.2"


def test_features_are_those_of_every_core(tmp_path: Path) -> None:
    lines = (
        "processor: 0",
        "Features: asimd asimddp sve",
        "CPU part: 0xd41\n",
        "processor: 1",
        "Features: asimddp asimd",
    )
    cpuinfo = "\n".join((*lines, "CPU implementer: 0x41", "CPU architecture: 8", "CPU part: 0xd05"))
    facts = facts_of(
        tmp_path, "raspberry-pi-5", {"/proc/cpuinfo": "CPU architecture: 8\nCPU implementer: 0x41\n" + cpuinfo}
    )
    assert facts.cpu.features == ("asimd", "asimddp")
    assert facts.cpu.name == "Cortex-A78 + Cortex-A55"


def test_xavier_nx(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, "xavier-nx-jetpack-4.6")
    jetson = facts.jetson
    assert jetson is not None
    assert (facts.cpu.name, jetson.soc, jetson.l4t, jetson.jetpack) == ("NVIDIA Carmel", "tegra194", "32.7.1", "4.6.1")
    assert (jetson.power_mode and jetson.power_mode.name, jetson.sms_at_most) == ("MODE_15W_6CORE", 6)
    assert (jetson.emc_mhz, jetson.emc_max_mhz, jetson.emc_cap_mhz) == (1600, 1866, 1600)
    assert (facts.cuda_version, facts.tensorrt_version) == ("10.2.300", "8.2.1")


def test_thor_has_several_gpu_clocks_and_its_memory_clock_in_devfreq(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, "agx-thor-jetpack-7.0")
    jetson = facts.jetson
    assert jetson is not None
    assert (facts.cpu.name, jetson.soc, jetson.l4t, jetson.jetpack) == ("Neoverse-V3AE", "tegra264", "38.2.0", "7.0")
    assert {"sve", "sve2", "i8mm", "bf16"} <= set(facts.cpu.features)
    assert [(clock.node, clock.current_mhz) for clock in jetson.gpu_clocks] == [
        ("gpu-gpc-0", 1049),
        ("gpu-gpc-1", 1049),
    ]
    assert (jetson.emc_mhz, jetson.emc_max_mhz) == (3200, 4266)
    assert (jetson.tpc_pg_mask, jetson.sms_at_most) == (None, None)
    assert (jetson.power_mode and jetson.power_mode.name, facts.tensorrt_version) == ("120W", "10.13.3.9")
    assert jetson.power_modes[2].cpus_off == (12, 13)


def test_raspberry_pi(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, "raspberry-pi-5")
    assert (facts.kind, facts.cpu.name, facts.jetson) == ("raspberry-pi", "Cortex-A76", None)
    assert facts.raspberry_pi is not None
    assert facts.raspberry_pi.throttled_now == ("under-voltage", "throttled")
    assert facts.raspberry_pi.throttled_since_boot == ("under-voltage", "frequency capped", "throttled")
    assert facts.raspberry_pi.under_voltage is True


def test_raspberry_pi_without_a_driver_for_throttling_is_told_what_to_run(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, "raspberry-pi-5", without=("/sys/devices/platform", "/sys/class/hwmon"))
    (lack,) = facts.missing
    assert (lack.fact, lack.why) == ("throttling flags", "not there")
    assert "vcgencmd get_throttled" in lack.remedy
    assert facts.raspberry_pi is not None
    assert (facts.raspberry_pi.throttled_now, facts.raspberry_pi.under_voltage) == (None, None)


def test_pc_in_a_limited_slice(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, "pc")
    assert (facts.kind, facts.arch, facts.model) == ("pc", "x86_64", "Dell Inc. Precision 5860")
    cpu = facts.cpu
    assert (cpu.name, cpu.logical_cpus, cpu.physical_cores) == ("Intel(R) Xeon(R) w3-2423", 8, 4)
    assert {"avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"} <= set(cpu.features)
    assert cpu.last_level_cache_bytes == 15 << 20
    assert CpuCache(level=1, kind="data", size_bytes=48 << 10, instances=4) in cpu.caches
    assert len(cpu.policies) == 8
    assert facts.container == ContainerLimits(memory_limit_bytes=32 << 30, memory_used_bytes=8 << 30)
    assert facts.usable_memory_bytes == 24 << 30


def test_container_on_a_jetson_states_what_it_cannot_see(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, "container-on-jetson")
    assert (facts.kind, facts.model) == ("jetson", "NVIDIA Jetson Orin Nano Developer Kit")
    assert facts.container == ContainerLimits(
        container=True, memory_limit_bytes=4 << 30, memory_used_bytes=1 << 30, cpus=2.5
    )
    assert facts.usable_memory_bytes == 3 << 30
    lacks = missing(facts)
    assert lacks["Jetson Linux (L4T) release"] == ("/etc/nv_tegra_release", "not there")
    assert lacks["GPU clocks"] == ("/sys/class/devfreq", "not there")
    assert lacks["power mode"] == ("/var/lib/nvpmodel/status", "not there")
    assert {"EMC clock", "CUDA version", "TensorRT version"} <= lacks.keys()
    assert all(lack.remedy for lack in facts.missing)


@pytest.mark.parametrize("group", ["0::/", "0::/../../other", "0::/docker/0123"])
def test_container_with_cgroup_v2(tmp_path: Path, group: str) -> None:
    limits = {"memory.max": "1073741824", "memory.current": "4096", "cpu.max": "150000 100000"}
    files = {f"/sys/fs/cgroup/{name}": text for name, text in limits.items()}
    facts = facts_of(
        tmp_path, "pc", files | {"/proc/self/cgroup": group, "/run/.containerenv": ""}, without=("/sys/fs",)
    )
    assert facts.container == ContainerLimits(
        container=True, memory_limit_bytes=1 << 30, memory_used_bytes=4096, cpus=1.5
    )


def test_unlimited_cgroup_v1(tmp_path: Path) -> None:
    folder = "/sys/fs/cgroup/memory/memory.limit_in_bytes"
    facts = facts_of(
        tmp_path,
        "container-on-jetson",
        {folder: "9223372036854771712", "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1"},
    )
    assert facts.container == ContainerLimits(container=True)
    assert facts.usable_memory_bytes == facts.memory.available_bytes


def test_board_of_another_maker_is_no_jetson(tmp_path: Path) -> None:
    tree = {
        "/proc/device-tree/model": "Radxa ROCK 5B",
        "/proc/device-tree/compatible": "radxa,rock-5b\\0rockchip,rk3588",
    }
    facts = facts_of(tmp_path, "raspberry-pi-5", tree)
    assert (facts.kind, facts.model, facts.missing) == ("board", "Radxa ROCK 5B", ())


def test_file_for_root_only_is_stated_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = system_files._read_bytes

    def refuse(path: Path) -> bytes:
        if "/sys/kernel/debug/" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)

    monkeypatch.setattr(system_files, "_read_bytes", refuse)
    facts = facts_of(tmp_path, "orin-nano-jetpack-6.2")
    assert [(lack.fact, lack.why, lack.remedy) for lack in facts.missing] == [
        ("EMC clock", "permission denied", "run it again with sudo"),
        ("highest EMC clock", "permission denied", "run it again with sudo"),
    ]
    assert facts.missing[0].path == "/sys/kernel/debug/bpmp/debug/clk/emc/rate"
    assert facts.jetson is not None
    assert facts.jetson.emc_mhz is None
    assert facts.jetson.power_mode is not None


@pytest.mark.parametrize(
    ("path", "text", "fact"),
    [
        ("/etc/nv_tegra_release", "Jetson Linux 40", None),  # the package tells it
        ("/var/lib/nvpmodel/status", "mode=2", "power mode"),
        ("/var/lib/nvpmodel/status", "pmode:0009", "name and limits of power mode 9"),
        ("/sys/kernel/debug/bpmp/debug/clk/emc/rate", "3.2 GHz", "EMC clock"),
        ("/usr/local/cuda/version.json", "[[[", "CUDA version"),
        ("/usr/local/cuda/version.json", '{"cuda": "12"}', "CUDA version"),
        ("/proc/meminfo", "MemTotal: 8 GB", "total and available memory"),
    ],
)
def test_other_formats_are_stated_and_cost_nothing_else(tmp_path: Path, path: str, text: str, fact: str | None) -> None:
    facts = facts_of(tmp_path, "orin-nano-jetpack-6.2", {path: text})
    if fact is None:
        assert facts.missing == ()
    else:
        (lack,) = facts.missing
        assert lack.fact == fact
        assert lack.why.startswith("unknown format: ")
    assert facts.cpu.name == "Cortex-A78AE"
    assert facts.jetson is not None
    assert facts.jetson.l4t == "36.4.3"


def test_new_l4t_is_looked_up_in_the_package_or_stated(tmp_path: Path) -> None:
    release = {"/etc/nv_tegra_release": "# R41 (release), REVISION: 1, GCID: 1"}
    facts = facts_of(tmp_path / "a", "orin-nano-jetpack-6.2", release)
    assert facts.jetson is not None
    assert (facts.jetson.l4t, facts.jetson.jetpack) == ("41.1.0", "6.2")
    bare = facts_of(tmp_path / "b", "orin-nano-jetpack-6.2", release, without=("/var/lib/dpkg",))
    assert missing(bare)["JetPack version"] == (
        "/etc/nv_tegra_release",
        "unknown format: 'no JetPack is known for L4T 41.1.0'",
    )


def test_a_bug_in_one_parser_loses_only_its_fact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(tegra, "parse_power_modes", broken)
    monkeypatch.setattr(cpu_facts, "cpu_caches", broken)
    facts = facts_of(tmp_path, "orin-nano-jetpack-6.2")
    lacks = missing(facts)
    assert lacks["power modes"] == ("/etc/nvpmodel.conf", "unknown format: ZeroDivisionError: bug")
    assert lacks["CPU caches"][1].startswith("unknown format")
    assert facts.jetson is not None
    assert facts.jetson.jetpack == "6.2"
    assert facts.cpu.features


def test_directory_in_place_of_every_file(tmp_path: Path) -> None:
    for path in sample_files("orin-nano-jetpack-6.2"):
        (tmp_path / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
    facts = read_facts(tmp_path)
    assert facts.kind == "jetson"  # by the presence of /etc/nv_tegra_release
    assert missing(facts)["Jetson Linux (L4T) release"][1] == "is a directory"
    assert from_json(to_json(facts), SystemFacts) == facts


ODD = st.one_of(st.binary(max_size=200), st.integers().map(lambda n: str(n).encode()), st.just(b"9" * 5000))
PATHS = {name: sorted(sample_files(name)) for name in NAMES}


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: lay_out(tmp_path_factory.mktemp(name), sample_files(name)) for name in NAMES}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_odd_contents_never_raise(machines: dict[str, Path], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    places = [
        machines[name] / path.lstrip("/")
        for path in data.draw(st.lists(st.sampled_from(PATHS[name]), min_size=1, max_size=12, unique=True))
    ]
    proper = {place: place.read_bytes() for place in places}
    try:
        for place in places:
            place.write_bytes(data.draw(ODD))
        facts = read_facts(machines[name])
        assert from_json(to_json(facts), SystemFacts) == facts
    finally:
        for place, contents in proper.items():
            place.write_bytes(contents)


def test_this_machine_agrees_with_psutil() -> None:
    facts = read_facts()
    assert facts.arch == platform.machine()
    assert facts.kernel == platform.release()
    assert facts.cpu.logical_cpus == psutil.cpu_count()
    assert facts.cpu.physical_cores == psutil.cpu_count(logical=False)
    assert facts.cpu.usable_cpus == len(os.sched_getaffinity(0))
    assert facts.memory.total_bytes == psutil.virtual_memory().total
    assert facts.memory.available_bytes == pytest.approx(psutil.virtual_memory().available, rel=0.05)
    assert facts.memory.swap_total_bytes == psutil.swap_memory().total
    if facts.kind == "pc":
        assert not [lack for lack in facts.missing if "Jetson" in lack.fact or "CUDA" in lack.fact]


def test_empty_machine_states_the_basics_only(tmp_path: Path) -> None:
    facts = read_facts(tmp_path)
    assert (facts.kind, facts.arch, facts.usable_memory_bytes) == ("pc", "unknown", None)
    assert set(missing(facts)) == {
        "model",
        "number of CPUs",
        "CPU caches",
        "CPU governor and frequencies",
        "total and available memory",
    }


def test_power_modes_of_odd_spelling() -> None:
    text = """<POWER_MODEL ID=1 NAME="10W">
    GPU MAX_FREQ 500000000 # a note
    GPU MAX_FREQ
    EMC MAX_FREQ 0
    < POWER_MODEL NAME=none >
    GPU MAX_FREQ 5
    < PM_CONFIG DEFAULT=1 >
    GPU MAX_FREQ 7
    """
    (mode,) = parse_power_modes(text)
    assert (mode.id, mode.name, mode.gpu_max_mhz, mode.emc_max_mhz) == (1, "10W", 500, None)
    assert mode.settings == {"GPU MAX_FREQ": "500000000", "EMC MAX_FREQ": "0"}


@given(st.text(alphabet="<>=# \n\tPOWER_MODELIDNAME019-", max_size=200))
def test_any_power_mode_file_is_parsed(text: str) -> None:
    assert all(mode.id >= 0 for mode in parse_power_modes(text))


def test_table_of_jetpacks_is_ordered_and_complete_in_form() -> None:
    keys = [tuple(int(part) for part in key.split(".")) for key in JETPACK]
    assert keys == sorted(keys)
    assert all(len(key) == 3 for key in keys)


def test_import_is_light() -> None:
    heavy = "{'psutil', 'numpy', 'yaml'}"
    code = f"import sys, edgeq.profiles.facts.system_facts; print({heavy} & sys.modules.keys() or 'none')"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "none"
