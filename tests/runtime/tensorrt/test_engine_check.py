"""A wrong engine does not serve."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeq.bundle import describe_file, open_bundle
from edgeq.errors import BundleError, SessionError
from edgeq.profiles.onnx.session import open_onnx_session
from edgeq.runtime.tensorrt.cache import EngineFolder, EngineStore, put_engine
from edgeq.runtime.tensorrt.check import Arrays, answered, check_engine
from edgeq.runtime.tensorrt.engine_key import Machine
from edgeq.runtime.tensorrt.records import EngineInfo, EngineKey
from edgeq.runtime.tensorrt.samples import (
    ANSWERS_FILE,
    SAMPLES_FILE,
    bundle_answers,
    bundle_samples,
    write_samples,
)
from edgeq.runtime.tensorrt.serving import serve
from edgeq.runtime.tensorrt.targets import EngineTarget

Wrong = Any


def _cpu(graph: Path) -> Any:
    session = open_onnx_session(graph, 1)
    return lambda inputs: dict(zip(["scores"], session.run(["scores"], dict(inputs)), strict=True))


def test_the_graph_itself_passes(tiny: ModuleType, tmp_path: Path) -> None:
    graph = tiny.int8_graph(tmp_path / "m.onnx")
    check = check_engine(_cpu(graph), answered(graph, tiny.calls([1, 3])))
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
        check_engine(lambda inputs: {"scores": wrong(right(inputs)["scores"])}, answered(graph, tiny.calls([3])))


def test_nothing_to_check_with_is_no_check(tiny: ModuleType, tmp_path: Path) -> None:
    graph = tiny.int8_graph(tmp_path / "m.onnx")
    with pytest.raises(SessionError, match="no inputs"):
        check_engine(_cpu(graph), answered(graph, []))


class _Session:
    """What stands for an engine on a GPU, which this machine may not have."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.closed = False

    def close(self) -> None:
        self.closed = True


def _session(run: Any) -> Any:
    return _Session(run)


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


def test_answers_of_the_bundle_stand_for_a_graph_that_no_cpu_computes(int8_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(int8_bundle)
    calls = list(answered(bundle.file("model"), bundle_samples(bundle)))
    samples, answers = (dict(call) for call, _ in calls), (dict(answer) for _, answer in calls)
    write_samples(int8_bundle / SAMPLES_FILE, list(samples))
    write_samples(int8_bundle / ANSWERS_FILE, list(answers))
    entries = (describe_file(int8_bundle, SAMPLES_FILE, "samples"), describe_file(int8_bundle, ANSWERS_FILE, "answers"))
    plan = msgspec.structs.replace(bundle.tensor.plan, scheme="bf16")
    manifest = msgspec.structs.replace(bundle.tensor, plan=plan, files=(*bundle.tensor.files, *entries))
    bf16 = dataclasses.replace(bundle, manifest=manifest)
    right = _cpu(bundle.file("model"))
    (int8_bundle / "model.onnx").write_bytes(b"nothing that a CPU computes")
    store, target = EngineStore(tmp_path / "engines"), EngineTarget("board", "8.7", machine=Machine(sms=8))
    found, trt = _engine(store), ModuleType("tensorrt")
    with pytest.raises(SessionError, match="take BF16: an engine cannot be compared with its graph on other inputs"):
        serve(trt, bf16, found, target, store, samples=[], session=lambda *_a, **_k: _session(right))
    found = _engine(store)
    with pytest.raises(SessionError, match="is not the graph's"):
        wrong = _session(lambda inputs: {"scores": -right(inputs)["scores"]})
        serve(trt, bf16, found, target, store, session=lambda *_a, **_k: wrong)
    found = _engine(store)
    serve(trt, bf16, found, target, store, session=lambda *_a, **_k: _session(right))
    check = store.check_of(found, 8, "8.7")
    assert check is not None
    assert (check.inputs, check.max_error) == (4, 0.0)
    write_samples(int8_bundle / ANSWERS_FILE, [dict(calls[0][1])])
    with pytest.raises(BundleError, match="has 1 whole answers to 4 samples"):
        bundle_answers(bf16)


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
