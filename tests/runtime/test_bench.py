"""The benchmark on the real SmolLM2: samples, verdicts, disturbance, and processes that die."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.bundle import MANIFEST, hash_file
from edgeq.errors import BundleError, EdgeqError, PromptTooLongError, SessionError, UsageError
from edgeq.report import LanguageDetails, LanguageWorkload, Report, TensorWorkload
from edgeq.runtime.bench import run_bench
from edgeq.runtime.bench_language import LanguageSubject, prompts, samples_per_answer
from edgeq.runtime.bench_messages import Finished, Generate, Load, Loaded, Sample, Usage
from edgeq.runtime.bench_process import WorkerProcess
from edgeq.runtime.bench_run import Conditions, planned_loads, planned_repetitions
from edgeq.types import Budget, from_json, to_json

# The machine that runs the tests may be busy; only the tests of host load look at it.
ANY_LOAD = 1.0
SHORT = LanguageWorkload(prompt_tokens=8, output_tokens=4, warmup=1, repetitions=5, threads=1)
BUDGET = Budget(peak_memory_bytes=1 << 20, load_ms=120_000, ttft_ms=60_000, itl_ms=1e-3, tokens_per_s=1e-3, power_w=15)
BALLAST_BYTES = 300 << 20


class MakeBundle(Protocol):
    """The ``make_bundle`` fixture."""

    def __call__(self, model: Path, *, built_for: str = "laptop-cpu") -> Path: ...


@pytest.fixture(scope="module")
def report(smollm2_bundle: Path) -> Report:
    """One run whose budget brings about every kind of verdict, from a parent that is larger than its child."""
    ballast = bytearray(b"x") * BALLAST_BYTES
    measured = run_bench(smollm2_bundle, SHORT, budget=BUDGET, max_host_load=ANY_LOAD)
    assert len(ballast) == BALLAST_BYTES
    return measured


def test_every_raw_sample_is_kept(report: Report) -> None:
    counts = {name: len(entry.samples) for name, entry in report.metrics.items()}
    assert counts == {"ttft_ms": 5, "itl_ms": 15, "tokens_per_s": 5, "load_ms": 8, "peak_memory_bytes": 1}
    assert {name: len(entry.samples) for name, entry in report.warmup.items()} == {
        "ttft_ms": 1,
        "itl_ms": 3,
        "tokens_per_s": 1,
    }
    assert (report.repetitions, report.planned_repetitions) == (5, 5)
    assert all(sample > 0 for entry in report.metrics.values() for sample in entry.samples)
    assert sum(report.metrics["itl_ms"].samples) + sum(report.metrics["ttft_ms"].samples) < report.duration_s * 1e3


def test_every_kind_of_verdict(report: Report) -> None:
    results = {verdict.field: verdict.result for verdict in report.verdicts}
    assert results == {
        "peak_memory_bytes": "FAIL",
        "load_ms": "PASS",
        "ttft_ms": "INSUFFICIENT",
        "itl_ms": "FAIL",
        "tokens_per_s": "PASS",
        "latency_ms": None,
        "power_w": "INSUFFICIENT",
    }
    by_field = {verdict.field: verdict for verdict in report.verdicts}
    assert by_field["ttft_ms"].missing_samples == 54
    assert by_field["power_w"].reason.startswith("not measured")
    assert report.result == "FAIL"
    assert report.valid


def test_peak_memory_is_that_of_the_serving_process(report: Report, smollm2_bundle: Path) -> None:
    memory = report.memory
    assert memory is not None
    assert report.metrics["peak_memory_bytes"].source == "VmHWM of the serving process"
    weights = (smollm2_bundle / "model.gguf").stat().st_size
    assert weights < memory.peak_bytes < BALLAST_BYTES
    assert memory.before_load_bytes is not None
    assert memory.before_load_bytes < memory.peak_bytes - weights // 2


def test_report_identifies_bundle_machine_and_tools(report: Report, smollm2_bundle: Path) -> None:
    assert report.manifest_sha256 == hash_file(smollm2_bundle / MANIFEST)
    assert report.device.logical_cpus == len(os.sched_getaffinity(0))
    assert {"edgeq", "python", "llama.cpp", "llama-cpp-python"} <= set(report.tools)
    assert isinstance(report.details, LanguageDetails)
    assert (report.details.context_tokens, report.simulated, report.profile) == (512, False, "laptop-cpu")
    assert report.host_load.during is not None
    assert report.host_load.own is not None
    assert report.host_load.own > 0.05
    assert from_json(to_json(report), Report) == report


def test_no_prompt_is_found_in_the_cache(report: Report) -> None:
    assert not any("cache" in note for note in report.notes)


def test_nothing_constrained_has_no_result(smollm2_bundle: Path) -> None:
    workload = LanguageWorkload(prompt_tokens=4, output_tokens=1, warmup=0, repetitions=1, threads=1, context_tokens=64)
    report = run_bench(smollm2_bundle, workload, max_host_load=ANY_LOAD)
    assert report.result is None
    assert isinstance(report.details, LanguageDetails)
    assert (report.threads, report.details.context_tokens, report.warmup) == (1, 64, {})
    assert len(report.metrics["load_ms"].samples) == 1
    assert "itl_ms" not in report.metrics
    assert "no gap" in report.unmeasured["itl_ms"]


def test_time_ends_a_run_and_the_report_says_so(smollm2_bundle: Path) -> None:
    workload = LanguageWorkload(
        prompt_tokens=4, output_tokens=2, warmup=0, threads=1, repetitions=100_000, max_seconds=1.5
    )
    report = run_bench(smollm2_bundle, workload, max_host_load=ANY_LOAD)
    assert 1 <= report.repetitions < 100_000
    assert any("--max-seconds" in note and f"{report.repetitions} of 100000" in note for note in report.notes)


def test_seconds_instead_of_repetitions(smollm2_bundle: Path) -> None:
    workload = LanguageWorkload(prompt_tokens=4, output_tokens=2, warmup=0, threads=1, seconds=0.7)
    report = run_bench(smollm2_bundle, workload, max_host_load=ANY_LOAD)
    assert report.planned_repetitions is None
    assert report.duration_s >= 0.7
    assert report.notes == (
        "The plan predicts the time to first token for prompts of 1 tokens, not 4",
        (
            "Predicted times are means; inter-token latency and decode speed for a full context of 512 tokens, "
            "measured with at most 6"
        ),
    )


def test_a_loaded_host_is_named_and_nothing_passes(smollm2_bundle: Path) -> None:
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        report = run_bench(
            smollm2_bundle,
            LanguageWorkload(prompt_tokens=8, output_tokens=4, warmup=0, repetitions=5, threads=1),
            budget=Budget(peak_memory_bytes=1 << 40, tokens_per_s=1e-3),
        )
    finally:
        burner.kill()
        burner.wait()
    assert not report.valid
    assert "host loaded" in report.invalid_reasons[0]
    assert report.host_load.during is not None
    assert report.host_load.during > 0.1
    assert report.result == "INSUFFICIENT"
    assert {v.result for v in report.verdicts if v.limit is not None} == {"INSUFFICIENT"}


@pytest.mark.skipif(os.uname().machine == "aarch64", reason="the profile would describe this machine")
def test_a_bundle_for_another_device_never_passes_here(smollm2_gguf: Path, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(smollm2_gguf, built_for="jetson-orin")
    workload = LanguageWorkload(prompt_tokens=4, output_tokens=2, warmup=0, threads=1, repetitions=5)
    report = run_bench(bundle, workload, budget=Budget(peak_memory_bytes=1 << 40), max_host_load=ANY_LOAD)
    assert report.simulated
    assert not report.valid
    assert "jetson-orin is aarch64" in report.invalid_reasons[0]
    assert report.result == "INSUFFICIENT"


@pytest.mark.skipif(os.uname().machine == "aarch64", reason="the profile would describe this machine")
def test_nor_does_one_for_a_device_of_the_users_own(smollm2_gguf: Path, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(smollm2_gguf, built_for="my-robot")
    manifest = json.loads((bundle / "edgeq.json").read_text())
    manifest["target"] = {"arch": "aarch64", "accelerator": "cpu"}
    (bundle / "edgeq.json").write_text(json.dumps(manifest))
    workload = LanguageWorkload(prompt_tokens=1, output_tokens=2, warmup=0, threads=1, repetitions=1)
    report = run_bench(bundle, workload, budget=Budget(peak_memory_bytes=1 << 40), max_host_load=ANY_LOAD)
    assert report.simulated
    assert report.result == "INSUFFICIENT"


def test_an_unknown_profile_is_noted(smollm2_gguf: Path, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(smollm2_gguf, built_for="my-robot")
    workload = LanguageWorkload(prompt_tokens=1, output_tokens=2, warmup=0, threads=1, repetitions=1)
    report = run_bench(bundle, workload, max_host_load=ANY_LOAD)
    assert [note for note in report.notes if "my-robot" in note]
    assert report.valid


def test_a_killed_worker_is_one_line(smollm2_bundle: Path) -> None:
    def kill_child(_done: int, _total: int, what: str) -> None:
        if what == "repetition":
            for child in psutil.Process().children():
                child.kill()

    with pytest.raises(SessionError, match=r"^The measured process was killed by SIGKILL\..*dmesg") as caught:
        run_bench(smollm2_bundle, SHORT, max_host_load=ANY_LOAD, progress=kill_child)
    assert "\n" not in str(caught.value)
    assert psutil.Process().children() == []


def test_the_last_words_of_an_aborted_worker_are_told() -> None:
    with WorkerProcess() as worker:
        assert worker._process.stdin is not None
        worker._process.stdin.write(b'{"type":"nonsense"}\n')
        with pytest.raises(SessionError, match=r"exit code 1; its last words: .*ValidationError"):
            worker.request(Usage(), Finished)


def test_an_error_in_the_worker_keeps_its_class_and_remedy() -> None:
    with WorkerProcess() as worker, pytest.raises(SessionError, match="before it loaded a bundle"):
        worker.request(Generate(prompt=[1], max_tokens=1), Sample)


def test_a_model_that_does_not_load_is_one_line(tmp_path: Path, make_bundle: MakeBundle) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(EdgeqError) as caught:
        run_bench(make_bundle(tmp_path / "bad.gguf"), SHORT, max_host_load=ANY_LOAD)
    assert type(caught.value) is SessionError
    assert "\n" not in str(caught.value)


def test_an_exception_in_the_parent_leaves_no_process(smollm2_bundle: Path) -> None:
    def interrupt(_done: int, _total: int, what: str) -> None:
        if what == "repetition":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(smollm2_bundle, SHORT, max_host_load=ANY_LOAD, progress=interrupt)
    assert psutil.Process().children() == []


def test_the_worker_dies_with_its_parent_in_the_middle_of_an_answer(smollm2_bundle: Path) -> None:
    load = Load(bundle=str(smollm2_bundle), threads=1, context_tokens=None, text="a b c")
    worker = WorkerProcess()
    prompt = worker.request(load, Loaded).text_tokens
    process = worker._process
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(msgspec.json.encode(Generate(prompt=prompt, max_tokens=500)) + b"\n")
    # What the kernel does when the parent is killed.
    process.stdin.close()
    assert process.stdout.read() == b"", "it finished its answer first"
    worker.kill()
    assert process.returncode == 1


def test_a_worker_that_is_told_to_exit_ends_cleanly() -> None:
    worker = WorkerProcess()
    worker.request(Usage(), Finished)
    worker.close()
    assert worker._process.returncode == 0


def test_usage_counts_processor_time_and_memory() -> None:
    with WorkerProcess() as worker:
        first = worker.request(Usage(), Finished)
        second = worker.request(Usage(), Finished)
    assert 0 < first.cpu_s <= second.cpu_s
    assert first.peak_bytes is not None
    assert first.peak_bytes > 1 << 20


def test_a_flipped_byte_is_found_before_anything_is_measured(smollm2_gguf: Path, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(smollm2_gguf)
    model = bundle / "model.gguf"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.unlink()  # it may be a hard link to the real file
    model.write_bytes(data)
    with pytest.raises(BundleError, match="was changed"):
        run_bench(bundle, SHORT)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prompt_tokens": 0}, "prompt tokens are too few"),
        ({"output_tokens": 0}, "output tokens are too few"),
        ({"warmup": -1}, "warm-up"),
        ({"repetitions": 0}, "repetitions are too few"),
        ({"threads": 0}, "threads"),
        ({"seconds": 1.0}, "exclude each other"),
        ({"seconds": float("nan"), "repetitions": None}, "no time to measure"),
        ({"max_seconds": 0.0}, "no time to measure"),
    ],
)
def test_a_workload_that_makes_no_sense(smollm2_bundle: Path, changes: dict[str, float], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        run_bench(smollm2_bundle, msgspec.structs.replace(SHORT, **changes))


def test_confidence_and_host_load_are_shares(smollm2_bundle: Path) -> None:
    with pytest.raises(UsageError, match="confidence"):
        run_bench(smollm2_bundle, SHORT, confidence=95)
    with pytest.raises(UsageError, match="host load"):
        run_bench(smollm2_bundle, SHORT, max_host_load=10)


def test_a_workload_that_does_not_fit_the_context(smollm2_bundle: Path) -> None:
    with pytest.raises(PromptTooLongError, match="make 600, the context holds 512"):
        run_bench(smollm2_bundle, LanguageWorkload(prompt_tokens=500, output_tokens=100))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"workload": TensorWorkload()}, "is a language model, and the workload is for others"),
        ({"inputs": Path("x.npz")}, "which takes no arrays"),
        ({"budget": Budget(latency_ms=5)}, "which has no latency p99"),
    ],
)
def test_what_only_the_other_kind_of_bundle_has(smollm2_bundle: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        run_bench(smollm2_bundle, **options)


def conditions(workload: LanguageWorkload, **limits: float) -> Conditions:
    return Conditions(workload, msgspec.convert(limits, Budget), confidence=0.95, max_host_load=1)


def wanted(made_for: Conditions) -> int | None:
    assert isinstance(made_for.workload, LanguageWorkload)
    return planned_repetitions(made_for, samples_per_answer(made_for.workload), LanguageSubject.fewest_repetitions)


def test_repetitions_follow_from_the_budget() -> None:
    default = LanguageWorkload()
    assert wanted(conditions(default)) == 10
    assert wanted(conditions(default, peak_memory_bytes=1, power_w=1)) == 10
    assert wanted(conditions(default, ttft_ms=1)) == 124  # p95 at 95 % with two misses
    assert wanted(conditions(default, itl_ms=1)) == 21  # 628 gaps, 31 of them in each answer
    assert wanted(conditions(LanguageWorkload(output_tokens=11), itl_ms=1)) == 63
    assert wanted(conditions(default, tokens_per_s=1)) == 11
    assert wanted(conditions(LanguageWorkload(repetitions=7), ttft_ms=1)) == 7
    assert wanted(conditions(LanguageWorkload(seconds=7), ttft_ms=1)) is None
    assert wanted(conditions(LanguageWorkload(output_tokens=1), itl_ms=1)) == 10
    strict = dataclasses.replace(conditions(default, ttft_ms=1), confidence=0.99)
    assert wanted(strict) == 165


def test_load_times_take_several_processes_only_if_constrained() -> None:
    assert planned_loads(conditions(LanguageWorkload())) == 1
    assert planned_loads(conditions(LanguageWorkload(), load_ms=1)) == 8  # the median at 95 % with one miss


@given(
    text=st.lists(st.integers(0, 5), min_size=2, max_size=60).filter(lambda ids: len(set(ids)) > 1),
    n_tokens=st.integers(1, 200),
)
def test_prompts_have_their_length_and_share_no_beginning(text: list[int], n_tokens: int) -> None:
    made = list(itertools.islice(prompts(text, n_tokens), 20))
    assert {len(prompt) for prompt in made} == {n_tokens}
    assert all(first[0] != second[0] for first, second in itertools.pairwise(made))
    assert all(token in text for prompt in made for token in prompt)
