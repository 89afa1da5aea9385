from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgeq.converters.gguf.imatrix import read_imatrix
from edgeq.errors import ConversionError, OutputExistsError, UsageError
from edgeq.planner import importance
from edgeq.planner.importance import ImatrixJob, make_imatrix

_CONVERTER = """
import shutil, sys
from pathlib import Path
folder, out = sys.argv[1], sys.argv[sys.argv.index("--outfile") + 1]
assert sys.argv[sys.argv.index("--outtype") + 1] == "f32"
shutil.copy(Path(folder).with_suffix(".gguf"), out)
print("converted", file=sys.stderr)
"""


@pytest.mark.parametrize("given", [False, True])
def test_a_checkout_of_llama_cpp_converts_once(given: bool, tiny_hf: Callable[..., Path], tmp_path: Path) -> None:
    model, checkout, out = tiny_hf("llama-tied"), tmp_path / "llama.cpp", tmp_path / "out" / "own.gguf"
    checkout.mkdir()
    (checkout / "convert_hf_to_gguf.py").write_text(_CONVERTER)
    text = tmp_path / "text.txt"
    text.write_text("the robot moves its arm " * 80)
    job = ImatrixJob(str(model), llama_cpp=checkout, tokens=300, threads=1, calibration=text if given else None)
    stages: list[str] = []
    made = make_imatrix(job, out, progress=lambda stage, *_: stages.append(stage))
    assert stages.count("convert with llama.cpp") == 1
    assert "read weights" not in stages
    assert list(out.parent.iterdir()) == [out]
    assert read_imatrix(out).sha256 == made.matrix.sha256
    assert made.text.n_tokens == 300
    assert made.without_entry == ()
    with pytest.raises(UsageError, match="this is a GGUF"):
        make_imatrix(ImatrixJob(str(model.with_suffix(".gguf")), llama_cpp=checkout), tmp_path / "other.gguf")


def test_a_text_that_is_too_short_is_refused_before_weights_are_read(
    tiny_hf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "export_reference", lambda *_: pytest.fail("weights were read"))
    short = tmp_path / "short.txt"
    short.write_text("the robot")
    with pytest.raises(UsageError, match="are needed"):
        make_imatrix(ImatrixJob(str(tiny_hf("llama-tied")), calibration=short), tmp_path / "new" / "own.gguf")
    assert list(tmp_path.iterdir()) == [short]


def test_a_file_that_appears_meanwhile_is_kept(tiny_hf: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "own.gguf"
    job = ImatrixJob(str(tiny_hf("llama-tied").with_suffix(".gguf")), tokens=300, threads=1)

    def progress(stage: str, *_: object) -> None:
        if stage == "collect imatrix":
            out.write_text("mine")

    with pytest.raises(OutputExistsError, match=r"own.gguf exists.*--force"):
        make_imatrix(job, out, progress=progress)
    assert out.read_text() == "mine"
    make_imatrix(job, out, force=True)
    assert read_imatrix(out).chunk_count > 0
    assert list(tmp_path.iterdir()) == [out]


def test_names_that_are_no_text_are_escaped_and_those_too_long_refused(
    tiny_hf: Callable[..., Path], tmp_path: Path
) -> None:
    import gguf

    text, out = tmp_path / "t\udcff.txt", tmp_path / "own.gguf"
    text.write_text("the robot moves its arm " * 80)
    job = ImatrixJob(str(tiny_hf("llama-tied")), tokens=300, threads=1, calibration=text)
    made = make_imatrix(job, out)
    assert made.text.name == "t\\udcff.txt"
    (dataset,) = gguf.GGUFReader(out).fields["imatrix.datasets"].contents()
    assert dataset.startswith("t\\udcff.txt, 300 tokens, sha256 ")
    with pytest.raises(ConversionError, match="too long"):
        make_imatrix(job, tmp_path / ("o" * 300))
    with pytest.raises(OutputExistsError, match="made from"):
        make_imatrix(job, text, force=True)
