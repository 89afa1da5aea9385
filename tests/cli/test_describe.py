"""Plans as lines: types by role and layer, and blocks of lines."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.cli.describe import sections, type_lines
from edgeq.types import Plan, Prediction

_PREDICTED = Prediction(
    file_bytes=1,
    weights_bytes=1,
    kv_cache_bytes=1,
    compute_bytes=1,
    runtime_bytes=1,
    peak_memory_bytes=1,
    itl_ms=1.0,
    tokens_per_s=1.0,
    ttft_ms=1.0,
    prompt_tokens=1,
)


def _plan(types: dict[str, str]) -> Plan:
    return Plan(tensor_types=types, context_tokens=1, ubatch_tokens=1, predicted=_PREDICTED)


def test_layers_that_agree_are_one_run() -> None:
    kinds = ["q5_1"] * 4 + ["q8_0"] + ["q4_k"] * 5
    types = {"token_embd.weight": "q8_0"}
    types |= {f"blk.{n}.ffn_up.weight": kind for n, kind in enumerate(kinds)}
    types |= {f"blk.{n}.ffn_norm.weight": "f32" for n in range(10)}
    assert type_lines(_plan(types)) == [
        "tensors                count  types",
        "---------------------  -----  --------------------------",
        "token_embd.weight          1  q8_0",
        "blk.*.ffn_up.weight       10  0-3 q5_1, 4 q8_0, 5-9 q4_k",
        "blk.*.ffn_norm.weight     10  f32",
    ]


def test_layers_without_a_tensor_break_a_run() -> None:
    types = {"blk.0.a": "q4_0", "blk.1.a": "q4_0", "blk.3.a": "q4_0", "blk.12.a": "q8_0"}
    assert type_lines(_plan(types))[-1].endswith("0-1 q4_0, 3 q4_0, 12 q8_0")


@given(
    st.lists(st.sampled_from(["q4_0", "iq4_nl", "q5_1", "q8_0"]), min_size=1, max_size=90),
    st.sampled_from([40, 80, 100]),
)
def test_the_table_says_every_layer_within_the_width(kinds: list[str], width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        lines = type_lines(_plan({f"blk.{n}.ffn_down": kind for n, kind in enumerate(kinds)}))
    assert max(map(len, lines)) <= width
    assert lines[2].split()[:2] == ["blk.*.ffn_down", str(len(kinds))]
    told = " ".join(line[lines[0].index("types") :] for line in lines[2:]).split(",")
    if len(set(kinds)) == 1:
        assert [part.strip() for part in told] == kinds[:1]
        return
    found: dict[int, str] = {}
    for part in told:
        match = re.fullmatch(r" ?(\d+)(?:-(\d+))? (\S+)", part.rstrip())
        assert match is not None, part
        found |= dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1), match[3])
    assert [found[n] for n in range(len(kinds))] == kinds


def test_sections_have_one_empty_line_between_them() -> None:
    assert sections([], ["a", "b"], [], ["c"], []) == ["a", "b", "", "c"]
    assert sections([], []) == []
