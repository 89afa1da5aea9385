from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from edgeq.errors import ProfileError
from edgeq.profiles.loader import load_profile, parse_profile, profile_names

_LAPTOP = (resources.files("edgeq.profiles") / "laptop-cpu.yaml").read_text()


def test_every_shipped_profile_loads_under_every_name() -> None:
    names = profile_names()
    assert {"laptop-cpu", "jetson-orin"} <= names.keys()
    for alias, name in names.items():
        assert load_profile(alias).name == name
    assert load_profile("jetson-orin").name == "jetson-orin-nano-8gb"


def test_units_arrive_in_base_units() -> None:
    profile = load_profile("laptop-cpu")
    assert profile.memory.total_bytes == 16 * 2**30
    assert profile.memory.bandwidth_bytes_per_s == pytest.approx(25.6e9)
    assert profile.memory.usable_bytes == 12 * 2**30
    assert profile.budget.itl_ms == 100.0


def test_a_profile_of_the_users_own_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(_LAPTOP.replace("name: laptop-cpu", "name: mine", 1))
    assert load_profile(str(tmp_path / "mine.yaml")).name == "mine"
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile(str(tmp_path / "missing.yaml"))


def test_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(ProfileError, match="jetson-orin"):
        load_profile("jetson-orinn")
    with pytest.raises(ProfileError, match="laptop-cpu"):
        load_profile("toaster")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("arch: x86_64", "arhc: x86_64", "arhc"),
        ("total_bytes: 16GiB", "total_bytes: 8", "without a unit"),
        ("total_bytes: 16GiB", "total_bytes: 8 bananas", "bananas"),
        ("total_bytes: 16GiB", "total_bytes: 2GiB", "reserves all"),
        ("decode_efficiency: 0.55", "decode_efficiency: 1.5", "cannot be"),
        ("decode_efficiency: 0.55", "decode_efficiency: .nan", "cannot be"),
        ("itl_ms: 100ms", 'itl_ms: "0"', "cannot be"),
        ("itl_ms: 100ms", "tokens_per_s: .inf", "cannot be"),
        ("accelerator: cpu", "accelerator: vulkan", "accelerator 'vulkan'"),
        ("arch: x86_64", "arch: banana", "arch 'banana'"),
        ("accelerator: cpu", "accelerator: cpu\nthreads: -4", "threads"),
        ("  memory.total_bytes: the", "  memory.total: the", "no source for memory.total_bytes"),
        ("  ttft_ms: 2s\n", "  ttft_ms: 2s\n  peak_memory_bytes: 64GiB\n", "larger than its usable memory"),
        ("provenance: datasheet", "provenance: hearsay", "hearsay"),
        ("aliases: [laptop]", "aliases: [laptop", "no valid YAML"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(old: str, new: str, message: str) -> None:
    assert old in _LAPTOP
    with pytest.raises(ProfileError, match=message) as caught:
        parse_profile(_LAPTOP.replace(old, new, 1), "mine.yaml")
    assert "\n" not in str(caught.value)


def test_a_list_is_no_profile() -> None:
    with pytest.raises(ProfileError, match="no mapping"):
        parse_profile("- 1", "mine.yaml")
