from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from edgeq.converters.gguf.finite import check_weights
from edgeq.converters.gguf.header import read_header
from edgeq.errors import ConversionError, SourceError


def _file(path: Path, weights: np.ndarray, kind: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if kind == "bf16":
        packed = (np.asarray(weights, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        bf16 = gguf.GGMLQuantizationType.BF16
        writer.add_tensor("w", packed.view(np.uint8).reshape(*weights.shape[:-1], -1), raw_dtype=bf16)
    else:
        writer.add_tensor("w", weights.astype({"f32": np.float32, "f16": np.float16}[kind]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_weights_are_counted_and_named(tmp_path: Path, kind: str, bad: float) -> None:
    weights = np.ones((64, 32))
    header = read_header(_file(tmp_path / "good.gguf", weights, kind))
    assert header.tensors["w"].type == kind
    check_weights(header, {"w": "q8_0"}, finite=False)
    weights[3, 3:6] = bad
    header = read_header(_file(tmp_path / "bad.gguf", weights, kind))
    with pytest.raises(SourceError, match="w holds 3 weights"):
        check_weights(header, {"w": "q8_0"}, finite=False)
    check_weights(header, {"w": "q8_0"}, finite=True)  # not read again


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_a_weight_beyond_f16_is_refused_only_for_f16(tmp_path: Path, kind: str) -> None:
    weights = np.ones((4, 32))
    weights[2, 2] = -131072.0
    header = read_header(_file(tmp_path / "large.gguf", weights, kind))
    with pytest.raises(ConversionError, match=r"1\.31e\+05.*--quant bf16"):
        check_weights(header, {"w": "f16"}, finite=True)
    for other in ("bf16", "f32", "q8_0"):
        check_weights(header, {"w": other}, finite=True)
