"""SmoothQuant: the same numbers in floats, and outliers that INT8 survives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeq.converters.onnx.quantize.channels import sample_channels
from edgeq.converters.onnx.quantize.clean import clean_for
from edgeq.converters.onnx.quantize.dynamic import quantize_dynamic
from edgeq.converters.onnx.quantize.smooth import channel_tensors, smooth
from edgeq.errors import ConversionError

pytest.importorskip("onnxruntime")


def _plant(source: Path, out: Path, size: float) -> None:
    """Give two channels of the residual stream values of about ``size``, as massive activations are."""
    model = onnx.load(source)
    for weight in model.graph.initializer:
        array = numpy_helper.to_array(weight)
        if weight.name.endswith("position_embeddings") and array.ndim == 3:
            planted = array.copy()
            noise = np.random.default_rng(0).standard_normal((*array.shape[:-1], 2)).astype(np.float32)
            planted[..., [5, 40]] += size * (1 + 0.02 * noise) * np.array([1, -0.7], np.float32)
            weight.CopyFrom(numpy_helper.from_array(planted, weight.name))
            break
    else:
        pytest.fail("the model has no position embeddings")
    onnx.save(model, out)


@pytest.fixture
def planted(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A vision transformer whose residual stream has outliers of 1,400."""
    clean, out = tmp_path / "clean.onnx", tmp_path / "planted.onnx"
    clean_for(tiny("vit"), clean, "onnxruntime-cpu")
    _plant(clean, out, 1400.0)
    return out


def test_residual_outliers_survive_quantization(
    planted: Path,
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    cosine: Callable[..., float],
    tmp_path: Path,
) -> None:
    tensors = channel_tensors(planted)
    assert len(tensors) == 6  # normalizations, and what attention makes
    samples = sample_channels(planted, tensors, (make_feeds(planted, seed) for seed in range(4)))
    smoothed, plain, quantized = (tmp_path / f"{n}.onnx" for n in ("smooth", "plain", "int8"))
    done = smooth(planted, smoothed, samples)
    assert all(site.error < site.before / 10 for site in done if "norm" in site.tensor)
    feeds = make_feeds(planted, 9)
    expected = run_model(planted, feeds)
    np.testing.assert_allclose(run_model(smoothed, feeds), expected, rtol=5e-3, atol=5e-3)
    quantize_dynamic(planted, plain)
    quantize_dynamic(smoothed, quantized)
    before, after = cosine(run_model(plain, feeds), expected), cosine(run_model(quantized, feeds), expected)
    assert after >= 0.99
    assert after > before


@pytest.mark.parametrize("alpha", [0.3, 0.8])
@pytest.mark.parametrize("shift", [True, False])
def test_any_alpha_computes_the_same(
    tiny: Callable[[str], Path],
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    tmp_path: Path,
    alpha: float,
    shift: bool,
) -> None:
    source, out = tiny("vit"), tmp_path / "smooth.onnx"
    samples = sample_channels(source, channel_tensors(source), [make_feeds(source, 1)])
    done = smooth(source, out, samples, alpha=alpha, shift=shift)
    assert {site.alpha for site in done} == {alpha}
    feeds = make_feeds(source, 2)
    np.testing.assert_allclose(run_model(out, feeds), run_model(source, feeds), rtol=1e-3, atol=1e-4)


def test_samples_are_bounded_and_ranges_see_every_row(
    tiny: Callable[[str], Path], make_feeds: Callable[..., dict[str, NDArray[Any]]]
) -> None:
    source = tiny("vit")
    (name, *_) = channel_tensors(source)
    few = sample_channels(source, [name], [make_feeds(source, 1)], rows=8)[name]
    more = sample_channels(source, [name], (make_feeds(source, s) for s in (1, 2, 3)), rows=8)[name]
    assert few.rows.shape == more.rows.shape == (8, 64)
    assert (more.low <= few.low).all()
    assert (more.high >= few.high).all()
    with pytest.raises(ConversionError, match="no value 'nothing'"):
        sample_channels(source, ["nothing"], [])
    with pytest.raises(ConversionError, match="no inputs"):
        sample_channels(source, [name], [])


def test_what_costs_a_node_is_smoothed_when_asked(
    tiny: Callable[[str], Path],
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    cosine: Callable[..., float],
    tmp_path: Path,
) -> None:
    source, loud = tiny("bert"), tmp_path / "loud.onnx"
    model = onnx.load(source)
    arrays = {weight.name: weight for weight in model.graph.initializer}
    # One hidden neuron is a hundred times as loud as all others, and one channel behind each normalization ten times.
    for node in model.graph.node:
        weight = arrays.get(node.input[1]) if node.op_type in ("MatMul", "LayerNormalization") else None
        if weight is None or (node.op_type == "MatMul" and list(weight.dims) != [64, 128]):
            continue
        array = numpy_helper.to_array(weight).copy()
        array[..., 3] *= 100 if node.op_type == "MatMul" else 10
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, loud)
    tensors = channel_tensors(loud, paid=True)
    assert len(tensors) == 8
    samples = sample_channels(loud, tensors, (make_feeds(loud, seed) for seed in range(4)))
    smoothed, plain, quantized = (tmp_path / f"{n}.onnx" for n in ("smooth", "plain", "int8"))
    done = smooth(loud, smoothed, samples, paid=True)
    assert any(site.split for site in done)
    feeds = make_feeds(loud, 9)
    expected = run_model(loud, feeds)
    np.testing.assert_allclose(run_model(smoothed, feeds), expected, rtol=1e-3, atol=1e-3)
    quantize_dynamic(loud, plain)
    quantize_dynamic(smoothed, quantized)
    before, after = cosine(run_model(plain, feeds), expected), cosine(run_model(quantized, feeds), expected)
    assert 1 - after < (1 - before) / 2


def test_normalizations_that_others_read_too_are_left_alone(tiny: Callable[[str], Path]) -> None:
    free = channel_tensors(tiny("bert"))  # its residual sums read what its normalizations make
    assert not [name for name in free if "norm" in name]


def test_factors_of_what_attention_makes_go_into_its_values(
    tiny: Callable[[str], Path],
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    tmp_path: Path,
) -> None:
    source, out = tiny("bert"), tmp_path / "smooth.onnx"
    tensors = channel_tensors(source)
    samples = sample_channels(source, tensors, [make_feeds(source, 1)])
    done = smooth(source, out, samples, alpha=0.6)
    assert len(done) == len(tensors) == 2
    feeds = make_feeds(source, 2)
    expected = run_model(source, feeds)
    np.testing.assert_allclose(run_model(out, feeds), expected, rtol=1e-3, atol=1e-4)
    before, after = (sample_channels(path, tensors, [feeds]) for path in (source, out))
    for name in tensors:  # channels are shifted and scaled indeed, and no node came to it
        assert not np.allclose(before[name].rows, after[name].rows, atol=1e-2)
    assert [node.op_type for node in onnx.load(out).graph.node] == [n.op_type for n in onnx.load(source).graph.node]


def test_missing_samples_and_odd_alphas_are_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no sample"):
        smooth(tiny("vit"), tmp_path / "o.onnx", {})
    with pytest.raises(ConversionError, match="alpha is 2"):
        smooth(tiny("vit"), tmp_path / "o.onnx", {}, alpha=2.0)
    assert not (tmp_path / "o.onnx").exists()
