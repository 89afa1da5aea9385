"""Pictures of bytes against quality, in characters and in files, from points that are made up."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.cli.front import Scale, front_text
from edgeq.cli.picture import draw
from edgeq.planner.front import Front, FrontPoint
from edgeq.types import Prediction

_PRESETS = {
    "iq2_xs": (64.5, 1.4), "q2_k": (78.3, 0.45), "iq3_xs": (77.5, 0.36), "q3_k_s": (80.0, 0.30), "iq3_s": (80.0, 0.27),
    "q3_k_m": (87.5, 0.105), "iq4_xs": (85.0, 0.106), "iq4_nl": (85.9, 0.12), "q4_0": (85.9, 0.17), "q4_1": (92.0, 0.1),
    "q4_k_s": (96.9, 0.055), "q4_k_m": (98.9, 0.044), "q5_0": (102.0, 0.022), "q6_k": (132.0, 0.003),
    "q8_0": (138.0, 0.002),
}  # fmt: skip


def _point(mib: float, kld: float, *labels: str) -> FrontPoint:
    size = round(mib * 2**20)
    predicted = Prediction(
        file_bytes=size,
        weights_bytes=size,
        kv_cache_bytes=1,
        compute_bytes=1,
        runtime_bytes=1,
        peak_memory_bytes=size,
        itl_ms=10.0,
        tokens_per_s=100.0,
        ttft_ms=1.0,
        prompt_tokens=1,
    )
    return FrontPoint(labels, kld, predicted)


@pytest.fixture(scope="module")
def front() -> Front:
    return Front(
        mixes=tuple(_point(58 + 3.5 * n, 1.2 * math.exp(-0.33 * n)) for n in range(24)),
        chosen=_point(98.7, 0.0249),
        presets=tuple(_point(*place, name) for name, place in _PRESETS.items()),
        left_out=("iq1_s",),
    )


def _canvas(text: str) -> list[str]:
    """The lines of the picture itself, without axis and what follows."""
    return [line for line in text.splitlines() if re.match(r" *[\d.]* [│┤|+]", line)]


@pytest.mark.parametrize("width", [40, 72, 100, 200])
def test_the_picture_fits_the_terminal(front: Front, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = front_text(front, colour=False).splitlines()
    axis = next(n for n, line in enumerate(lines) if "└" in line)
    assert max(map(len, lines[: axis + 3])) <= min(width, 110)
    drawn = "\n".join(_canvas("\n".join(lines)))
    assert drawn.count("◆") == 1
    assert 10 <= drawn.count("+") <= len(_PRESETS)  # two points may share a cell
    assert drawn.count("•") >= 14


def test_names_stand_beside_points_and_cover_nothing(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    drawn = "\n".join(_canvas(front_text(front, colour=False)))
    words = re.findall(r"[a-z][a-z0-9_]+", drawn)
    assert len(words) == len(set(words))
    assert set(words) <= {*_PRESETS, "chosen"}
    assert {"chosen", "q8_0", "q6_k", "iq2_xs"} <= set(words)
    # Without names the same points are drawn.
    bare = Front(front.mixes, front.chosen, tuple(_point(*place) for place in _PRESETS.values()), ())
    plain = "\n".join(_canvas(front_text(bare, colour=False)))
    assert [drawn.count(c) for c in "+•◆"] == [plain.count(c) for c in "+•◆"]


def test_points_stand_where_their_figures_are(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    lines = _canvas(front_text(front, colour=False))
    (row,) = (n for n, line in enumerate(lines) if "◆" in line)
    ticks = {n: float(line.partition("┤")[0]) for n, line in enumerate(lines) if "┤" in line}
    assert len(ticks) >= 3
    assert all((n <= row) == (tick >= 0.0249) for n, tick in ticks.items() if n != row)
    edge = lines[row].index("│") if row not in ticks else lines[row].index("┤")
    width = 110 - edge - 2
    assert lines[row].index("◆") - edge - 1 == round(Scale.around([58.0, 138.5]).at(98.7) * (width - 1))


def test_the_table_has_every_preset_and_the_plan(front: Front) -> None:
    text = front_text(front, colour=False)
    for name, (mib, kld) in _PRESETS.items():
        assert re.search(rf"^{name} +{mib} MiB +{kld:.4g} ", text, re.MULTILINE), name
    assert re.search(r"^chosen +98\.7 MiB +0\.0249 ", text, re.MULTILINE)
    assert "left out: iq1_s" in text


def test_colours_change_nothing_else(front: Front) -> None:
    coloured = front_text(front, colour=True)
    assert "\x1b[1;32m◆" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == front_text(front, colour=False)


def test_an_output_that_only_takes_ascii() -> None:
    program = (
        "from tests_front import front; from edgeq.cli.front import front_text; "
        "import sys; sys.stdout.write(front_text(front, colour=False))"
    )
    program = program.replace("from tests_front import front; ", _ASCII_FRONT)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONIOENCODING": "ascii:strict", "PATH": ""},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b" # " in done.stdout
    assert b"chosen" in done.stdout


_ASCII_FRONT = (
    "from edgeq.planner.front import Front, FrontPoint; from edgeq.types import Prediction; "
    "p = lambda size, kld: FrontPoint((), kld, Prediction(file_bytes=size, weights_bytes=1, kv_cache_bytes=1, "
    "compute_bytes=1, runtime_bytes=1, peak_memory_bytes=1, itl_ms=1.0, tokens_per_s=1.0, ttft_ms=1.0, "
    "prompt_tokens=1)); front = Front((p(9000, 0.5), p(20000, 0.01)), p(12000, 0.2), (), ()); "
)


def test_points_of_the_unquantized_model_are_left_out_of_a_logarithmic_picture(front: Front) -> None:
    with_zero = Front((*front.mixes, _point(257.0, 0.0)), front.chosen, front.presets, ())
    assert _canvas(front_text(with_zero, colour=False)) == _canvas(front_text(front, colour=False))
    assert draw(with_zero, "t", ".png").startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [40, 110])
def test_a_plan_without_loss_is_seen_at_the_foot(front: Front, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lossless = Front(front.mixes, _point(257.0, 0.0, "f16"), front.presets, ())
    text = front_text(lossless, colour=False)
    lines = _canvas(text)
    assert [n for n, line in enumerate(lines) if "◆" in line] == [len(lines) - 1]
    assert "chosen (KL 0)" in lines[-1]
    assert "◆ chosen (KL 0)" in text
    assert re.search(r"^chosen \(f16\) +257\.0? MiB +0 ", text, re.MULTILINE)
    assert max(map(len, lines)) <= width
    texts = _svg_texts(draw(lossless, "t", ".svg"))
    assert "chosen (KL 0)" in texts
    assert texts.keys() >= set(_PRESETS)
    assert draw(lossless, "t", ".png").startswith(b"\x89PNG")


def test_a_picture_without_mixes_says_why(front: Front) -> None:
    without = Front((), front.chosen, front.presets, ())
    assert "no mix keeps the device's budget" in front_text(without, colour=False)
    assert "no mix keeps" not in front_text(front, colour=False)
    assert draw(without, "t", ".svg")


def test_nothing_but_the_unquantized_model() -> None:
    nothing = Front((), _point(257.0, 0.0), (), ())
    assert "nothing to draw" in front_text(nothing, colour=False)
    assert draw(nothing, "t", ".svg")


def test_one_point_is_a_picture_too() -> None:
    alone = Front((_point(90.0, 0.1),), _point(90.0, 0.1), (), ())
    assert "◆" in front_text(alone, colour=False)
    assert draw(alone, "t", ".png").startswith(b"\x89PNG")


@given(st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=9), st.booleans(), st.integers(2, 12))
def test_scales(values: list[float], log: bool, most: int) -> None:
    scale = Scale.around(values, log=log)
    places = [scale.at(value) for value in sorted(values)]
    assert places == sorted(places)
    assert 0 <= places[0] <= places[-1] <= 1
    ticks = scale.ticks(most)
    assert len(ticks) <= max(most, 12)
    assert all(-1e-9 <= scale.at(tick) <= 1 + 1e-9 for tick in ticks)


# --- files ------------------------------------------------------------------------------------------------------------


def _svg_texts(data: bytes) -> dict[str, ET.Element]:
    return {"".join(e.itertext()).strip(): e for e in ET.fromstring(data).iter() if e.tag.endswith("text")}


def test_an_svg_names_everything_with_units(front: Front) -> None:
    texts = _svg_texts(draw(front, "tiny on laptop-cpu", ".svg"))
    assert {*_PRESETS, "chosen", "best mix of its size", "tiny on laptop-cpu"} <= texts.keys()
    assert {"file size (MiB)", "predicted mean KL divergence (nats)"} <= texts.keys()
    assert "Predicted, not measured. A preset's point is the preset's types, rounded by edgeq." in texts


def test_no_name_covers_another(front: Front) -> None:
    """Of an 8-point font every letter is between 3 and 7 points wide and about 8 high."""
    places = {}
    for text, element in _svg_texts(draw(front, "t", ".svg")).items():
        moved = re.search(r"translate\(([\d.]+) ([\d.]+)\)", element.get("transform", ""))
        x = float(element.get("x") or (moved and moved[1]) or "nan")
        y = float(element.get("y") or (moved and moved[2]) or "nan")
        if text in _PRESETS or text == "chosen":
            places[text] = (x, y)
    assert len(places) == len(_PRESETS) + 1
    for (a, (ax, ay)), (b, (bx, by)) in itertools.combinations(places.items(), 2):
        left, right = ((a, ax), bx) if ax <= bx else ((b, bx), ax)
        assert abs(ay - by) > 6 or left[1] + 3 * len(left[0]) < right, (a, b)


def test_the_same_points_make_the_same_file(front: Front) -> None:
    for suffix in (".svg", ".png"):
        assert draw(front, "t", suffix) == draw(front, "t", suffix)
