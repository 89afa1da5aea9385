"""Models in 8 bits: nodes that stay in floats for their error, and for their speed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.converters.onnx.quantize.static import calibration_tensors
from edgeq.errors import ConversionError
from edgeq.planner.tensors.accuracy import Miss, worst_cosine
from edgeq.planner.tensors.candidates import Candidate, Workbench
from edgeq.planner.tensors.decide import decide, missed_gate
from edgeq.planner.tensors.job import Gate
from edgeq.planner.tensors.node_times import measured
from edgeq.planner.tensors.samples import Samples
from edgeq.planner.tensors.search import eight_bit_candidates
from edgeq.planner.tensors.timing import kernel_times
from edgeq.planner.tensors.writing import Dialect
from edgeq.tensor_types import Coverage, Embedding, Scheme

MakeBench = Callable[..., Workbench]


def _cosine(candidate: Candidate) -> float:
    assert candidate.quality is not None
    return worst_cosine(candidate.quality)


def test_a_node_that_is_slower_in_8_bits_may_stay_in_floats(chain: Path, make_bench: MakeBench) -> None:
    bench = make_bench(chain)
    clock = measured(bench.samples.judged, threads=1, disabled_optimizers=())
    gate = Gate(min_cosine=0.9)
    plain, faster = eight_bit_candidates(bench, "int8-dynamic", {}, gate=gate, method=None, clock=clock)
    assert (plain.float_nodes, faster.variant_of) == ({}, plain.label)
    assert faster.float_nodes.keys() == {"thin"}
    assert "us in 8 bits" in faster.float_nodes["thin"]
    kinds = {kernel.name: kernel.op_type for kernel in kernel_times(faster.path, bench.samples.judged, threads=1)}
    assert kinds["thin"] == "MatMul"
    assert faster.predicted_ms is not None
    (asked,) = eight_bit_candidates(bench, "int8-dynamic", {}, gate=gate, method=None, clock=clock, for_speed=False)
    assert asked.float_nodes == {}


def _with_an_outlier(chain: Path) -> Path:
    """The chain, with one column of the last weights so large that the others have no steps."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(chain)
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == "w1"]
    values = onnx.numpy_helper.to_array(weight).copy()
    values[:, 7] *= 300.0
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "w1"))
    onnx.save(model, chain)
    return chain


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic"])
def test_a_mix_says_what_was_predicted_and_what_is_measured(chain: Path, make_bench: MakeBench, scheme: str) -> None:
    bench = make_bench(_with_an_outlier(chain))
    whole = bench.dynamic({}, "whole")
    gate = Gate(min_cosine=(1 + _cosine(whole)) / 2)
    (mix,) = eight_bit_candidates(
        bench,
        "int8-static" if scheme == "int8-static" else "int8-dynamic",
        {},
        gate=gate,
        method="minmax",
        clock=None,
    )
    assert mix.float_nodes
    assert _cosine(mix) >= gate.min_cosine
    (note,) = mix.notes
    assert "was predicted from errors of single nodes" in note
    assert f"{_cosine(mix):.4f} is measured" in note
    assert "assumed by their multiply-adds" in note


def test_static_weights_are_narrow_where_sums_overflow(chain: Path, make_bench: MakeBench) -> None:
    onnx = pytest.importorskip("onnx")
    bench = make_bench(chain, dialect=Dialect("onnxruntime-cpu", "u8", narrow_weights=True))
    found = bench.static(bench.ranges(("minmax",))["minmax"], {}, "narrow")
    tensors = {tensor.name: tensor for tensor in onnx.load(found.path).graph.initializer}
    stored = onnx.numpy_helper.to_array(next(t for name, t in tensors.items() if name.startswith("w1_quantized")))
    steps = stored.astype(int).reshape(-1, 4, 512)  # inputs that a kernel multiplies together
    pairs = np.maximum(steps, 0)[:, :, None] + np.maximum(steps, 0)[:, None]
    assert (pairs * (1 - np.eye(4, dtype=int))[None, :, :, None]).max() * 255 <= 32767
    assert np.abs(steps).max() > 64


def test_nodes_in_floats_need_ranges_that_were_not_asked_for_before(tmp_path: Path, make_bench: MakeBench) -> None:
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    weights = [
        onnx.numpy_helper.from_array((rng.standard_normal(size) / 9).astype(np.float32), name)
        for name, size in (("w1", (8, 3, 3, 3)), ("w2", (8, 8, 3, 3)), ("w3", (8, 8, 3, 3)))
    ]
    nodes = [
        node("Conv", ["x", "w1"], ["a"], name="first"),
        node("MaxPool", ["a"], ["b"], name="pool", kernel_shape=[2, 2]),
        node("Conv", ["b", "w2"], ["c"], name="second"),
        node("Conv", ["c", "w3"], ["y"], name="third"),
    ]
    graph = onnx.helper.make_graph(
        nodes, "pooled", [info("x", 1, [1, 3, 16, 16])], [info("y", 1, ["n", "c", "h", "w"])], weights
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "pooled.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    calls = [{"x": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(4)]
    bench = make_bench(path, samples=Samples(calls[:2], calls[2:], "random numbers"))
    ranges = bench.ranges(("minmax",))["minmax"]
    wanted = set(calibration_tensors(path, "onnxruntime-cpu", frozenset({"first"})))
    assert wanted - ranges.keys()
    found = bench.static(bench.completed(ranges, "minmax", {"first": "asked"}), {"first": "asked"}, "kept")
    assert found.coverage is not None
    assert found.coverage.left == ("first",)


def test_floats_that_were_chosen_are_no_lack_of_coverage_where_speed_shows_their_worth() -> None:
    half = Coverage(weight_share=0.5, mac_share=0.5, groups=(), left=("chosen", "tiny"))
    mix = Candidate("int8-static", Path("m"), "m", float_nodes={"chosen": "error"}, coverage=half, kept_share=0.49)
    assert missed_gate(mix, Gate(), asked_share=0.0, timed=True) is None
    assert missed_gate(mix, Gate(), asked_share=0.49, timed=False) is None
    assert missed_gate(mix, Gate(min_coverage=0.5), asked_share=0.0, timed=False) is None
    unproven = missed_gate(mix, Gate(), asked_share=0.0, timed=False)
    told = "only 50% of the multiply-adds are quantized; in floats are chosen, tiny"
    assert unproven == Miss(told, "--min-coverage")
    lost = Candidate("int8-static", Path("m"), "m", float_nodes={"chosen": "error"}, coverage=half, kept_share=0.1)
    why = missed_gate(lost, Gate(), asked_share=0.0, timed=True)
    assert why is not None
    assert why.reason.endswith("in floats are tiny")


def test_eight_bits_for_a_gpu_end_at_halves(chain: Path, make_bench: MakeBench) -> None:
    bench = make_bench(chain, dialect=Dialect("tensorrt", "s8"))
    schemes: tuple[Scheme, ...] = ("int8-static", "fp16", "fp32")
    found = decide(bench, schemes, Gate(min_cosine=0.99), {}, method="minmax", clock=None, asked=False)
    assert found.chosen.scheme == "int8-static"
    strict = decide(bench, schemes, Gate(min_cosine=0.999999), {}, method="minmax", clock=None, asked=False)
    assert strict.chosen.scheme == "fp16"
    assert strict.rejected[0].option.startswith("int8-static")
    exact = decide(bench, schemes, Gate(min_cosine=1.0), {}, method="minmax", clock=None, asked=False)
    assert exact.chosen.scheme == "fp32"
    assert np.isfinite(_cosine(found.chosen))


def _with_a_count(chain: Path) -> Path:
    """The chain, with the places where its result is above a number as another output: as many as there are."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(chain)
    graph = model.graph
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.5, np.float32), "limit"))
    graph.node.append(onnx.helper.make_node("Greater", ["y", "limit"], ["above"]))
    graph.node.append(onnx.helper.make_node("NonZero", ["above"], ["places"]))
    graph.output.append(onnx.helper.make_tensor_value_info("places", 7, [2, "n"]))
    onnx.save(model, chain)
    return chain


def test_a_candidate_of_other_shapes_is_rejected_with_the_reason(chain: Path, make_bench: MakeBench) -> None:
    bench = make_bench(_with_a_count(chain))
    schemes: tuple[Scheme, ...] = ("int8-static", "int8-dynamic", "fp32")
    found = decide(bench, schemes, Gate(min_cosine=0.5), {}, method="minmax", clock=None, asked=False)
    assert found.chosen.scheme == "fp32"
    assert [entry.option.split("-m")[0] for entry in found.rejected] == ["int8-static", "int8-dynamic"]
    for entry in found.rejected:
        assert re.search(r"'places' of the quantized model has the shape \[2, \d+\] instead of", entry.reason)
    with pytest.raises(ConversionError, match=r"int8-dynamic.*has the shape \[2, \d+\] instead of \[2, \d+\] on input"):
        decide(bench, ("int8-dynamic",), Gate(min_cosine=0.5), {}, method=None, clock=None, asked=True)


def test_a_candidate_that_cannot_be_loaded_is_rejected_with_the_reason(
    chain: Path, make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")

    def broken(_model: Path, out: Path, **_more: Any) -> None:
        model = onnx.load(chain)
        model.graph.node[0].domain = "com.microsoft"
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        onnx.save(model, out)

    monkeypatch.setattr("edgeq.planner.tensors.writing.quantize_weights", broken)
    schemes: tuple[Scheme, ...] = ("int8-weights", "fp32")
    found = decide(make_bench(chain), schemes, Gate(), {}, method=None, clock=None, asked=False)
    assert found.chosen.scheme == "fp32"
    assert "ONNX Runtime cannot load" in found.rejected[0].reason
    with pytest.raises(ConversionError, match="int8-weights: ONNX Runtime cannot load"):
        decide(make_bench(chain), schemes[:1], Gate(), {}, method=None, clock=None, asked=True)


def test_text_encoders_are_compared_by_vectors_of_texts(tmp_path: Path, make_bench: MakeBench) -> None:
    onnx = pytest.importorskip("onnx")
    info = onnx.helper.make_tensor_value_info
    rng = np.random.default_rng(0)
    width, tokens = 64, 16
    weights = [onnx.numpy_helper.from_array(rng.standard_normal((width, width)).astype(np.float32), "w")]
    inputs = [info("x", 1, [1, tokens, width]), info("attention_mask", 7, [1, tokens])]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        onnx.helper.make_node("Cast", ["attention_mask"], ["kept"], to=1),
        onnx.helper.make_node("Unsqueeze", ["kept", "last"], ["column"]),
        onnx.helper.make_node("Mul", ["h", "column"], ["m"]),
        onnx.helper.make_node("Add", ["m", "h"], ["last_hidden_state"]),
    ]
    weights.append(onnx.numpy_helper.from_array(np.array([2]), "last"))
    graph = onnx.helper.make_graph(nodes, "g", inputs, [info("last_hidden_state", 1, [1, tokens, width])], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "encoder.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    mask = np.array([[1] * 5 + [0] * (tokens - 5)])
    calls = [
        {"x": rng.standard_normal((1, tokens, width)).astype(np.float32) * scale, "attention_mask": mask}
        for scale in (1.0, 2.0)
    ]
    for call in calls:
        call["x"][:, 5:] *= 100.0  # padding, which ruins the grid of a call and would hide it in a mean over all tokens
    bench = make_bench(
        path,
        samples=Samples(calls, calls, "padded texts"),
        embedding=Embedding(pooling="mean", normalize=False, max_tokens=tokens),
    )
    found = bench.dynamic({})
    assert found.quality is not None
    hidden, sentence = found.quality.outputs
    assert (hidden.name, sentence.name) == ("last_hidden_state", "sentence embedding")
    one, other = (onnxruntime_outputs(file, calls) for file in (path, found.path))
    cosines = []
    for exact, made in zip(one, other, strict=True):
        u, v = exact[0, :5].mean(axis=0), made[0, :5].mean(axis=0)
        cosines.append(float(u @ v / np.linalg.norm(u) / np.linalg.norm(v)))
    assert sentence.mean_cosine == pytest.approx(np.mean(cosines), abs=1e-5)
    assert sentence.mean_cosine < hidden.mean_cosine
    assert _cosine(found) == sentence.mean_cosine


def onnxruntime_outputs(path: Path, calls: list[dict[str, Any]]) -> list[Any]:
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [session.run(None, call)[0].astype(np.float64) for call in calls]
