from __future__ import annotations

import ctypes
import importlib
import re
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.recipe import (
    Override,
    apply_overrides,
    parse_override,
    read_recipe,
    recipe_yaml,
    tensor_type_file,
)
from edgeq.errors import UsageError
from edgeq.ggml_types import ggml_type

_BASE = {"token_embd.weight": "q8_0", "blk.0.ffn_down.weight": "q4_k", "blk.1.ffn_down.weight": "q4_k", "norm": "f32"}
_SHAPES = {
    "token_embd.weight": (576, 1000),
    "blk.0.ffn_down.weight": (1536, 576),
    "blk.1.ffn_down.weight": (1536, 576),
    "norm": (576,),
}
_FREE = [name for name in _BASE if name != "norm"]


def _apply(*texts: str) -> dict[str, str]:
    return apply_overrides(_BASE, [parse_override(text) for text in texts], _FREE, _SHAPES)


def test_the_first_match_wins() -> None:
    types = _apply(r"blk\.1\.=q8_0", "ffn_down=Q6_K")
    assert types == {**_BASE, "blk.0.ffn_down.weight": "q6_k", "blk.1.ffn_down.weight": "q8_0"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["ffn_dwon=q8_0"], r"changes nothing: no tensor has such a name\. edgeq plan lists"),
        (["ffn=q8_0", "ffn_down=q6_k"], "taken by an earlier override"),
        (["token_embd=q4_k"], "rows of 576 weights, and q4_k needs a multiple of 256"),
        (["=q8_0"], "is not REGEX=TYPE"),
        (["ffn_down"], "is not REGEX=TYPE"),
        (["ffn_(=q8_0"], "is no regular expression"),
        (["ffn=q9_0"], "is not a tensor type"),
        (["norm=q8_0"], "always stays f32"),
        (["ffn=iq2_xxs"], "importance matrix"),
    ],
)
def test_bad_overrides_say_why(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _apply(*texts)


def test_an_equals_sign_may_stand_in_the_expression() -> None:
    assert parse_override("a=b=q8_0") == Override("a=b", "q8_0")


@given(st.dictionaries(st.sampled_from(sorted(_FREE)), st.sampled_from(["q4_0", "q5_1", "q8_0", "f16"]), min_size=1))
def test_a_recipe_names_every_tensor_and_comes_back_the_same(chosen: dict[str, str]) -> None:
    import tempfile

    types = {**_BASE, **chosen}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(recipe_yaml(types, "q4_k_m"))
        recipe = read_recipe(path)
    assert recipe.base == "q4_k_m"
    assert apply_overrides(_BASE, recipe.overrides, _FREE, _SHAPES) == types


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 2", "version 2"),
        ("overides: []", "overides"),
        ("overrides: [{match: a}]", "type"),
        ("- 1", "Expected"),
        ("{", "no valid YAML"),
        ("overrides: [{match: '(', type: q8_0}]", "regular expression"),
    ],
)
def test_bad_recipes_say_why(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / "missing.yaml")


class TinyGguf(Protocol):
    """The ``tiny_gguf`` fixture."""

    def __call__(self) -> Path: ...


def test_llama_cpp_gives_every_tensor_the_type_of_the_file(tiny_gguf: TinyGguf, tmp_path: Path) -> None:
    """The entries through what llama-quantize does with them: split at the first =, in lower case, as patterns."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    source = tiny_gguf()
    header = read_header(source)
    choice = ["q4_0", "q5_1", "q8_0", "iq4_nl", "f16"]
    matrices = [name for name, tensor in header.tensors.items() if len(tensor.shape) > 1]
    types = {name: tensor.type for name, tensor in header.tensors.items()}
    types |= {name: choice[n % len(choice)] for n, name in enumerate(matrices)}
    entries = [entry.partition("=") for entry in tensor_type_file(types).split()]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, 1
    kind = llama_cpp.llama_model_tensor_override
    array = (kind * (len(entries) + 1))()
    for index, (pattern, _, type_name) in enumerate(entries):
        array[index] = kind(pattern.lower().encode(), ggml_type(type_name).id)
    params.tt_overrides = array
    out = tmp_path / "out.gguf"
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(out), ctypes.byref(params)) == 0
    assert {name: tensor.type for name, tensor in read_header(out).tensors.items()} == types


def test_names_in_a_file_for_llama_quantize() -> None:
    types = {"blk.1.ffn.weight": "q4_0", "blk.10.ffn.weight": "q5_1", "blk-1.ffn.weight": "q8_0", "Out[0].w": "q6_k"}
    types |= {"v.blk.1.ffn.weight": "iq4_nl", "blk.1.ffn.weight_b": "q4_1"}
    entries = [line.partition("=") for line in tensor_type_file(types).splitlines()]
    for name, kind in types.items():
        assert [t for pattern, _, t in entries if re.search(pattern.lower(), name)] == [kind]


@pytest.mark.parametrize("names", [["a b"], ["a=b"], ["a\n"], [""], ["Ab", "Bb"], ["Ab", "ab"]])
def test_names_that_a_file_for_llama_quantize_cannot_tell(names: list[str]) -> None:
    with pytest.raises(UsageError, match="Export a recipe"):
        tensor_type_file(dict.fromkeys(names, "q8_0"))
