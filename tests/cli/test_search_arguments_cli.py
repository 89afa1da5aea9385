"""What is said of a search's options and texts before any work is done."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest

from tests.fixtures.command import Cli, one_line
from tests.fixtures.language_models import TinyHf
from tests.fixtures.search import LIMIT, SEARCH


@pytest.fixture(scope="module")
def model(tiny_hf: TinyHf) -> Path:
    return tiny_hf("llama-untied")


def _no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        pytest.fail("the search began")

    monkeypatch.setattr("edgeq.planner.convert.pose", stop)


def _words(seed: int, n: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(n))


def test_texts_are_checked_before_the_search(
    model: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeq.converters.calibration import texts

    _no_search(monkeypatch)
    own, short, late = (tmp_path / f"{name}.txt" for name in ("own", "short", "late"))
    own.write_text(_words(1, 5000))
    short.write_text("too short")
    late.write_bytes(own.read_bytes() + b"\xff\xfe")
    (tmp_path / "copy.txt").write_text(own.read_text())
    topics = tmp_path / "topics.txt"
    topics.write_text("\n\n".join(texts._split(texts._documents(), "select").values()))
    search = ("convert", model, "--target", "laptop-cpu", *LIMIT, "-o", tmp_path / "out", "--eval-tokens", "2000")
    calibrated = ("--calibration-tokens", "2048", "--calibration")
    for arguments, words in (
        (["--eval-text", short], ["short.txt gives", "512 are needed"]),
        (["--eval-text", late], ["late.txt is not UTF-8"]),
        (
            ["--eval-text", topics],
            ["topics.txt, the text to judge by", "mixes are compared on", "Give another text with --eval-text."],
        ),
        ([*calibrated, short], ["short.txt gives", "2048 are needed"]),
        ([*calibrated, own, "--eval-text", tmp_path / "copy.txt"], ["copy.txt is both the calibration text and"]),
        ([*calibrated, topics], ["mixes are compared on", "Give another text with --calibration."]),
    ):
        line = one_line(cli(*search, *arguments), 2)
        assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_warnings_about_the_text_to_judge_by_are_notes(model: Path, cli: Cli, tmp_path: Path) -> None:
    text = tmp_path / "foreign.txt"
    text.write_text("今日は天気がいいですね。你好世界。" * 200)
    expected = "the tokenizer hardly knows the language of foreign.txt: 1.00 bytes a token"
    shown = cli("plan", model, "--target", "laptop-cpu", "--quant", "q8_0", "--eval-text", text)
    assert f"note     {expected}" in shown.stdout, shown.stderr
    done = cli("plan", model, *SEARCH, *LIMIT, "--eval-text", text, "--json")
    assert any(note.startswith(expected) for note in json.loads(done.stdout)["notes"]), done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-size", "100"], ["no unit"]),
        (["--max-kld", "0"], ["above 0 to 10 nats", "0.05"]),
        (["--max-kld", "11"], ["above 0 to 10 nats"]),
        (["--max-kld", "nan"], ["above 0 to 10 nats"]),
        (["--max-kld", "much"], ["above 0 to 10 nats"]),
        (["--min-top1", "90"], ["0.9 or 90%"]),
        (["--min-top1", "0%"], ["0.9 or 90%"]),
        (["--min-top1", "101%"], ["0.9 or 90%"]),
        (["--minimize", "bytes"], ["--max-kld"]),
        (["--minimize", "size"], ["invalid choice", "quality", "latency"]),
        (["--search", "sometimes"], ["invalid choice"]),
        (["--search", "always", "--quant", "q8_0"], ["--quant"]),
        (["--search", "never", "--estimator", "fisher"], ["--estimator", "--search never"]),
        (["--quant", "q8_0", "--trials", "3"], ["--trials", "--quant"]),
        (["--quant", "q8_0", "--minimize", "quality"], ["--minimize", "--quant"]),
        (["--trials", "0"], ["above zero"]),
        (["--seed", "-1"], ["from 0 to"]),
        (["--seed", "99999999999999999999"], ["from 0 to"]),
        (["--calibration", "missing.txt"], ["missing.txt", "No such file"]),
        (["--calibration-tokens", "10"], ["one chunk of 256"]),
        (["--imatrix", "missing.gguf"], ["missing.gguf"]),
        (["--eval-text", "missing.txt"], ["missing.txt"]),
        (["--eval-tokens", "0", "--max-kld", "0.1"], ["--eval-tokens 0"]),
        (["--eval-tokens", "-1"], ["from 0 to"]),
        (["--eval-tokens", "0", "--eval-text", __file__], ["--eval-tokens 0 reads nothing of --eval-text"]),
        (["--eval-tokens", "10"], ["--eval-tokens 10 is less than 16", "Use 1024 or more"]),
        (["--eval-text", "/dev/zero"], ["--eval-text", "is no regular file"]),
        (["--calibration", "/dev/zero"], ["--calibration", "is no regular file"]),
        (["--eval-text", sys.executable], ["is no text"]),
        (["--calibration", sys.executable], ["is no text"]),
        (["--calibration", __file__, "--eval-text", __file__], ["the same text", Path(__file__).name]),
    ],
)
@pytest.mark.parametrize("command", ["plan", "convert"])
def test_wrong_values_are_one_line_before_any_work(
    command: str, arguments: list[str], words: list[str], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = one_line(cli(command, "no-such-model", "--target", "laptop-cpu", *arguments), 2)
    assert line.startswith("edgeq")
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_with_a_base_leaves_nothing_to_search(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("base: q8_0")
    options = ("--target", "laptop-cpu", "--recipe", tmp_path / "recipe.yaml", "--search", "always")
    assert "the base q8_0" in one_line(cli("plan", "no-such-model", *options), 2)


def test_the_help_names_the_defaults(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeq.planner.problem import SearchOptions

    monkeypatch.setenv("COLUMNS", "200")
    defaults = SearchOptions()
    for command in ("plan", "convert"):
        shown = cli(command, "--help").stdout
        for option, default in (
            ("--trials N", defaults.trials),
            ("--calibration-tokens N", defaults.evidence.tokens),
            ("--seed N", defaults.evidence.seed),
        ):
            assert re.search(rf"{option}\s+[^\n]*\({default}\)", shown), option
