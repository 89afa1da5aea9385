"""Readers of /proc and /sys: on this machine, and on machines laid out in a folder."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from edgeq.report import HostLoad
from edgeq.runtime import measure
from edgeq.runtime.measure import CpuTimes, Snapshot
from edgeq.types import Target

QUIET = HostLoad(before=0.0, during=0.01, steal=0.0, own=0.9, allowed=0.1)
CALM = Snapshot(
    cpu=None, temperatures_c={"z": 40.0}, throttle_count=7, governor="performance", frequency_limit_mhz=(2000.0,)
)


def lay_out(root: Path, files: dict[str, str]) -> Path:
    """A file system of small files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_memory_agrees_with_psutil() -> None:
    memory = measure.process_memory()
    assert memory is not None
    resident = psutil.Process().memory_info().rss
    assert memory.resident_bytes == pytest.approx(resident, rel=0.05)
    assert memory.peak_bytes >= memory.resident_bytes * 0.99
    assert memory.anonymous_bytes is not None
    assert memory.file_bytes is not None
    assert memory.anonymous_bytes + memory.file_bytes == pytest.approx(resident, rel=0.05)


def test_peak_outlives_what_was_freed() -> None:
    code = (
        "from edgeq.runtime.measure import process_memory as m\n"
        "a = m(); b = bytearray(b'x') * (64 << 20); del b; c = m()\n"
        "print(c.peak_bytes - a.peak_bytes, c.resident_bytes - a.resident_bytes)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    peak, resident = map(int, output.split())
    assert peak > 60 << 20
    assert resident < 30 << 20


def test_memory_of_a_kernel_without_a_high_water_mark_is_unknown(tmp_path: Path) -> None:
    root = lay_out(tmp_path, {"proc/self/status": "Name:\tx\nVmRSS:\t 100 kB\n"})
    assert measure.process_memory(root=root) is None
    assert measure.process_memory(root=tmp_path / "nothing") is None
    lay_out(
        tmp_path, {"proc/5/status": "VmHWM:\t     200 kB\nVmRSS:\t     100 kB\nRssFile:\t 30 kB\nRssShmem:\t 4 kB\n"}
    )
    assert measure.process_memory(5, root=root) == measure.ProcessMemory(200 * 1024, 100 * 1024, None, 34 * 1024)


def test_cpu_times_count_only_usable_cpus_and_guests_once(tmp_path: Path) -> None:
    tick = 1 / os.sysconf("SC_CLK_TCK")
    stat = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 100 10 20 300 40 1 2 7 50 5\ncpu1 1000 0 0 0 0 0 0 0 0 0\nintr 5\n"
    root = lay_out(tmp_path, {"proc/stat": stat})
    times = measure.read_cpu_times(root=root, cpus=[0])
    assert times is not None
    assert times.total_s == pytest.approx(480 * tick)
    assert times.busy_s == pytest.approx(133 * tick)
    assert times.steal_s == pytest.approx(7 * tick)
    assert measure.read_cpu_times(root=tmp_path / "nothing") is None
    assert measure.read_cpu_times(root=root, cpus=[5]) is None


def test_own_time_is_not_host_load() -> None:
    before = measure.read_cpu_times()
    started = time.process_time()
    while time.process_time() - started < 0.5:
        pass
    load = measure.host_load(
        before, measure.read_cpu_times(), own_s=time.process_time() - started, busy_before=None, allowed=0.1
    )
    assert load.during is not None
    assert load.own is not None
    assert load.own > 0
    # The same seconds counted as somebody else's are host load.
    blamed = measure.host_load(before, measure.read_cpu_times(), own_s=0, busy_before=None, allowed=0.1)
    assert blamed.during is not None
    assert blamed.during > load.during


def test_host_load_counts_steal_and_never_goes_below_zero() -> None:
    zero = CpuTimes(0, 0, 0)
    load = measure.host_load(zero, CpuTimes(10, 6, 1), own_s=5, busy_before=0.2, allowed=0.1)
    assert load.during == pytest.approx(0.2)
    assert load.steal == pytest.approx(0.1)
    assert (load.own, load.before) == (0.5, 0.2)
    assert measure.host_load(zero, CpuTimes(10, 4, 0), own_s=5, busy_before=None, allowed=0.1).during == 0
    assert measure.host_load(None, zero, own_s=5, busy_before=None, allowed=0.1).during is None
    assert measure.host_load(zero, zero, own_s=5, busy_before=None, allowed=0.1).during is None


def test_busy_share_is_a_share() -> None:
    share = measure.busy_share(0.1)
    assert share is not None
    assert 0 <= share <= 1


@pytest.mark.parametrize(
    ("after", "match"),
    [
        (CALM, None),
        (dataclasses.replace(CALM, throttle_count=9), "throttled: heat slowed the CPUs down 2 times"),
        (dataclasses.replace(CALM, governor="powersave"), "governor went from performance to powersave"),
        (dataclasses.replace(CALM, frequency_limit_mhz=(1500.0,)), "from 2000 to 1500 MHz"),
    ],
)
def test_changed_clocks_are_a_disturbance(after: Snapshot, match: str | None) -> None:
    found = measure.disturbances(CALM, after, QUIET)
    assert len(found) == (match is not None)
    assert match is None or match in found[0]


def test_host_load_above_the_allowance_is_a_disturbance() -> None:
    loaded = HostLoad(before=0.0, during=0.25, steal=0.0, own=0.5, allowed=0.1)
    assert measure.disturbances(CALM, CALM, loaded) == (
        "host loaded: other processes took 25% of the CPU time, 10% is allowed",
    )
    unknown = HostLoad(before=None, during=None, steal=None, own=None, allowed=0.1)
    assert "could not be read" in measure.disturbances(CALM, CALM, unknown)[0]
    unchecked = HostLoad(before=None, during=None, steal=None, own=None, allowed=1)
    assert measure.disturbances(CALM, CALM, unchecked) == ()


def test_snapshot_of_a_board_that_throttles(tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    root = lay_out(
        tmp_path,
        {
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "45500\n",
            "sys/class/thermal/thermal_zone1/type": "broken\n",
            "sys/class/thermal/thermal_zone1/temp": "n/a\n",
            f"sys/devices/system/cpu/cpu{cpu}/thermal_throttle/core_throttle_count": "3\n",
            f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_max_freq": "1510400\n",
            f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor": "schedutil\n",
        },
    )
    first = measure.take_snapshot(root=root)
    assert first.temperatures_c == {"thermal_zone0 cpu-thermal": 45.5}
    assert (first.throttle_count, first.governor, first.frequency_limit_mhz) == (3, "schedutil", (1510.4,))
    lay_out(
        tmp_path,
        {
            "sys/class/thermal/thermal_zone0/temp": "80000\n",
            f"sys/devices/system/cpu/cpu{cpu}/thermal_throttle/core_throttle_count": "5\n",
        },
    )
    second = measure.take_snapshot(root=root)
    assert measure.throttle_events(first, second) == 2
    assert [(t.before_c, t.after_c) for t in measure.temperatures(first, second)] == [(45.5, 80.0)]
    assert measure.throttle_events(CALM, dataclasses.replace(CALM, throttle_count=None)) is None


def test_fingerprint_of_this_machine_and_of_a_jetson(tmp_path: Path) -> None:
    here = measure.describe_device()
    assert here.machine == os.uname().machine
    assert here.logical_cpus == len(os.sched_getaffinity(0))
    assert here.memory_bytes == psutil.virtual_memory().total
    board = measure.describe_device(
        root=lay_out(tmp_path, {"proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0"})
    )
    assert board.model == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (board.cpu, board.frequency_mhz) == (None, ())


def test_target_of_another_kind(tmp_path: Path) -> None:
    laptop, jetson = Target(arch="x86_64", accelerator="cpu"), Target(arch="aarch64", accelerator="cuda:sm_87")
    assert measure.unlike_target("l", laptop, "x86_64") is None
    assert measure.unlike_target("l", msgspec.structs.replace(laptop, arch="any"), "aarch64") is None
    assert "l is x86_64, this machine is aarch64" in str(measure.unlike_target("l", laptop, "aarch64"))
    assert "aarch64, this machine is x86_64" in str(measure.unlike_target("j", jetson, "x86_64"))
    assert "no NVIDIA device" in str(measure.unlike_target("j", jetson, "aarch64", root=tmp_path))
    assert measure.unlike_target("j", jetson, "aarch64", root=lay_out(tmp_path, {"dev/nvgpu": ""})) is None
