"""Building in a process of its own: under a limit, and with every way to die told in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import pytest

from edgeq.errors import SessionError, UnsupportedModelError
from edgeq.runtime.tensorrt.build_process import build_limited, likely_peak_bytes
from edgeq.runtime.tensorrt.records import EngineSettings
from edgeq.tensor_types import AxisRange
from edgeq.units import parse_bytes

PYTHON = sys.executable
ADA = EngineSettings(compute_capability="8.9", axes={"batch": AxisRange(least=1, usual=2, most=4)})


@pytest.mark.usefixtures("rtx")
def test_an_engine_comes_out_of_the_process(tiny: ModuleType, tmp_path: Path) -> None:
    told: list[tuple[float, int]] = []
    graph, out = tiny.int8_graph(tmp_path / "m.onnx"), tmp_path / "m.engine"
    info = build_limited(
        "tensorrt_rtx", graph, out, ADA, limit_bytes=4 << 30, progress=lambda s, n: told.append((s, n))
    )
    assert info.size_bytes == out.stat().st_size
    assert info.peak_memory_bytes is not None
    assert 50 << 20 < info.peak_memory_bytes < 1.5 * likely_peak_bytes(graph)
    assert all(seconds > 0 for seconds, _ in told)


@pytest.mark.usefixtures("rtx")
def test_the_limit_ends_it_and_one_that_would_do_is_named(tiny: ModuleType, tmp_path: Path) -> None:
    graph, out = tiny.int8_graph(tmp_path / "m.onnx"), tmp_path / "m.engine"
    with pytest.raises(
        SessionError, match=r"more than the limit of 60\.0 MiB\. .*use --memory-limit (\d+MiB)"
    ) as raised:
        build_limited("tensorrt_rtx", graph, out, ADA, limit_bytes=60 << 20)
    assert list(tmp_path.glob("m.engine*")) == []
    enough = parse_bytes(str(raised.value).split("--memory-limit ")[1].rstrip("."))
    assert build_limited("tensorrt_rtx", graph, out, ADA, limit_bytes=enough).size_bytes > 0


@pytest.mark.usefixtures("rtx")
def test_errors_cross_the_border_whole(tiny: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"node 'the_determinant' \(Det\)"):
        build_limited("tensorrt_rtx", tiny.unsupported_graph(tmp_path / "u.onnx"), tmp_path / "u.engine", ADA)


def _worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let another program stand for the worker."""
    script = tmp_path / "worker"
    script.write_text(f"#!{PYTHON}\n{textwrap.dedent(program)}")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_a_worker_that_the_system_ends_is_one_line(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tiny.float_graph(tmp_path / "m.onnx")
    _worker(tmp_path, monkeypatch, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(SessionError, match=r"most likely because memory ran out\. By its size it needs about \d"):
        build_limited("tensorrt_rtx", graph, tmp_path / "m.engine", ADA)


def test_a_worker_that_crashes_tells_its_last_words(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tiny.float_graph(tmp_path / "m.onnx")
    program = "import os, sys; print('Assertion failed: foo', file=sys.stderr, flush=True); os.abort()"
    _worker(tmp_path, monkeypatch, program)
    with pytest.raises(SessionError, match=r"was ended by SIGABRT; its last words: Assertion failed: foo\. "):
        build_limited("tensorrt_rtx", graph, tmp_path / "m.engine", ADA)
    _worker(tmp_path, monkeypatch, "import sys; sys.exit(3)")
    with pytest.raises(SessionError, match="ended with exit code 3"):
        build_limited("tensorrt_rtx", graph, tmp_path / "m.engine", ADA)


def test_the_limit_watches_while_memory_grows(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tiny.float_graph(tmp_path / "m.onnx")
    program = """
        import sys, time
        sys.stdin.buffer.read()
        held = []
        for _ in range(400):
            held.append(bytearray(b"x" * (1 << 20)))
            time.sleep(0.005)
    """
    _worker(tmp_path, monkeypatch, program)
    with pytest.raises(SessionError, match=r"more than the limit of 100\.0 MiB"):
        build_limited("tensorrt_rtx", graph, tmp_path / "m.engine", ADA, limit_bytes=100 << 20)


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("delay_s", [0.0, 2.0])
def test_the_worker_dies_with_its_parent(tmp_path: Path, delay_s: float) -> None:
    # The parent starts the worker, gives it no request to finish with, tells its id, and is killed.
    program = f"""
        import subprocess, sys, time, os, msgspec
        from edgeq.runtime.tensorrt.build_worker import BuildRequest
        from edgeq.runtime.tensorrt.records import EngineSettings
        request = BuildRequest(flavour="tensorrt_rtx", onnx={str(tmp_path / "fifo")!r}, out="x",
                               settings=EngineSettings(compute_capability="8.9"), parent=os.getpid())
        worker = subprocess.Popen([sys.executable, "-m", "edgeq.runtime.tensorrt.build_worker"], stdin=subprocess.PIPE)
        worker.stdin.write(msgspec.json.encode(request))
        worker.stdin.close()
        print(worker.pid, flush=True)
        time.sleep(60)
    """
    os.mkfifo(tmp_path / "fifo")  # opening it waits for ever: the worker is alive, and busy
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(delay_s)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and _alive(worker):
        time.sleep(0.05)
    assert not _alive(worker)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
