"""A GGUF in memory: its weights, tokenizer and metadata."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import Any

from edgeq.errors import SessionError, UsageError
from edgeq.llama_handle import Handle, buffer_bytes
from edgeq.llama_library import CapturedLog, capture_log, interruptible, library

__all__ = ["Model"]

# LLAMA_TOKEN_ATTR_UNKNOWN, _CONTROL and _USER_DEFINED in llama.h: tokens that are cut out of a text before the rest.
_CUT_OUT_FIRST = 1 | 8 | 16


class Model(Handle):
    """A GGUF in memory. A context manager; made by `Model.load`.

    Attributes:
        path: the file.
        buffer_bytes: weights in memory as llama.cpp counts them (rounded to 0.01 MiB), mapped ones included.
        n_vocab: tokens in the vocabulary.
        n_embd: width of the residual stream.
        n_layers: transformer blocks.
        n_ctx_train: tokens of context that the model was trained for.
        n_swa: width of the sliding attention window, 0 without one.
        bos: id of the token that begins a text, None without one.
        eos: id of the token that ends a text, None without one.
        add_bos: whether a raw text is to begin with ``bos``.
        chat_template: Jinja source, None without one.
    """

    def __init__(self, pointer: Any, path: Path, log: CapturedLog, *, vocab_only: bool) -> None:  # noqa: ANN401
        self._lib = lib = library()
        super().__init__(pointer, lib.llama_model_free, "model")
        self.path = path
        self.vocab_only = vocab_only
        self.buffer_bytes = buffer_bytes(log).get("model", 0)
        self._vocab = vocab = lib.llama_model_get_vocab(pointer)
        self._has_vocabulary = lib.llama_vocab_type(vocab) != lib.LLAMA_VOCAB_TYPE_NONE
        self.n_vocab = int(lib.llama_vocab_n_tokens(vocab))
        self.n_embd = int(lib.llama_model_n_embd(pointer))
        self.n_layers = int(lib.llama_model_n_layer(pointer))
        self.n_ctx_train = int(lib.llama_model_n_ctx_train(pointer))
        self.n_swa = int(lib.llama_model_n_swa(pointer))
        self.bos = _token_or_none(lib.llama_vocab_bos(vocab))
        self.eos = _token_or_none(lib.llama_vocab_eos(vocab))
        self.add_bos = bool(lib.llama_vocab_get_add_bos(vocab))
        template = lib.llama_model_chat_template(pointer, None)
        # edgeq's own key, since llama.cpp has none: see edgeq.converters.gguf.tokenizer.TokenizerSpec.space_prefix.
        self._space_first = self._has_text("edgeq.tokenizer.space_prefix", "first")
        self.chat_template: str | None = None if template is None else template.decode("utf-8", errors="replace")

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        gpu_layers: int = 0,
        use_mmap: bool = False,
        use_extra_bufts: bool = True,
        vocab_only: bool = False,
    ) -> Model:
        """Load a GGUF.

        Args:
            path: the file; of a split model, the first part.
            gpu_layers: layers on the accelerator; -1 for all.
            use_mmap: map the file instead of reading it. Off, weights that are repacked for the CPU are not held
                twice (SmolLM2-135M in Q4_0: 191 MB of RSS against 247 MB; in Q4_1, which is not repacked, 195 MB
                either way), and no page has to be fetched from disk later. On, a file that is in the page cache
                already loads faster, and the kernel may take the pages back.
            use_extra_bufts: let llama.cpp repack weights for this CPU; off when tensors are to be observed in a graph.
            vocab_only: tokenizer and metadata only; no context can be made.

        Raises:
            SessionError: no such file, no GGUF, an architecture that this llama.cpp does not know, too little memory.
            MissingPackageError: llama-cpp-python is not installed.
        """
        lib = library()
        if not path.is_file():
            raise SessionError(f"{path} does not exist or is no file", "Give the path of a GGUF file")
        params = lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if use_mmap else lib.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = use_extra_bufts
        params.vocab_only = vocab_only
        interrupted = threading.Event()
        params.progress_callback = lib.llama_progress_callback(lambda _share, _data: not interrupted.is_set())
        with capture_log() as log:
            pointer = interruptible(
                lambda: lib.llama_model_load_from_file(os.fsencode(path), params),
                stop=interrupted.set,
                undo=lambda loaded: lib.llama_model_free(loaded) if loaded else None,
            )
        if not pointer:
            cause = log.cause("llama.cpp gave no reason")
            raise SessionError(
                f"{path} cannot be loaded: {cause}", "Check that the file is a complete GGUF and that memory is free"
            )
        return cls(pointer, path, log, vocab_only=vocab_only)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool, at_start: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; a lone surrogate is an error.
            add_special: add what the model wants around a text (BOS, for some EOS).
            parse_special: read ``<|im_start|>`` and its like as control tokens. Never for text of strangers.
            at_start: whether ``text`` begins a sequence rather than continuing one. Only tokenizers that put a space
                before the very first word (``edgeq.tokenizer.space_prefix``) give other ids then.

        Raises:
            UsageError: the text is not valid Unicode.
            SessionError: the file holds no vocabulary.
        """
        self.check_vocabulary()
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text is not valid Unicode (lone surrogate at character {error.start})",
                "Decode it with errors='replace'",
            ) from None
        # Hugging Face puts no space before text that has one or that begins with a token of its own; only the ids tell.
        if at_start and self._space_first and data and not text.startswith((" ", "\u2581")):
            plain = self._tokenize(data, add_special=False, parse_special=parse_special)
            if not (plain and self._lib.llama_vocab_get_attr(self._vocab, plain[0]) & _CUT_OUT_FIRST):
                data = b" " + data
        return self._tokenize(data, add_special=add_special, parse_special=parse_special)

    def _tokenize(self, data: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        room = len(data) + 8
        while True:
            ids = (ctypes.c_int32 * room)()
            count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
            if count >= 0:
                return ids[:count]
            room = -count

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that a token stands for; a character may span several tokens.

        Args:
            token: its id.
            special: give control tokens their text instead of nothing.

        Raises:
            UsageError: an id outside of the vocabulary.
            SessionError: the file holds no vocabulary.
        """
        self.check_vocabulary()
        self.check_token(token)
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = self._lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def is_eog(self, token: int) -> bool:
        """Whether the token ends a generation (EOS, end of turn and their like)."""
        self.check_token(token)
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def is_control(self, token: int) -> bool:
        """Whether the token is a control token, which no user's text may contain; errors as in `token_bytes`."""
        self.check_vocabulary()
        self.check_token(token)
        return bool(self._lib.llama_vocab_is_control(self._vocab, token))

    def check_vocabulary(self) -> None:
        """Raise SessionError if the file holds no vocabulary: llama.cpp would end the process when asked for text."""
        self.check_open()
        if not self._has_vocabulary:
            raise SessionError(
                f"{self.path.name} holds no vocabulary, so it can neither read nor write text",
                "Use a GGUF with the model's tokenizer",
            )

    def check_token(self, token: int) -> None:
        """Raise UsageError for an id outside of the vocabulary: in llama.cpp it would end the process."""
        self.check_open()
        if not 0 <= token < self.n_vocab:
            raise UsageError(
                f"{token} is not a token of this model, which has {self.n_vocab}", "Use ids that its tokenizer gives"
            )

    def _has_text(self, key: str, value: str) -> bool:
        """Whether the metadata hold that text under that key."""
        buffer = ctypes.create_string_buffer(len(value) + 2)
        length = self._lib.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return bool(length == len(value) and buffer.value == value.encode())

    def metadata(self) -> dict[str, str]:
        """Scalar metadata of the GGUF as text, arrays shortened as llama.cpp prints them."""
        lib, pointer = self._lib, self.pointer
        result: dict[str, str] = {}
        for index in range(lib.llama_model_meta_count(pointer)):
            key = _read_string(lib.llama_model_meta_key_by_index, pointer, index)
            result[key] = _read_string(lib.llama_model_meta_val_str_by_index, pointer, index)
        return result


def _token_or_none(token: int) -> int | None:
    return None if token < 0 else int(token)


def _read_string(function: Any, pointer: Any, index: int) -> str:  # noqa: ANN401 - ctypes
    room = 256
    while True:
        buffer = ctypes.create_string_buffer(room)
        length = function(pointer, index, buffer, room)
        if length < room:
            return buffer.raw[: max(0, length)].decode("utf-8", errors="replace")
        room = length + 1
