from __future__ import annotations

import functools
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from edgeq.errors import EdgeqError, SessionClosedError, SessionError, UsageError
from edgeq.runtime.tensor.session import TensorSession
from edgeq.runtime.tensor.settings import TensorSettings
from edgeq.tensor_types import AxisRange, TensorSpec

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ONE = TensorSettings(threads=1)
RNG = np.random.default_rng(5)


def rows(count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return RNG.standard_normal((count, 8), np.float32)


@pytest.fixture(scope="module")
def reference(linear_onnx: Path) -> Callable[[Any], dict[str, Any]]:
    session = onnxruntime.InferenceSession(linear_onnx, providers=["CPUExecutionProvider"])
    return lambda x: dict(zip(("y", "mean"), session.run(None, {"x": x}), strict=True))


@pytest.fixture
def session(linear_onnx: Path, axes: dict[str, AxisRange]) -> Iterator[TensorSession]:
    with TensorSession.open(linear_onnx, TensorSettings(threads=1, axes=axes)) as opened:
        yield opened


def assert_same(found: Any, wanted: Any) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_run_gives_what_onnxruntime_gives(session: TensorSession, reference: Any) -> None:
    for x in (rows(2), rows(1), rows(2)):
        assert_same(session.run({"x": x}), reference(x))
    x = rows(3)
    assert_same(session.run(MappingProxyType({"x": x})), reference(x))
    assert session.inputs == (TensorSpec(name="x", dtype="float32", shape=("batch", 8)),)
    assert [spec.name for spec in session.outputs] == ["y", "mean"]
    assert session.providers == ("CPUExecutionProvider",)
    assert session.threads == 1
    assert session.load_ms > 0


def test_arrays_that_are_not_contiguous(session: TensorSession, reference: Any) -> None:
    for x in (rows(6)[::2], np.asfortranarray(rows(3)), rows(3)[:, ::-1]):
        assert_same(session.run({"x": x}), reference(np.ascontiguousarray(x)))


def test_outputs_belong_to_the_caller(session: TensorSession) -> None:
    x = rows(1)
    first = session.run({"x": x})["y"]
    kept = first.copy()
    session.run({"x": x + 1})
    np.testing.assert_array_equal(first, kept)


FAULTS: list[tuple[Any, str]] = [
    ({}, "'x' is missing"),
    ({"y": rows(1)}, "no input 'y'"),
    ({"x": rows(1), "z": rows(1)}, "no input 'z'"),
    ({"x": rows(1).tolist()}, "'x' is a list"),
    ({"x": None}, "'x' is a NoneType"),
    ({"x": rows(1).astype(np.float64)}, "'x' is float64"),
    ({"x": rows(1).astype(">f4")}, "'x' is >f4"),
    ({"x": np.zeros((1, 8), "U3")}, "'x' is <U3"),
    ({"x": np.zeros((1, 9), np.float32)}, r"shape \(1, 9\)"),
    ({"x": np.zeros(8, np.float32)}, r"shape \(8,\)"),
    ({"x": np.zeros((7, 8), np.float32)}, "'batch' of 'x' has 7.*1 to 6"),
    ({"x": np.zeros((0, 8), np.float32)}, "'batch' of 'x' has 0"),
]


@pytest.mark.parametrize(("inputs", "message"), FAULTS)
@pytest.mark.parametrize("warm", [False, True])
def test_each_fault_of_inputs_in_one_line(session: TensorSession, inputs: Any, message: str, warm: bool) -> None:
    if warm:
        session.run({"x": rows(1)})
    calls: list[Callable[[], object]] = [
        lambda: session.run(inputs),
        lambda: session.run_async(inputs),
        lambda: session.run_batch([{"x": rows(1)}, inputs]),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    session.run({"x": rows(1)})


def test_a_failure_of_the_runtime_is_one_line(tmp_path: Path) -> None:
    helper, proto = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        "gather",
        [helper.make_tensor_value_info("i", proto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", proto.FLOAT, ["n"])],
        [onnx.numpy_helper.from_array(np.arange(5, dtype=np.float32), "table")],
    )
    path = tmp_path / "gather.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    with TensorSession.open(path, ONE) as session:
        assert session.run({"i": np.array([4])})["y"] == [4]
        with pytest.raises(SessionError, match=r"the runtime failed: .*out of data bounds") as caught:
            session.run({"i": np.array([5])})
        assert "\n" not in str(caught.value)
        binding = session.bind({"i": [1]})
        binding.inputs["i"][:] = 9
        with pytest.raises(SessionError, match="out of data bounds"):
            binding.run()


def _note(done: list[int], index: int, _: object) -> None:
    done.append(index)


def test_run_async_keeps_the_order_and_raises_by_its_future(session: TensorSession, reference: Any) -> None:
    inputs = [rows(1) for _ in range(20)]
    futures = [session.run_async({"x": x}) for x in inputs]
    done: list[int] = []
    for index, future in enumerate(futures):
        future.add_done_callback(functools.partial(_note, done, index))
    for future, x in zip(futures, inputs, strict=True):
        assert_same(future.result(60), reference(x))
    assert sorted(done) == list(range(20))


def test_run_batch_joins_calls(session: TensorSession, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = session.run

    def watched(inputs: Mapping[str, Any]) -> Any:
        seen.append(len(inputs["x"]))
        return run(inputs)

    monkeypatch.setattr(session, "run", watched)
    counts = [1, 2, 3, 1, 6, 1, 1]
    calls = [{"x": rows(count)} for count in counts]
    results = session.run_batch(calls)
    assert seen == [6, 1, 6, 2]
    for call, result in zip(calls, results, strict=True):
        assert_same(result, reference(call["x"]))
    assert session.run_batch([]) == []


def test_a_bound_call_reads_and_writes_the_same_memory(session: TensorSession, reference: Any) -> None:
    binding = session.bind()
    assert binding.inputs["x"].shape == (2, 8)
    for x in (rows(2), rows(2), rows(2)):
        binding.inputs["x"][:] = x
        outputs = binding.run()
        assert outputs["y"] is binding.outputs["y"]
        assert_same(outputs, reference(x))
    other = session.bind({"x": (5, 8)})
    other.inputs["x"][:] = 1
    assert_same(other.run(), reference(np.ones((5, 8), np.float32)))
    binding.inputs["x"][:] = 2
    assert_same(binding.run(), reference(np.full((2, 8), 2, np.float32)))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1,)}, "no input 'z'"),
        ({"x": (7, 8)}, "'batch' of 'x' has 7"),
        ({"x": (2, 9)}, r"shape \(2, 9\)"),
        ({"x": (-1, 8)}, "makes no sense"),
        ({"x": ("a", 8)}, r"shape \('a', 8\) of 'x' makes no sense"),
        ({"x": (1.0, 8)}, r"shape \(1\.0, 8\) of 'x' makes no sense"),
        ({"x": 5}, "shape 5 of 'x' makes no sense"),
        ({"x": "28"}, "shape '28' of 'x' makes no sense"),
        ({"x": (1 << 40, 1 << 40)}, "takes more memory than there is"),
        (5, "shapes by the names of inputs, not a int"),
    ],
)
def test_shapes_that_cannot_be_bound(session: TensorSession, shapes: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        session.bind(shapes)


def test_a_dynamic_axis_without_a_size_cannot_be_bound(linear_onnx: Path) -> None:
    with (
        TensorSession.open(linear_onnx, ONE) as session,
        pytest.raises(UsageError, match="'batch' of 'x' has no size"),
    ):
        session.bind()


def test_many_threads_share_a_session(session: TensorSession, reference: Any) -> None:
    inputs = [rows(count % 6 + 1) for count in range(60)]
    with ThreadPoolExecutor(4) as pool:
        for x, result in zip(inputs, pool.map(lambda x: session.run({"x": x}), inputs), strict=True):
            assert_same(result, reference(x))


def test_a_closed_session(linear_onnx: Path) -> None:
    session = TensorSession.open(linear_onnx, ONE)
    binding = session.bind({"x": (1, 8)})
    assert "(closed)" not in repr(session)
    session.close()
    session.close()
    calls: list[Callable[[], object]] = [
        lambda: session.run({"x": rows(1)}),
        lambda: session.run_async({"x": rows(1)}),
        lambda: session.run_batch([{"x": rows(1)}]),
        lambda: session.bind({"x": (1, 8)}),
        binding.run,
    ]
    for call in calls:
        with pytest.raises(SessionClosedError):
            call()
    assert "(closed)" in repr(session)


def test_calls_that_wait_while_it_is_closed_end_with_an_error(session: TensorSession) -> None:
    begun, go_on = threading.Event(), threading.Event()
    run = session.run

    def slow(inputs: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return run(inputs)

    session.run = slow  # type: ignore[method-assign]
    futures = [session.run_async({"x": rows(1)}) for _ in range(3)]
    assert begun.wait(60)
    closer = threading.Thread(target=session.close)
    closer.start()
    while session._engine is not None:
        pass
    go_on.set()
    closer.join(60)
    assert not closer.is_alive()
    for future in futures:
        assert isinstance(future.exception(0), SessionClosedError)


def test_a_call_may_close_the_session(linear_onnx: Path) -> None:
    session = TensorSession.open(linear_onnx, ONE)
    first = session.run_async({"x": rows(1)})
    closed = threading.Event()

    def close(_: object) -> None:
        session.close()
        closed.set()

    session.run_async({"x": rows(1)}).add_done_callback(close)
    assert closed.wait(60)
    assert first.result(60)["y"].shape == (1, 4)


def test_nothing_is_held_after_closing(linear_onnx: Path) -> None:
    session = TensorSession.open(linear_onnx, ONE)
    binding = session.bind({"x": (1, 8)})
    session.run_async({"x": rows(1)}).result(60)
    engine = weakref.ref(session._engine)
    session.close()
    gc.collect()
    assert engine() is None
    assert binding.outputs["y"].shape == (1, 4)


def test_a_forgotten_session_warns(linear_onnx: Path) -> None:
    sessions = [TensorSession.open(linear_onnx, ONE)]
    with pytest.warns(ResourceWarning, match="unclosed <TensorSession x>"):
        sessions.clear()


def test_an_axis_of_one_size_is_fixed(linear_onnx: Path) -> None:
    settings = TensorSettings(threads=1, axes={"batch": AxisRange(least=3, usual=3, most=3)})
    with TensorSession.open(linear_onnx, settings) as session:
        assert session.inputs[0].shape == (3, 8)
        assert session.bind().run()["y"].shape == (3, 4)
        with pytest.raises(UsageError, match=r"shape \(2, 8\)"):
            session.run({"x": rows(2)})


def test_threads_stay_on_their_cores(linear_onnx: Path, reference: Any) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    with TensorSession.open(linear_onnx, TensorSettings(cores=tuple(cpus[:1] * 2))) as session:
        assert session.threads == 2
        here = os.sched_getaffinity(0)
        x = rows(1)
        assert_same(session.run_async({"x": x}).result(60), reference(x))
        assert session._worker is not None
        assert session._worker.submit(lambda: os.sched_getaffinity(0)).result(60) == {cpus[0]}
        assert os.sched_getaffinity(0) == here
    with pytest.raises(UsageError, match=r"may not use the CPU 99999.*Choose among"):
        TensorSession.open(linear_onnx, TensorSettings(cores=(99999,)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TensorSettings(threads=1, providers=("CUDAExecutionProvider",)), "was not built with CUDA.*onnxruntime-gpu"),
        (TensorSettings(threads=1, providers=("NoSuchProvider",)), "was not built with NoSuch.*Choose among .*CPU"),
        (TensorSettings(threads=1000), "1000 threads make no sense"),
    ],
)
def test_settings_that_cannot_be_met(linear_onnx: Path, settings: TensorSettings, message: str) -> None:
    if "CUDA" in message and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(EdgeqError, match=message):
        TensorSession.open(linear_onnx, settings)


def test_a_provider_that_is_left_out_silently_is_an_error(linear_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime only logs that a provider's libraries are missing, and computes on the CPU."""
    real = onnxruntime.InferenceSession
    asked: list[Any] = []

    def falling_back(source: Any, options: Any, *, providers: Any, **more: Any) -> Any:
        asked.append((providers, more["enable_fallback"]))
        return real(source, options, providers=["CPUExecutionProvider"], **more)

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", falling_back)
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    with pytest.raises(SessionError, match=r"could not start CUDAExecutionProvider.*computed on CPU.*CUDA and cuDNN"):
        TensorSession.open(linear_onnx, TensorSettings(threads=1, providers=wanted))
    assert asked == [(list(wanted), 0)]


def test_optimizers_are_switched_off(linear_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = onnxruntime.InferenceSession, []

    def watched(*args: Any, **more: Any) -> Any:
        seen.append(more["disabled_optimizers"])
        return real(*args, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    settings = TensorSettings(threads=1, disabled_optimizers=("SkipLayerNormFusion",))
    TensorSession.open(linear_onnx, settings).close()
    assert [names[-1] for names in seen] == ["SkipLayerNormFusion"]


def test_a_graph_of_strings_is_refused(tmp_path: Path) -> None:
    helper, proto = onnx.helper, onnx.TensorProto
    value = [helper.make_tensor_value_info(name, proto.STRING, [1]) for name in ("s", "t")]
    graph = helper.make_graph([helper.make_node("Identity", ["s"], ["t"])], "strings", value[:1], value[1:])
    path = tmp_path / "strings.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    with pytest.raises(SessionError, match=r"input 's' is tensor\(string\)"):
        TensorSession.open(path, ONE)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for content in (None, b"", b"nothing"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SessionError, match=r"model\.onnx") as caught:
            TensorSession.open(path, ONE)
        assert "\n" not in str(caught.value)


def test_calls_without_names_are_one_line(session: TensorSession) -> None:
    calls: list[Callable[[Any], object]] = [session.run, session.run_async, lambda odd: session.run_batch([odd])]
    for call in calls:
        for odd in (None, 5, [1]):
            with pytest.raises(UsageError, match="not a mapping of names to arrays"):
                call(odd)
    with pytest.raises(UsageError, match="takes a list of calls, not a NoneType"):
        session.run_batch(None)  # type: ignore[arg-type]
