"""``edgeq convert`` killed at random moments leaves no bundle, and the next run cleans up what it did leave."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeq.bundle import MANIFEST, open_bundle
from edgeq.staging import PREFIX


def _convert(model: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edgeq.cli", "convert", str(model), "--target", "laptop-cpu", "-o", str(out)]
    command += ["--eval-tokens", "0"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)


def _killed_runs(model: Path, folder: Path, count: int) -> None:
    started = time.monotonic()
    assert _convert(model, folder / "reference").wait() == 0
    whole_s = time.monotonic() - started
    rng = random.Random(20)
    killed_with_staging = 0
    out = folder / "out"
    for _ in range(count):
        child = _convert(model, out)
        try:
            child.wait(timeout=rng.uniform(0.02, 1.0) * whole_s)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
        orphans = [p for p in folder.iterdir() if p.name not in ("reference", "out")]
        # At most the one that was killed just now: every run sweeps those before it.
        assert len(orphans) <= 1
        assert all(p.name.startswith(PREFIX) for p in orphans)
        killed_with_staging += bool(orphans)
        if out.exists():  # this run was faster than its end; what is there must be whole
            open_bundle(out, verify=True)
            for path in sorted(out.rglob("*")):
                path.unlink()
            out.rmdir()
    assert killed_with_staging >= count // 4, "the moments must hit work in progress, or nothing was tested"
    assert _convert(model, out).wait() == 0
    assert sorted(p.name for p in folder.iterdir()) == ["out", "reference"]
    assert (out / MANIFEST).is_file()


def test_killed_three_times(smollm2_hf: Path, tmp_path: Path) -> None:
    _killed_runs(smollm2_hf, tmp_path, 3)


@pytest.mark.slow
def test_killed_twenty_times(smollm2_hf: Path, tmp_path: Path) -> None:
    _killed_runs(smollm2_hf, tmp_path, 20)
