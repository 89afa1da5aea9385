"""Local folders and GGUF files as sources. The hub has its own file, test_hub.py."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from edgeq.converters.source import resolve, weight_files, weights_sha256
from edgeq.errors import EdgeqError, SourceError, UnsupportedModelError, UsageError

WEIGHTS: dict[str, np.ndarray[Any, Any]] = {
    "a.weight": np.ones((4, 8), np.float16),
    "b.weight": np.zeros(3, np.float32),
}


def write_folder(folder: Path, config: object = None, card: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"]} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    save_file(WEIGHTS, folder / "model.safetensors")
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def write_gguf(path: Path, weights: dict[str, np.ndarray[Any, Any]], **metadata: str | int) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        name = key.replace("__", ".")
        if isinstance(value, int):
            writer.add_uint16(name, value)
        else:
            writer.add_string(name, value)
    for name, data in weights.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_folder(tmp_path: Path) -> None:
    source = resolve(str(write_folder(tmp_path / "tiny")))
    assert source.id == "tiny"
    assert source.path == str(tmp_path / "tiny")
    assert source.revision is None
    assert source.format == "hf"
    assert source.architecture == "LlamaForCausalLM"
    assert source.n_params == 35
    assert source.dtype == "f16"
    assert source.license is None
    assert source.weights_sha256 is None


def test_folder_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").path == str(folder), "a folder wins over a hub id of the same spelling"
    monkeypatch.chdir(folder)
    assert resolve(".").id == "name"


def test_reference_model(smollm2_hf: Path) -> None:
    source = resolve(str(smollm2_hf))
    assert source.n_params == 134_515_008
    assert source.dtype == "bf16"
    assert source.license == "apache-2.0"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n# A model", "mit"),
        ("---\ntags:\n- a\nlicense: 'apache-2.0'  # really\n---\n", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_license_of_the_card(tmp_path: Path, card: str, expected: str | None) -> None:
    assert resolve(str(write_folder(tmp_path, card=card))).license == expected


def test_hash_of_one_file_is_its_own(tmp_path: Path) -> None:
    source = resolve(str(write_folder(tmp_path)))
    seen: list[tuple[int, int, str]] = []
    digest = weights_sha256(source, lambda *step: seen.append(step))
    data = (tmp_path / "model.safetensors").read_bytes()
    assert digest == hashlib.sha256(data).hexdigest()
    assert seen[-1] == (len(data), len(data), "model.safetensors")


def test_hash_of_shards_is_of_all_in_order(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    for name, (tensor, data) in zip(names, WEIGHTS.items(), strict=True):
        save_file({tensor: data}, tmp_path / name)
    index = {"metadata": {}, "weight_map": dict(zip(WEIGHTS, names, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = resolve(str(tmp_path))
    assert [file.name for file in weight_files(source)] == names
    joined = b"".join((tmp_path / name).read_bytes() for name in names)
    assert weights_sha256(source) == hashlib.sha256(joined).hexdigest()


def test_hash_of_weights_that_vanished(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"a": np.ones((2, 32), np.float32)})
    source = resolve(str(path))
    path.unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        weights_sha256(source)


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "f16"), (np.float32, "f32")])
def test_gguf(tmp_path: Path, dtype: type[np.generic], name: str) -> None:
    weights = {"a": np.ones((4, 32), np.float32).astype(dtype), "n": np.ones(8, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", weights, general__license="mit")
    source = resolve(str(path))
    assert (source.id, source.format, source.architecture) == ("m.gguf", "gguf", "llama")
    assert (source.n_params, source.dtype, source.license) == (136, name, "mit")
    assert weights_sha256(source) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_quantized_gguf_is_refused(smollm2_gguf: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"quantized already \(q4_1, q8_0\).*Give the original"):
        resolve(str(smollm2_gguf))


def test_split_gguf_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m-00001-of-00003.gguf", {"a": np.ones((1, 32), np.float32)}, split__count=3)
    with pytest.raises(UnsupportedModelError, match=r"one of 3 parts.*--merge"):
        resolve(str(path))


def test_gguf_that_is_no_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "lora.gguf", {"a": np.ones((1, 32), np.float32)}, general__type="adapter")
    with pytest.raises(UnsupportedModelError, match="of type 'adapter'"):
        resolve(str(path))
    with pytest.raises(UnsupportedModelError, match="holds no tensors"):
        resolve(str(write_gguf(tmp_path / "vocab.gguf", {})))


@given(keep=st.integers(0, 400))
def test_truncated_gguf(tmp_path_factory: pytest.TempPathFactory, keep: int) -> None:
    folder = tmp_path_factory.mktemp("gguf")
    whole = write_gguf(folder / "m.gguf", {"a": np.ones((4, 32), np.float32)})
    whole.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(SourceError, match="GGUF"):
        resolve(str(whole))


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(struct.pack("<4sIQQ", b"GGUF", 3, 2**62, 0), id="tensors"),
        pytest.param(struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**62), id="keys"),
        pytest.param(struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**62) + bytes(64), id="key-length"),
        pytest.param(struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 4, 2**61) + bytes(64), id="array"),
    ],
)
def test_absurd_gguf_counts_are_refused_before_allocation(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header)
    with pytest.raises(SourceError, match="no valid GGUF"):
        resolve(str(path))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("weights.txt", "no valid GGUF"), ("pytorch_model.bin", "pickle"), ("model.safetensors", "Give its folder")],
)
def test_file_that_is_no_gguf(tmp_path: Path, name: str, remedy: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02 hello, I am something else entirely, and long enough")
    with pytest.raises(SourceError, match=remedy):
        resolve(str(tmp_path / name))


@pytest.mark.parametrize("ref", ["nonsense", "", "a/b/c", "missing.gguf", "./missing/folder", "own er/name", "a/b--c"])
def test_neither_path_nor_id(ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EdgeqError, match=r"neither a folder nor a file|no config\.json"):
        resolve(ref)


@pytest.mark.parametrize("ref", ["nope.onnx", "models/nope.onnx", "models/nope.GGUF"])
def test_a_file_that_is_missing_is_not_looked_for_on_the_hub(
    ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="neither a folder nor a file here") as caught:
        resolve(ref)
    assert "id" not in caught.value.remedy.split()


def test_revision_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no revision"):
        resolve(str(write_folder(tmp_path)), revision="main")


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ("{", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ("[]", "no JSON object"),
        ("{}", "names no architectures"),
        ('{"architectures": []}', "names no architectures"),
        ('{"architectures": [1]}', "names no architectures"),
        ("\xff", "no valid JSON"),
    ],
)
def test_wrong_config(tmp_path: Path, config: str, cause: str) -> None:
    write_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(SourceError, match=cause):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("edgeq.json", "is a bundle"),
        ("model-f16.gguf", "Give the GGUF itself"),
        ("adapter_config.json", "Merge it"),
        ("notes.txt", "save_pretrained"),
    ],
)
def test_folder_without_config(tmp_path: Path, file: str, remedy: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(SourceError, match=remedy):
        resolve(str(tmp_path))


def test_pickles_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(SourceError, match="safetensors"):
        resolve(str(tmp_path))
