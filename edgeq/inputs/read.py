"""What a user has on disk as the inputs of a model: images, lines of text, saved arrays."""

from __future__ import annotations

import itertools
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgeq.errors import UsageError
from edgeq.inputs.arrays import Array, check_arrays, describe_shape, describe_specs
from edgeq.inputs.images import ImageProcessor, image_processor
from edgeq.inputs.text import TextEncoder, text_encoder
from edgeq.tensor_types import AxisRange, TensorArtifact, TensorSpec

__all__ = ["IMAGE_SUFFIXES", "read_inputs"]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_FORMS = "a folder of images, a .txt with a text a line, or .npz files"
_TEXT_NAMES = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
Axes = Mapping[str, AxisRange]
Call = dict[str, Array]


def read_inputs(
    path: str | os.PathLike[str],
    artifact: TensorArtifact,
    folder: str | os.PathLike[str] | None,
    count: int,
    *,
    axes: Axes | None = None,
) -> Iterator[Call]:
    """Inputs for calibration or comparison, read one call at a time.

    Images are prepared by the model's own settings; if the graph has another, fixed size, they are resized to it whole
    (`ImageProcessor.for_shape`). Texts are tokenized by the model's tokenizer. Each row of the arrays of an ``.npz``
    is an input of its own. Where there is more than asked for, what is taken is spread evenly over the files by name,
    the lines or the rows.

    Args:
        path: a folder of images or of ``.npz`` files, searched with all folders below; one of these files; or a
            ``.txt``.
        artifact: of the model.
        folder: with the model's settings (``preprocessor_config.json``, ``tokenizer.json``); arrays need none.
        count: the most calls.
        axes: sizes that dynamic axes may have.

    Returns:
        Mappings as a session takes them, of one input each, or of as many as a fixed first axis asks for.

    Raises:
        UsageError: nothing that can be read, fewer inputs than one call takes, or arrays of wrong names, shapes or
            types, or with NaN; some of it only when the iterator comes to it.
        SourceError: settings of the model that make no sense.
        MissingPackageError: Pillow or ``tokenizers`` is not installed.
    """
    if count < 1:
        raise UsageError(f"{count} inputs make no sense", "Ask for at least one")
    files, kind = _find(Path(path))
    if kind == ".npz":
        calls = _from_arrays(files, artifact, count)
    else:
        if folder is None:
            raise UsageError(f"{path} needs the model's own settings to be prepared", "Give .npz files instead")
        if kind == ".txt":
            _refuse_texts(artifact)
            lowercase = artifact.embedding is not None and artifact.embedding.lowercase
            encoder = text_encoder(folder, lowercase=lowercase)
            calls = _from_texts(files[0], artifact, encoder, count, axes or {})
        else:
            spec = _image_spec(artifact)
            calls = _from_images(files, artifact, spec, image_processor(folder), count)
    return _checked(calls, artifact.inputs, axes or {})


def _checked(calls: Iterator[tuple[str, Call]], specs: Sequence[TensorSpec], axes: Axes) -> Iterator[Call]:
    for source, call in calls:
        check_arrays(call, specs, axes, finite=True, source=source)
        yield call


def _find(path: Path) -> tuple[list[Path], str]:
    """The files, and what they are: ``".npz"``, ``".txt"`` or ``"image"``."""
    try:
        found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    except OSError as error:
        raise UsageError(f"{path} cannot be searched: {error.strerror}", "Check its permissions") from error
    if not path.exists():
        raise UsageError(f"{path} does not exist", f"Give {_FORMS}")
    kinds: dict[str, list[Path]] = {}
    for file in found:
        kinds.setdefault(_kind(file), []).append(file)
    kinds.pop("", None)
    if not kinds:
        raise UsageError(f"{path} holds nothing that can be read", f"Give {_FORMS}")
    if path.is_dir():
        kinds.pop(".txt", None)  # a README beside the images
        if not kinds:
            raise UsageError(f"{path} holds texts only", "Give one .txt with a text a line")
    if len(kinds) > 1:
        raise UsageError(f"{path} holds images and .npz files", "Give a folder with one kind")
    kind, files = next(iter(kinds.items()))
    return files, kind


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in {".npz", ".txt"}:
        return suffix
    return "image" if suffix in IMAGE_SUFFIXES else ""


def _spread(total: int, count: int) -> list[int]:
    """Indices of at most ``count`` of ``total`` things, evenly spread and in order."""
    chosen = min(total, count)
    return [index * total // chosen for index in range(chosen)]


def _rows(spec: TensorSpec) -> int:
    """Inputs that one call takes: a fixed first axis is filled, a dynamic one gets one."""
    first = spec.shape[0] if spec.shape else 1
    return first if isinstance(first, int) else 1


def _chosen(total: int, rows: int, count: int, what: str) -> list[list[int]]:
    """Indices of the inputs of each call."""
    if total < rows:
        raise UsageError(f"{what} holds {total} inputs, and one call takes {rows}", "Give more")
    indices = iter(_spread(total, count * rows))
    groups = iter(lambda: list(itertools.islice(indices, rows)), [])
    return [group for group in groups if len(group) == rows]


def _from_images(
    files: Sequence[Path], artifact: TensorArtifact, spec: TensorSpec, processor: ImageProcessor, count: int
) -> Iterator[tuple[str, Call]]:
    others = [other for other in artifact.inputs if other.name != spec.name]
    for other in others:
        if other.name != "pixel_mask":
            raise UsageError(
                f"the model also takes {other.name!r}, which images do not give", "Give all inputs as .npz files"
            )
    groups = _chosen(len(files), _rows(spec), count, "the folder")
    return _prepared(files, groups, spec, others, processor.for_shape(spec.shape))


def _prepared(
    files: Sequence[Path],
    groups: Sequence[Sequence[int]],
    spec: TensorSpec,
    masks: Sequence[TensorSpec],
    processor: ImageProcessor,
) -> Iterator[tuple[str, Call]]:
    for group in groups:
        images = [processor(files[index]) for index in group]
        if len({image.shape for image in images}) > 1:
            raise UsageError(
                f"{files[group[0]]} and the next come out in different sizes, and one call takes {len(group)}",
                "Convert the model again with a first axis of 1, or with a fixed height and width",
            )
        pixels = np.concatenate(images)
        call: Call = {spec.name: pixels.astype(spec.dtype, copy=False)}
        for mask in masks:
            call[mask.name] = np.ones((len(pixels), *pixels.shape[2:]), mask.dtype)
        yield str(files[group[0]]), call


def _image_specs(artifact: TensorArtifact) -> list[TensorSpec]:
    """Inputs that an image could be."""
    return [
        spec
        for spec in artifact.inputs
        if len(spec.shape) == 4
        and np.dtype(spec.dtype).kind == "f"
        and spec.shape[1] in {3, "channels", "num_channels"}
    ]


def _image_spec(artifact: TensorArtifact) -> TensorSpec:
    fitting = _image_specs(artifact)
    if len(fitting) != 1:
        remedy = "Give a .txt with a text a line, or .npz files" if _takes_texts(artifact) else "Give .npz files"
        raise UsageError(f"the model takes no images: {describe_specs(artifact.inputs)}", remedy)
    return fitting[0]


def _takes_texts(artifact: TensorArtifact) -> bool:
    return any(spec.name == "input_ids" and len(spec.shape) == 2 for spec in artifact.inputs)


def _refuse_texts(artifact: TensorArtifact) -> None:
    if not _takes_texts(artifact):
        remedy = "Give a folder of images, or .npz files" if len(_image_specs(artifact)) == 1 else "Give .npz files"
        raise UsageError(f"the model takes no texts: {describe_specs(artifact.inputs)}", remedy)


def _from_texts(
    path: Path, artifact: TensorArtifact, encoder: TextEncoder, count: int, axes: Axes
) -> Iterator[tuple[str, Call]]:
    specs = {spec.name: spec for spec in artifact.inputs}
    for name in specs:
        if name not in _TEXT_NAMES:
            raise UsageError(f"the model also takes {name!r}, which texts do not give", "Give all inputs as .npz files")
    texts = _lines(path)
    length = specs["input_ids"].shape[1]
    limits = [
        artifact.embedding.max_tokens if artifact.embedding is not None else None,
        axes[length].most if isinstance(length, str) and length in axes else None,
    ]
    limit = min((number for number in limits if number is not None), default=None)
    groups = _chosen(len(texts), _rows(specs["input_ids"]), count, str(path))
    return _encoded(texts, groups, specs, encoder, (limit, length if isinstance(length, int) else None), path)


def _encoded(
    texts: Sequence[str],
    groups: Sequence[Sequence[int]],
    specs: Mapping[str, TensorSpec],
    encoder: TextEncoder,
    limits: tuple[int | None, int | None],
    path: Path,
) -> Iterator[tuple[str, Call]]:
    limit, length = limits
    for group in groups:
        arrays: dict[str, Array] = dict(encoder([texts[index] for index in group], limit, length=length))
        shape = arrays["input_ids"].shape
        arrays["position_ids"] = np.broadcast_to(np.arange(shape[1]), shape)
        yield str(path), {name: arrays[name].astype(spec.dtype) for name, spec in specs.items()}


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "Check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8 (byte {error.start})", "Save it in UTF-8") from error
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise UsageError(f"{path} holds no text", "Give a text a line")
    return lines


def _from_arrays(files: Sequence[Path], artifact: TensorArtifact, count: int) -> Iterator[tuple[str, Call]]:
    chosen = [files[index] for index in _spread(len(files), count)]
    for index, file in enumerate(chosen):
        share = count * (index + 1) // len(chosen) - count * index // len(chosen)
        arrays = _load(file)
        for rows in _row_groups(file, arrays, artifact.inputs, share):
            yield str(file), {name: array[rows] if rows else array for name, array in arrays.items()}


def _row_groups(file: Path, arrays: Mapping[str, Array], specs: Sequence[TensorSpec], count: int) -> list[list[int]]:
    """Rows of each call; one empty list for arrays that have no rows of their own and are taken whole."""
    firsts = {spec.shape[0] if spec.shape else None for spec in specs}
    sizes = {len(array) if array.ndim else None for array in arrays.values()}
    if len(firsts) != 1 or len(sizes) != 1 or not all(_has_rows(arrays.get(spec.name), spec) for spec in specs):
        if len(firsts) == 1:
            _refuse_shapes(file, arrays, specs)
        return [[]]  # if they do not fit, they are refused as they lie in the file
    first, size = firsts.pop(), sizes.pop()
    if first is None or size is None or first == size:
        return [[]]
    rows = first if isinstance(first, int) else 1
    return _chosen(size, rows, count, str(file))


def _refuse_shapes(file: Path, arrays: Mapping[str, Array], specs: Sequence[TensorSpec]) -> None:
    """Refuse arrays that do not fit even but for their first axis, and say how they are saved."""
    for spec in specs:
        array = arrays.get(spec.name)
        if array is None or not spec.shape or _has_rows(array, spec):
            continue
        rows = _rows(spec)
        least = f"; one call takes {rows} rows" if rows > 1 else ""
        raise UsageError(
            f"{file}: the input {spec.name!r} has the shape {describe_shape(array.shape)}, and the model takes "
            f"{describe_shape(spec.shape)}",
            f"Save it with the shape {describe_shape(('n', *spec.shape[1:]))}, a row for each input{least}",
        )


def _has_rows(array: Array | None, spec: TensorSpec) -> bool:
    """Whether an array fits but for its first axis."""
    return (
        array is not None
        and array.ndim == len(spec.shape)
        and all(
            isinstance(wanted, str) or size == wanted
            for size, wanted in zip(array.shape[1:], spec.shape[1:], strict=True)
        )
    )


def _load(file: Path) -> Call:
    remedy = "Save it with numpy.savez(file, name=array)"
    try:
        # numpy would leave a broken file open that it had opened itself
        with file.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UsageError(f"{file} holds one array without a name", remedy)
            arrays = {name: archive[name] for name in archive.files}
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}", "Check its permissions") from error
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zipfile.LargeZipFile, MemoryError) as error:
        raise UsageError(f"{file} cannot be read as arrays: {error}", remedy) from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of members that are no .npy
            raise UsageError(f"{file} holds {name!r}, which is no array", remedy)
    return arrays
