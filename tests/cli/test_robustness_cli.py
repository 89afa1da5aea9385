"""What shells, pipes, disks and files do to a command line, each answered by one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeq.cli.output import show_lines
from edgeq.cli.progress import Progress

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def shell(line: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A line of bash in which ``edgeq`` is the command and ``$1`` and so on are ``args``."""
    script = f'edgeq() {{ "{sys.executable}" -m edgeq.cli "$@"; }}; set -o pipefail; {line}'
    return subprocess.run(
        ["bash", "-c", script, "bash", *map(str, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="surrogateescape",
        env={**os.environ, **(env or {})},
        timeout=120,
        check=False,
    )


def one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("edgeq")
    for word in words:
        assert word in line


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "completion bash", "inspect --help"])
def test_a_full_disk_behind_stdout(smollm2_bundle: Path, command: str) -> None:
    argument = '"$1"' if command == "inspect" else ""
    done = shell(f"edgeq {command} {argument} > /dev/full", smollm2_bundle)
    one_line(done, 1, "standard output", "No space left")


def test_a_reader_that_leaves_is_no_failure(smollm2_bundle: Path) -> None:
    done = shell('edgeq inspect "$1" | true', smollm2_bundle)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_ends_an_answer(smollm2_bundle: Path) -> None:
    done = shell('edgeq run "$1" --raw "1 2 3 4" --max-tokens 400 | head -c 1', smollm2_bundle)
    assert done.returncode == 0
    assert done.stderr == ""


def test_closed_streams(smollm2_bundle: Path) -> None:
    done = shell('edgeq run "$1" Hi --max-tokens 2 >&-', smollm2_bundle)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    one_line(shell('edgeq run "$1" - <&-', smollm2_bundle), 2, "prompt is empty")
    done = shell('edgeq run "$1" Hi --max-tokens 2 --json <&- 2>&-', smollm2_bundle)
    assert done.returncode == 0
    assert '"finish_reason": "length"' in done.stdout
    assert shell("edgeq inspect nothing-here >&- 2>&-").returncode == 1


def test_input_that_is_no_text(smollm2_bundle: Path) -> None:
    done = shell("printf 'a\\377' | edgeq run \"$1\" -", smollm2_bundle, env={"PYTHONIOENCODING": "utf-8:strict"})
    one_line(done, 2, "Standard input", "UTF-8")


def test_an_output_that_only_takes_ascii(smollm2_bundle: Path) -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii:strict"}
    done = shell('edgeq run "$1" --raw "été, été, été, été, été," --max-tokens 6', smollm2_bundle, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert "\\xe9" in done.stdout
    done = shell('edgeq inspect "$1"', smollm2_bundle, env=ascii_only)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_closed_stderr_does_not_stop_a_conversion(smollm2_hf: Path, tmp_path: Path) -> None:
    command = 'edgeq convert "$1" --target laptop-cpu --eval-tokens 0 -o "$2" 2>&1 | true'
    done = shell(command, smollm2_hf, tmp_path / "out")
    assert done.returncode == 0
    assert (tmp_path / "out" / "edgeq.json").is_file()


def test_progress_that_nobody_reads_goes_on() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream, Progress(stream) as progress:
        for step in range(3):
            progress(step, 3, f"work {step}")
        os.fstat(stream.fileno())


def test_what_a_manifest_smuggles_in_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    show_lines(["licence mit\nok: all fine\x1b[2J\r", "é ≤\t1"])
    assert capsys.readouterr().out == "licence mit\\nok: all fine\\x1b[2J\\r\né ≤\t1\n"


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", ["513", "100000", "0", "two"])
@pytest.mark.parametrize("command", ["run b hi", "bench b", "plan m --target laptop-cpu"])
def test_threads(cli: Cli, command: str, threads: str) -> None:
    done = cli(*command.split(), "--threads", threads)
    one_line(done, 2, "--threads")


@pytest.mark.parametrize("limit", ["1e20GiB", "99999999999999GiB"])
def test_absurd_amounts(cli: Cli, limit: str) -> None:
    one_line(cli("plan", "m", "--target", "laptop-cpu", "--max-memory", limit), 2, limit, "more than any machine")


def test_an_argument_of_several_lines_is_one_line(cli: Cli) -> None:
    one_line(cli("convrt\nsecond"), 2, "convrt")
    one_line(cli("inspect", "b", "--what\nnow"), 2, "--what")


@pytest.mark.parametrize("command", ["plan", "convert"])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("x" * 5000, ["too long"]),
        ("/".join(["x" * 200] * 30), ["too long"]),
        ("~nobody-of-that-name/x", ["home"]),
        ("a\udcffb", ["neither"]),
        ("a\0b", ["neither"]),
    ],
)
def test_names_that_no_model_can_have(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, model: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(command, model, "--target", "laptop-cpu", *(["-o", "out"] if command == "convert" else []))
    one_line(done, 1)
    assert any(word in done.stderr for word in words), done.stderr
    assert len(done.stderr) < 600
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_manifest_can_name(cli: Cli, tmp_path: Path) -> None:
    model = tmp_path / "bad\udcff"
    model.mkdir()
    one_line(cli("plan", model, "--target", "laptop-cpu"), 1, "UTF-8")


def test_answers_without_a_speed(cli: Cli, smollm2_bundle: Path) -> None:
    done = cli("run", smollm2_bundle, "Hi", "--max-tokens", "1")
    assert (done.returncode, "1 tokens, ended by length" in done.stderr) == (0, True)
    done = cli("run", smollm2_bundle, "Hi", "--deadline", "1us")
    assert (done.returncode, "no first token, 0 tokens, ended by deadline" in done.stderr) == (0, True)


def test_an_output_that_no_manifest_can_name(cli: Cli, tmp_path: Path) -> None:
    one_line(cli("convert", "m", "--target", "laptop-cpu", "-o", tmp_path / "bad\udcff"), 2, "UTF-8")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_in_a_folder_that_is_no_utf_8(smollm2_bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "bad\udcff"
    link.symlink_to(smollm2_bundle)
    done = shell('edgeq run "$1" Hi --max-tokens 1', link)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_was_deleted(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell('cd "$1" && rmdir "$1" && edgeq convert m --target laptop-cpu', tmp_path / "gone")
    assert done.returncode == 1
    assert "folder was deleted" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_an_error_of_the_system_is_one_line(cli: Cli, smollm2_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr("edgeq.bundle.open_bundle", fail)
    one_line(cli("inspect", smollm2_bundle), 1, "/some/file: Permission denied")


def test_paths_are_quoted_for_the_shell(cli: Cli, smollm2_bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "a bundle; with $signs"
    link.symlink_to(smollm2_bundle)
    assert f"edgeq bench '{link}'" in cli("inspect", link).stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: q8_0\nbase: q4_0", ["'base'", "twice"]),
        ("version: 2020-13-45", ["month"]),
        ("[" * 20_000, ["nested too deeply"]),
        ("version: " + "9" * 5000, ["digit"]),
        ("overrides: [{match: 'a{99999999999}', type: q8_0}]", ["regular expression"]),
    ],
)
def test_recipes(cli: Cli, tmp_path: Path, text: str, words: list[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    one_line(cli("plan", "m", "--target", "laptop-cpu", "--recipe", recipe), 2, *words)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("missing.yaml", None, ["missing.yaml cannot be read: No such file", "Check the path"]),
        ("folder", "folder", ["folder cannot be read: Is a directory"]),
        (
            "latin.yaml",
            "base: Straße".encode("latin-1"),
            ["latin.yaml is no recipe", "not UTF-8", "base and overrides"],
        ),
        ("model.gguf", b"GGUF\x03\x00\x00\x00", ["model.gguf is no recipe", "base and overrides"]),
    ],
)
def test_files_that_are_no_recipes(
    cli: Cli, tmp_path: Path, name: str, data: bytes | str | None, words: list[str]
) -> None:
    recipe = tmp_path / name
    if isinstance(data, bytes):
        recipe.write_bytes(data)
    elif data is not None:
        recipe.mkdir()
    done = cli("plan", "m", "--target", "laptop-cpu", "--recipe", recipe)
    one_line(done, 2, *words)
    assert "Errno" not in done.stderr


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_without_a_vocabulary_ends_no_process(
    cli: Cli, no_vocabulary_gguf: Path, make_bundle: Callable[[Path], Path], tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    converting = ("convert", no_vocabulary_gguf, "--target", "laptop-cpu", "-o", out)
    searching = ("--search", "always", "--max-memory", "1GiB", "--decode-costs", "profile")
    for done in (
        cli(*converting, "--quant", "q8_0"),
        cli(*converting, *searching),
        cli("plan", *converting[1:-2]),
        cli("run", make_bundle(no_vocabulary_gguf), "hello"),
    ):
        assert done.returncode == 1
        assert "holds no vocabulary" in done.stderr.splitlines()[-1]
    assert not out.exists()


def test_a_model_without_a_vocabulary_is_refused_before_any_work(no_vocabulary_gguf: Path) -> None:
    from edgeq.converters.source import resolve
    from edgeq.errors import UnsupportedModelError

    with pytest.raises(UnsupportedModelError, match=r"nameless.gguf holds no vocabulary.*Use a GGUF with"):
        resolve(str(no_vocabulary_gguf))
