"""The way out for architectures that edgeq does not convert: llama.cpp's own converter, from a user's checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

from edgeq.converters.gguf.header import read_header
from edgeq.errors import ConversionError, UnsupportedModelError, UsageError

__all__ = ["export_with_llama_cpp"]

_SCRIPT = "convert_hf_to_gguf.py"
_KEPT_LINES = 8
# PR_SET_PDEATHSIG (1) survives exec: Linux kills the converter (9) with us, so that it does not go on writing.
_DIES_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"


def export_with_llama_cpp(
    folder: Path, out: Path, checkout: Path, *, float_type: str, progress: Callable[[str], None] | None = None
) -> None:
    """Run ``convert_hf_to_gguf.py`` of a llama.cpp checkout with this Python.

    Args:
        folder: the Hugging Face folder.
        out: the GGUF to write.
        checkout: the llama.cpp checkout; its script needs torch and transformers in this environment.
        float_type: ``"f32"``, ``"f16"`` or ``"bf16"``.
        progress: told each line that the script prints.

    Raises:
        UsageError: the folder holds no such script.
        UnsupportedModelError: the model brings code of its own, which the script may run.
        ConversionError: the script failed; its last line is the cause.
    """
    script = checkout / _SCRIPT
    if not script.is_file():
        raise UsageError(f"{checkout} has no {_SCRIPT}", "Give --llama-cpp the folder of a llama.cpp checkout")
    _refuse_foreign_code(folder)
    arguments = [str(script), str(folder), "--outfile", str(out), "--outtype", float_type]
    command = [sys.executable, "-c", _DIES_WITH_PARENT, sys.executable, *arguments]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as child:
        try:
            lines = _follow(child, progress)
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0 or not out.is_file():
        raise _failure(script, child.returncode, lines)
    read_header(out)


def _follow(child: subprocess.Popen[str], progress: Callable[[str], None] | None) -> list[str]:
    """Read what the script says until it ends; returns the last lines."""
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    for line in child.stderr or ():
        if text := line.strip():
            kept.append(text)
            if progress is not None:
                progress(text)
    return list(kept)


def _failure(script: Path, code: int, lines: list[str]) -> ConversionError:
    cause = lines[-1] if lines else f"exit code {code}"
    if "ModuleNotFoundError" in cause or "ImportError" in cause:
        remedy = f"Install {script.parent / 'requirements.txt'} into this environment"
    else:
        remedy = "Use a checkout that knows this model, or convert it with the script's own options and bring the GGUF"
    return ConversionError(f"{script} failed: {cause}", remedy, details=tuple(lines[:-1]))


def _refuse_foreign_code(folder: Path) -> None:
    """llama.cpp's script lets transformers run a model's own code for some families; edgeq does not."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # the script says what is wrong with it
    if isinstance(config, dict) and "auto_map" in config and any(folder.glob("*.py")):
        raise UnsupportedModelError(
            f"{folder} brings code of its own (auto_map), which llama.cpp's converter may run",
            "If you trust it, run the converter yourself and give edgeq the GGUF",
        )
