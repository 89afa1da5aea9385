"""Which ``tokenizer.ggml.pre`` stands for a tokenizer.json, told from its structure and not from a checksum of ids.

llama.cpp has one list of regular expressions for each name (llama-vocab.cpp). A row here says which steps of Hugging
Face's `tokenizers` are the same cuts, and the tests train a tokenizer with exactly those steps for every row and
compare ids. Two names can share their cuts and differ in ``ignore_merges``: whether a word that is a token as a whole
becomes that token although no merges lead to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from edgeq.converters.gguf.tokenizer_files import Step
from edgeq.errors import UnsupportedModelError

__all__ = ["ROWS", "PreTokenizer", "recognise"]

Cut = tuple[str, str]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _CONTRACTION + _WORD + r"|\p{N}{1,3}" + _REST
# The same cuts as tiktoken writes them for cl100k_base: possessive, which changes nothing here.
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_QWEN2 = _CONTRACTION + _WORD + r"|\p{N}" + _REST
_QWEN35 = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED_CODER = _CONTRACTION + _WORD + r"|\p{N}{1}| ?[^\s\p{L}\p{N}" + "\r\n" + r"]+|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PREFIX = r"[^\r\n\p{L}\p{N}]?"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_PREFIX}{_UPPER}*{_LOWER}+|{_PREFIX}{_UPPER}+{_LOWER}*|\p{{N}}" + _TAIL
_O200K = (
    rf"{_PREFIX}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_PREFIX}{_UPPER}+{_LOWER}*{_CONTRACTION}?|\p{{N}}{{1,3}}" + _TAIL
)
_CASE_LIMIT = (
    "llama.cpp tells upper from lower case in ASCII only and does not count combining marks as letters here: words of "
    "other alphabets with mixed case, and scripts that write vowels as marks, may be cut differently"
)


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """One name of llama.cpp and the steps that it stands for.

    Attributes:
        name: for ``tokenizer.ggml.pre``.
        spellings: each a sequence of steps that cuts text in the same way.
        ignore_merges: what llama.cpp does under that name.
        limit: text that llama.cpp cuts differently; empty if none is known.
    """

    name: str
    spellings: tuple[tuple[Cut, ...], ...]
    ignore_merges: bool = False
    limit: str = ""


def _split(*regexes: str) -> tuple[tuple[Cut, ...], ...]:
    return tuple((("split", regex), ("bytes", "plain")) for regex in regexes)


ROWS = (
    PreTokenizer("gpt-2", ((("bytes", "regex"),), *_split(_GPT2))),
    PreTokenizer("smollm", ((("digits", "individual"), ("bytes", "regex")),)),
    PreTokenizer("llama-bpe", _split(_LLAMA3, _CL100K), ignore_merges=True),
    PreTokenizer("dbrx", _split(_LLAMA3, _CL100K)),
    PreTokenizer("qwen2", _split(_QWEN2)),
    PreTokenizer("qwen35", _split(_QWEN35)),
    PreTokenizer("seed-coder", _split(_SEED_CODER)),
    PreTokenizer("tekken", _split(_TEKKEN), ignore_merges=True, limit=_CASE_LIMIT),
    PreTokenizer("gpt-4o", _split(_O200K), limit=_CASE_LIMIT),
)


def recognise(pre_tokenizer: Step | None, *, ignore_merges: bool, merges_reach_all: Callable[[], bool]) -> PreTokenizer:
    """The row for a byte-level ``pre_tokenizer`` of tokenizer.json.

    Args:
        pre_tokenizer: the field as it is.
        ignore_merges: of the BPE model.
        merges_reach_all: whether every token is what its own merges make of it; then ``ignore_merges`` is moot. Asked
            only where the answer decides.

    Raises:
        UnsupportedModelError: no row has these steps; the cause names them.
    """
    steps = tuple(_step(node) for node in pre_tokenizer.flat()) if pre_tokenizer is not None else ()
    rows = [row for row in ROWS if any(_same(steps, spelling) for spelling in row.spellings)]
    for row in rows:
        if row.ignore_merges == ignore_merges:
            return row
    if rows and merges_reach_all():
        return rows[0]
    shown = " + ".join(f"{kind}({value})" for kind, value in steps) or "nothing"
    flag = f" with ignore_merges={str(ignore_merges).lower()}" if rows else ""
    raise UnsupportedModelError(
        f"the tokenizer cuts text in a way that edgeq cannot express for llama.cpp: {shown}{flag}",
        "Bring an F16 GGUF of the model, or pass --llama-cpp DIR to use the converter of a llama.cpp checkout",
    )


def _same(steps: tuple[Cut, ...], spelling: tuple[Cut, ...]) -> bool:
    # Keeping what a regex matches and dropping the rest is the same cut as isolating its matches where it matches
    # everything, as each single regex of the table does.
    single = len(spelling) == 2 and spelling[0][0] == "split"
    return tuple(("split", value) if single and kind == "keep" else (kind, value) for kind, value in steps) == spelling


def _step(node: Step) -> Cut:
    if node.type == "ByteLevel":
        return (
            "bytes",
            ("regex" if node.use_regex else "plain") + (" with prefix space" if node.add_prefix_space else ""),
        )
    if node.type == "Digits":
        return ("digits", "individual" if node.individual_digits else "runs")
    if node.type == "Split":
        return _split_step(node)
    return (node.type, "")


def _split_step(node: Step) -> Cut:
    regex = (node.pattern or {}).get("Regex")
    if regex is not None and (node.behavior, node.invert) in {("Isolated", False), ("Removed", True)}:
        return ("keep" if node.invert else "split", regex)
    return ("Split", f"{node.pattern} {node.behavior}{' inverted' if node.invert else ''}")
