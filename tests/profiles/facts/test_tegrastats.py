"""Lines of tegrastats from JetPack 4 to 7, and any other text."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgeq.profiles.facts.tegrastats import CpuLoad, EngineLoad, PowerRail, TegraStats, ThermalZone, parse_tegrastats
from edgeq.types import from_json, to_json

MIB = 1 << 20
NANO_JP4 = (
    "RAM 1923/3964MB (lfb 2x2MB) SWAP 191/1982MB (cached 6MB) IRAM 0/252kB(lfb 252kB) "
    "CPU [5%@1224,4%@1224,3%@1224,6%@1224] EMC_FREQ 0%@1600 GR3D_FREQ 3%@76 APE 25 PLL@37C CPU@40C PMIC@50C GPU@40C "
    "AO@45C thermal@40C POM_5V_IN 2532/2698 POM_5V_GPU 0/0 POM_5V_CPU 366/406"
)
XAVIER_JP4 = (
    "RAM 4181/7771MB (lfb 8x4MB) SWAP 0/3885MB (cached 0MB) CPU [10%@1190,0%@1190,off,off,5%@1190,1%@1190] "
    "EMC_FREQ 15%@1600 GR3D_FREQ 12%@114 VIC_FREQ 0%@115 NVENC 716 APE 150 MTS fg 0% bg 1.5% AO@41C PMIC@100C "
    "thermal@42.425C VDD_IN 3539mW/1422mW VDD_CPU_GPU_CV 203mW/203mW VDD_SOC 813mW/207mW"
)
ORIN_JP5 = (
    "RAM 3821/7337MB (lfb 21x1MB) SWAP 1/3668MB (cached 0MB) CPU [30%@1651,53%@1651,70%@1651,30%@1651,off,off] "
    "EMC_FREQ 4%@2133 GR3D_FREQ 35%@306 GR3D2_FREQ 35%@0 VIC_FREQ 0%@115 NVDLA0 off CV0@-256C GPU@44.9C tj@45.5C "
    "VDD_GPU_SOC 1234mW/1200mW NC 0mW/0mW NC 1mW/0mW"
)
ORIN_JP6 = (
    "05-09-2026 18:42:06 RAM 18207/62841MB (lfb 466x4MB) SWAP 86/31420MB (cached 2MB) CPU [14%@2188,off] "
    "EMC_FREQ 3%@2133 GR3D_FREQ 35%@[305,306] NVENC 79%@166 NVDEC off NVJPG off NVDLA0 off PVA0_FREQ off OFA off "
    "VIC 36%@115 APE 174 cpu@52.562C soc2@48.437C gpu@45.5C tj@51C VDD_IN 5060mW/5010mW"
)
THOR_JP7 = (
    "08-08-2026 21:00:39 RAM 8353/125749MB (lfb 31x4MB) CPU [0%,5%,off]@2601 EMC_FREQ @4266 "
    "GR3D_FREQ @[1049,1049,1049] NVENC0_FREQ @1691 VIC off cpu@58.25C/61.75C tj@66.625C/66.625C "
    "VDD_GPU -392mW/8660mW/37939mW VIN 28906mW/14453mW/28906mW"
)


@pytest.mark.parametrize("line", [NANO_JP4, XAVIER_JP4, ORIN_JP5, ORIN_JP6, THOR_JP7])
def test_every_known_format_is_understood_as_a_whole(line: str) -> None:
    stats = parse_tegrastats(line)
    assert stats.unknown == ()
    assert stats.ram_total_bytes is not None
    assert stats.cpus
    assert stats.gpu is not None
    assert stats.emc is not None
    assert stats.temperatures
    assert stats.rails
    assert from_json(to_json(stats), TegraStats) == stats


def test_memory_of_the_first_nano() -> None:
    stats = parse_tegrastats(NANO_JP4)
    assert (stats.ram_used_bytes, stats.ram_total_bytes) == (1923 * MIB, 3964 * MIB)
    assert (stats.largest_free_blocks, stats.largest_free_block_bytes) == (2, 2 * MIB)
    assert (stats.swap_used_bytes, stats.swap_total_bytes, stats.swap_cached_bytes) == (191 * MIB, 1982 * MIB, 6 * MIB)
    assert (stats.iram_used_bytes, stats.iram_total_bytes) == (0, 252 * 1024)
    assert stats.rail("POM_5V_IN") == PowerRail(name="POM_5V_IN", now_mw=2532, average_mw=2698)
    assert stats.time is None
    small = parse_tegrastats("RAM 1/2MB (lfb 3x512kB)")
    assert small.largest_free_block_bytes == 512 * 1024


def test_clocks_of_xavier() -> None:
    stats = parse_tegrastats(XAVIER_JP4)
    assert stats.cpus[0] == CpuLoad(online=True, load_percent=10, frequency_mhz=1190)
    assert stats.cpus[2] == CpuLoad(online=False)
    assert stats.gpu == EngineLoad(name="GR3D_FREQ", load_percent=12, frequencies_mhz=(114,))
    assert stats.engine("NVENC") == EngineLoad(name="NVENC", frequencies_mhz=(716,))
    assert (stats.mts_foreground_percent, stats.mts_background_percent) == (0, 1.5)
    assert stats.temperature_c("AO") == 41


def test_orin_under_jetpack_5_and_6() -> None:
    five, six = parse_tegrastats(ORIN_JP5), parse_tegrastats(ORIN_JP6)
    assert five.gpu == EngineLoad(name="GR3D_FREQ", load_percent=35, frequencies_mhz=(306,))
    assert six.gpu == EngineLoad(name="GR3D_FREQ", load_percent=35, frequencies_mhz=(305, 306))
    assert five.emc == EngineLoad(name="EMC_FREQ", load_percent=4, frequencies_mhz=(2133,))
    assert (five.temperature_c("gpu"), six.temperature_c("GPU"), six.temperature_c("cv0")) == (44.9, 45.5, None)
    assert five.temperatures[0] == ThermalZone(name="CV0", now_c=None)
    assert [rail.now_mw for rail in five.rails if rail.name == "NC"] == [0, 1]
    assert six.engine("NVDEC") == EngineLoad(name="NVDEC", on=False)
    assert six.time == "05-09-2026 18:42:06"
    assert six.rail("VDD_IN") == PowerRail(name="VDD_IN", now_mw=5060, average_mw=5010)


def test_thor_prints_clocks_without_load_and_peaks() -> None:
    stats = parse_tegrastats(THOR_JP7)
    assert stats.gpu == EngineLoad(name="GR3D_FREQ", load_percent=None, frequencies_mhz=(1049, 1049, 1049))
    assert stats.emc == EngineLoad(name="EMC_FREQ", load_percent=None, frequencies_mhz=(4266,))
    assert stats.cpus[1] == CpuLoad(online=True, load_percent=5, frequency_mhz=2601)
    assert stats.temperatures[0] == ThermalZone(name="cpu", now_c=58.25, peak_c=61.75)
    assert stats.rail("VDD_GPU") == PowerRail(name="VDD_GPU", now_mw=-392, average_mw=8660, peak_mw=37939)


def test_what_is_not_understood_is_kept_and_costs_nothing_else() -> None:
    stats = parse_tegrastats("FUTURE 5 RAM x/yMB CPU [bad,off,7%] GR3D_FREQ 9%@[300,N/A] VDD_NEW 5A VDD_IN 7mW/8mW\n")
    assert stats.unknown == ("FUTURE", "5", "RAM", "x/yMB", "VDD_NEW", "5A")
    assert stats.ram_total_bytes is None
    assert [cpu.online for cpu in stats.cpus] == [None, False, True]
    assert stats.gpu == EngineLoad(name="GR3D_FREQ", load_percent=9, frequencies_mhz=(300, None))
    assert stats.rail("VDD_IN") == PowerRail(name="VDD_IN", now_mw=7, average_mw=8)
    assert parse_tegrastats("").unknown == ()


WORDS = st.sampled_from(
    [*(NANO_JP4 + " " + THOR_JP7 + " " + ORIN_JP5).split(), "[", "]", "@", "/", "%", "off", "9" * 40]
)


@given(st.one_of(st.text(), st.lists(WORDS, max_size=40).map(" ".join), st.lists(WORDS, max_size=20).map("".join)))
@example("CPU [" + "CPU [" * 500)
@example("CPU [\u0663%@\u0663]")
def test_any_text_is_parsed_and_survives_json(line: str) -> None:
    stats = parse_tegrastats(line)
    assert set(" ".join(stats.unknown).split()) <= set(line.split())
    assert from_json(to_json(stats), TegraStats) == stats


def test_long_lines_cost_no_more_than_their_length() -> None:
    stats = parse_tegrastats("VIC off X@1C [ " * 20_000)
    assert (len(stats.engines), len(stats.temperatures), len(stats.unknown)) == (20_000, 20_000, 20_000)
