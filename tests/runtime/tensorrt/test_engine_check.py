"""A wrong engine does not serve."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgeq.bundle import open_bundle
from edgeq.errors import SessionError
from edgeq.profiles.onnx.session import open_onnx_session
from edgeq.runtime.tensorrt.cache import EngineFolder, EngineStore, put_engine
from edgeq.runtime.tensorrt.check import Arrays, check_engine
from edgeq.runtime.tensorrt.engine_key import Machine
from edgeq.runtime.tensorrt.records import EngineInfo, EngineKey
from edgeq.runtime.tensorrt.serving import serve
from edgeq.runtime.tensorrt.targets import EngineTarget

Wrong = Any


def _cpu(graph: Path) -> Any:
    session = open_onnx_session(graph, 1)
    return lambda inputs: dict(zip(["scores"], session.run(["scores"], dict(inputs)), strict=True))


def test_the_graph_itself_passes(tiny: ModuleType, tmp_path: Path) -> None:
    graph = tiny.int8_graph(tmp_path / "m.onnx")
    check = check_engine(_cpu(graph), graph, tiny.calls([1, 3]))
    assert check.inputs == 2
    assert check.min_cosine == pytest.approx(1.0)
    assert check.max_error == 0.0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda y: -y, "output 'scores' is not the graph's: cosine -1"),
        (lambda y: y[::-1] * np.asarray([1, -1, 2, 0, 3], np.float32), "is not the graph's"),
        (np.zeros_like, "cosine 0.0000"),
        (lambda y: y * np.nan, "is not finite"),
        (lambda y: y[:, :2], r"has the shape \(3, 2\), the graph's \(3, 5\)"),
    ],
)
def test_a_wrong_output_is_named(tiny: ModuleType, tmp_path: Path, wrong: Wrong, told: str) -> None:
    graph = tiny.int8_graph(tmp_path / "m.onnx")
    right = _cpu(graph)
    with pytest.raises(SessionError, match=told):
        check_engine(lambda inputs: {"scores": wrong(right(inputs)["scores"])}, graph, tiny.calls([3]))


def test_nothing_to_check_with_is_no_check(tiny: ModuleType, tmp_path: Path) -> None:
    graph = tiny.int8_graph(tmp_path / "m.onnx")
    with pytest.raises(SessionError, match="no inputs"):
        check_engine(_cpu(graph), graph, [])


class _Session:
    """What stands for an engine on a GPU, which this machine may not have."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.closed = False

    def close(self) -> None:
        self.closed = True


def _engine(store: EngineStore) -> EngineFolder:
    key = EngineKey(
        artifact_sha256="a" * 64, flavour="tensorrt", version="10.3.0", compute_capability="8.7", settings="s"
    )

    def build(out: Path) -> EngineInfo:
        out.write_bytes(b"engine")
        return EngineInfo(
            flavour="tensorrt", version="10.3.0", compute_capability="8.7", size_bytes=6,
            sha256=hashlib.sha256(b"engine").hexdigest(), build_ms=1.0, layers=1, precisions={}, shapes=(),
            created_utc="",
        )  # fmt: skip

    return put_engine(store.place(key), key, build)


def test_a_new_engine_is_compared_once_before_it_serves(int8_bundle: Path, tmp_path: Path) -> None:
    store, bundle = EngineStore(tmp_path / "engines"), open_bundle(int8_bundle)
    target = EngineTarget("board", "8.7", machine=Machine(sms=8))
    right, calls = _cpu(bundle.file("model")), []

    def run(inputs: Arrays) -> Any:
        calls.append(inputs)
        return right(inputs)

    found = _engine(store)
    session: Any = _Session(run)
    for expected in (4, 4):  # the second time it is known to be right
        serve(ModuleType("tensorrt"), bundle, found, target, store, session=lambda *_a, **_k: session)
        assert not session.closed
        assert len(calls) == expected
    check = store.check_of(found, 8, "8.7")
    assert check is not None
    assert check.inputs == 4


def test_an_engine_that_is_wrong_is_closed_and_removed(int8_bundle: Path, tmp_path: Path) -> None:
    store, bundle = EngineStore(tmp_path / "engines"), open_bundle(int8_bundle)
    target = EngineTarget("board", "8.7", machine=Machine(sms=8))
    right = _cpu(bundle.file("model"))
    session: Any = _Session(lambda inputs: {"scores": -right(inputs)["scores"]})
    found = _engine(store)
    with pytest.raises(SessionError, match="is not the graph's"):
        serve(ModuleType("tensorrt"), bundle, found, target, store, session=lambda *_a, **_k: session)
    assert session.closed
    assert not found.path.exists()
    assert store.check_of(found, 8, "8.7") is None
