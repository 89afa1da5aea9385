"""Running an engine: the order of work with a stand-in for GPU and library, and the real thing where there is a GPU."""

from __future__ import annotations

import ctypes
import enum
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeq.bundle import open_bundle
from edgeq.errors import SessionClosedError, SessionError, UsageError
from edgeq.runtime.tensorrt.log import logger_of
from edgeq.runtime.tensorrt.serving import open_engine
from edgeq.runtime.tensorrt.session import EngineSession


class FakeDriver:
    """The host's memory for the device's; work is done when it is enqueued, or recorded and done at each launch."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.memory: dict[int, Any] = {}
        self.recording: list[Callable[[], object]] | None = None
        self.graphs: dict[int, list[Callable[[], object]]] = {}
        self.streams = 0
        self.closed = False
        self.full_after: int | None = None

    def enter(self) -> None:
        self.log.append("enter")

    def _take(self, n_bytes: int) -> int:
        if self.full_after is not None and len(self.memory) >= self.full_after:
            raise SessionError("The GPU's memory is full", "")
        block = (ctypes.c_uint8 * n_bytes)()
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    allocate = allocate_host = _take

    def _give(self, address: int) -> None:
        del self.memory[address]

    free = free_host = _give

    def create_stream(self) -> int:
        self.streams += 1
        return 7

    def destroy_stream(self, stream: int) -> None:
        assert stream == 7
        self.streams -= 1

    def do(self, what: str, work: Callable[[], object]) -> None:
        if self.recording is None:
            self.log.append(what)
            work()
        else:
            self.recording.append(work)

    def to_device(self, device: int, host: int, n_bytes: int, stream: int) -> None:
        self.do("to_device", partial(ctypes.memmove, device, host, n_bytes))

    def to_host(self, host: int, device: int, n_bytes: int, stream: int) -> None:
        self.do("to_host", partial(ctypes.memmove, host, device, n_bytes))

    def wait(self, stream: int) -> None:
        self.log.append("wait")

    def begin_capture(self, stream: int) -> None:
        self.log.append("capture")
        self.recording = []

    def end_capture(self, stream: int) -> int:
        assert self.recording is not None
        self.graphs[len(self.log)], self.recording = self.recording, None
        return len(self.log)

    def launch(self, graph: int, stream: int) -> None:
        self.log.append("launch")
        for work in self.graphs[graph]:
            work()

    def destroy_graph(self, graph: int) -> None:
        del self.graphs[graph]

    def close(self) -> None:
        self.closed = True


class Mode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class FakeEngine:
    """Doubles ``x`` of the shape (1 to 4, 3) into ``y``."""

    num_io_tensors = 2
    dynamic_output = False

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.capturable = True

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y")[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name == "x" else Mode.OUTPUT

    def get_tensor_shape(self, _name: str) -> tuple[int, ...]:
        return (-1, 3)

    def get_tensor_dtype(self, _name: str) -> str:
        return "float32"

    def get_tensor_profile_shape(self, _name: str, _index: int) -> list[tuple[int, ...]]:
        return [(1, 3), (2, 3), (4, 3)]

    def create_execution_context(self) -> FakeContext | None:
        return FakeContext(self)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.shape: tuple[int, ...] = (-1, 3)
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, _name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def get_tensor_shape(self, _name: str) -> tuple[int, ...]:
        return (-1, 3) if self.engine.dynamic_output else self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, _stream: int) -> bool:
        shape, driver = self.shape, self.engine.driver
        if driver.recording is not None and not self.engine.capturable:
            return False

        def work() -> None:
            count = math.prod(shape)
            x = np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses["x"]))
            y = np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses["y"]))
            y[:] = 2 * x

        driver.do("execute", work)
        return True


@pytest.fixture
def driver() -> FakeDriver:
    """A device."""
    return FakeDriver()


@pytest.fixture
def engine(driver: FakeDriver) -> FakeEngine:
    """An engine on it."""
    return FakeEngine(driver)


@pytest.fixture
def library(engine: FakeEngine) -> ModuleType:
    """TensorRT as far as a session speaks to it."""
    trt = ModuleType("tensorrt")

    class Logger:
        class Severity(enum.IntEnum):
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2

    def nptype(kind: str) -> type:
        if kind == "fp8":
            raise TypeError(kind)
        return np.float32

    def deserialize(data: bytes) -> FakeEngine | None:
        if data == b"engine":
            return engine
        logger_of(trt)[0].log(Logger.Severity.ERROR, "the plan is\nof version 9")
        return None

    trt.__dict__.update(
        __version__="10.3.0",
        ILogger=Logger,
        TensorIOMode=Mode,
        nptype=nptype,
        Runtime=lambda _logger: SimpleNamespace(deserialize_cuda_engine=deserialize),
    )
    return trt


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """The file of the engine."""
    path = tmp_path / "model.engine"
    path.write_bytes(b"engine")
    return path


def _rows(count: int, start: float = 0.0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (np.arange(count * 3, dtype=np.float32) + start).reshape(count, 3)


def test_a_call_is_recorded_at_its_second_time_and_replayed_from_then_on(
    library: ModuleType, driver: FakeDriver, plan: Path
) -> None:
    with EngineSession(library, plan, driver=driver) as session:
        for start in range(4):
            out = session.run({"x": _rows(2, start)})["y"]
            np.testing.assert_array_equal(out, 2 * _rows(2, start))
        assert driver.log.count("execute") == 1
        assert driver.log.count("capture") == 1
        assert driver.log.count("launch") == 3
        assert session.notes == []


def test_another_shape_is_recorded_anew(library: ModuleType, driver: FakeDriver, plan: Path) -> None:
    with EngineSession(library, plan, driver=driver) as session:
        for count in (1, 1, 1, 4, 4, 1, 2):
            np.testing.assert_array_equal(session.run({"x": _rows(count)})["y"], 2 * _rows(count))
            assert len(driver.graphs) <= 1
        assert driver.log.count("execute") == 4  # one plain run for each change of shape
    assert driver.graphs == {}


def test_results_are_the_callers(library: ModuleType, driver: FakeDriver, plan: Path) -> None:
    with EngineSession(library, plan, driver=driver) as session:
        first = session.run({"x": _rows(1)})["y"]
        kept = first.copy()
        session.run({"x": _rows(1, 100.0)})
        np.testing.assert_array_equal(first, kept)


def test_an_engine_that_cannot_be_recorded_is_run_and_it_is_said(
    library: ModuleType, driver: FakeDriver, engine: FakeEngine, plan: Path
) -> None:
    engine.capturable = False
    with EngineSession(library, plan, driver=driver) as session:
        for _ in range(4):
            np.testing.assert_array_equal(session.run({"x": _rows(2)})["y"], 2 * _rows(2))
        assert len(session.notes) == 1
        assert "not recorded as a CUDA graph" in session.notes[0]
        assert driver.log.count("capture") == 1
        assert driver.graphs == {}


def test_recording_can_be_switched_off(library: ModuleType, driver: FakeDriver, plan: Path) -> None:
    with EngineSession(library, plan, driver=driver, cuda_graph=False) as session:
        for _ in range(3):
            session.run({"x": _rows(2)})
        assert "capture" not in driver.log


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({}, "The inputs are none, the model takes x"),
        ({"z": _rows(1)}, "The inputs are z, the model takes x"),
        ({"x": _rows(1), "z": _rows(1)}, "The inputs are x, z"),
        ({"x": _rows(1).astype(np.float64)}, r"'x' is float64, the model takes float32\. .*astype"),
        ({"x": _rows(5)}, r"shape \(5, 3\), the engine takes \(1, 3\) to \(4, 3\)"),
        ({"x": np.zeros((0, 3), np.float32)}, r"shape \(0, 3\)"),
        ({"x": np.zeros((1, 3, 1), np.float32)}, r"shape \(1, 3, 1\)"),
    ],
)
def test_wrong_inputs_are_one_line(
    library: ModuleType, driver: FakeDriver, plan: Path, inputs: dict[str, Any], told: str
) -> None:
    with EngineSession(library, plan, driver=driver) as session:
        with pytest.raises(UsageError, match=told):
            session.run(inputs)
        np.testing.assert_array_equal(session.run({"x": _rows(1)})["y"], 2 * _rows(1))


def test_arrays_of_any_layout_are_taken(library: ModuleType, driver: FakeDriver, plan: Path) -> None:
    with EngineSession(library, plan, driver=driver) as session:
        strided = np.asfortranarray(_rows(4))[::2]
        np.testing.assert_array_equal(session.run({"x": strided})["y"], 2 * strided)


def test_closing_gives_all_back_and_is_final(library: ModuleType, driver: FakeDriver, plan: Path) -> None:
    session = EngineSession(library, plan, driver=driver)
    session.run({"x": _rows(2)})
    session.run({"x": _rows(2)})
    session.close()
    session.close()
    assert (driver.memory, driver.graphs, driver.streams, driver.closed) == ({}, {}, 0, True)
    with pytest.raises(SessionClosedError):
        session.run({"x": _rows(2)})


def test_a_refused_engine_tells_the_librarys_words(library: ModuleType, driver: FakeDriver, tmp_path: Path) -> None:
    path = tmp_path / "old.engine"
    path.write_bytes(b"older")
    with pytest.raises(SessionError, match=r"refused the engine .*: the plan is of version 9\. Build it again"):
        EngineSession(library, path, driver=driver)
    assert driver.closed


@pytest.mark.parametrize("full_after", [0, 1, 2, 3])
def test_too_little_memory_leaves_nothing_behind(
    library: ModuleType, driver: FakeDriver, plan: Path, full_after: int
) -> None:
    driver.full_after = full_after
    with pytest.raises(SessionError, match="memory is full"):
        EngineSession(library, plan, driver=driver)
    assert (driver.memory, driver.streams, driver.closed) == ({}, 0, True)


def test_what_an_engine_cannot_be_called_with_is_told_at_the_start(
    library: ModuleType, driver: FakeDriver, engine: FakeEngine, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.dynamic_output = True
    with pytest.raises(SessionError, match="shape of the output 'y' depends on values"):
        EngineSession(library, plan, driver=driver)
    engine.dynamic_output = False
    monkeypatch.setattr(engine, "get_tensor_dtype", lambda _name: "fp8")
    with pytest.raises(SessionError, match="'x' is fp8, which numpy does not have"):
        EngineSession(library, plan, driver=driver)
    monkeypatch.setattr(engine, "create_execution_context", lambda: None)
    with pytest.raises(SessionError, match="cannot make ready"):
        EngineSession(library, plan, driver=driver)


@pytest.mark.cuda
def test_an_engine_serves_on_the_gpu(tiny: ModuleType, int8_bundle: Path, tmp_path: Path) -> None:
    """Built, compared with its graph, recorded, and called with several shapes."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from edgeq.runtime.tensorrt.cache import EngineStore

    with open_engine(open_bundle(int8_bundle), store=EngineStore(tmp_path / "engines")) as session:
        for call in tiny.calls([1, 1, 1, 4, 4, 2]):
            out = session.run(call)["scores"]
            assert out.shape == (len(call["images"]), tiny.CLASSES)
            assert np.isfinite(out).all()
        assert session.notes == []
