"""Mixes drawn as sizes against errors: in the terminal, as pictures, as JSON."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.command import Cli, one_line
from tests.fixtures.language_models import TinyHf
from tests.fixtures.search import LIMIT, SEARCH


@pytest.fixture(scope="module")
def model(tiny_hf: TinyHf) -> Path:
    return tiny_hf("llama-untied")


def test_the_front_in_the_terminal_and_in_files(
    model: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    svg, png = tmp_path / "front.svg", tmp_path / "front.PNG"
    first = cli("plan", model, *SEARCH, *LIMIT, "--front", svg)
    assert first.returncode == 0, first.stderr
    picture = first.stdout[first.stdout.index("predicted mean KL divergence in nats") :]
    assert max(map(len, picture[: picture.index("Predicted, not measured")].splitlines())) <= 90
    assert "\x1b" not in picture
    assert "◆" in picture
    assert "A preset's point is the preset's types, rounded by edgeq" in picture
    assert picture.endswith(f"wrote {svg}\n")
    texts = {"".join(e.itertext()).strip() for e in ET.parse(svg).iter() if e.tag.endswith("text")}
    assert {"chosen", "best mix of its size", "file size (KiB)"} <= texts
    assert any("q8_0" in text for text in texts)
    drawn = svg.read_bytes()
    assert cli("plan", model, *SEARCH, *LIMIT, "--front", svg, "--force").returncode == 0
    assert svg.read_bytes() == drawn
    assert cli("plan", model, *SEARCH, *LIMIT, "--front", png, "--json").returncode == 0
    assert png.read_bytes().startswith(b"\x89PNG\r\n")


def test_the_front_as_json(model: Path, cli: Cli) -> None:
    done = cli("plan", model, *SEARCH, *LIMIT, "--json", "--front")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    front = found.pop("front")
    assert found == json.loads(cli("plan", model, *SEARCH, *LIMIT, "--json").stdout)
    assert front["chosen"]["predicted_kld"] == pytest.approx(found["search"]["predicted_kld"])
    assert front["chosen"]["predicted"] == found["predicted"]
    sizes = [point["predicted"]["file_bytes"] for point in front["mixes"]]
    assert sizes == sorted(sizes)
    assert len(sizes) > 10
    presets = {label for point in front["presets"] for label in point["labels"]}
    assert {"q8_0", "q4_0"} <= presets
    assert not presets & {"f16", "f32", "bf16", *front["left_out"]}


def test_a_picture_changes_no_plan(model: Path, cli: Cli, tmp_path: Path) -> None:
    """Where f16 or q8_0 fits, convert takes it, and the front shows that plan among the mixes."""

    def planned(*options: object) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(cli("plan", model, *options, "--json").stdout)
        return found

    target = ("--target", "laptop-cpu", "--threads", "1")
    needed = [planned(*target, "--quant", kind)["predicted"]["peak_memory_bytes"] for kind in ("q8_0", "f16")]
    between = ("--max-memory", f"{sum(needed) // 2}B")
    for limit, preset in (((), "f16"), (between, "q8_0")):
        plain = planned(*SEARCH, *limit)
        done = cli("plan", model, *SEARCH, *limit, "--json", "--front", tmp_path / f"{preset}.svg")
        assert done.returncode == 0, done.stderr
        drawn = json.loads(done.stdout)
        front = drawn.pop("front")
        assert plain["preset"] == preset
        assert drawn == plain
        assert front["chosen"]["labels"] == [preset]
        assert front["chosen"]["predicted"]["file_bytes"] == plain["predicted"]["file_bytes"]
        assert (front["chosen"]["predicted_kld"] == 0) is (preset == "f16")
        assert len(front["mixes"]) > 5
        assert "chosen" in (tmp_path / f"{preset}.svg").read_text()
    shown = cli("plan", model, *SEARCH, "--front").stdout
    assert "types    f16" in shown
    assert "◆ chosen (KL 0)" in shown
    assert re.search(r"^chosen \(f16\) ", shown, re.MULTILINE)


def test_two_outputs_are_two_files(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").symlink_to(tmp_path)
    for other in ("same.svg", tmp_path / "same.svg", "there/same.svg"):
        done = cli("plan", "no-such-model", "--target", "laptop-cpu", "--front", "same.svg", "--export", other)
        assert "--front and --export both name" in one_line(done, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--front", "front.pdf"], "before --front"),
        (["--front", "x", "--target"], "before --front"),
        (["--front", "--quant", "q8_0"], "--quant"),
        (["--front", "--search", "never"], "--search never"),
        (["--front", "--recipe", "recipe.yaml"], "--recipe"),
        (["--format", "llama.cpp"], "--export"),
        (["--export", "x", "--format", "ollama"], "invalid choice"),
    ],
)
def test_wrong_pictures_and_exports(
    arguments: list[str], word: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("overrides: [{match: attn_k, type: q8_0}]")
    assert word in one_line(cli("plan", "no-such-model", "--target", "laptop-cpu", *arguments), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
