"""The probe itself, really run, with few types so that it takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from edgeq.cli import main
from edgeq.probe import language, steps
from edgeq.probe.reference import Reading, SpeedReference, between, spread_of
from edgeq.probe.session_costs import DEEP, SHALLOW, measure_session
from edgeq.probe_points import MatmulPoint
from edgeq.profiles.kernels.cost_table import CostEntry
from edgeq.profiles.kernels.probe_attention import SHAPES
from edgeq.profiles.llm.model_latency import Kernels, decode_ms, speeds_of, ttft_ms
from edgeq.profiles.llm.sample_model import SampleModel, sample_types
from edgeq.profiles.loader import load_profile

TYPES = ("f16", "q8_0", "q4_0")


@pytest.fixture
def few_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "PROBED_TYPES", TYPES)
    monkeypatch.setattr(language, "DECODE_SHAPES", ((512, 256), (512, 4096)))
    monkeypatch.setattr(language, "MATMUL_SHAPES", ((512, 512),))
    monkeypatch.setattr(language, "KV_TYPES", ("f16", "q8_0"))
    monkeypatch.setattr(language, "_USUAL_KV", ("f16",))
    monkeypatch.setattr(language, "SHAPES", SHAPES[:1])


def test_a_probed_machine_has_a_profile_that_predicts(
    tmp_path: Path, few_types: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my robot.yaml"
    assert main(["devices", "probe", "-o", str(out), "--seconds", "2", "--threads", "1"]) == 0
    told = capsys.readouterr()
    assert "q8_0" in told.out
    assert f"wrote {out}" in told.out
    profile = load_profile(str(out))
    assert (profile.name, profile.threads, profile.provenance) == ("my-robot", 1, "measured")
    found = profile.measured
    assert found is not None
    assert found.language is not None
    assert {entry.type for entry in found.language.decode.entries} == set(TYPES)
    assert all(f"warning: do not trust these figures: {doubt}" in told.err for doubt in found.doubts)
    assert found.bandwidth[0].read_bytes_per_s > 1e8
    speeds = speeds_of(profile)
    assert isinstance(speeds.prompts, Kernels)
    model = SampleModel(layers=4, width=512, feed_forward=1024, heads=8, kv_heads=4)
    shape, types = model.shape(), sample_types(model)
    token = decode_ms(shape, types, speeds, kv_types=("f16", "f16"), cached_tokens=128)
    prompt = ttft_ms(shape, types, speeds, kv_types=("f16", "f16"), prompt_tokens=128, ubatch_tokens=128)
    assert 0 < token < prompt < 128 * token
    # Nothing is overwritten unasked.
    assert main(["devices", "probe", "-o", str(out)]) == 1
    assert "--force" in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_file_the_profile_is_the_result(few_types: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "probe", "--seconds", "1", "--threads", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["name"] == "this-machine"
    assert document["measured"]["language"]["decode"]["threads"] == 1


@pytest.mark.parametrize(
    "arguments", [["--seconds", "0"], ["--seconds", "x"], ["--threads", "0"], ["--threads", "100000"]]
)
def test_nonsense_is_refused_before_any_work(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["devices", "probe", *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices", "probe", "-o", str(tmp_path / "missing" / "x.yaml")]) == 1
    assert "missing" in capsys.readouterr().err


def test_a_session_takes_more_time_for_more_layers_and_tells_its_memory() -> None:
    shallow, deep = measure_session((SHALLOW, DEEP), threads=1)
    assert deep.decode_ns > shallow.decode_ns
    assert deep.prompt_ns > shallow.prompt_ns
    for found in (shallow, deep):
        assert 20 << 20 < found.beside_bytes < 200 << 20  # an interpreter with numpy and llama.cpp


def test_readings_tell_how_much_a_machine_changes() -> None:
    assert spread_of([Reading(100.0, 50.0), Reading(150.0, 50.0)]) == pytest.approx((0.5, 0.0))
    with SpeedReference(1) as reference:
        readings = [reference.read() for _ in range(2)]
    assert all(reading.decode_ns > 0 < reading.prompt_ns for reading in readings)


def test_a_doubt_names_what_changed() -> None:
    steady, slower = Reading(100.0, 50.0), Reading(130.0, 51.0)
    (doubt,) = steps._unsteady((steady, slower))
    assert doubt.startswith("the speed of memory changed by 30%")
    assert steps._unsteady((steady, steady)) == ()
    assert steps._unsteady(()) == ()


def test_parts_count_with_the_mean_of_their_turns() -> None:
    entry = CostEntry(type="q8_0", columns=512, rows=256, ns=100.0, spread=0.1, n=5, buffer="CPU")
    mean = language._mean_times([entry, msgspec.structs.replace(entry, ns=300.0, spread=0.3, n=7)])
    assert (mean.ns, mean.n) == (200.0, 12)
    assert mean.spread == pytest.approx(0.2)
    point = MatmulPoint(
        type="q8_0", columns=512, rows=256, batch=16, threads=1, flops_per_s=1e9, spread=0.0, n=3, buffer="CPU"
    )
    faster = msgspec.structs.replace(point, flops_per_s=4e9)
    # Times are what is added up, so it is their mean that counts, not that of speeds.
    assert language._mean_matmul([point, faster]).ns == pytest.approx((point.ns + faster.ns) / 2)


def test_times_are_put_at_the_usual_speed() -> None:
    slow, quick = Reading(200.0, 50.0), Reading(100.0, 40.0)
    assert between(slow, quick) == quick
    usual = language._usual([slow, quick, quick])
    assert usual == quick
    assert language._factor(slow, usual) == Reading(0.5, 0.8)
    point = MatmulPoint(
        type="q8_0", columns=512, rows=256, batch=16, threads=1, flops_per_s=1e9, spread=0.0, n=3, buffer="CPU"
    )
    (at_usual,) = language._at([point], 0.8)
    assert at_usual.ns == pytest.approx(0.8 * point.ns)
