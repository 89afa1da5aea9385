"""Proof that the tokenizer in a GGUF gives the ids that Hugging Face gives, on text made to break it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edgeq.converters.gguf.tokenizer_bpe import is_byte_level
from edgeq.converters.gguf.tokenizer_files import TokenizerFiles
from edgeq.converters.gguf.tokenizer_spm import space_prefix
from edgeq.converters.gguf.vocabulary import AddedToken, strips_like_phi3
from edgeq.errors import ConversionError, SourceError, require_package
from edgeq.llama import Model

__all__ = ["NASTY_TEXT", "check_tokenizer"]

NASTY_TEXT = "\n".join(
    [
        "The quick brown fox can't, won't and SHOULDN'T jump; we'll see, they've said I'd've.",
        "0 1 12 123 1234 12345678901234567890 3.14159 -1e-9 0x1F 1,000,000 ½ ² Ⅷ ٣٤٥",
        "def f(x: int) -> str:\n\tif x >= 0:\n\t\treturn f'{x!r:>8}'  # ok\n        pass\r\n\r\nint main(){}//",
        "  two   three    four\t\ttabs \n\n\n  \n   newlines\n\n\n\n end   ",
        "https://example.org/a?b=c&d=%20#e user@host:~/x$ ls -la | grep '^d' && echo \"$PATH\" > /dev/null",
        "Ünïcödé naïve café Straße ŒUVRE İstanbul ǅ Ђ Ελληνικά русский текст Հայերեն ქართული",
        "漢字とかなカナ、한국어 텍스트。中文标点：“你好”！全角ＡＢＣ１２３ 𠮷野家",  # noqa: RUF001
        "שלום עולם مرحبا بالعالم 123 \u200f\u200e mixed",
        "🙂👍🏽👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈🇩🇪 ❤️ ™ © ∑∞≠ → ▁ ░ \u00a0nbsp\u2003em\u3000ideographic",
        "!!! ??? ... --- *** ___ ``` ''' \"\"\" <<>> {{}} [[]] (()) \\\\ // || && ~~ ^^ @@ ## $$ %% ++ ==",
        "camelCaseHTTPServer snake_case SCREAMING_CASE kebab-case v1.2.3-rc4 I'M it's IT'S 'tis rock'n'roll",
        "<0x0A> </ s> <|not a token|> [PAD] <unused",
        "\u0001\u001b\u007f control \ufeff bom",
    ]
)

_MAX_PROBED_TOKENS = 256

Encode = Callable[[str, bool], list[int]]


def check_tokenizer(gguf_path: Path, folder: Path, text: str = NASTY_TEXT) -> None:
    """Compare the GGUF's tokenizer in llama.cpp with the folder's in Hugging Face's `tokenizers`.

    A folder with only a tokenizer.model is compared with the `sentencepiece` package. Compared are the text as a whole,
    each of its lines, and each added token (256 at most, evenly spread) between letters and between spaces, where
    Hugging Face strips no spaces around it.

    Args:
        gguf_path: with or without weights; only the vocabulary is loaded.
        folder: the Hugging Face folder that it was made from.
        text: in NFC, since llama.cpp does not normalize.

    Raises:
        ConversionError: some ids differ; the cause names the first.
        SourceError: the folder's tokenizer cannot be read.
        SessionError: the GGUF cannot be loaded.
    """
    files = TokenizerFiles.read(folder)
    encode, added, spaced = _oracle(files)
    with Model.load(gguf_path, vocab_only=True) as model:
        for probe in _probes(text, added, spaced=spaced):
            for add_special in (False, True):
                ours = model.tokenize(probe, add_special=add_special, parse_special=True)
                _compare(model, gguf_path, probe, ours, encode(probe, add_special))


def _oracle(files: TokenizerFiles) -> tuple[Encode, tuple[AddedToken, ...], bool]:
    """Text to ids as Hugging Face does it, the added tokens, and whether spaces may follow them in probes."""
    if files.json is None:
        return _sentencepiece_oracle(files), (), False
    tokenizers = require_package("tokenizers", "convert", "to check tokenizers")
    path = files.folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the package raises nothing more specific
        raise SourceError(f"{path} is refused by the tokenizers package ({error})", "Get the file again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str, add_special: bool) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special).ids
        return ids

    # With Metaspace "always" llama.cpp doubles a space after a token: the one difference that the notes name.
    always = not is_byte_level(files.json) and space_prefix(files.json) == "always"
    return encode, files.added({}), not always


def _sentencepiece_oracle(files: TokenizerFiles) -> Encode:
    sentencepiece = require_package("sentencepiece", "convert", "to check tokenizers")
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(files.sentencepiece)
    bos = [processor.bos_id()] if files.config.get("add_bos_token") is not False else []
    eos = [processor.eos_id()] if files.config.get("add_eos_token") is True else []

    def encode(text: str, add_special: bool) -> list[int]:
        ids: list[int] = processor.EncodeAsIds(text)
        return [*bos, *ids, *eos] if add_special else ids

    return encode


def _probes(text: str, added: Sequence[AddedToken], *, spaced: bool) -> Iterator[str]:
    yield text
    yield from (line for line in text.splitlines() if line and (spaced or not line.startswith(" ")))
    step = max(1, -(-len(added) // _MAX_PROBED_TOKENS))
    # Added runs of ▁ (Gemma) stand for spaces, which the text has; who spells ▁▁ gets other ids in llama.cpp.
    chosen = [token for token in added[::step] if "▁" not in token.content]
    yield "a" + "a".join(token.content for token in chosen if not token.single_word) + "a"
    if spaced:
        same = strips_like_phi3(added)
        around = [token for token in chosen if same or not (token.lstrip or token.rstrip)]
        yield "a " + " a\n ".join(token.content for token in around) + " a"


def _compare(model: Model, path: Path, probe: str, ours: list[int], theirs: list[int]) -> None:
    if ours == theirs:
        return
    pairs = zip(ours, theirs, strict=False)
    at = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    before = b"".join(model.token_bytes(token, special=True) for token in ours[:at]).decode("utf-8", errors="replace")
    raise ConversionError(
        f"the tokenizer in {path} differs from Hugging Face's at token {at} of {probe[:40]!r}, after {before[-20:]!r}: "
        f"{_shown(model, ours[at : at + 3])} where Hugging Face has {_shown(model, theirs[at : at + 3])}",
        "This is a limit of edgeq or llama.cpp: bring an F16 GGUF of the model, or pass --llama-cpp DIR",
    )


def _shown(model: Model, ids: Sequence[int]) -> str:
    return " ".join(f"{index} {model.token_bytes(index, special=True)!r}" for index in ids) or "the end"
