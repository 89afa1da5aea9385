"""``edgeq devices``, and how a device and its power mode are named on the command line."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import pytest

from edgeq.cli.profile_text import format_field
from edgeq.profiles.loader import known_profiles, load_profile, parse_profile


class Cli(Protocol):
    def __call__(self, *args: object) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of profiles; empty, whatever this machine has."""
    path = tmp_path / "profiles"
    path.mkdir()
    monkeypatch.setenv("EDGEQ_PROFILES", str(path))
    return path


def one_error(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert "error:" in lines[0]
    return lines[0]


# --- the list


def test_the_table_has_a_row_for_each_device(cli: Cli) -> None:
    done = cli("devices")
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + 12
    nano = next(line for line in lines if line.startswith("jetson-orin-nano-8gb"))
    for word in ("5.4 of 8 GiB", "102.4 GB/s", "cuda:sm_87", "25W", "llama.cpp-cuda", "datasheet", "jetson-orin"):
        assert word in nano
    assert not lines[0].rstrip().endswith("file")


def test_profiles_of_the_users_own_are_told_with_their_file(cli: Cli, folder: Path) -> None:
    (folder / "mine.yaml").write_text("name: mine\nextends: jetson-orin\nsummary: a robot\n")
    (folder / "broken.yaml").write_text("name: broken\nextends: jetson-orin\nsummery: a robot\n")
    (folder / "evil.yaml").write_text('name: evil\nextends: jetson-orin\n"\\e[2J": x\n')
    done = cli("devices")
    assert done.returncode == 0
    row = next(line for line in done.stdout.splitlines() if line.startswith("mine "))
    assert row.endswith(str(folder / "mine.yaml"))
    assert "broken" not in done.stdout
    warnings = done.stderr.splitlines()
    assert len(warnings) == 2
    assert all(line.startswith(f"warning: {folder}") for line in warnings)
    assert "Perhaps summary is meant" in warnings[0]
    assert "\x1b" not in done.stderr
    documents = {entry["name"]: entry for entry in json.loads(cli("devices", "--json").stdout)}
    assert documents["mine"]["error"] is None
    assert documents["mine"]["origin"] == str(folder / "mine.yaml")
    assert "summary is meant" in documents["broken"]["error"]
    assert documents["jetson-orin-nano-8gb"]["origin"] == "edgeq"


def test_the_json_list_is_for_scripts(cli: Cli) -> None:
    documents = json.loads(cli("devices", "--json").stdout)
    assert [entry["name"] for entry in documents] == [known.name for known in known_profiles()]
    orin = next(entry for entry in documents if "jetson-orin" in entry["aliases"])
    memory = load_profile("jetson-orin").memory
    assert (orin["total_bytes"], orin["usable_bytes"]) == (memory.total_bytes, memory.usable_bytes)
    assert orin["power_modes"] == ["7W", "15W", "25W", "MAXN_SUPER"]


def on_a_terminal(columns: int) -> tuple[list[str], str]:
    """Lines of the list on a terminal that wide, and what goes to stderr."""
    here, there = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns)}
    command = [sys.executable, "-m", "edgeq", "devices"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=there, stderr=subprocess.PIPE, text=True, env=environment
    ) as child:
        os.close(there)
        read = b""
        while piece := _read(here):
            read += piece
        assert child.stderr is not None
        said = child.stderr.read()
    os.close(here)
    assert child.returncode == 0, said
    return read.decode().splitlines(), said


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # Linux's way to say that the other end is closed
        return b""


@pytest.mark.parametrize("columns", [40, 79, 120])
def test_a_narrow_terminal_shows_what_matters_most(
    columns: int, cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "mine.yaml").write_text("name: mine\nextends: jetson-orin\nsummary: a robot\n")
    lines, said = on_a_terminal(columns)
    assert max(map(len, lines)) <= columns
    assert len(lines) == 2 + 13
    assert lines[0].split()[:2] == ["device", "memory"]
    assert ("bandwidth" in lines[0]) == (columns > 50)
    assert ("power mode" in lines[0]) == (columns >= 79)
    assert said.startswith("note: no room for the columns ")
    assert "figures" in said
    # A pipe has no width, whatever the shell says.
    monkeypatch.setenv("COLUMNS", str(columns))
    piped = cli("devices")
    assert piped.stdout.splitlines()[0].split()[-1] == "file"
    assert piped.stderr == ""


def test_a_wide_terminal_shows_everything(cli: Cli) -> None:
    assert on_a_terminal(200) == (cli("devices").stdout.splitlines(), "")


def test_the_documentation_shows_what_is(cli: Cli, repo: Path) -> None:
    text = (repo / "docs" / "devices.md").read_text(encoding="utf-8")
    assert f"$ edgeq devices\n{cli('devices').stdout}```" in text
    examples = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert [parse_profile(example, "docs/devices.md").name for example in examples] == ["my-robot", "my-box"]


# --- one device


@pytest.mark.parametrize("name", [known.name for known in known_profiles() if known.origin == "edgeq"])
def test_everything_shown_has_its_source(name: str, cli: Cli) -> None:
    done = cli("devices", "show", name)
    assert done.returncode == 0, done.stderr
    profile = load_profile(name)
    body, _, tail = done.stdout.partition("\nsources\n")
    listed = {int(line.partition("]")[0].strip(" [")): line.partition("] ")[2] for line in tail.splitlines()}
    assert list(listed) == list(range(1, len(listed) + 1))
    assert set(listed.values()) == set(profile.sources.values())
    for mode in profile.power_modes:
        assert mode.name in body
    for software in profile.software:
        assert software.jetpack in (None, *body.split())
    for row in body.splitlines():
        if row.startswith(("planner", "memory", "SMs", *(mode.name for mode in profile.power_modes))):
            assert row.endswith("]"), row


def test_numbers_are_shown_in_human_units(cli: Cli) -> None:
    shown = cli("devices", "show", "jetson-orin").stdout
    for words in (
        "CPU clock                     1728 MHz",
        "INT8, dense                   33.4 TOPS",
        "visible to Linux              7.44 GiB",
        "bandwidth, measured           94.8 GB/s",
        "25W *        1   25 W     6   1344 MHz    8    918 MHz  30.1 TOPS  102.4 GB/s  94.8 GB/s",
        "15W          0   15 W",
        "7.2      39.2.0  13.2",
        "planner     peak memory              ≤ 4.00 GiB",
        "tensorrt           fp32, fp16, bf16, int8, int4",
    ):
        assert words in shown, words
    assert "MAXN_SUPER   2      -" in shown


def test_another_power_mode(cli: Cli) -> None:
    assert (
        "power mode MODE_30W: 55.4 GiB usable, 128.0 GB/s, as much as the GPU draws"
        in cli("devices", "show", "jetson-agx-orin").stdout
    )
    shown = cli("devices", "show", "jetson-agx-orin", "--power-mode", "maxn").stdout
    assert "power mode MAXN: 55.4 GiB usable, 204.8 GB/s\n" in shown
    assert "MAXN *" in shown
    assert "Choose one of MODE_30W" in one_error(cli("devices", "show", "jetson-agx-orin", "--power-mode", "30W"), 1)
    assert "no power modes" in one_error(cli("devices", "show", "laptop", "--power-mode", "30W"), 1)


def test_a_profile_in_a_file(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nextends: raspberry-pi-5\nsummary: a robot\nthreads: 2\nsources: {threads: my choice}\n"
    )
    assert "my choice" in cli("devices", "show", path).stdout
    document = json.loads(cli("devices", "show", path, "--json").stdout)
    assert document["threads"] == 2
    assert document["sources"]["threads"] == "my choice"
    assert json.loads(cli("devices", "--json", "show", path).stdout) == document
    path.write_text("name: mine\nextends: raspberry-pi-5\nsummary: a robot\nthreads: 2\n")
    assert "no source for threads" in one_error(cli("devices", "show", path), 1)


def test_mistakes_are_one_line(cli: Cli, tmp_path: Path) -> None:
    assert "Choose one of jetson-orin" in one_error(cli("devices", "show", "jetson-orinn"), 1)
    assert "No such file" in one_error(cli("devices", "show", tmp_path / "nowhere.yaml"), 1)
    assert "no regular file" in one_error(cli("devices", "show", tmp_path), 1)
    assert "NAME|FILE" in one_error(cli("devices", "show"), 2)
    assert "'shwo'" in one_error(cli("devices", "shwo"), 2)


def test_help_has_examples(cli: Cli) -> None:
    assert "edgeq devices show jetson-orin" in cli("devices", "--help").stdout
    assert "--power-mode maxn" in cli("devices", "show", "--help").stdout
    assert "devices" in cli("--help").stdout


@pytest.mark.parametrize(
    ("path", "value", "shown"),
    [
        ("memory.total_bytes", 2**33, "8.00 GiB"),
        ("memory.bandwidth_bytes_per_s", 102.4e9, "102.4 GB/s"),
        ("backends.x.compute_flops_per_s", 8e10, "80 GFLOP/s"),
        ("gpu.int8_ops_per_s", 6.68e12, "6.68 TOPS"),
        ("gpu.fp4_ops_per_s", 1.035e15, "1035 TOPS"),
        ("cpu.clock_hz", 1.728e9, "1728 MHz"),
        ("power_modes.15W.power_w", 15.0, "15 W"),
        ("backends.x.layer_overhead_ms", 0.05, "0.05 ms"),
        ("backends.x.decode_efficiency", 0.78, "78%"),
        ("gpu.sms", 8, "8"),
        ("gpu.compute_capability", "8.7", "8.7"),
    ],
)
def test_values_for_people(path: str, value: float | str, shown: str) -> None:
    assert format_field(path, value) == shown


# --- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_tab_completion_knows_devices_and_power_modes(shell: str, cli: Cli, folder: Path) -> None:
    (folder / "mine.yaml").write_text("name: my-own-robot\nextends: jetson-orin\nsummary: a robot\n")
    script = cli("completion", shell).stdout
    for word in ("jetson-agx-orin", "pi5", "my-own-robot", "MAXN_SUPER", "--power-mode" if shell != "tcsh" else "15W"):
        assert word in script


def test_completion_runs_nothing(cli: Cli, folder: Path) -> None:
    (folder / "evil.yaml").write_text("name: $(touch evil)\naliases: ['`id`']\nextends: laptop\nsummary: a\n")
    for shell in ("bash", "zsh", "tcsh"):
        script = cli("completion", shell).stdout
        assert "touch evil" not in script
        assert "`id`" not in script


@pytest.mark.parametrize(
    ("word", "found"),
    [("./b", ["./bot.yaml"]), ("bo", ["bot.yaml"]), ("jetson-th", ["jetson-thor", "jetson-thor-t4000"]), ("zz", [])],
)
def test_a_device_or_a_file_is_completed(word: str, found: list[str], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(cli("completion", "bash").stdout)
    (tmp_path / "bot.yaml").touch()
    typed = f"COMP_WORDS=(edgeq devices show {word}); COMP_CWORD=3"
    shown = subprocess.run(
        ["bash", "-c", f'source ./script; {typed}; _shtab_edgeq; printf "%s\\n" "${{COMPREPLY[@]}}"'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(found) <= set(shown.stdout.split())
    assert all(entry.startswith(word) for entry in shown.stdout.split())


# --- the device of a plan


def test_a_plan_is_for_a_power_mode(cli: Cli, smollm2_hf: Path, tmp_path: Path) -> None:
    def planned(*arguments: object) -> dict[str, object]:
        done = cli("plan", smollm2_hf, "--quant", "q8_0", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        plan: dict[str, object] = json.loads(done.stdout)
        return plan

    own, low = planned("--target", "jetson-orin"), planned("--target", "jetson-orin", "--power-mode", "7w")
    assert "for power mode 25W" in own["notes"]  # type: ignore[operator]
    assert "for power mode 7W" in low["notes"]  # type: ignore[operator]
    assert low["predicted"]["itl_ms"] > 1.5 * own["predicted"]["itl_ms"]  # type: ignore[index]
    (tmp_path / "mine").write_text("name: mine\nextends: jetson-orin\nsummary: a robot\npower_mode: 7W\n")
    assert planned("--profile", tmp_path / "mine")["predicted"] == low["predicted"]
    assert not [note for note in planned("--target", "laptop")["notes"] if "power" in note]  # type: ignore[attr-defined]


def test_the_device_is_named_once(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    assert "--target --profile is required" in one_error(cli("plan", model), 2)
    assert "not allowed with" in one_error(cli("plan", model, "--target", "laptop", "--profile", "x.yaml"), 2)
    # A profile is a file, whatever it is called; a device's name is for another option.
    monkeypatch.chdir(tmp_path)
    for command in ("plan", "convert"):
        assert "my-laptop cannot be read" in one_error(cli(command, model, "--profile", "my-laptop"), 1)
        for name in ("laptop-cpu", "Jetson-Orin"):
            message = one_error(cli(command, model, "--profile", name), 2)
            assert f"--profile takes a file, and {name} is a device's name. Use --target {name}" in message
        message = one_error(cli(command, model, "--target", "jetson-orin", "--power-mode", "16W"), 1)
        assert "no power mode '16W'. Choose one of" in message
        assert "no power modes" in one_error(cli(command, model, "--target", "laptop", "--power-mode", "15W"), 1)
    (tmp_path / "laptop-cpu").write_text("name: mine\n")
    assert "laptop-cpu lacks" in one_error(cli("plan", model, "--profile", "laptop-cpu"), 1)
    assert not [path.name for path in tmp_path.iterdir() if path.name not in ("profiles", "model", "laptop-cpu")]
