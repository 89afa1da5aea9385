"""``edgeq bench`` and ``edgeq report`` as a user runs them, and the table that they print."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Protocol

import msgspec
import pytest

from edgeq.bundle import open_bundle
from edgeq.cli.tables import format_table, render_report, verdict_table
from edgeq.report import Report, read_report
from edgeq.types import Budget, from_json
from edgeq.verdicts import judge, metric

SHORT = (
    *("--prompt-tokens", "4", "--output-tokens", "3", "--warmup", "1", "--repetitions", "5", "--threads", "1"),
    *("--max-host-load", "1"),
)


class RunCli(Protocol):
    """The ``run_cli`` fixture."""

    def __call__(self, *args: str | Path) -> CompletedProcess[str]: ...


class MakeBundle(Protocol):
    """The ``make_bundle`` fixture."""

    def __call__(self, model: Path) -> Path: ...


@pytest.fixture(scope="module")
def measured(smollm2_bundle: Path, tmp_path_factory: pytest.TempPathFactory, run_cli: RunCli) -> CompletedProcess[str]:
    """A run that passes; its bundle is in ``args[4]``."""
    bundle = tmp_path_factory.mktemp("measured") / "bundle"
    shutil.copytree(smollm2_bundle, bundle)
    return run_cli("bench", bundle, *SHORT, "--max-memory", "4GiB", "--min-tps", "0.001")


def bundle_of(process: CompletedProcess[str]) -> Path:
    return Path(process.args[4])


def test_a_met_budget_exits_with_zero_and_a_table(measured: CompletedProcess[str]) -> None:
    assert measured.returncode == 0, measured.stderr
    rows = [line for line in measured.stdout.splitlines() if line.endswith("PASS")]
    assert [row.split("  ")[0] for row in rows] == ["peak memory", "decode speed p50", "result: PASS"]
    assert "≤ 4.00 GiB" in rows[0]
    assert "VmHWM of the serving process" in measured.stdout
    for label in ("first token", "inter-token", "decode speed", "load time", "host load", "workload"):
        assert re.search(rf"^{label} ", measured.stdout, re.MULTILINE), label
    # No terminal: no colour, nothing cut off, no progress among the results.
    assert "\x1b" not in measured.stdout + measured.stderr
    assert "…" not in measured.stdout
    assert "repetition" not in measured.stdout
    assert "repetition" in measured.stderr


def test_the_report_lies_in_the_bundle_and_leaves_it_valid(measured: CompletedProcess[str]) -> None:
    bundle = open_bundle(bundle_of(measured), verify=True)
    names = sorted(path.name for path in bundle.reports.iterdir())
    assert len(names) == 2
    assert re.fullmatch(r"\d{8}T\d{6}\.\d{3}Z-bench\.json", names[0])
    assert names[1] == "report.json"
    assert read_report(bundle.reports / names[0]) == read_report(bundle.reports / names[1])


def test_report_prints_the_same_again(measured: CompletedProcess[str], run_cli: RunCli) -> None:
    again = run_cli("report", bundle_of(measured))
    assert (again.returncode, again.stdout, again.stderr) == (0, measured.stdout, "")
    as_json = run_cli("report", bundle_of(measured), "--json")
    assert from_json(as_json.stdout.encode(), Report).result == "PASS"


def test_json_is_alone_on_stdout_and_an_undecided_budget_exits_with_three(
    smollm2_bundle: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    output = tmp_path / "deep" / "report.json"
    process = run_cli("bench", smollm2_bundle, *SHORT, "--max-ttft", "60s", "--json", "--output", output)
    assert process.returncode == 3, process.stderr
    report = from_json(process.stdout.encode(), Report)
    assert json.loads(process.stdout)["result"] == report.result == "INSUFFICIENT"
    assert len(report.metrics["ttft_ms"].samples) == 5
    assert read_report(output) == report
    assert not (smollm2_bundle / "reports").exists()


def test_a_missed_budget_exits_with_three(smollm2_bundle: Path, tmp_path: Path, run_cli: RunCli) -> None:
    process = run_cli("bench", smollm2_bundle, *SHORT, "--max-memory", "1MiB", "--output", tmp_path / "r.json")
    assert process.returncode == 3
    assert re.search(r"^FAIL peak memory: the peak is [\d.]+ % over the limit$", process.stdout, re.MULTILINE)
    assert process.stdout.endswith("result: FAIL\n")


def refused(process: CompletedProcess[str], code: int) -> str:
    """The one line of an error."""
    assert process.returncode == code, process.stderr
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    return line


def test_a_bundle_that_takes_no_reports_is_refused_before_measuring(
    smollm2_gguf: Path, make_bundle: MakeBundle, run_cli: RunCli
) -> None:
    bundle = make_bundle(smollm2_gguf)
    (bundle / "reports").write_text("in the way")
    assert "--output FILE" in refused(run_cli("bench", bundle, *SHORT), 1)


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["--max-memory", "400parsecs"], 2, "400parsecs"),
        (["--max-itl", "60"], 2, "no unit"),
        (["--confidence", "95"], 2, "confidence"),
        (["--repetitions", "0"], 2, "above zero"),
        (["--repetitions", "3", "--seconds", "3"], 2, "not allowed with"),
        (["--prompt-tokens", "600"], 1, "the context holds 512"),
        (["--context", "4096"], 2, "planned for 512"),
    ],
)
def test_bad_arguments_are_one_line(
    smollm2_bundle: Path, tmp_path: Path, run_cli: RunCli, arguments: list[str], code: int, match: str
) -> None:
    process = run_cli("bench", smollm2_bundle, *arguments, "--output", tmp_path / "r.json")
    assert process.returncode == code
    assert match in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
    assert process.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_bundles_without_a_report_of_their_own(
    measured: CompletedProcess[str], smollm2_bundle: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    assert "edgeq bench" in refused(run_cli("report", smollm2_bundle), 1)
    assert "no bundle" in refused(run_cli("bench", tmp_path), 1)
    other = tmp_path / "other"
    shutil.copytree(bundle_of(measured), other)
    manifest = other / "edgeq.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"name": "smollm2"', b'"name": "changed"'))
    assert "another bundle" in refused(run_cli("report", other), 1)


def test_colour_only_where_it_is_wanted(measured: CompletedProcess[str]) -> None:
    report = read_report(bundle_of(measured) / "reports" / "report.json")
    plain, coloured = render_report(report, colour=False), render_report(report, colour=True)
    assert "\x1b" not in plain
    assert "\x1b[32mPASS\x1b[0m" in coloured
    assert re.sub(r"\x1b\[\d*m", "", coloured) == plain


def test_an_invalid_run_is_named_once(measured: CompletedProcess[str]) -> None:
    report = read_report(bundle_of(measured) / "reports" / "report.json")
    reasons = ("host loaded: other processes took 64% of the CPU time, 10% is allowed",)
    verdicts = judge(report.budget, report.metrics, invalid=reasons)
    text = render_report(
        msgspec.structs.replace(report, verdicts=verdicts, valid=False, invalid_reasons=reasons, result="INSUFFICIENT"),
        colour=False,
    )
    assert text.count("host loaded") == 1
    assert text.count("INSUFFICIENT\n") == 3
    assert not re.search(r"PASS$", text, re.MULTILINE)


def test_verdict_table_shows_measured_and_constrained_lines_only() -> None:
    verdicts = judge(
        Budget(ttft_ms=100, tokens_per_s=5, power_w=15),
        {
            "ttft_ms": metric("ms", "a test", [250.0] * 100),
            "tokens_per_s": metric("tok/s", "a test", [10.0] * 3),
            "load_ms": metric("ms", "a test", [123.4]),
        },
        predicted={"ttft_ms": 80.0},
    )
    assert verdict_table(verdicts, 0.95, colour=False) == [
        "budget line              predicted    measured  bound 95 %        limit  samples  verdict",
        "-----------------------  ---------  ----------  ----------  -----------  -------  ------------",
        "load time p50                    -      123 ms           -            -        1  -",
        "time to first token p95    80.0 ms      250 ms      250 ms     ≤ 100 ms      100  FAIL",
        "decode speed p50                 -  10.0 tok/s           -  ≥ 5.0 tok/s        3  INSUFFICIENT",
        "power                            -           -           -     ≤ 15.0 W        0  INSUFFICIENT",
    ]


def test_tables_are_as_wide_as_their_contents() -> None:
    long = "x" * 300
    lines = format_table(["a", "bb"], [["1", long], ["22", "y"]], right=(0,))
    assert lines == [" a  bb", "--  " + "-" * 300, " 1  " + long, "22  y"]
