"""What a profile's YAML may not hold: each mistake is one line with its cause and what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edgeq.errors import ProfileError, UsageError
from edgeq.profiles.loader import parse_profile
from edgeq.profiles.schema import parse_fields, sources_of

# A copy, so that a shipped figure may change.
_LAPTOP = (Path(__file__).parent / "samples" / "laptop-cpu.yaml").read_text()
_NANO = (resources.files("edgeq.profiles") / "jetson-orin-nano-8gb.yaml").read_text()


def changed(text: str, change: Callable[[dict[str, Any]], object]) -> str:
    """A shipped profile with one thing changed."""
    raw = yaml.safe_load(text)
    change(raw)
    return yaml.safe_dump(raw, sort_keys=False)


def refused(text: str) -> str:
    with pytest.raises(ProfileError) as caught:
        parse_profile(text, "mine.yaml")
    error = caught.value
    assert error.cause.startswith("mine.yaml")
    assert error.remedy
    assert "\n" not in str(error)
    assert len(str(error)) < 600
    return str(error)


def test_units_arrive_in_base_units() -> None:
    profile = parse_profile(_LAPTOP, "mine.yaml")
    assert profile.memory.total_bytes == 16 * 2**30
    assert profile.memory.bandwidth_bytes_per_s == pytest.approx(25.6e9)
    assert profile.memory.usable_bytes == 11.5 * 2**30
    assert profile.budget.itl_ms == 100.0
    assert profile.backend.compute_flops_per_s == pytest.approx(120e9)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("0ms", 0), ("0", 0), (0, 0), ("0.0 us", 0), ("250us", 0.25), ("1.5s", 1500)],
)
def test_an_overhead_may_be_nothing(value: object, expected: float) -> None:
    assert parse_fields({"token_overhead_ms": value}) == {"token_overhead_ms": expected}


def test_a_rate_needs_no_unit_and_measured_numbers_have_none() -> None:
    assert (
        parse_fields({"budgets": {"planner": {"tokens_per_s": "20tok/s"}}})["budgets"]["planner"]["tokens_per_s"] == 20
    )
    assert parse_fields({"budgets": {"planner": {"tokens_per_s": 20}}})["budgets"]["planner"]["tokens_per_s"] == 20
    assert parse_fields({"measured": {"drift_ms": -0.5}}) == {"measured": {"drift_ms": -0.5}}
    assert parse_fields({"measured": {"available_bytes": 5, "bytes_per_s": "2GB/s"}})["measured"] == {
        "available_bytes": 5,
        "bytes_per_s": 2e9,
    }


@pytest.mark.parametrize(
    ("path", "key", "words"),
    [
        ("", "arhc", ["arhc", "Perhaps arch is meant"]),
        ("cpu", "coers", ["cpu.coers", "Perhaps cores is meant"]),
        ("gpu", "sm", ["gpu.sm", "Perhaps sms is meant"]),
        ("memory", "total_byte", ["memory.total_byte", "Perhaps total_bytes is meant"]),
        ("power_modes.15W", "gpu_clok_hz", ["power_modes.15W.gpu_clok_hz", "Perhaps gpu_clock_hz is meant"]),
        ("power_modes.15W", "name", ["power_modes.15W.name"]),
        ("backends.llama.cpp-cuda", "precision", ["backends.llama.cpp-cuda.precision", "Perhaps precisions is meant"]),
        ("budgets", "planer", ["budgets.planer", "Perhaps planner is meant"]),
        ("budgets.planner", "itl", ["budgets.planner.itl", "Perhaps itl_ms is meant"]),
        ("software.0", "jetpak", ["software.0.jetpak", "Perhaps jetpack is meant"]),
        ("cpu", "zzz", ["cpu.zzz", "Known keys: clock_hz, cores, features, name"]),
    ],
)
def test_a_misspelt_key_at_any_depth_names_the_right_one(path: str, key: str, words: list[str]) -> None:
    def change(raw: dict[str, Any]) -> None:
        at: Any = raw
        parts = ["backends", "llama.cpp-cuda"] if path.startswith("backends") else path.split(".") if path else []
        for part in parts:
            at = at[int(part)] if part.isdigit() else at[part]
        at[key] = "x"

    message = refused(changed(_NANO, change))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("total_bytes: 16GiB", "total_bytes: 8", ["memory.total_bytes", "8 has no unit", "8GiB"]),
        ("total_bytes: 16GiB", "total_bytes: '8'", ["memory.total_bytes", "no unit"]),
        ("total_bytes: 16GiB", "total_bytes: 8 bananas", ["memory.total_bytes", "bananas"]),
        ("total_bytes: 16GiB", "total_bytes: 0 bananas", ["memory.total_bytes", "bananas"]),
        ("total_bytes: 16GiB", "total_bytes: -8GiB", ["memory.total_bytes", "positive"]),
        ("total_bytes: 16GiB", "total_bytes: [16GiB]", ["memory.total_bytes"]),
        ("total_bytes: 16GiB", "total_bytes: true", ["memory.total_bytes", "no amount"]),
        ("total_bytes: 16GiB", "total_bytes: -8", ["memory.total_bytes", "-8 is not a positive amount", "8GiB"]),
        ("total_bytes: 16GiB", "total_bytes: .nan", ["memory.total_bytes", "not a number", "8GiB"]),
        ("total_bytes: 16GiB", "total_bytes: -.inf", ["memory.total_bytes", "cannot be infinite", "8GiB"]),
        ("total_bytes: 16GiB", "total_bytes: 16Gb", ["memory.total_bytes", "means gigabits"]),
        ("ttft_ms: 2s,", "ttft_ms: 2s, power_w: 20MW,", ["budgets.planner.power_w", "means megawatts"]),
        ("ttft_ms: 2s,", "ttft_ms: 2s, power_w: 0MW,", ["budgets.planner.power_w", "means megawatts"]),
        ("  memory.total_bytes: the", "  # the", ["no source for memory.total_bytes"]),
        ("bandwidth_bytes_per_s: 25.6GB/s", "bandwidth_bytes_per_s: 25.6GB", ["bandwidth_bytes_per_s", "GB/s"]),
        ("bandwidth_bytes_per_s: 25.6GB/s", "bandwidth_bytes_per_s: 0", ["bandwidth_bytes_per_s", "number above 0"]),
        ("bandwidth_bytes_per_s: 25.6GB/s", "bandwidth_bytes_per_s: 25.6Gb/s", ["'Gb/s' means gigabits", "write GB/s"]),
        ("compute_flops_per_s: 120GFLOP/s", "compute_flops_per_s: 120TOPS", ["compute_flops_per_s", "TOPS", "gflop/s"]),
        ("cores: 4", "cores: 4GiB", ["cpu.cores", "Write a whole number"]),
        ("cores: 4", "cores: 0", ["cpu.cores", "1 or more"]),
        ("cores: 4", "cores: 100000", ["cpu.cores", "512 or less"]),
        ("cores: 4", "cores: .inf", ["cpu.cores", "cannot be infinite"]),
        ("decode_efficiency: 0.55", "decode_efficiency: 1.5", ["decode_efficiency", "such as 0.5 for 50 %"]),
        ("decode_efficiency: 0.55", "decode_efficiency: 50%", ["llama.cpp-cpu.decode_efficiency", "such as 0.5 for"]),
        ("decode_efficiency: 0.55", "decode_efficiency: 0", ["llama.cpp-cpu.decode_efficiency", "such as 0.5 for"]),
        ("decode_efficiency: 0.55", "decode_efficiency: .nan", ["llama.cpp-cpu.decode_efficiency", "not a number"]),
        ("decode_efficiency: 0.55", "decode_efficiency: yes", ["llama.cpp-cpu.decode_efficiency"]),
        ("    runtime_bytes: 58MiB\n", "", ["runtime_bytes"]),
        ("itl_ms: 100ms", 'itl_ms: "0"', ["budgets.planner.itl_ms", "nothing can keep"]),
        ("ttft_ms: 2s,", "ttft_ms: 2s, tokens_per_s: .inf,", ["tokens_per_s"]),
        ("ttft_ms: 2s,", "ttft_ms: 2s, tokens_per_s: -1,", ["tokens_per_s"]),
        ("arch: x86_64", "arch: banana", ["arch", "'banana'", "Choose one of x86_64, aarch64, any"]),
        ("arch: x86_64", "arch: x86_64\nthreads: -4", ["threads"]),
        ("arch: x86_64", "arch: x86_64\nsoftware: {jetpack: a}", ["software"]),
        ("arch: x86_64", "arch: x86_64\nsoftware: [{cuda: 12.6}]", ["software", "cuda", "Put it in quotes"]),
        ("unified: false", "unified: 'no'", ["memory.unified", "Write true or false"]),
        ("unified: false", "unified: 3", ["memory.unified"]),
        ("  memory.total_bytes: the", "  memory.total: the", ["memory.total", "Perhaps memory.total_bytes is meant"]),
        ("  memory.reserved_bytes: a", "  # a", ["no source for memory.reserved_bytes"]),
        ("  cpu: the least that laptops sold in 2024-2026 have", "  cpu: ' '", ["sources"]),
        ("  cpu: the least that laptops sold in 2024-2026 have", "  cpu: 5", ["sources"]),
        ("  cpu: the least that laptops sold in 2024-2026 have", "  1: a", ["sources"]),
        (
            "provenance: datasheet",
            "provenance: hearsay",
            ["provenance", "hearsay", "Choose one of datasheet, measured"],
        ),
        ("provenance: datasheet", "provenance: measured", ["provenance"]),
        ("provenance: datasheet\n", "", ["lacks provenance"]),
        ("name: laptop-cpu", "name: Laptop CPU", ["name", "lower-case"]),
        ("name: laptop-cpu", "name: 5", ["name"]),
        ("name: laptop-cpu", "name: laptop.yaml", ["would be read as a file's"]),
        ("aliases: [laptop]", "aliases: [laptop", ["no valid YAML"]),
        ("aliases: [laptop]", "aliases: [La Ptop]", ["aliases", "lower-case"]),
        ("aliases: [laptop]", "aliases: laptop", ["aliases"]),
        ("aliases: [laptop]", "aliases: [laptop-cpu]", ["a name twice"]),
        ("aliases: [laptop]", f"aliases: {'[' * 60}{']' * 60}", ["too deeply"]),
        ("summary: A", "1: A", ["the key 1", "quotes"]),
        ("summary: A", "summary: 2024-01-01 #", ["summary", "Put it in quotes"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(old: str, new: str, words: list[str]) -> None:
    assert old in _LAPTOP
    message = refused(_LAPTOP.replace(old, new, 1))
    assert all(word in message for word in words), message


def _set(*path: str) -> Callable[[object], Callable[[dict[str, Any]], None]]:
    def with_value(value: object) -> Callable[[dict[str, Any]], None]:
        def change(raw: dict[str, Any]) -> None:
            at = raw
            for part in path[:-1]:
                at = at[part]
            at[path[-1]] = value

        return change

    return with_value


def _only_sources(raw: dict[str, Any]) -> None:
    raw["sources"] = {key: "a test" for key in raw if key not in ("name", "sources") and raw[key] is not None}


_MODE = ("power_modes", "15W")
_CUDA = ("backends", "llama.cpp-cuda")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("memory", "visible_bytes")("9GiB"), ["visible_bytes is more than memory.total_bytes"]),
        (_set("memory", "reserved_bytes")("7620MiB"), ["reserved_bytes leaves nothing"]),
        (_set("memory", "reserved_bytes")("64GiB"), ["reserved_bytes leaves nothing"]),
        (_set("memory", "measured_bandwidth_bytes_per_s")("200GB/s"), ["above the peak"]),
        (_set("budgets", "planner", "peak_memory_bytes")("7GiB"), ["budgets.planner.peak_memory_bytes"]),
        (_set("threads")(7), ["7 threads", "6 cores"]),
        (_set(*_MODE, "sms")(9), ["power_modes.15W.sms is more than gpu.sms"]),
        (_set(*_MODE, "gpu_clock_hz")("2GHz"), ["power_modes.15W.gpu_clock_hz"]),
        (_set(*_MODE, "cpu_cores")(7), ["power_modes.15W.cpu_cores is more than cpu.cores"]),
        (_set(*_MODE, "cpu_clock_hz")("3GHz"), ["power_modes.15W.cpu_clock_hz"]),
        (_set(*_MODE, "int8_ops_per_s")("99TOPS"), ["power_modes.15W.int8_ops_per_s"]),
        (_set(*_MODE, "bandwidth_bytes_per_s")("300GB/s"), ["power_modes.15W.bandwidth_bytes_per_s"]),
        (_set(*_MODE, "measured_bandwidth_bytes_per_s")("70GB/s"), ["power_modes.15W.measured", "the mode's peak"]),
        (_set(*_MODE, "nvpmodel_id")(1), ["one nvpmodel_id"]),
        (_set(*_MODE, "sms")("q"), ["power_modes.15W.sms", "Write a whole number"]),
        (_set("power_modes", "25w")({}), ["upper and lower case"]),
        (_set("power_mode")("30W"), ["power_mode is '30W'", "7W, 15W, 25W, MAXN_SUPER"]),
        (_set("power_mode")(None), ["which one its figures are for"]),
        (_set("gpu")(None), ["needs a GPU"]),
        (_set("gpu", "fp8_ops_per_s")("60TOPS"), ["8.7 has no fp8"]),
        (_set("gpu", "compute_capability")(8.7), ["gpu.compute_capability", "Put it in quotes"]),
        (_set("gpu", "compute_capability")("sm_87"), ["of another form", 'such as "8.7" for sm_87']),
        (_set("gpu", "compute_capability")("11"), ["gpu.compute_capability", 'such as "8.7" for sm_87']),
        (
            _set(*_MODE, "sms")(4),
            ["power_modes.15W.int8_ops_per_s is 20.1 TOPS", "4 SMs at 612 MHz", "10 TOPS", "null"],
        ),
        (_set(*_MODE, "gpu_clock_hz")("306MHz"), ["power_modes.15W.int8_ops_per_s", "8 SMs at 306 MHz"]),
        (_set(*_MODE, "gpu_clock_hz")(None), ["power_modes.15W.int8_ops_per_s", "8 SMs at 1020 MHz"]),
        (_set(*_MODE, "int8_ops_per_s")("20.6TOPS"), ["power_modes.15W.int8_ops_per_s"]),
        (_set("gpu", "int8_ops_per_s")("66.8TOPS"), ["gpu.int8_ops_per_s", "8 SMs at 1020 MHz", "dense", "33.4"]),
        (_set("gpu", "clock_hz")("100MHz"), ["gpu.int8_ops_per_s", "8 SMs at 100 MHz"]),
        (_set(*_CUDA, "precisions")(["fp16", "fp8"]), ["backends.llama.cpp-cuda", "8.7 has no fp8", "Remove fp8"]),
        (_set(*_CUDA, "precisions")(["fp12"]), ["precision 'fp12'"]),
        (_set(*_CUDA, "precisions")([]), ["no precisions"]),
        (_set(*_CUDA, "compute_flops_per_s")("1TFLOP/s"), ["Keep one of them"]),
        (_set(*_CUDA, "compute_efficiency")(None), ["does not say how fast it computes"]),
        (_set(*_CUDA, "decode_efficiency")(None), ["lacks decode_efficiency"]),
        (_set("backends", "llama.cpp-cuad")({"precisions": ["fp16"]}), ["llama.cpp-cuad", "llama.cpp-cuda"]),
        (_set("backends")({}), ["names no backend"]),
        (_set("backends")(["llama.cpp-cuda"]), ["backends that are no mapping"]),
        (_set("backends")(None), ["names no backend"]),
        (_set("backends", "tensorrt")("fp16"), ["backends.tensorrt that is no mapping"]),
        (_set("backends", "tensorrt")({}), ["lacks backends.tensorrt.precisions"]),
        (_set("power_modes")("15W"), ["power_modes that are no mapping"]),
    ],
)
def test_what_cannot_be_true_together_is_refused(change: Callable[[dict[str, Any]], None], words: list[str]) -> None:
    message = refused(changed(changed(_NANO, change), _only_sources))
    assert all(word in message for word in words), message


def test_figures_of_a_gpu_that_are_not_known_are_not_judged() -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["power_modes"]["15W"] |= {"sms": 4, "int8_ops_per_s": None}
        raw["gpu"] |= {"compute_capability": "99.0", "int8_ops_per_s": "66TOPS"}
        raw["power_modes"] = {"15W": raw["power_modes"]["15W"]}
        raw["power_mode"] = "15W"

    text = changed(changed(_NANO, change), _only_sources)
    assert parse_profile(text, "mine.yaml").int8_ops_per_s == pytest.approx(66e12 * 4 / 8 * 612 / 1020)


@pytest.mark.parametrize("key", [15, True, 1.5])
def test_names_of_power_modes_are_texts(key: object) -> None:
    message = refused(changed(_NANO, lambda raw: raw["power_modes"].update({key: {"sms": 4}})))
    assert f"power_modes.{key}" in message
    assert "quotes" in message


def test_many_missing_sources_are_still_one_line() -> None:
    message = refused(changed(_NANO, lambda raw: raw.update(sources={})))
    assert "no source" in message
    assert "cpu.cores" in message
    assert "more." in message


def test_a_wrong_unit_is_told_before_a_missing_source() -> None:
    text = "name: mine\nsummary: a robot\nextends: laptop-cpu\nmemory: {reserved_bytes: 3 bananas}\n"
    assert "bananas" in refused(text)


@pytest.mark.parametrize("text", ["- 1", "", "5", "null", "\x00", "a: &x 1\nb: *x"])
def test_what_is_no_mapping_is_no_profile(text: str) -> None:
    refused(text)


def test_sources_are_told_by_value() -> None:
    raw = {
        "a": {"x": "1GB", "y": "2GB"},
        "b": {"z": None, "n": 5},
        "sources": {"a": "of both", "a.y": "of one", "b": "c"},
    }
    assert sources_of(raw) == {"a.x": "of both", "a.y": "of one", "b.n": "c"}


def test_quantities_name_their_path() -> None:
    with pytest.raises(UsageError, match=r"a\.b\.0\.c_bytes"):
        parse_fields({"a": {"b": [{"c_bytes": 5}]}})
    with pytest.raises(UsageError, match=r"a\.b cannot be infinite"):
        parse_fields({"a": {"b": float("inf")}})


_RAW: dict[str, Any] = yaml.safe_load(_NANO)
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["8GiB", "0", "-1GB", "1e400GB", "15W", "0ms", "fp8", 10**400, "1" * 5000, {}, []])
)
_ANYTHING = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*_RAW, "15W", "sms", "precisions"]) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def _places(raw: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    for key in raw if isinstance(raw, dict) else range(len(raw)) if isinstance(raw, list) else ():
        found += _places(raw[key], (*path, key))
    return found


_PLACES = _places(_RAW)


@given(st.lists(st.tuples(st.sampled_from(_PLACES), _ANYTHING), min_size=1, max_size=3))
def test_any_values_anywhere_give_a_profile_or_a_line(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    raw = copy.deepcopy(_RAW)
    for path, value in changes:
        at = raw
        try:
            for part in path[:-1]:
                at = at[part]
            at[path[-1]] = copy.deepcopy(value)
        except (KeyError, TypeError, IndexError):
            continue  # an earlier change took the place away
    _read(yaml.safe_dump(raw))


@given(_ANYTHING)
def test_any_yaml_gives_a_line(data: Any) -> None:
    _read(yaml.safe_dump(data))


def _read(text: str) -> None:
    try:
        parse_profile(text, "mine.yaml")
    except ProfileError as error:
        assert "\n" not in str(error)
