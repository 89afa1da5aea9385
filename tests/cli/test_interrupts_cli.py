"""Ctrl-C and SIGTERM in every stage of ``edgeq convert``: exit code 130, one line, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_SIGNALS = [signal.SIGINT, signal.SIGTERM]


def _interrupted(model: Path, folder: Path, stage: str, delay_s: float, number: signal.Signals) -> None:
    """Convert, send the signal a moment after the stage has begun, and look at what is left."""
    arguments = ["convert", str(model), "--target", "laptop-cpu", "--quant", "q4_k_m", "-o", "out"]
    command = [sys.executable, "-m", "edgeq.cli", *arguments]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=os.environ) as child:
        assert child.stderr is not None
        seen = []
        for line in child.stderr:
            seen.append(line)
            if line.startswith(stage):
                break
        else:
            pytest.fail(f"{stage} did not begin: {seen}")
        time.sleep(delay_s)
        child.send_signal(number)
        rest = child.stderr.read()
        code = child.wait(60)
    assert code == 130, rest
    assert rest.splitlines()[-1] == "edgeq: interrupted"
    assert "Exception" not in rest
    assert "Traceback" not in rest
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", _SIGNALS, ids=lambda s: s.name)
@pytest.mark.parametrize(("stage", "delay_s"), [("quantize", 0.2), ("check model", 0.05)])
def test_an_interrupt_while_llama_cpp_works(
    smollm2_hf: Path, tmp_path: Path, stage: str, delay_s: float, number: signal.Signals
) -> None:
    _interrupted(smollm2_hf, tmp_path, stage, delay_s, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", _SIGNALS, ids=lambda s: s.name)
@pytest.mark.parametrize(
    "stage", ["plan", "read weights", "quantize", "check tokenizer", "check model", "measure quality"]
)
def test_interrupts_at_many_moments(smollm2_hf: Path, tmp_path: Path, stage: str, number: signal.Signals) -> None:
    for delay_s in (0.0, 0.1):
        _interrupted(smollm2_hf, tmp_path, stage, delay_s, number)


# ``main`` imports that module inside its ``try``: however slow the machine is, "up" is not said before.
_TELLS_WHEN_IN_MAIN = """
import os, sys
from edgeq.cli import main

class Tell:
    def find_spec(self, name, *_):
        if name == "edgeq.cli.app":
            os.write(2, b"up\\n")

sys.meta_path.insert(0, Tell())
raise SystemExit(main())
"""


def test_an_interrupt_from_the_first_moment_on(smollm2_bundle: Path) -> None:
    """Imports, loading, prompt, answer: from ``main`` on, there is no moment for a traceback."""
    program = _TELLS_WHEN_IN_MAIN
    command = [sys.executable, "-c", program, "run", str(smollm2_bundle), "Count to a thousand.", "--max-tokens", "400"]
    for step in range(8):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
            assert child.stderr is not None
            assert child.stderr.readline() == "up\n"
            time.sleep(0.001 * 2**step - 0.0005)
            child.send_signal(signal.SIGINT)
            said = child.stderr.read()
            assert child.wait(60) == 130, said
        assert said == "edgeq: interrupted\n"
