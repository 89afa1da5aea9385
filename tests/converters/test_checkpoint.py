"""The reader of safetensors against the safetensors package, and against files that lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.converters.checkpoint import Checkpoint
from edgeq.errors import SourceError, UnsupportedModelError

safetensors_numpy = pytest.importorskip("safetensors.numpy")
torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _write(file: Path, header: dict[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def _entry(start: int, end: int, shape: tuple[int, ...] = (2, 2), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _raw(tensor: Any) -> npt.NDArray[np.uint8]:
    return np.frombuffer(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), np.uint8)


@st.composite
def _models(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Shards of random tensors."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shards: list[dict[str, Any]] = []
    number = 0
    for _ in range(draw(st.integers(1, 3))):
        shard = {}
        for _ in range(draw(st.integers(1, 4))):
            shape = draw(st.lists(st.integers(0, 5), max_size=3))
            dtype = TORCH[draw(st.sampled_from(sorted(TORCH)))]
            shard[f"t{number}.é"] = torch.randn(shape, generator=generator).to(dtype)
            number += 1
        shards.append(shard)
    return shards


@settings(max_examples=60, deadline=None)
@given(shards=_models(), indexed=st.booleans())
def test_reads_what_safetensors_wrote(
    tmp_path_factory: pytest.TempPathFactory, shards: list[dict[str, Any]], indexed: bool
) -> None:
    folder = tmp_path_factory.mktemp("model")
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        safetensors_torch.save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    if indexed:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tensors = {name: tensor for shard in shards for name, tensor in shard.items()}
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.entries) == set(tensors)
    assert checkpoint.n_params == sum(tensor.numel() for tensor in tensors.values())
    assert len(checkpoint.files) == len(shards)
    for name, tensor in tensors.items():
        entry = checkpoint.entries[name]
        assert TORCH[entry.dtype] == tensor.dtype
        assert entry.shape == tuple(tensor.shape)
        array = checkpoint.read(name)
        assert array.shape == tuple(tensor.shape)
        assert array.tobytes() == _raw(tensor).tobytes()
        if tensor.ndim:
            half = tensor.shape[0] // 2
            assert checkpoint.read_rows(name, half, tensor.shape[0]).tobytes() == _raw(tensor[half:]).tobytes()


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 300), value=st.integers(0, 255), cut=st.integers(0, 300))
def test_a_damaged_file_is_one_line_and_never_read_out_of_bounds(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("model")
    file = folder / "model.safetensors"
    safetensors_numpy.save_file({"a": np.ones((3, 4), np.float32), "b": np.zeros(5, np.float16)}, file)
    data = bytearray(file.read_bytes())
    data[position % len(data)] = value
    file.write_bytes(bytes(data[: len(data) - cut % len(data)]))
    refusal = None
    try:
        checkpoint = Checkpoint.open(folder)
        for name in checkpoint.entries:
            checkpoint.read(name)
    except SourceError as error:
        refusal = error
    # Anything but a SourceError has failed the test by now; a change inside the numbers is no damage to the format.
    assert refusal is None or (refusal.remedy and "\n" not in str(refusal))


@pytest.mark.parametrize(
    ("header", "data", "length", "cause"),
    [
        ({"a": _entry(0, 16)}, b"\0" * 15, None, "truncated: a ends at byte"),
        ({"a": _entry(0, 16)}, b"\0" * 17, None, "1 bytes after its last tensor"),
        ({"a": _entry(0, 16), "b": _entry(8, 24)}, b"\0" * 24, None, "b overlaps"),
        ({"a": _entry(0, 16), "b": _entry(20, 36)}, b"\0" * 36, None, "leaves a gap"),
        ({"a": _entry(0, 12)}, b"\0" * 12, None, "does not have 12 bytes"),
        ({"a": _entry(16, 0)}, b"\0" * 16, None, "does not have -16 bytes"),
        ({"a": _entry(0, 16, (2, -2))}, b"\0" * 16, None, "damaged"),
        ({"a": _entry(0, 16, (2**50, 2))}, b"\0" * 16, None, "damaged"),
        ({"a": _entry(0, 16, dtype="Q4")}, b"\0" * 16, None, "unknown dtype 'Q4'"),
        ({"a": {"dtype": "F32", "shape": [2, 2]}}, b"\0" * 16, None, "damaged"),
        ({"a": 1}, b"", None, "damaged"),
        (b"[1, 2]", b"", None, "damaged"),
        (b"{", b"", None, "damaged"),
        (b"\xff\xfe{}", b"", None, "damaged"),
        (b"[" * 100_000, b"", None, "damaged"),
        ({}, b"", None, "no tensors"),
        ({"a": _entry(0, 16)}, b"\0" * 16, 10**6, "truncated or no safetensors"),
        ({"a": _entry(0, 16)}, b"\0" * 16, 2**63, "truncated or no safetensors"),
    ],
)
def test_refuses_headers_that_lie(
    tmp_path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None, cause: str
) -> None:
    _write(tmp_path / "model.safetensors", header, data, length=length)
    with pytest.raises(SourceError, match=cause) as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.remedy


def test_refuses_an_absurd_header_before_reading_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 2**38))
        stream.truncate(2**38 + 8)  # sparse: allocating the header would take 256 GiB
    with pytest.raises(SourceError, match="absurd"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("size", [0, 3, 7])
def test_refuses_a_file_without_a_header(tmp_path: Path, size: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\0" * size)
    with pytest.raises(SourceError, match="truncated or no safetensors"):
        Checkpoint.open(tmp_path)


def test_reads_only_headers_until_rows_are_asked_for(tmp_path: Path) -> None:
    size = 4 * 2**40
    header = json.dumps({"a": _entry(0, size, (2**20, 2**20))}).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + size)  # sparse: 4 TiB
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.n_params == 2**40
    assert not checkpoint.read_rows("a", 2**20 - 1, 2**20).any()


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("model-00002-of-00002.safetensors", "names model-00002-of-00002.safetensors, which is missing"),
        ("../other.safetensors", "leaves the folder"),
        ("/etc/passwd", "leaves the folder"),
        ("a/../../b", "leaves the folder"),
        ("", "leaves the folder"),
    ],
)
def test_index_with_a_bad_file(tmp_path: Path, name: str, cause: str) -> None:
    safetensors_numpy.save_file({"a": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=cause):
        Checkpoint.open(tmp_path)


def test_index_naming_a_tensor_that_the_shard_lacks(tmp_path: Path) -> None:
    safetensors_numpy.save_file({"a": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"says that b is in one\.safetensors, but it is not"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {"a": 1}}', '{"metadata": {}}'])
def test_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SourceError, match="no index of shards"):
        Checkpoint.open(tmp_path)


def test_one_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        safetensors_numpy.save_file({"a": np.ones(2, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(SourceError, match=r"a is in both one\.safetensors and two\.safetensors"):
        Checkpoint.open(tmp_path)


def test_shards_without_index_must_be_complete(tmp_path: Path) -> None:
    file = tmp_path / "model-00001-of-00002.safetensors"
    safetensors_numpy.save_file({"a": np.ones(2, np.float32)}, file)
    with pytest.raises(SourceError, match=r"model-00002-of-00002\.safetensors is missing"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(SourceError, match="pickle") as caught:
        Checkpoint.open(tmp_path)
    assert "safetensors" in caught.value.remedy


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    safetensors_numpy.save_file({"lora_A": np.ones(2, np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="LoRA adapter"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_weights_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no safetensors"):
        Checkpoint.open(tmp_path)
    with pytest.raises(SourceError, match="is no folder"):
        Checkpoint.open(tmp_path / "nothing")


def test_dtype_is_that_of_most_weights(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(10, dtype=torch.bfloat16), "b": torch.zeros(3), "ids": torch.zeros(99).long()}
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.dtype == "bf16"
    assert checkpoint.n_params == 13
    with pytest.raises(UnsupportedModelError, match="ids is of dtype I64"):
        checkpoint.read("ids")


def test_only_integers(tmp_path: Path) -> None:
    safetensors_numpy.save_file({"a": np.zeros(3, np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="holds only I8 tensors"):
        assert Checkpoint.open(tmp_path).dtype


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors_numpy.save_file({"a": np.zeros(100, np.float32)}, file)
    checkpoint = Checkpoint.open(tmp_path)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(SourceError, match="became shorter"):
        checkpoint.read("a")


def test_rows_outside_the_tensor(tmp_path: Path) -> None:
    safetensors_numpy.save_file({"a": np.zeros((4, 2), np.float32)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(IndexError):
        checkpoint.read_rows("a", 2, 5)
