"""The written artifact against the unquantized model, on a short fixed text, before anything is published.

This is proof of life (the file loads, its logits are finite and resemble the reference), not a measure of quality.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.errors import ConversionError
from edgeq.llama import Context, Model
from edgeq.types import SmokeCheck

__all__ = ["SMOKE_TEXT", "kl_divergence", "smoke_check"]

SMOKE_TEXT = """The arm moves to the shelf, waits for the camera, and picks the smallest of the three boxes. If the grip
slips, it stops and says why. def area(w: float, h: float) -> float: return w * h  # in m2
Q: How far is the charger? A: It is 2.5 m ahead, behind the second door. 12 + 30 = 42, and 7 * 6 = 42 too."""

_MAX_TOKENS = 128
_CHUNK = 32
_SINGLE = 4  # at least so many tokens go one by one
_FLOAT_LIMIT = 1e-2  # mean KL of a float artifact; far above rounding, far below any mistake
_BLOCK_LIMIT = 4.0  # mean KL of a quantized artifact; beyond it nothing of the model is left


def smoke_check(reference: Path, artifact: Path, *, is_float: bool, threads: int | None = None) -> SmokeCheck:
    """Compare two GGUF files position by position.

    Args:
        reference: the unquantized model.
        artifact: what will be published.
        is_float: the artifact stores every weight by itself, so it has to agree closely.
        threads: None for the machine's physical cores.

    Raises:
        ConversionError: the artifact does not load, gives NaN or Inf, or has lost the model.
    """
    expected = _log_probabilities(reference, threads)
    found = _log_probabilities(artifact, threads)
    divergences, agreements = [], []
    for p, q in zip(expected, found, strict=True):
        divergences.append(kl_divergence(p, q))
        agreements.append(bool(np.argmax(p) == np.argmax(q)))
    result = SmokeCheck(
        tokens=len(divergences),
        mean_kld=float(np.mean(divergences)),
        max_kld=float(np.max(divergences)),
        top1_agreement=float(np.mean(agreements)),
        text_sha256=hashlib.sha256(SMOKE_TEXT.encode()).hexdigest(),
    )
    limit = _FLOAT_LIMIT if is_float else _BLOCK_LIMIT
    if not result.mean_kld <= limit:
        raise ConversionError(
            f"The converted model does not behave like its source: mean KL divergence {result.mean_kld:.3g} nats over "
            f"{result.tokens} tokens, at most {limit:g} is plausible",
            "Choose a larger type; if it happens with --quant f16 too, report the model's name",
        )
    return result


def kl_divergence(p: npt.NDArray[np.float32], q: npt.NDArray[np.float32]) -> float:
    """KL(p || q) in nats of two rows of log-probabilities, summed in float64."""
    return float(np.sum(np.exp(p, dtype=np.float64) * (p.astype(np.float64) - q)))


def _log_probabilities(path: Path, threads: int | None) -> Iterator[npt.NDArray[np.float32]]:
    """Rows of log-probabilities, float32 of (n_vocab,), one for each position of the text.

    Most of the text goes through in chunks, as a prompt does, and the rest token by token, as an answer does: the two
    run on different kernels.
    """
    with Model.load(path, use_mmap=True) as model:
        tokens = model.tokenize(SMOKE_TEXT, add_special=True, parse_special=False)[:_MAX_TOKENS]
        with Context(
            model, context_tokens=_MAX_TOKENS, batch_tokens=_CHUNK, threads=threads, max_outputs=_CHUNK
        ) as context:
            whole = max(0, len(tokens) - _SINGLE) // _CHUNK * _CHUNK
            for start in range(0, whole, _CHUNK):
                context.decode(tokens[start : start + _CHUNK], start, logits="all")
                for row in context.all_logits():
                    yield _log_softmax(row, path)
            for position in range(whole, len(tokens)):
                context.decode(tokens[position : position + 1], position, logits="last")
                yield _log_softmax(context.logits(), path)


def _log_softmax(logits: npt.NDArray[np.float32], path: Path) -> npt.NDArray[np.float32]:
    if not np.isfinite(logits).all():
        raise ConversionError(
            f"{path.name} gives logits that are NaN or infinite", "Check the source model; try --quant f16"
        )
    shifted = logits - logits.max()
    normalizer = np.log(np.sum(np.exp(shifted, dtype=np.float64)))
    return np.asarray(shifted - normalizer, np.float32)
