"""The way out for architectures that edgeq does not convert: llama.cpp's own converter, from a user's checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edgeq.converters.gguf.header import read_header
from edgeq.errors import ConversionError, UsageError

__all__ = ["export_with_llama_cpp"]

_SCRIPT = "convert_hf_to_gguf.py"


def export_with_llama_cpp(folder: Path, out: Path, checkout: Path, *, float_type: str) -> None:
    """Run ``convert_hf_to_gguf.py`` of a llama.cpp checkout with this Python.

    Args:
        folder: the Hugging Face folder.
        out: the GGUF to write.
        checkout: the llama.cpp checkout; its script needs torch and transformers in this environment.
        float_type: ``"f32"``, ``"f16"`` or ``"bf16"``.

    Raises:
        UsageError: the folder holds no such script.
        ConversionError: the script failed; its last line is the cause.
    """
    script = checkout / _SCRIPT
    if not script.is_file():
        raise UsageError(f"{checkout} has no {_SCRIPT}", "Give --llama-cpp the folder of a llama.cpp checkout")
    command = [sys.executable, str(script), str(folder), "--outfile", str(out), "--outtype", float_type]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0 or not out.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ConversionError(
            f"{script} failed: {lines[-1] if lines else f'exit code {done.returncode}'}",
            "Install its requirements.txt into this environment, or use a checkout that knows the model",
        )
    read_header(out)
