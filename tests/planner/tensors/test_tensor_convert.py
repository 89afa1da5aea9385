"""From a Hugging Face folder or an ONNX file to a bundle that loads, with tiny models of random weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.bundle import open_bundle
from edgeq.cli import main
from edgeq.errors import BudgetError, ConversionError, EdgeqError, UsageError
from edgeq.planner.tensors.convert import convert_tensor
from edgeq.planner.tensors.job import Calibration, Gate, Precision, TensorJob
from edgeq.types import Budget

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

SMALL = Calibration(samples=4, judged=3, method="minmax")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertModel(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=5
    )
    folder = tmp_path_factory.mktemp("resnet")
    transformers.ResNetForImageClassification(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder as an ONNX file, so that it is exported once."""
    return convert_tensor(job(bert, "fp32"), tmp_path_factory.mktemp("fp32") / "bundle").file("model")


def job(model: Path, precision: Precision = "auto", **fields: Any) -> TensorJob:
    return TensorJob(model=str(model), target="laptop-cpu", precision=precision, calibration=SMALL, threads=1, **fields)


@pytest.mark.parametrize("precision", ["auto", "int8-dynamic"])
def test_a_text_encoder_becomes_a_bundle_that_runs(bert: Path, tmp_path: Path, precision: Precision) -> None:
    bundle = convert_tensor(job(bert, precision, gate=Gate(min_cosine=0.95, min_coverage=0.5)), tmp_path / "bundle")
    manifest = open_bundle(bundle.path, verify=True).tensor
    assert manifest.artifact.task == "feature-extraction"
    assert manifest.plan.predicted.file_bytes == sum(
        entry.size_bytes for entry in manifest.files if entry.role in ("model", "data")
    )
    if precision != "auto":
        assert manifest.plan.scheme == precision
    if manifest.plan.scheme == "fp32":
        assert (manifest.quality, manifest.coverage) == (None, None)
    else:
        assert manifest.quality is not None
        assert manifest.quality.outputs[0].mean_cosine >= 0.95
        assert manifest.coverage is not None
        assert manifest.coverage.mac_share >= 0.5
    ids = np.arange(24, dtype=np.int64).reshape(2, 12)
    with edgeq.load(bundle.path, kind="tensor") as session:
        found = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    reference = transformers.BertModel.from_pretrained(bert).eval()
    with torch.no_grad():
        exact = reference(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()
    ours = found["last_hidden_state"]
    assert ours.shape == exact.shape
    assert float((ours * exact).sum() / np.linalg.norm(ours) / np.linalg.norm(exact)) > 0.95


def test_a_camera_model_with_fixed_shapes(resnet: Path, tmp_path: Path) -> None:
    wanted = job(resnet, "int8-static", shapes={"pixel_values": (1, 3, 32, 32)}, gate=Gate(min_cosine=0.9))
    manifest = convert_tensor(wanted, tmp_path / "bundle").tensor
    assert manifest.artifact.inputs[0].shape == (1, 3, 32, 32)
    assert manifest.plan.axes == {}
    assert manifest.plan.activations == "u8"
    assert manifest.coverage is not None
    assert manifest.coverage.mac_share == pytest.approx(1.0)
    assert any("--calibration" in note for note in manifest.plan.notes)


def test_for_tensorrt_activations_are_signed(resnet: Path, tmp_path: Path) -> None:
    wanted = TensorJob(
        model=str(resnet),
        target="laptop-rtx",
        backend="tensorrt-rtx",
        precision="int8-static",
        shapes={"pixel_values": (1, 3, 32, 32)},
        calibration=SMALL,
        gate=Gate(min_cosine=0.9),
        threads=1,
    )
    manifest = convert_tensor(wanted, tmp_path / "bundle").tensor
    assert (manifest.plan.backend, manifest.plan.activations) == ("tensorrt-rtx", "s8")
    assert manifest.plan.speedup is None
    assert any("speed was not measured" in note for note in manifest.plan.notes)


@pytest.mark.parametrize(("target", "opset"), [("laptop-rtx", 22), ("jetson-orin", None)])
def test_bf16_is_judged_with_its_roundings_and_brings_answers(
    bert: Path, resnet: Path, tmp_path: Path, target: str, opset: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgeq.runtime.tensorrt.samples import bundle_answers

    wanted = TensorJob(model=str(bert), target=target, precision="bf16", calibration=SMALL, threads=1)
    bundle = convert_tensor(wanted, tmp_path / "bundle")
    plan, quality = bundle.tensor.plan, bundle.tensor.quality
    assert (plan.scheme, plan.opset) == ("bf16", opset)
    assert quality is not None
    assert all(0.99 < output.mean_cosine < 0.999999 for output in quality.outputs)
    assert bundle.tensor.coverage is not None
    assert {group.precision for group in bundle.tensor.coverage.groups if group.op_type == "MatMul"} == {"bf16"}
    answers = list(bundle_answers(bundle))
    assert [set(outputs) for _, outputs in answers] == [{spec.name for spec in bundle.tensor.artifact.outputs}] * 3
    assert main(["verify", str(bundle.path)]) == 0
    capsys.readouterr()
    camera = dataclasses.replace(wanted, model=str(resnet), shapes={"pixel_values": (1, 3, 32, 32)})
    if opset is None:
        with pytest.raises(ConversionError, match="Conv takes bfloat16 from opset 22 on, and this is 20"):
            convert_tensor(dataclasses.replace(camera, keep_float=("classifier",)), tmp_path / "camera")
    else:
        groups = convert_tensor(camera, tmp_path / "camera").tensor.coverage
        assert groups is not None
        assert {group.precision for group in groups.groups} == {"bf16"}


def test_a_gate_that_nothing_passes_ships_the_float_model(exported: Path, tmp_path: Path) -> None:
    strict = Gate(min_cosine=1.0)
    manifest = convert_tensor(job(exported, "auto", gate=strict), tmp_path / "bundle").tensor
    assert manifest.plan.scheme == "fp32"
    assert any(entry.option.startswith("int8-dynamic") for entry in manifest.plan.rejected)
    with pytest.raises(ConversionError, match=r"cosine .* at least 1 is asked for"):
        convert_tensor(job(exported, "int8-dynamic", gate=strict), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_nodes_that_the_user_keeps_in_floats(exported: Path, tmp_path: Path) -> None:
    gate = Gate(min_cosine=0.9, min_coverage=0.1)
    manifest = convert_tensor(job(exported, "int8-dynamic", keep_float=("layer.0",), gate=gate), tmp_path / "b").tensor
    assert manifest.plan.float_nodes
    assert all("layer.0" in name for name in manifest.plan.float_nodes)
    with pytest.raises(UsageError, match="matches no node"):
        convert_tensor(job(exported, "int8-dynamic", keep_float=("no such",)), tmp_path / "c")
    with pytest.raises(UsageError, match="no regular expression"):
        convert_tensor(job(exported, "int8-dynamic", keep_float=("(",)), tmp_path / "c")


def test_an_onnx_file_is_a_model_too(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(exported), "--target", "laptop-cpu", "--precision", "int8-dynamic"]
    words += ["--samples", "3", "--min-cosine", "0.9", "-o", str(tmp_path / "second"), "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["source"]["format"], document["plan"]["scheme"]) == ("onnx", "int8-dynamic")
    assert main(["inspect", str(tmp_path / "second")]) == 0
    shown = capsys.readouterr().out
    assert "int8-dynamic" in shown
    assert "quantized:" in shown
    assert main(["verify", str(tmp_path / "second")]) == 0


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--quant", "q8_0"], "for language models"),
        (["--precision", "fp16"], "computes FP16 in FP32"),
        (["--precision", "fp8"], "cannot run fp8"),
        (["--backend", "tensorrt"], "has no backend"),
        (["--shape", "nothing=1x2"], "nothing"),
        (["--task", "image-classification"], "image-classification"),
    ],
)
def test_wrong_options_are_one_line(
    bert: Path, tmp_path: Path, words: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["convert", str(bert), "--target", "laptop-cpu", "-o", str(tmp_path / "out"), *words])
    told = capsys.readouterr().err
    assert code in (1, 2)
    assert match in told.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_what_an_onnx_file_cannot_have_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="are for models that are exported"):
        convert_tensor(job(exported, "fp32", shapes={"input_ids": (1, 8)}), tmp_path / "b")


def test_a_limit_that_even_the_weights_exceed(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="the limit is"):
        convert_tensor(job(exported, "fp32", budget=Budget(peak_memory_bytes=1 << 20)), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_failure_leaves_nothing_behind(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeq.planner.tensors.convert.verify_bundle", _fail)
    with pytest.raises(EdgeqError, match="on purpose"):
        convert_tensor(job(exported, "fp32"), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def _fail(*_: object) -> None:
    raise ConversionError("on purpose", "Nothing to do")
