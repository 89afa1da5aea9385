from __future__ import annotations

import math
import tempfile
from pathlib import Path

import gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.gguf_bytes import ALIGNMENT, Value, encode_header, encode_tensor_info

# The keys that gguf's reader looks at itself keep their meaning.
KEYS = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=12).map(lambda k: f"x.{k}")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES: st.SearchStrategy[Value] = (
    st.booleans()
    | st.integers(0, 2**32 - 1)
    | st.floats(width=32, allow_nan=False)
    | TEXTS
    | st.lists(TEXTS, min_size=1, max_size=5)
    | st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5)
)


@settings(max_examples=60)
@given(
    metadata=st.dictionaries(KEYS, VALUES, min_size=1, max_size=6),
    shape=st.lists(st.integers(1, 8), min_size=1, max_size=3),
)
def test_gguf_reads_the_same_values(metadata: dict[str, Value], shape: list[int]) -> None:
    head = encode_header(metadata, [encode_tensor_info("w", tuple(shape), 0, 0)])
    assert len(head) % ALIGNMENT == 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        path.write_bytes(head + bytes(4 * math.prod(shape)))
        reader = gguf.GGUFReader(path)
        for key, value in metadata.items():
            field = reader.get_field(key)
            assert field is not None
            assert field.contents() == value
        (tensor,) = reader.tensors
        assert [int(n) for n in tensor.shape] == shape
        assert (tensor.name, int(tensor.data_offset)) == ("w", len(head))
