"""What makes an engine worthless is told in words."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from edgeq.runtime.tensorrt.engine_key import Machine, differences, engine_key, key_name, read_machine
from edgeq.runtime.tensorrt.records import EngineKey, EngineSettings
from edgeq.system_files import SystemFiles
from edgeq.tensor_types import AxisRange

KEY = EngineKey(
    artifact_sha256="a" * 64, flavour="tensorrt", version="10.3.0.30", compute_capability="8.7", sms=8,
    power_mode="15W", l4t="36.4.3", settings="s",
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"artifact_sha256": "b" * 64}, "another model"),
        ({"data_sha256": "b" * 64}, "another model's weights"),
        ({"version": "10.16.2.10"}, "TensorRT 10.3.0.30, now 10.16.2.10"),
        ({"compute_capability": "8.9"}, "compute capability 8.7, now 8.9"),
        ({"sms": 4}, "streaming multiprocessors 8, now 4"),
        ({"power_mode": "25W"}, "power mode 15W, now 25W"),
        ({"power_mode": None}, "power mode 15W, now unknown"),
        ({"l4t": "36.5.0"}, "Jetson Linux 36.4.3, now 36.5.0"),
        ({"settings": "t"}, "another settings"),
    ],
)
def test_every_part_of_the_key_counts(change: dict[str, object], told: str) -> None:
    wanted = msgspec.structs.replace(KEY, **change)
    assert differences(KEY, wanted) == (told,)
    assert key_name(wanted) != key_name(KEY)


def test_an_equal_key_differs_in_nothing() -> None:
    assert differences(KEY, msgspec.structs.replace(KEY)) == ()
    assert key_name(KEY) == key_name(msgspec.structs.replace(KEY))


def _library(name: str, version: str = "10.3.0") -> ModuleType:
    module = ModuleType(name)
    module.__dict__["__version__"] = version
    return module


def test_the_key_is_of_the_files_and_of_what_was_asked(tiny: ModuleType, tmp_path: Path) -> None:
    trt, machine = _library("tensorrt"), Machine(sms=8, power_mode="15W", l4t="36.4.3")
    graph = tiny.external_graph(tmp_path / "model.onnx", "weights.data")
    settings = EngineSettings(axes={"batch": AxisRange(least=1, usual=1, most=4)})
    key = engine_key(trt, graph, settings, "8.7", machine)
    assert (key.sms, key.power_mode, key.l4t) == (8, "15W", "36.4.3")
    # Limits, threads and caches shape the way to an engine, and not the engine.
    limited = msgspec.structs.replace(settings, workspace_bytes=1 << 20, threads=1, timing_cache="x", tactic_bytes=5)
    assert engine_key(trt, graph, limited, "8.7", machine) == key
    wider = EngineSettings(axes={"batch": AxisRange(least=1, usual=1, most=8)})
    assert differences(key, engine_key(trt, graph, wider, "8.7", machine)) == ("another settings",)
    weights = tmp_path / "weights.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert differences(key, engine_key(trt, graph, settings, "8.7", machine)) == ("another model's weights",)


def test_rtx_engines_are_the_same_on_every_machine_of_a_capability(tiny: ModuleType, tmp_path: Path) -> None:
    graph = tiny.float_graph(tmp_path / "model.onnx")
    settings, rtx = EngineSettings(), _library("tensorrt_rtx", "1.7.1.116")
    here = engine_key(rtx, graph, settings, "8.9", Machine(sms=24))
    assert here == engine_key(rtx, graph, settings, "8.9", Machine())
    assert here.sms is None


def test_a_jetson_tells_power_mode_and_release(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic")
    (tmp_path / "etc/nvpmodel.conf").write_text("< POWER_MODEL ID=1 NAME=25W >\nGPU MAX_FREQ 918000000\n")
    (tmp_path / "var/lib/nvpmodel").mkdir(parents=True)
    (tmp_path / "var/lib/nvpmodel/status").write_text("pmode:0001 fmode:quiet")
    assert read_machine(8, SystemFiles(tmp_path)) == Machine(sms=8, power_mode="25W", l4t="36.4.3")
    assert read_machine(24, SystemFiles(tmp_path / "nothing")) == Machine(sms=24)
