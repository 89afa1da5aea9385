"""The shipped profiles, and what a profile tells in each power mode."""

from __future__ import annotations

import msgspec
import pytest

from edgeq.errors import ProfileError
from edgeq.profiles.device import DeviceProfile, PowerMode, nearest_source, power_mode_of
from edgeq.profiles.loader import known_profiles, load_profile, profile_names
from edgeq.profiles.profile_files import candidates

NAMES = {
    "jetson-orin-nano-8gb": ["jetson-orin-nano", "jetson-orin"],
    "jetson-orin-nano-4gb": [],
    "jetson-orin-nx-8gb": [],
    "jetson-orin-nx-16gb": ["jetson-orin-nx"],
    "jetson-agx-orin-32gb": [],
    "jetson-agx-orin-64gb": ["jetson-agx-orin"],
    "jetson-thor": ["jetson-thor-t5000", "jetson-agx-thor"],
    "jetson-thor-t4000": [],
    "jetson-xavier-nx": [],
    "raspberry-pi-5": ["raspberry-pi", "pi5"],
    "laptop-cpu": ["laptop"],
    "laptop-rtx": [],
}
SHIPPED = [known.profile for known in known_profiles() if known.origin == "edgeq" and known.profile is not None]
BY_NAME = pytest.mark.parametrize("profile", SHIPPED, ids=lambda profile: profile.name)
# Dense INT8 operations of one SM in a clock: NVIDIA's throughput tables by compute capability.
INT8_PER_SM_AND_CLOCK = {"7.2": 2048, "8.7": 4096, "8.9": 2048, "11.0": 16384}


def test_twelve_devices_are_shipped_and_load_under_every_name() -> None:
    known = {name: device for name, device in profile_names().items() if device in NAMES}
    assert {profile.name for profile in SHIPPED} == NAMES.keys()
    assert known == {alias: name for name, aliases in NAMES.items() for alias in (name, *aliases)}
    for alias, name in known.items():
        assert load_profile(alias).name == load_profile(alias.upper()).name == name


def test_names_that_are_found_without_reading_are_those_of_the_yaml() -> None:
    for candidate in candidates():
        if candidate.origin == "edgeq":
            assert candidate.file is not None
            raw = candidate.file.raw
            assert list(candidate.file.names) == [raw["name"], *raw.get("aliases", [])]
            assert candidate.file.where == f"edgeq's {raw['name']}.yaml"


@BY_NAME
def test_every_number_has_a_source_and_every_source_a_value(profile: DeviceProfile) -> None:
    plain = msgspec.to_builtins(profile)
    for name in ("backends", "power_modes"):
        plain[name] = {item.pop("name"): item for item in plain[name]}
    leaves: dict[str, object] = {}

    def collect(value: object, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                collect(item, f"{path}.{key}" if path else key)
        elif value not in (None, [], {}):
            leaves[path] = value

    collect({key: value for key, value in plain.items() if key != "sources"}, "")
    for path, value in leaves.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and value != 0:
            assert profile.source_of(path), path
    for source in profile.sources:
        assert any(path == source or path.startswith(f"{source}.") for path in leaves), source
    assert not any("to be completed" in text for text in profile.sources.values())


@BY_NAME
def test_throughput_of_each_mode_is_that_of_its_sms_and_clock(profile: DeviceProfile) -> None:
    gpu = profile.gpu
    if gpu is None:
        assert profile.accelerator == "cpu"
        return
    per_clock = INT8_PER_SM_AND_CLOCK[gpu.compute_capability]
    assert gpu.clock_hz is not None
    assert gpu.int8_ops_per_s == pytest.approx(gpu.sms * gpu.clock_hz * per_clock, rel=0.01)
    for mode in profile.power_modes:
        assert mode.sms is not None
        assert mode.gpu_clock_hz is not None
        assert mode.int8_ops_per_s == pytest.approx(mode.sms * mode.gpu_clock_hz * per_clock, rel=0.01)
        untold = tuple(msgspec.structs.replace(m, int8_ops_per_s=None) for m in profile.power_modes)
        derived = power_mode_of(msgspec.structs.replace(profile, power_modes=untold), mode.name).int8_ops_per_s
        assert derived == pytest.approx(mode.int8_ops_per_s, rel=0.01)


@BY_NAME
def test_a_robot_has_budgets_that_leave_room_for_its_other_work(profile: DeviceProfile) -> None:
    assert profile.budgets.perception.latency_ms == 33.3
    assert profile.budgets.policy.latency_ms == 20
    planner = profile.budget
    assert planner.ttft_ms is not None
    assert planner.itl_ms is not None
    if profile.name != "laptop-cpu":
        assert planner.peak_memory_bytes is not None
        assert 0.6 < planner.peak_memory_bytes / profile.memory.usable_bytes < 0.8


@BY_NAME
def test_every_profile_can_be_planned_for(profile: DeviceProfile) -> None:
    backend = profile.backend
    assert backend.decodes
    assert profile.flops_per_s(backend) > 1e9
    assert profile.bandwidth_bytes_per_s > 1e9


@pytest.mark.parametrize(
    ("device", "default", "modes"),
    [
        ("jetson-orin-nano-8gb", "25W", {"15W": 0, "25W": 1, "MAXN_SUPER": 2, "7W": 3}),
        ("jetson-orin-nano-4gb", "25W", {"10W": 0, "25W": 1, "MAXN_SUPER": 2}),
        ("jetson-orin-nx-16gb", "40W", {"MAXN_SUPER": 0, "10W": 1, "15W": 2, "25W": 3, "40W": 4}),
        ("jetson-orin-nx-8gb", "40W", {"MAXN_SUPER": 0, "10W": 1, "15W": 2, "20W": 3, "40W": 4}),
        ("jetson-agx-orin-64gb", "MODE_30W", {"MAXN": 0, "MODE_15W": 1, "MODE_30W": 2, "MODE_50W": 3}),
        ("jetson-agx-orin-32gb", "MODE_30W", {"MAXN": 0, "MODE_15W": 1, "MODE_30W": 2, "MODE_40W": 3}),
        ("jetson-thor", "120W", {"MAXN": 0, "120W": 1, "90W": 2, "70W": 3}),
        ("jetson-thor-t4000", "70W", {"MAXN": 0, "70W": 1}),
    ],
)
def test_power_modes_are_nvpmodels(device: str, default: str, modes: dict[str, int]) -> None:
    profile = load_profile(device)
    assert profile.power_mode == default
    assert {mode.name: mode.nvpmodel_id for mode in profile.power_modes} == modes


def test_figures_of_the_issue() -> None:
    nano = load_profile("jetson-orin")
    assert nano.accelerator == "cuda:sm_87"
    assert nano.gpu is not None
    assert nano.gpu.sms == 8
    for name, clock, tops, bandwidth in (("15W", 612, 20, 68), ("25W", 918, 30, 102), ("MAXN_SUPER", 1020, 33, 102)):
        mode = power_mode_of(nano, name)
        assert mode.mode is not None
        assert mode.mode.gpu_clock_hz == clock * 1e6
        assert mode.int8_ops_per_s is not None
        assert round(mode.int8_ops_per_s / 1e12) == tops
        assert round(mode.peak_bandwidth_bytes_per_s / 1e9) == bandwidth
    thor, pi = load_profile("jetson-thor"), load_profile("raspberry-pi-5")
    assert thor.accelerator == "cuda:sm_110"
    assert {"fp8", "fp4"} <= set(next(b for b in thor.backends if b.name == "tensorrt").precisions)
    assert (pi.cpu.cores, pi.cpu.clock_hz, pi.gpu) == (4, 2.4e9, None)


@BY_NAME
def test_precisions_are_those_of_the_gpu(profile: DeviceProfile) -> None:
    capability = 0.0 if profile.gpu is None else float(profile.gpu.compute_capability)
    known = {precision for backend in profile.backends for precision in backend.precisions if backend.on_gpu}
    assert ("fp8" in known) == (capability >= 8.9)
    assert ("fp4" in known) == (capability >= 10)
    assert ("bf16" in known) == (capability >= 8)


def test_a_slow_gpu_cannot_draw_what_the_bus_has() -> None:
    agx = load_profile("jetson-agx-orin")
    assert agx.peak_bandwidth_bytes_per_s == 204.8e9
    # STREAM on the GPU reached 128.0 GB/s in this mode, and 187.5 in MAXN.
    assert agx.bandwidth_bytes_per_s == pytest.approx(128e9, rel=0.02)
    assert power_mode_of(agx, "maxn").bandwidth_bytes_per_s == 204.8e9
    on_cpu = msgspec.structs.replace(agx, backends=tuple(b for b in agx.backends if not b.on_gpu))
    assert on_cpu.bandwidth_bytes_per_s == 204.8e9
    assert on_cpu.accelerator == "cpu"


def test_an_unknown_power_mode_names_the_nearest() -> None:
    nano = load_profile("jetson-orin")
    assert power_mode_of(nano, "maxn_super").power_mode == "MAXN_SUPER"
    with pytest.raises(ProfileError, match=r"no power mode 'MAXN'\. Choose one of MAXN_SUPER"):
        power_mode_of(nano, "MAXN")
    with pytest.raises(ProfileError, match="7W, 15W, 25W, MAXN_SUPER"):
        power_mode_of(nano, "turbo")
    with pytest.raises(ProfileError, match="laptop-cpu has no power modes"):
        power_mode_of(load_profile("laptop-cpu"), "15W")


def test_a_mode_that_tells_nothing_is_as_the_rest_of_the_profile() -> None:
    nano = load_profile("jetson-orin")
    bare = msgspec.structs.replace(nano, power_modes=(PowerMode(name="OWN"),), power_mode="OWN")
    assert nano.gpu is not None
    assert bare.int8_ops_per_s == nano.gpu.int8_ops_per_s
    assert bare.peak_bandwidth_bytes_per_s == nano.memory.bandwidth_bytes_per_s


def test_a_profile_without_language_models_says_so_when_one_is_planned() -> None:
    nano = load_profile("jetson-orin")
    vision = msgspec.structs.replace(nano, backends=tuple(b for b in nano.backends if b.name == "tensorrt"))
    assert vision.accelerator == "cuda:sm_87"
    with pytest.raises(ProfileError, match="no backend for language models"):
        _ = vision.backend
    with pytest.raises(ProfileError, match="how fast tensorrt computes"):
        vision.flops_per_s(vision.backends[0])


def test_the_nearest_source_is_the_longest_path() -> None:
    sources = {"power_modes": "a", "power_modes.15W": "b", "power_modes.15": "c"}
    assert nearest_source("power_modes.15W.sms", sources) == "b"
    assert nearest_source("power_modes.15W", sources) == "b"
    assert nearest_source("power_modes.25W.sms", sources) == "a"
    assert nearest_source("memory.total_bytes", sources) is None
