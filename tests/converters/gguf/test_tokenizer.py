"""What goes around the vocabulary: special ids, BOS and EOS, templates, padding, and folders that are broken."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken as HfAddedToken
from tokenizers import Tokenizer

from edgeq.converters.gguf.tokenizer import (
    NASTY_TEXT,
    TokenizerSpec,
    check_tokenizer,
    fitting_name,
    read_tokenizer,
)
from edgeq.converters.gguf.vocabulary import AddedToken, TokenType, strips_like_phi3
from edgeq.errors import ConversionError, EdgeqError, SourceError, UnsupportedModelError
from edgeq.llama import Model

transformers = pytest.importorskip("transformers")

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPECIAL = ("<|endoftext|>", "<|bos|>", "<|im_end|>", "<|pad|>")

Train = Callable[..., int]
Make = Callable[..., TokenizerSpec]


def template(before: str | None, after: str | None, *, repeat: int = 1) -> dict[str, Any]:
    """A post-processor that puts tokens around a text."""
    names = {name: SPECIAL.index(name) for name in (before, after) if name}
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    if before:
        single = [{"SpecialToken": {"id": before, "type_id": 0}}] * repeat + single
    if after:
        single = [*single, {"SpecialToken": {"id": after, "type_id": 0}}]
    tokens = {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in names.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}


@pytest.fixture
def folder(tmp_path: Path, train_byte_level: Train) -> Path:
    train_byte_level(tmp_path, BYTES, vocab_size=420, special=SPECIAL)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(document | changes))


def read(folder: Path, n_vocab: int = 500) -> TokenizerSpec:
    return read_tokenizer(folder, n_vocab=n_vocab, architecture="llama")


def test_nasty_text_is_nfc() -> None:
    assert unicodedata.is_normalized("NFC", NASTY_TEXT)


@pytest.mark.parametrize("before", [None, "<|bos|>"])
@pytest.mark.parametrize("after", [None, "<|endoftext|>"])
def test_bos_and_eos_are_added_where_hugging_face_adds_them(
    folder: Path, make_vocabulary_gguf: Make, before: str | None, after: str | None
) -> None:
    sequence = {"type": "Sequence", "processors": [{**BYTES, "type": "ByteLevel"}, template(before, after)]}
    edit(folder / "tokenizer.json", post_processor=sequence)
    edit(folder / "tokenizer_config.json", bos_token="<|bos|>", tokenizer_class="PreTrainedTokenizerFast")
    spec = make_vocabulary_gguf(folder, folder / "v.gguf", n_vocab=420)
    assert (spec.add_bos, spec.add_eos) == (before is not None, after is not None)
    check_tokenizer(folder / "v.gguf", folder)
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    with Model.load(folder / "v.gguf", vocab_only=True) as model:
        assert model.tokenize("Hi you", add_special=True, parse_special=False) == oracle.encode("Hi you")


@pytest.mark.parametrize(
    ("processor", "named"),
    [
        (template("<|bos|>", None, repeat=2), "2 tokens before"),
        ({"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2]}, "RobertaProcessing"),
    ],
)
def test_other_framing_is_refused(folder: Path, processor: Mapping[str, Any], named: str) -> None:
    edit(folder / "tokenizer.json", post_processor=processor)
    with pytest.raises(UnsupportedModelError, match=named):
        read(folder)


def test_a_post_processor_with_an_undefined_token_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer.json", post_processor=template("<|bos|>", None) | {"special_tokens": {}})
    with pytest.raises(SourceError, match="does not define"):
        read(folder)


def test_roles_come_from_the_tokenizer_first(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token={"content": "<|im_end|>"}, bos_token=None, pad_token=None)
    edit(folder / "special_tokens_map.json", eos_token="<|endoftext|>", pad_token="<|pad|>")
    edit(folder / "generation_config.json", eos_token_id=[2, 0], bos_token_id=1)
    edit(folder / "config.json", eos_token_id=7, bos_token_id=8, pad_token_id=9)
    spec = read(folder)
    # The null in tokenizer_config.json wins over the older special_tokens_map.json, config.json is the last resort.
    assert spec.special_ids == {"bos": 1, "eos": 2, "pad": 9, "eot": 0}


def test_a_text_model_inside_another_is_found(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)
    edit(folder / "config.json", text_config={"eos_token_id": 2, "bos_token_id": 1})
    assert read(folder).special_ids["eos"] == 2


def test_every_end_of_generation_config_ends_a_generation(folder: Path, make_vocabulary_gguf: Make) -> None:
    edit(folder / "generation_config.json", eos_token_id=[0, 1, 2, 3])
    spec = make_vocabulary_gguf(folder, folder / "v.gguf", n_vocab=420)
    # <|im_end|> is known to llama.cpp by its text, so the two keys go to the two that are not.
    assert (spec.special_ids["eot"], spec.special_ids["eom"]) == (1, 3)
    with Model.load(folder / "v.gguf", vocab_only=True) as model:
        assert [index for index in range(420) if model.is_eog(index)] == [0, 1, 2, 3]


def test_ends_beyond_the_keys_of_llama_cpp_are_noted(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[0, 1, 3, 100, 101])
    assert any("two tokens that end an answer" in note for note in read(folder).notes)


def test_a_model_without_an_end_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(SourceError, match="which token ends a text") as caught:
        read(folder)
    assert "eos_token" in caught.value.remedy


def test_no_bos_means_that_none_is_added_and_says_so(folder: Path, make_vocabulary_gguf: Make) -> None:
    spec = make_vocabulary_gguf(folder, folder / "v.gguf", n_vocab=420)
    assert not spec.add_bos
    assert any("no token that begins a text" in note for note in spec.notes)
    with Model.load(folder / "v.gguf", vocab_only=True) as model:
        assert (model.bos, model.add_bos) == (0, False)


def test_rows_without_a_token_are_filled_and_their_text_is_no_token(folder: Path, make_vocabulary_gguf: Make) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["[PAD425]"] = 430
    (folder / "tokenizer.json").write_text(json.dumps(document))
    spec = make_vocabulary_gguf(folder, folder / "v.gguf", n_vocab=450)
    assert len(spec.tokens) == 450
    unused = [index for index, kind in enumerate(spec.token_types) if kind == TokenType.UNUSED]
    assert unused == [*range(420, 430), *range(431, 450)]
    assert len(set(spec.tokens)) == 450
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with Model.load(folder / "v.gguf", vocab_only=True) as model:
        for text in ("[PAD421]", "[PAD449] x"):
            ids = model.tokenize(text, add_special=False, parse_special=True)
            assert ids == reference.encode(text).ids


def test_more_tokens_than_rows_are_refused(folder: Path) -> None:
    with pytest.raises(SourceError, match="the embedding has 419 rows"):
        read(folder, 419)


def test_one_text_with_two_ids_is_refused(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    again = {**document["added_tokens"][0], "id": 450}
    edit(folder / "tokenizer.json", added_tokens=[*document["added_tokens"], again])
    with pytest.raises(SourceError, match="twice, as"):
        read(folder)


def test_one_id_for_two_texts_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"0": {"content": "<other>", "special": True}})
    with pytest.raises(SourceError, match="id 0 to both"):
        read(folder)


@pytest.mark.parametrize("key", ["x", "-"])
def test_a_decoder_entry_that_is_none_is_refused(folder: Path, key: str) -> None:
    edit(folder / "tokenizer_config.json", added_tokens_decoder={key: {"content": "<other>"}})
    with pytest.raises(SourceError, match="added_tokens_decoder"):
        read(folder)


def test_added_tokens_of_every_file_are_found_in_text(folder: Path, make_vocabulary_gguf: Make) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([HfAddedToken("<think>", normalized=False), HfAddedToken("  ", normalized=False)])
    tokenizer.add_special_tokens([HfAddedToken("<|tool|>"), HfAddedToken("<|tool|>>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    spec = make_vocabulary_gguf(folder, folder / "v.gguf", n_vocab=424)
    kinds = [TokenType(spec.token_types[index]).name for index in range(420, 424)]
    assert kinds == ["USER_DEFINED", "USER_DEFINED", "CONTROL", "CONTROL"]
    check_tokenizer(folder / "v.gguf", folder)
    with Model.load(folder / "v.gguf", vocab_only=True) as model:
        assert model.token_bytes(420) == b"<think>"
        assert model.token_bytes(422) == b""
        plain = model.tokenize("<|tool|><think>", add_special=False, parse_special=False)
        assert plain[-1] == 420
        assert 422 not in plain


def test_tokens_named_only_beside_tokenizer_json_are_written(folder: Path) -> None:
    edit(folder / "added_tokens.json", **{"<extra>": 460})
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"461": {"content": "<more>", "special": True}})
    spec = read(folder)
    assert (spec.tokens[460], spec.tokens[461]) == ("<extra>", "<more>")
    assert spec.token_types[460:462] == (TokenType.USER_DEFINED, TokenType.CONTROL)


def phi3_tokens(**changes: AddedToken) -> list[AddedToken]:
    plain = ("<unk>", "<s>", "<|endoftext|>")
    tokens = {text: AddedToken(i, text, special=True) for i, text in enumerate(plain)}
    tokens |= {
        text: AddedToken(i + 3, text, special=True, rstrip=True)
        for i, text in enumerate(("</s>", "<|end|>", "<|user|>"))
    }
    return list((tokens | changes).values())


def test_spaces_after_tokens_are_dropped_as_in_phi3_or_it_is_noted(folder: Path) -> None:
    assert strips_like_phi3(phi3_tokens())
    assert not strips_like_phi3(phi3_tokens()[1:])
    assert not strips_like_phi3([*phi3_tokens(), AddedToken(9, "<|x|>", special=True)])
    assert not strips_like_phi3([*phi3_tokens(), AddedToken(9, "<|x|>", special=True, rstrip=True, lstrip=True)])
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"][2]["rstrip"] = True
    edit(folder / "tokenizer.json", added_tokens=document["added_tokens"])
    spec = read(folder)
    assert any("drops spaces beside <|im_end|>" in note for note in spec.notes)
    assert fitting_name("Phi-3-mini", spec) == "Phi 3-mini"
    assert fitting_name("SmolLM2", spec) == "SmolLM2"


def test_phi3_strips_in_llama_cpp_too(tmp_path: Path, train_byte_level: Train) -> None:
    from gguf import GGUFWriter

    from edgeq.converters.gguf.tokenizer import write_tokenizer

    special = ("<unk>", "<s>", "<|endoftext|>", "</s>", "<|end|>", "<|user|>")
    n_vocab = train_byte_level(tmp_path, BYTES, vocab_size=420, special=special)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in document["added_tokens"][3:]:
        token["rstrip"] = True
    edit(tmp_path / "tokenizer.json", added_tokens=document["added_tokens"])
    spec = read(tmp_path, n_vocab)
    assert spec.strips_after_special
    assert not any("drops spaces" in note for note in spec.notes)
    for name, agrees in ((fitting_name("mini", spec), True), ("mini", False)):
        writer = GGUFWriter(str(tmp_path / "v.gguf"), "llama")
        writer.add_name(name)
        write_tokenizer(writer, spec)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if agrees:
            check_tokenizer(tmp_path / "v.gguf", tmp_path)
        else:
            with pytest.raises(ConversionError, match="differs"):
                check_tokenizer(tmp_path / "v.gguf", tmp_path)


CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_chat_templates_by_precedence(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template="config")
    assert read(folder).chat_template == "config"
    edit(folder / "chat_template.json", chat_template="json")
    assert read(folder).chat_template == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert read(folder).chat_template == "jinja"


def test_named_chat_templates_are_all_written(folder: Path, make_vocabulary_gguf: Make) -> None:
    entries = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHAT}, {"name": "rag"}]
    edit(folder / "tokenizer_config.json", chat_template=entries)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "think.jinja").write_text("thoughts")
    make_vocabulary_gguf(folder, folder / "v.gguf", n_vocab=420)
    fields = GGUFReader(folder / "v.gguf").fields
    assert fields["tokenizer.chat_templates"].contents() == ["think", "tool_use"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == "tools"
    assert fields["tokenizer.chat_template.think"].contents() == "thoughts"
    with Model.load(folder / "v.gguf", vocab_only=True) as model:
        assert model.chat_template == CHAT


def test_writing_twice_gives_the_same_bytes(folder: Path, make_vocabulary_gguf: Make) -> None:
    for name in ("a.gguf", "b.gguf"):
        make_vocabulary_gguf(folder, folder / name, n_vocab=420)
    assert (folder / "a.gguf").read_bytes() == (folder / "b.gguf").read_bytes()


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe{}", b"null and more"])
def test_files_that_are_not_what_they_say(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(SourceError, match=name) as caught:
        read(folder)
    assert "again" in caught.value.remedy


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [1]}},
        {"pre_tokenizer": {"type": "Split", "pattern": "x"}},
        {"normalizer": "NFC"},
        {"normalizer": {"normalizers": []}},
        {"post_processor": {"type": "TemplateProcessing", "single": ["A"]}},
        {"post_processor": {"type": "Sequence", "processors": None}},
        {"added_tokens": [{"content": "x"}]},
        {"model": {"type": "BPE", "vocab": ["a"], "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        {"model": []},
    ],
)
def test_fields_of_the_wrong_shape(folder: Path, change: dict[str, Any]) -> None:
    edit(folder / "tokenizer.json", **change)
    with pytest.raises(SourceError) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_no_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xff")
    with pytest.raises(SourceError, match="not UTF-8"):
        read(folder)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 3000), junk=st.binary(max_size=4))
def test_truncated_json_gives_one_line(tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes) -> None:
    source = tmp_path_factory.getbasetemp() / "whole.json"
    if not source.exists():
        vocabulary = {chr(0x100 + index): index for index in range(200)}
        model = {"type": "BPE", "vocab": vocabulary, "merges": []}
        source.write_text(json.dumps({"added_tokens": [], "model": model, "pre_tokenizer": BYTES}))
    data = source.read_bytes()
    broken = tmp_path_factory.mktemp("broken")
    (broken / "tokenizer.json").write_bytes(data[: min(cut, len(data) - 1)] + junk)
    (broken / "config.json").write_text('{"eos_token_id": 3}')
    with pytest.raises(EdgeqError) as caught:
        read(broken)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_noticed(folder: Path, make_vocabulary_gguf: Make) -> None:
    make_vocabulary_gguf(folder, folder / "v.gguf", n_vocab=420)
    document = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    edit(folder / "tokenizer.json", model=document["model"])
    with pytest.raises(ConversionError, match=r"at token \d+ of") as caught:
        check_tokenizer(folder / "v.gguf", folder)
    assert "where Hugging Face has" in caught.value.cause
