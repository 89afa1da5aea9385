"""The embedding session: texts in, vectors out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.errors import BundleError, EdgeqError, UsageError
from edgeq.inputs.arrays import Array
from edgeq.inputs.text import check_texts, text_encoder
from edgeq.profiles.onnx.session import PROVIDERS
from edgeq.runtime.tensor.engine import Engine
from edgeq.runtime.tensor.pooling import normalized, pool
from edgeq.runtime.tensor.session import TensorSession
from edgeq.runtime.tensor.settings import TensorSettings
from edgeq.tensor_types import Embedding, TensorManifest, TensorSpec

__all__ = ["EmbeddingSession"]

_HIDDEN = "last_hidden_state"
# Texts that are tokenized at once, and then sorted by their tokens.
_BLOCK_TEXTS = 256
# Of one run on a CPU, all rows filled up: more of them leave the caches. MiniLM in floats takes for a text of 48 tokens
# 13.1 ms alone, 11.7 among 8 and 12.7 among 32.
_MOST_TOKENS = 384
# That a text may be filled up by on a CPU: what a run costs beside its tokens, so that a run of its own is no better.
_MOST_FILLED = 8


class EmbeddingSession(TensorSession):
    """A loaded text encoder. All that `TensorSession` can do, and `embed`.

    Args:
        engine: what computes, from token ids to hidden states of (texts, tokens, width); the session closes it.
        settings: how it was made.
        tokenizer: the folder with ``tokenizer.json``.
        embedding: how hidden states become vectors.
        manifest: of the bundle that it belongs to.
        started: when loading began, on the clock of `time.perf_counter`.

    Attributes:
        dimensions: of a vector.
        embedding: as given.

    Raises:
        BundleError: the graph is not what the manifest tells, or is no text encoder.
        SourceError: the tokenizer makes no sense.
        MissingPackageError: ``tokenizers`` is not installed.
    """

    def __init__(
        self,
        engine: Engine,
        settings: TensorSettings,
        tokenizer: Path,
        embedding: Embedding,
        *,
        manifest: TensorManifest | None = None,
        started: float | None = None,
    ) -> None:
        super().__init__(engine, settings, manifest=manifest, started=started)
        try:
            self._hidden, self.dimensions = _hidden_states(self.outputs)
            self._fields = _token_inputs(self.inputs)
            self._encoder = text_encoder(tokenizer, lowercase=embedding.lowercase)
        except EdgeqError:
            self.close()
            raise
        self.embedding = embedding

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> npt.NDArray[np.float32]:
        """One vector a text.

        Texts of like length are computed together, so the order in which they come costs nothing: on a CPU those that
        differ by 8 tokens at most, and 384 tokens of them; on a GPU as many as ``batch_size`` allows. Texts that are
        longer than the model was made for are cut; `count_tokens` tells which. A text without any token, as the empty
        one is where the tokenizer adds none, gets zeros.

        Of a model in dynamic INT8 a vector depends a little on the texts beside it, since all rows of one run share
        one grid for their activations; with ``batch_size=1`` it does not, which takes about twice the time for
        texts of a few words.

        Args:
            texts: any number of them.
            batch_size: the most that are computed at once; fewer where the graph takes fewer or the texts are long.

        Returns:
            float32 of (texts, dimensions), in the order of the texts.

        Raises:
            UsageError: one string instead of several, text that is no valid Unicode, or a batch size below one.
            SessionClosedError: the session was closed.
            SessionError: ONNX Runtime failed.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size={batch_size} makes no sense", "Choose at least 1")
        if not isinstance(texts, str) and not len(texts):
            return np.empty((0, self.dimensions), np.float32)
        check_texts(texts)
        result = np.empty((len(texts), self.dimensions), np.float32)
        # The sort of sentence-transformers: characters tell the length well enough.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
        rows = min(batch_size, self._most_rows())
        # Without a padding token only texts that are computed together can be tokenized together.
        block = rows if self._encoder.pad_id is None else max(rows, _BLOCK_TEXTS)
        for start in range(0, len(order), block):
            chosen = order[start : start + block]
            result[chosen] = self._embed_block([texts[index] for index in chosen], rows)
        return result

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before any is cut, special ones included."""
        return self._encoder.count(texts)

    def _embed_block(self, texts: list[str], rows: int) -> npt.NDArray[np.float32]:
        """Vectors of texts that are tokenized together, at most so many rows in a run."""
        arrays = self._encoder(texts, self._limit(), length=self._fixed(1))
        held = arrays["attention_mask"] > 0
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        for chosen in self._runs(held.sum(axis=1), rows):
            # Only these texts' longest counts, on whichever side the others were filled up.
            used = slice(None) if self._fixed(1) is not None else np.flatnonzero(held[chosen].any(axis=0))
            vectors[chosen] = self._embed_tokens({name: array[chosen][:, used] for name, array in arrays.items()})
        return vectors

    def _runs(self, lengths: npt.NDArray[np.int64], rows: int) -> Iterator[list[int]]:
        """Indices of the texts of each run, by falling length; those without tokens are in none."""
        order = [int(index) for index in np.argsort(-lengths, kind="stable") if lengths[index]]
        # A GPU computes many rows in the time of one, and rows that the graph has anyway cost nothing.
        free = self.providers != PROVIDERS or self._fixed(0) is not None
        run: list[int] = []
        for index in order:
            longest = int(lengths[run[0]]) if run else 0
            width = self._fixed(1) or longest
            wide = not free and (len(run) + 1) * width > _MOST_TOKENS
            unlike = not free and self._fixed(1) is None and longest - int(lengths[index]) > _MOST_FILLED
            if run and (len(run) == rows or wide or unlike):
                yield run
                run = []
            run.append(index)
        if run:
            yield run

    def _embed_tokens(self, arrays: dict[str, Array]) -> npt.NDArray[np.float32]:
        """Vectors of texts that have tokens."""
        count = len(arrays["input_ids"])
        missing = (self._fixed(0) or count) - count
        if missing:  # a graph of a fixed number of rows gets the first again
            arrays = {name: np.concatenate([a, a[:1].repeat(missing, axis=0)]) for name, a in arrays.items()}
        feed = {spec.name: arrays[spec.name].astype(spec.dtype, copy=False) for spec in self._fields}
        hidden = self.run(feed)[self._hidden].astype(np.float32, copy=False)
        vectors = pool(hidden, arrays["attention_mask"], self.embedding.pooling)[:count]
        return normalized(vectors) if self.embedding.normalize else vectors

    def _limit(self) -> int:
        axis = self._fields[0].shape[1]
        most = self._axes[axis].most if isinstance(axis, str) and axis in self._axes else self.embedding.max_tokens
        return min(most, self.embedding.max_tokens)

    def _fixed(self, axis: int) -> int | None:
        size = self._fields[0].shape[axis]
        return size if isinstance(size, int) else None

    def _most_rows(self) -> int:
        axis = self._fields[0].shape[0]
        if isinstance(axis, int):
            return axis
        return self._axes[axis].most if axis in self._axes else 1 << 30


def _hidden_states(outputs: Sequence[TensorSpec]) -> tuple[str, int]:
    """Name and width of the output of hidden states."""
    for spec in sorted(outputs, key=lambda spec: spec.name != _HIDDEN):
        if len(spec.shape) == 3 and isinstance(spec.shape[2], int):
            return spec.name, spec.shape[2]
    raise BundleError("the graph gives no hidden states of (texts, tokens, width)", "Convert the model again")


def _token_inputs(inputs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The inputs, ``input_ids`` first."""
    known = ("input_ids", "attention_mask", "token_type_ids")
    names = [spec.name for spec in inputs]
    if not set(known[:2]) <= set(names) <= set(known) or any(len(spec.shape) != 2 for spec in inputs):
        raise BundleError(
            f"the graph takes {', '.join(names)}; a text encoder takes {', '.join(known)}",
            "Convert the model again for feature-extraction",
        )
    return sorted(inputs, key=lambda spec: known.index(spec.name))
