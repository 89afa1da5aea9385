"""SentencePiece BPE: ids in llama.cpp against transformers, from tokenizer.model and from tokenizer.json alone."""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from edgeq.converters.gguf.sentencepiece_model import SentencePieceModel, read_sentencepiece
from edgeq.converters.gguf.tokenizer import NASTY_TEXT, check_tokenizer, read_tokenizer
from edgeq.converters.gguf.tokenizer_spm import scores_from_merges
from edgeq.converters.gguf.vocabulary import TokenType
from edgeq.errors import ConversionError, UnsupportedModelError
from edgeq.llama import Model

transformers = pytest.importorskip("transformers")

TURN, TOOL = "<|turn|>", "<tool>"
TEMPLATE = f"<s>{TURN}user\nHi there, it's 2 o'clock</s>{TURN} robot\n  Yes{TOOL}left arm</s>\n"
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(
            [" ", "  ", "   ", "\n", "\n\n", "\t", "the robot", " arm", "don't", "123", "▁", "é", "机器人"]
        ),
    ),
    max_size=12,
).map(lambda parts: unicodedata.normalize("NFC", "".join(parts)))

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def train(request: pytest.FixtureRequest) -> Callable[..., bytes]:
    lines = [line[:400] for line in NASTY_TEXT.splitlines()] * 8 + [
        "the robot moves its left arm and the right arm of the robot moves it again",
        "for (int i = 0; i < 10; ++i) {    sum += a[i];    }",
        "    indented    text with    runs   of  spaces",
    ] * 8

    def run(**options: Any) -> bytes:
        model = io.BytesIO()
        defaults: dict[str, Any] = {
            "vocab_size": 700,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "split_digits": True,
            "minloglevel": 5,
        }
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, hard_vocab_limit=False, **(defaults | options)
        )
        return model.getvalue()

    return run


@pytest.fixture(scope="module")
def model_data(train: Callable[..., bytes]) -> bytes:
    return train(control_symbols=[TURN], user_defined_symbols=[TOOL])


def build_json(model: SentencePieceModel, style: str) -> Tokenizer:
    """A tokenizer.json as converters write it: all pairs that form a piece are merges, by score."""
    vocabulary = {piece.text: index for index, piece in enumerate(model.pieces)}
    ranked = sorted((-piece.score, index) for index, piece in enumerate(model.pieces) if piece.type is TokenType.NORMAL)
    merges = []
    for _, index in ranked:
        text = model.pieces[index].text
        cuts = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        merges += [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if style == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif style == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=style, split=False)
    for piece in model.pieces:
        if piece.type in {TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED}:
            special = piece.type is not TokenType.USER_DEFINED
            tokenizer.add_tokens([AddedToken(piece.text, special=special, normalized=False)])
    return tokenizer


def save_json(folder: Path, tokenizer: Tokenizer, **config: object) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles | config))
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="module", params=["first", "never", "always", "legacy", "gemma"])
def styled(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    model_data: bytes,
    make_vocabulary_gguf: Make,
) -> Iterator[tuple[str, Path, Tokenizer, Model]]:
    folder = tmp_path_factory.mktemp("spm")
    tokenizer = build_json(read_sentencepiece(model_data), request.param)
    n_vocab = save_json(folder, tokenizer)
    make_vocabulary_gguf(folder, folder / "v.gguf", n_vocab=n_vocab + 7)
    with Model.load(folder / "v.gguf", vocab_only=True) as model:
        yield request.param, folder, tokenizer, model


def test_json_alone_gives_the_same_ids(styled: tuple[str, Path, Tokenizer, Model]) -> None:
    _, folder, tokenizer, model = styled
    check_tokenizer(folder / "v.gguf", folder)
    assert model.tokenize(TEMPLATE, add_special=False, parse_special=True) == tokenizer.encode(TEMPLATE).ids or (
        styled[0] == "always"
    )


def test_any_text_gives_the_same_ids(styled: tuple[str, Path, Tokenizer, Model]) -> None:
    style, _, tokenizer, model = styled

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def compare(text: str) -> None:
        # Documented: with Metaspace "always" llama.cpp puts a space before text even if it begins with one.
        text = text.lstrip(" ▁") if style == "always" else text
        assert model.tokenize(text, add_special=False, parse_special=True) == tokenizer.encode(text).ids

    compare()


def test_spaces_before_text_follow_the_style(styled: tuple[str, Path, Tokenizer, Model]) -> None:
    style, folder, tokenizer, model = styled
    continued = model.tokenize("arm", add_special=False, parse_special=False, at_start=False)
    started = model.tokenize("arm", add_special=False, parse_special=False)
    assert started == tokenizer.encode("arm").ids
    assert (started != continued) is (style == "first")
    notes = read_tokenizer(folder, n_vocab=model.n_vocab, architecture="llama").notes
    assert bool(notes) is (style in {"first", "always"})


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_model_alone_gives_the_ids_of_transformers(
    tmp_path: Path, train: Callable[..., bytes], make_vocabulary_gguf: Make, *, dummy_prefix: bool
) -> None:
    data = train(control_symbols=[TURN], user_defined_symbols=[TOOL], add_dummy_prefix=dummy_prefix)
    (tmp_path / "tokenizer.model").write_bytes(data)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_prefix_space": dummy_prefix}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    n_vocab = len(read_sentencepiece(data).pieces)
    spec = make_vocabulary_gguf(tmp_path, tmp_path / "v.gguf", n_vocab=n_vocab)
    assert (spec.special_ids, spec.add_bos) == ({"bos": 1, "eos": 2, "unk": 0}, True)
    check_tokenizer(tmp_path / "v.gguf", tmp_path)
    with Model.load(tmp_path / "v.gguf", vocab_only=True) as model:
        for text in (TEMPLATE, NASTY_TEXT, "arm", " arm", TOOL, f"{TURN}arm"):
            expected = oracle.encode(text, add_special_tokens=False)
            assert model.tokenize(text, add_special=False, parse_special=True) == expected
        assert model.tokenize("arm", add_special=True, parse_special=True) == oracle.encode("arm")


def test_what_transformers_saves_again_gives_its_ids(
    tmp_path: Path, model_data: bytes, make_vocabulary_gguf: Make
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(model_data)
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    oracle = transformers.AutoTokenizer.from_pretrained(source)
    oracle.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "tokenizer.model").exists()
    make_vocabulary_gguf(tmp_path / "saved", tmp_path / "v.gguf", n_vocab=len(oracle))
    check_tokenizer(tmp_path / "v.gguf", tmp_path / "saved")


def test_tied_scores_of_runs_of_spaces(tmp_path: Path, make_vocabulary_gguf: Make) -> None:
    """Gemma's runs of spaces share a score, and transformers then ranks their merges by the length of the left part."""
    runs = ["▁" * n for n in range(2, 9)]
    letters = [*"abcdefgh", "▁", "▁a", "bc"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), *runs, *letters]
    merges = [(run[:cut], run[cut:]) for run in runs for cut in range(1, len(run))]
    merges = [("▁", "a"), *sorted(merges, key=lambda pair: (-len(pair[0]), -len(pair[1]))), ("b", "c")]
    vocabulary = {text: index for index, text in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in tokens[:4]])
    tokenizer.add_tokens([AddedToken(run, special=False, normalized=False) for run in runs])
    n_vocab = save_json(tmp_path, tokenizer, bos_token="<bos>", eos_token="<eos>")
    make_vocabulary_gguf(tmp_path, tmp_path / "v.gguf", n_vocab=n_vocab)
    check_tokenizer(tmp_path / "v.gguf", tmp_path)
    with Model.load(tmp_path / "v.gguf", vocab_only=True) as model:
        for length in range(1, 40):
            text = "b" + " " * length + "a"
            ids = model.tokenize(text, add_special=False, parse_special=True)
            assert ids == tokenizer.encode(text).ids
            assert b"".join(map(model.token_bytes, ids)) == text.encode()


def test_scores_are_ranks_and_interleaved_tokens_share_one() -> None:
    pairs = [("a", "b"), ("c", "d"), ("ab", "c"), ("x", "yz"), ("p", "q"), ("xy", "z"), ("e", "f")]
    assert scores_from_merges(pairs) == {"ab": 0, "cd": -1, "abc": -2, "xyz": -3, "pq": -3, "ef": -6}


def test_wrong_scores_are_noticed(tmp_path: Path, model_data: bytes, make_vocabulary_gguf: Make) -> None:
    """The control: the same pieces with merges in another order are another tokenizer."""
    tokenizer = build_json(read_sentencepiece(model_data), "never")
    n_vocab = save_json(tmp_path, tokenizer)
    make_vocabulary_gguf(tmp_path, tmp_path / "v.gguf", n_vocab=n_vocab)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ConversionError, match="differs from Hugging Face's at token"):
        check_tokenizer(tmp_path / "v.gguf", tmp_path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model_type": "unigram", "vocab_size": 500}, "Unigram"),
        ({"byte_fallback": False}, "byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrites characters"),
        ({"remove_extra_whitespaces": True}, "removes extra spaces"),
        ({"treat_whitespace_as_suffix": True}, "suffixes"),
    ],
)
def test_models_that_llama_cpp_cannot_follow_are_refused(
    tmp_path: Path, train: Callable[..., bytes], options: dict[str, Any], named: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(**options))
    with pytest.raises(UnsupportedModelError, match=named):
        read_tokenizer(tmp_path, n_vocab=2000, architecture="llama")


def altered(change: str, document: dict[str, Any]) -> None:
    model = document["model"]
    if change == "byte fallback":
        model["byte_fallback"] = False
    elif change == "256 byte tokens":
        del model["vocab"]["<0x41>"]
    elif change == "would merge":
        del model["merges"][len(model["merges"]) // 2]
    elif change == "ignore_merges":
        model["ignore_merges"] = True
    elif change == "treats spaces":
        document["pre_tokenizer"] = None
    elif change == "cuts at spaces":
        document["pre_tokenizer"]["split"] = True


@pytest.mark.parametrize(
    "change", ["byte fallback", "256 byte tokens", "would merge", "ignore_merges", "treats spaces", "cuts at spaces"]
)
def test_json_that_llama_cpp_cannot_follow_is_refused(tmp_path: Path, model_data: bytes, change: str) -> None:
    n_vocab = save_json(tmp_path, build_json(read_sentencepiece(model_data), "first"))
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    altered(change, document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UnsupportedModelError, match=change):
        read_tokenizer(tmp_path, n_vocab=n_vocab, architecture="llama")
