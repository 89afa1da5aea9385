"""Files put together from blocks, against what llama.cpp's own quantizer writes for the same types."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFWriter

from edgeq.converters.gguf.assemble import assemble, read_tensor
from edgeq.converters.gguf.header import GgufHeader, read_header
from edgeq.converters.gguf.imatrix import Activations, ImportanceMatrix
from edgeq.converters.gguf.quantize import assert_types, quantizable_tensors, quantize
from edgeq.converters.gguf.shape import model_shape
from edgeq.errors import ConversionError, DiskFullError, SourceError
from edgeq.ggml_blocks import dequantize, quantize_rows
from edgeq.llama import Context, Model
from edgeq.profiles.llm.model_memory import file_bytes

KINDS = ["q4_0", "q8_0", "iq4_nl", "q5_1", "q4_k", "q6_k", "iq3_s", "iq3_xxs", "bf16"]
Bytes = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def header(tiny_hf: Callable[..., Path]) -> GgufHeader:
    return read_header(tiny_hf("llama-tied", width=256).with_suffix(".gguf"))


@pytest.fixture(scope="module")
def matrix(header: GgufHeader) -> ImportanceMatrix:
    rng = np.random.default_rng(5)
    entries = {
        name: Activations(rng.gamma(0.5, size=(1, tensor.shape[0])).astype(np.float32), np.array([7]))
        for name, tensor in header.tensors.items()
        if len(tensor.shape) == 2
    }
    return ImportanceMatrix(entries, 1, 7)


@pytest.fixture(scope="module")
def types(header: GgufHeader) -> dict[str, str]:
    """A mix of everything."""
    chosen = {name: tensor.type for name, tensor in header.tensors.items()}
    for index, name in enumerate(sorted(quantizable_tensors(header.path))):
        chosen[name] = KINDS[index % len(KINDS)]
    return chosen


def _blocks(header: GgufHeader, matrix: ImportanceMatrix) -> Callable[[str, str], Bytes]:
    def make(name: str, kind: str) -> Bytes:
        tensor = header.tensors[name]
        raw = read_tensor(header, name)
        if kind == tensor.type:
            return raw
        return quantize_rows(dequantize(raw, tensor.type, tensor.shape[0]), kind, matrix.weights(name))

    return make


def _metadata(path: Path) -> dict[str, object]:
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def test_the_same_file_as_llama_cpps_quantizer(
    header: GgufHeader, matrix: ImportanceMatrix, types: dict[str, str], tmp_path: Path
) -> None:
    mine, theirs = tmp_path / "mine.gguf", tmp_path / "theirs.gguf"
    asked: list[str] = []
    blocks = _blocks(header, matrix)

    def watched(name: str, kind: str) -> Bytes:
        asked.append(name)
        return blocks(name, kind)

    assemble(header, types, watched, mine)
    quantize(header.path, theirs, types, imatrix=matrix, threads=1)
    assert asked == list(header.tensors)
    assert mine.stat().st_size == theirs.stat().st_size == file_bytes(model_shape(header), types)
    assert _metadata(mine) == _metadata(theirs)
    assert_types(mine, types)
    # llama.cpp sorts the tensors by layer; here they stay in the order of the reference.
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    found = gguf.GGUFReader(mine).tensors
    assert [tensor.name for tensor in found] == list(header.tensors)
    for tensor in found:
        other = expected.pop(tensor.name)
        assert (tensor.tensor_type, tensor.shape.tolist()) == (other.tensor_type, other.shape.tolist())
        assert np.array_equal(tensor.data, other.data), tensor.name
    assert not expected


def test_llama_cpp_computes_the_same_with_both(
    header: GgufHeader, matrix: ImportanceMatrix, types: dict[str, str], tmp_path: Path
) -> None:
    files = [tmp_path / "mine.gguf", tmp_path / "theirs.gguf"]
    assemble(header, types, _blocks(header, matrix), files[0])
    quantize(header.path, files[1], types, imatrix=matrix, threads=1)
    logits = []
    for file in files:
        with Model.load(file) as model, Context(model, context_tokens=32, threads=1, max_outputs=8) as context:
            context.decode(list(range(5, 13)), 0, logits="all")
            logits.append(context.all_logits())
    assert np.array_equal(logits[0], logits[1])
    assert np.isfinite(logits[0]).all()


def test_without_changes_it_is_a_copy(header: GgufHeader, tmp_path: Path) -> None:
    stored = {name: tensor.type for name, tensor in header.tensors.items()}
    assemble(header, stored, lambda name, _kind: read_tensor(header, name), tmp_path / "copy.gguf")
    assert (tmp_path / "copy.gguf").read_bytes() == header.path.read_bytes()


def _without_numbers(path: Path, *, value: str = "") -> GgufHeader:
    """A GGUF that does not say its file type or quantization version, as some converters write them."""
    writer = GGUFWriter(str(path), "llama")
    writer.add_string("note", value)
    writer.add_block_count(1)
    for name, width in (("blk.0.ffn_up.weight", 64), ("blk.0.ffn_norm.weight", 32), ("blk.0.ffn_down.weight", 96)):
        shape = (width,) if "norm" in name else (5, width)
        writer.add_tensor(name, np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_header(path)


@pytest.mark.parametrize("length", range(0, 33, 3))
def test_a_header_that_lacks_the_two_numbers_gets_them(length: int, tmp_path: Path) -> None:
    header = _without_numbers(tmp_path / "in.gguf", value="x" * length)
    types = {name: "q8_0" if "norm" not in name else "f32" for name in header.tensors}
    out = tmp_path / "out.gguf"

    def blocks(name: str, kind: str) -> Bytes:
        raw = read_tensor(header, name)
        return raw if kind == "f32" else quantize_rows(raw.view(np.float32), kind)

    assemble(header, types, blocks, out)
    found = _metadata(out)
    assert found == {**_metadata(header.path), "general.file_type": 7, "general.quantization_version": 2}
    assert_types(out, types)
    values = read_tensor(read_header(out), "blk.0.ffn_down.weight")
    assert np.array_equal(values, blocks("blk.0.ffn_down.weight", "q8_0"))
    assert len(out.read_bytes()) % 32 == 0


def test_numbers_of_another_type_are_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(str(tmp_path / "odd.gguf"), "llama")
    writer.add_uint64("general.quantization_version", 2)
    writer.add_tensor("w", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "odd.gguf")
    with pytest.raises(ConversionError, match=r"odd\.gguf has a general\.quantization_version that is no uint32"):
        assemble(header, {"w": "f32"}, lambda name, _kind: read_tensor(header, name), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_data_of_another_size_is_refused_and_nothing_stays(
    header: GgufHeader, types: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=r"token_embd\.weight has \d+ bytes as .*belong there"):
        assemble(header, types, lambda name, _kind: read_tensor(header, name)[1:], tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(header: GgufHeader, types: dict[str, str], tmp_path: Path) -> None:
    def stop(_name: str, _kind: str) -> Bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assemble(header, types, stop, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(header: GgufHeader, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(1)
    stored = {name: tensor.type for name, tensor in header.tensors.items()}
    with pytest.raises(DiskFullError, match="No space left"):
        assemble(header, stored, lambda name, _kind: read_tensor(header, name), disk / "out.gguf")
    assert list(disk.iterdir()) == []


def test_a_reference_that_was_cut_off_meanwhile_is_no_shorter_tensor(header: GgufHeader, tmp_path: Path) -> None:
    last = list(header.tensors)[-1]
    for cut in (1000, 1024):
        (tmp_path / "short.gguf").write_bytes(header.path.read_bytes()[:-cut])
        with pytest.raises(SourceError, match=f"short.gguf ends within {last}"):
            read_tensor(dataclasses.replace(header, path=tmp_path / "short.gguf"), last)
