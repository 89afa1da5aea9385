"""What the user named, a hub id, a folder or a GGUF file, made into a `ModelSource` on this disk."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from edgeq.converters.checkpoint import Checkpoint
from edgeq.converters.gguf.header import GgufHeader, read_header
from edgeq.converters.hub import Progress, download
from edgeq.converters.json_files import read_json_object
from edgeq.converters.onnx.skeleton import read_skeleton
from edgeq.errors import SourceError, UnsupportedModelError, UsageError
from edgeq.ggml_types import TYPES
from edgeq.types import ModelSource

__all__ = ["resolve", "weight_files", "weights_sha256"]

# Owner and name as the hub allows them: letters, digits, "-", "_" and ".", no double or closing dots and dashes.
_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}(?<![.-])", re.ASCII)
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)^---", re.DOTALL | re.MULTILINE)
_CHUNK_BYTES = 4 << 20


def resolve(
    ref: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> ModelSource:
    """Find a model, downloading it if ``ref`` is a hub id, and read what it says about itself.

    A path that exists wins over a hub id of the same spelling. Weights are not read; see `weights_sha256`.

    Args:
        ref: a hub id (``owner/name``), a folder with config.json and safetensors, an f32, f16 or bf16 GGUF, or an
            ONNX file.
        revision: of the hub id: branch, tag or commit.
        token: of the hub; see `edgeq.converters.hub.download`.
        cache: instead of the hub's own cache folder.
        progress: called with bytes done, bytes in all and the id while downloading.

    Raises:
        UsageError: a revision of something that is not on the hub.
        SourceError: nothing of that name, no permission, no network, or files that are truncated or wrong.
        UnsupportedModelError: a quantized or split GGUF, one without a vocabulary, pickles, or a checkpoint that edgeq
            does not read.
        MissingPackageError: the extra ``convert`` is not installed.
    """
    path = _on_this_disk(ref)
    if path is not None:
        if revision is not None:
            raise UsageError(f"{ref} is on this disk, so it has no revision", "Leave --revision out")
        try:
            if path.is_dir():
                return _from_folder(path.resolve(), _named(path))
            if path.suffix.lower() == ".onnx":
                return _from_onnx(path.resolve())
            return _from_gguf(path.resolve())
        except OSError as error:
            raise _unreadable(error, path) from error
    if ref.lower().endswith((".onnx", ".gguf", ".safetensors")):
        raise SourceError(f"{ref!r} is neither a folder nor a file here", "Check the path and its spelling")
    if not _HUB_ID.fullmatch(ref) or ref.endswith(".git"):
        raise SourceError(
            f"{ref!r} is neither a folder nor a file here, nor a hub id of the form owner/name",
            "Check the path, or write the id as on the model's page, such as HuggingFaceTB/SmolLM2-135M-Instruct",
        )
    found = download(ref, revision=revision, token=token, cache=cache, progress=progress)
    return _from_folder(found.folder, ref, revision=found.revision)


def _on_this_disk(ref: str) -> Path | None:
    """The file or folder of that name, or None if there is none."""
    try:
        path = Path(ref).expanduser()
        if not path.exists():
            return None
        str(path.resolve()).encode()
    except OSError as error:
        raise _unreadable(error, Path(ref)) from error
    except UnicodeEncodeError as error:
        raise SourceError(f"{ref!r} is no valid UTF-8", "Rename it; a manifest names its source") from error
    except (RuntimeError, ValueError) as error:
        raise SourceError(f"{ref!r} is no path: {error}", "Check the path") from error
    return path


def _unreadable(error: OSError, path: Path) -> SourceError:
    name = str(error.filename or path)
    return SourceError(f"{name[:200]} cannot be read: {error.strerror}", "Check the path, its permissions and the disk")


def weight_files(source: ModelSource) -> tuple[Path, ...]:
    """The files that hold a source's weights, in the order of their names.

    Raises:
        SourceError: they are gone, or wrong.
    """
    path = Path(source.path)
    if source.format == "onnx":
        places = {weight.location for weight in read_skeleton(path).weights if weight.location is not None}
        return (path, *(path.parent / place for place in sorted(places)))
    return (path,) if source.format == "gguf" else Checkpoint.open(path).files


def weights_sha256(source: ModelSource, progress: Progress | None = None) -> str:
    """SHA-256 in hex over the bytes of all `weight_files`, one after the other; of one file it is the file's own.

    Args:
        source: what `resolve` found.
        progress: called with bytes done, bytes in all and the file's name.

    Raises:
        SourceError: a file cannot be read.
    """
    digest, done = hashlib.sha256(), 0
    files = weight_files(source)
    try:
        total = sum(file.stat().st_size for file in files)
        for file in files:
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, total, file.name)
    except OSError as error:
        raise _unreadable(error, Path(source.path)) from error
    return digest.hexdigest()


def _named(path: Path) -> str:
    return path.resolve().name or str(path)


# --- ONNX files -------------------------------------------------------------------------------------------------------

# Of TensorProto.DataType.
_ONNX_DTYPES = {1: "f32", 10: "f16", 16: "bf16"}


def _from_onnx(path: Path) -> ModelSource:
    skeleton = read_skeleton(path)
    counts: Counter[str] = Counter()
    for weight in skeleton.weights:
        if weight.element_type in _ONNX_DTYPES:
            counts[_ONNX_DTYPES[weight.element_type]] += math.prod(weight.dims)
    return ModelSource(
        id=_named(path),
        path=str(path),
        format="onnx",
        architecture="onnx",
        n_params=sum(counts.values()),
        dtype=counts.most_common(1)[0][0] if counts else "f32",
    )


# --- Hugging Face folders ---------------------------------------------------------------------------------------------


def _from_folder(folder: Path, name: str, *, revision: str | None = None) -> ModelSource:
    config = _read_config(folder)
    checkpoint = Checkpoint.open(folder)
    return ModelSource(
        id=name,
        revision=revision,
        path=str(folder),
        format="hf",
        architecture=_architecture(config, folder),
        n_params=checkpoint.n_params,
        dtype=checkpoint.dtype,
        license=_card_license(folder / "README.md"),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise _not_a_model(folder)
    return read_json_object(path)


def _not_a_model(folder: Path) -> SourceError:
    if (folder / "edgeq.json").is_file():
        return SourceError(f"{folder} is a bundle, not a model", "Give the model that it was made from")
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    if ggufs:
        return SourceError(f"{folder} has no config.json", f"Give the GGUF itself: {folder / ggufs[0]}")
    if (folder / "adapter_config.json").is_file():
        return UnsupportedModelError(
            f"{folder} is an adapter, not a model",
            "Merge it into its base model (PEFT's merge_and_unload) and save that",
        )
    return SourceError(
        f"{folder} has no config.json, so it is no Hugging Face model",
        "Give the folder that save_pretrained wrote, with config.json, safetensors and tokenizer files",
    )


def _architecture(config: dict[str, Any], folder: Path) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise SourceError(
            f"{folder / 'config.json'} names no architectures",
            'Add the class of the model, such as "architectures": ["LlamaForCausalLM"]',
        )
    return names[0]


def _card_license(card: Path) -> str | None:
    """``license`` of a model card's front matter, or ``license_name`` where that says "other"."""
    if not card.is_file():
        return None
    front = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n"))
    if front is None:
        return None
    keys = dict(re.findall(r"^(license|license_name):[ \t]*[\"']?([^\s\"'#]+)", front[1], re.MULTILINE))
    found: str | None = keys.get("license")
    return keys.get("license_name", found) if found == "other" else found


# --- GGUF files -------------------------------------------------------------------------------------------------------


def _from_gguf(path: Path) -> ModelSource:
    if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}:
        raise UnsupportedModelError(
            f"{path} is a pickle, which can run code when it is loaded",
            "Save the model as safetensors with save_pretrained and give that folder",
        )
    if path.suffix == ".safetensors":
        raise SourceError(f"{path} alone is no model", f"Give its folder: {path.parent}")
    header = read_header(path)
    _refuse_unusable(header)
    weights = _weights_by_type(header)
    text = header.metadata.get("general.license")
    return ModelSource(
        id=path.name,
        path=str(path),
        format="gguf",
        architecture=header.architecture,
        n_params=weights.total(),
        dtype=weights.most_common(1)[0][0],
        license=text if isinstance(text, str) and text else None,
    )


def _refuse_unusable(header: GgufHeader) -> None:
    count = header.metadata.get("split.count", 0)
    if isinstance(count, int) and count > 1:
        raise UnsupportedModelError(
            f"{header.path} is one of {count} parts of a split GGUF",
            "Join them first with: llama-gguf-split --merge FIRST_PART JOINED.gguf",
        )
    kind = header.metadata.get("general.type", "model")
    if kind != "model" or not header.tensors:
        what = "tensors" if kind == "model" else f"model, but a GGUF of type {kind!r}"
        raise UnsupportedModelError(f"{header.path} holds no {what}", "Give the GGUF of the model itself")
    if header.metadata.get("tokenizer.ggml.model") == "no_vocab":
        raise UnsupportedModelError(
            f"{header.path.name} holds no vocabulary, so it can neither read nor write text",
            "Use a GGUF with the model's tokenizer",
        )
    quantized = Counter({t: n for t, n in _weights_by_type(header).items() if t not in TYPES or not TYPES[t].is_float})
    if quantized:
        kinds = ", ".join(kind for kind, _ in quantized.most_common())
        raise UnsupportedModelError(
            f"{header.path} is quantized already ({kinds}); quantizing it again would lose quality twice",
            "Give the original: an F16, BF16 or F32 GGUF, a Hugging Face folder or a hub id",
        )


def _weights_by_type(header: GgufHeader) -> Counter[str]:
    weights: Counter[str] = Counter()
    for tensor in header.tensors.values():
        weights[tensor.type] += tensor.n_params
    return weights
