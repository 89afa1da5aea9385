"""``edgeq bench``, ``edgeq report`` and ``edgeq verify`` on models that are called with arrays, as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeq.bundle import MANIFEST, open_bundle, write_manifest
from edgeq.cli.tables import render_report
from edgeq.report import Report, TensorDetails, read_report
from edgeq.tensor_types import AxisRange, TensorPrediction
from edgeq.types import from_json

pytest.importorskip("onnxruntime")

AXES = {"batch": AxisRange(least=1, usual=2, most=6)}
SHORT = ("--warmup", "1", "--repetitions", "300", "--max-host-load", "1")


@pytest.fixture(scope="module")
def bundle(linear_onnx: Path, make_tensor_bundle: Any) -> Path:
    folder: Path = make_tensor_bundle(linear_onnx, plan={"axes": AXES})
    return folder


@pytest.fixture(scope="module")
def measured(bundle: Path, run_cli: Any) -> CompletedProcess[str]:
    done: CompletedProcess[str] = run_cli("bench", bundle, *SHORT, "--max-latency", "60s", "--max-memory", "4GiB")
    return done


def test_a_met_budget_exits_with_zero_and_a_table(measured: CompletedProcess[str]) -> None:
    assert measured.returncode == 0, measured.stderr
    lines = measured.stdout.splitlines()
    assert lines[0] == "linear, built for laptop-cpu, fp32 for onnxruntime-cpu, CPUExecutionProvider, 1 threads"
    passed = [line.split("  ")[0] for line in lines if line.endswith("PASS")]
    assert passed == ["peak memory", "latency p99", "result: PASS"]
    assert re.search(r"^workload +300 calls in [\d.]+ s, after 1 warm-up$", measured.stdout, re.MULTILINE)
    assert re.search(r"^inputs +random numbers, 16 different calls: x 2x8$", measured.stdout, re.MULTILINE)
    assert re.search(r"^latency +p50 [\d.]+ ms, p90 [\d.]+ ms, p99 [\d.]+ ms$", measured.stdout, re.MULTILINE)
    assert re.search(r"^throughput +[\d.]+ calls/s \(by one caller", measured.stdout, re.MULTILINE)
    assert re.search(r"^load time +p50 ", measured.stdout, re.MULTILINE)
    assert "VmHWM of the serving process" in measured.stdout
    assert "time to first token" not in measured.stdout


def test_report_prints_the_same_again(measured: CompletedProcess[str], bundle: Path, run_cli: Any) -> None:
    again = run_cli("report", bundle)
    assert (again.returncode, again.stdout, again.stderr) == (0, measured.stdout, "")
    report = read_report(bundle / "reports" / "report.json")
    assert len(report.metrics["latency_ms"].samples) == 300
    assert open_bundle(bundle, verify=True).manifest.kind == "tensor"


def test_a_predicted_floor_is_marked(linear_onnx: Path, make_tensor_bundle: Any, run_cli: Any) -> None:
    sizes = {"file_bytes": 1, "weights_bytes": 1, "activation_bytes": 1, "runtime_bytes": 1, "peak_memory_bytes": 4}
    for floor, shown in ((True, "≳ 0.012 ms"), (False, "0.012 ms")):
        predicted = TensorPrediction(**sizes, latency_ms=0.0123, latency_is_floor=floor)
        folder = make_tensor_bundle(linear_onnx, plan={"axes": AXES, "predicted": predicted})
        done = run_cli("bench", folder, "--warmup", "0", "--repetitions", "5", "--max-host-load", "1")
        assert done.returncode == 0, done.stderr
        assert re.search(rf"^latency p99 +{shown} ", done.stdout, re.MULTILINE), done.stdout
        assert run_cli("report", folder).stdout == done.stdout
        told = json.loads(run_cli("report", folder, "--json").stdout)
        floors = {verdict["field"]: verdict["predicted_is_floor"] for verdict in told["verdicts"]}
        assert floors.pop("latency_ms") is floor
        assert not any(floors.values())


def test_calls_of_several_shapes_are_shown_by_their_ends(measured: CompletedProcess[str], bundle: Path) -> None:
    assert measured.returncode == 0
    report = read_report(bundle / "reports" / "report.json")
    assert isinstance(report.details, TensorDetails)
    shapes = ({"x": (1, 8), "n": ()}, {"x": (2, 8), "n": ()}, {"x": (4, 8), "n": ()})
    several = msgspec.structs.replace(report, details=msgspec.structs.replace(report.details, shapes=shapes))
    assert "x 1x8, n scalar to x 4x8, n scalar\n" in render_report(several, colour=False)


def test_inputs_of_the_user_as_json(bundle: Path, tmp_path: Path, run_cli: Any) -> None:
    np.savez(tmp_path / "mine.npz", x=np.ones((5, 8), np.float32))
    done = run_cli(
        "bench", bundle, *SHORT, "--inputs", tmp_path / "mine.npz", "--json", "--output", tmp_path / "r.json"
    )
    assert done.returncode == 0, done.stderr
    report = from_json(done.stdout.encode(), Report)
    assert report == read_report(tmp_path / "r.json")
    assert isinstance(report.details, TensorDetails)
    assert (report.details.inputs, report.details.calls) == ("mine.npz", 5)


def refused(done: CompletedProcess[str], code: int = 2) -> str:
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--prompt-tokens", "5"], "--prompt-tokens is for language models"),
        (["--output-tokens", "5", "--context", "64"], "--output-tokens, --context is for language models"),
        (["--max-itl", "5ms"], "--max-itl is for language models"),
        (["--max-ttft", "5ms", "--min-tps", "1"], "--max-ttft, --min-tps is for language models"),
        (["--axis", "batch"], "--axis 'batch' is not NAME=N"),
        (["--axis", "batch=x"], "is not NAME=N"),
        (["--axis", "rows=1"], "no dynamic axis 'rows'"),
        (["--size", "huge"], "invalid choice"),
        (["--inputs", "nowhere.npz"], "nowhere.npz"),
        (["--max-latency", "5"], "no unit"),
    ],
)
def test_options_that_make_no_sense(bundle: Path, tmp_path: Path, cli: Any, arguments: list[str], match: str) -> None:
    assert match in refused(cli("bench", bundle, *arguments, "--output", tmp_path / "r.json"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--axis", "batch=4"], ["--size", "largest"], ["--inputs", "."], ["--max-latency", "5ms"]]
)
def test_options_that_a_language_model_does_not_have(smollm2_bundle: Path, cli: Any, arguments: list[str]) -> None:
    assert f"is a language model, and {arguments[0]} is for others" in refused(cli("bench", smollm2_bundle, *arguments))


def test_verify_compares_the_graph_with_the_manifest(linear_onnx: Path, make_tensor_bundle: Any, cli: Any) -> None:
    pytest.importorskip("onnx")
    bundle = make_tensor_bundle(linear_onnx)
    done = cli("verify", bundle)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok: 1 files, ")
    assert done.stdout.endswith(", inputs, outputs and opset as the manifest tells\n")
    assert json.loads(cli("verify", bundle, "--json").stdout)["ok"] is True
    manifest = open_bundle(bundle).tensor
    changes: list[dict[str, Any]] = [{"opset": 19}, {"inputs": manifest.artifact.outputs}, {"outputs": ()}]
    for change in changes:
        told = msgspec.structs.replace(manifest.artifact, **change)
        write_manifest(bundle, msgspec.structs.replace(manifest, artifact=told))
        line = refused(cli("verify", bundle), 1)
        assert f"The manifest tells the {next(iter(change))} " in line
    assert (bundle / MANIFEST).is_file()
