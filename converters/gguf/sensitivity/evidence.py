"""Everything that is measured about a model before a mix is solved for, each part kept on disk for the next budget."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgeq.converters.calibration.generate import self_text
from edgeq.converters.calibration.texts import CHUNK_TOKENS, TokenText, calibration_text
from edgeq.converters.gguf.header import GgufHeader
from edgeq.converters.gguf.imatrix import ImportanceMatrix, check_matches, read_imatrix
from edgeq.converters.gguf.sensitivity.curvature import Curvature, Curvatures
from edgeq.converters.gguf.sensitivity.curvature_cache import keep_curvatures, load_curvatures
from edgeq.converters.gguf.sensitivity.fisher import fisher_curvatures, fisher_memory_bytes
from edgeq.converters.gguf.sensitivity.inputs import measured_inputs, weighted_by
from edgeq.converters.gguf.sensitivity.matrix import Importance
from edgeq.converters.gguf.sensitivity.probes import probed_curvatures
from edgeq.converters.gguf.sensitivity.table import weight_errors
from edgeq.disk_cache import DiskCache, cache_root, fingerprint
from edgeq.errors import EdgeqError, MissingPackageError, UnsupportedModelError, UsageError
from edgeq.llama_library import versions
from edgeq.profiles.llm.model_shape import EMBEDDING

__all__ = ["Evidence", "EvidenceRequest", "Workshop", "gather"]

Estimator = Literal["auto", "fisher", "imatrix"]
Kind = Literal["fisher", "imatrix"]
Progress = Callable[[str, int, int, str], None]
Floats = npt.NDArray[np.float32]

_FLOOR = 1e-3  # of the mean importance: a column that calibration never saw may still be needed
_VERSION = 6  # of everything that is cached here


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Where long work is done, and who is told.

    Attributes:
        folder: for files that are not kept.
        weights_key: identifies the model's weights; results are kept on disk under it.
        threads: for everything.
        progress: told stage, done, total, detail.
    """

    folder: Path
    weights_key: str
    threads: int
    progress: Progress

    def stage(self, name: str) -> Callable[[int, int, str], None]:
        """The progress of one stage."""
        return functools.partial(self.progress, name)


@dataclasses.dataclass(frozen=True)
class EvidenceRequest:
    """What the user wants the evidence to stand on.

    Attributes:
        estimator: ``"auto"`` takes ``"fisher"`` where torch, transformers, a Hugging Face folder and memory allow it.
        calibration: a text file; None lets the model write the text.
        imatrix: a file whose column weights are used instead of own ones.
        tokens: of calibration.
        seed: of everything that is drawn at random.
    """

    estimator: Estimator = "auto"
    calibration: Path | None = None
    imatrix: Path | None = None
    tokens: int = 10_240
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is known about a model.

    Attributes:
        header: of its float GGUF.
        text: the calibration text.
        curvatures: of every matrix that can be quantized.
        importance: column weights for the quantizer.
        importance_source: ``"fisher"``, ``"activations"``, or a file's name.
        errors: predicted KL divergence from the rounding of weights, by tensor and type, in nats.
        notes: what a user must know, one line each.
    """

    header: GgufHeader
    text: TokenText
    curvatures: Curvatures
    importance: Importance
    importance_source: str
    errors: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]

    @property
    def compensated(self) -> bool:
        """Whether errors of a block are made up for by later columns."""
        return any(c.correlation is not None for c in self.curvatures.by_tensor.values())


class _Text(msgspec.Struct, frozen=True):
    chunks: list[bytes]
    text_sha256: str
    name: str
    warnings: tuple[str, ...]


def gather(
    header: GgufHeader,
    folder: Path | None,
    menu: Mapping[str, Sequence[str]],
    request: EvidenceRequest,
    shop: Workshop,
) -> Evidence:
    """Calibrate, and price every type of every tensor.

    Args:
        header: of the float GGUF.
        folder: the Hugging Face folder that it is of; None if there is none.
        menu: types to price, by tensor.
        request: what to stand on.
        shop: where and how.

    Raises:
        UsageError: a calibration text that is too short, an imatrix of another model, a model that the estimator that
            was asked for cannot take.
        MissingPackageError: the estimator that was asked for needs torch.
    """
    model = fingerprint(_VERSION, shop.weights_key, _metadata_sha256(header), versions()["llama.cpp"])
    cache = DiskCache(cache_root() / "search" / model)
    given, gaps = _given(header, list(menu), request)
    wanted, why = _choose_estimator(request, header, folder)
    text = _calibration(header, request, cache, shop)
    basis = _Basis(header, tuple(menu), request, given, text, cache, shop)
    found, estimator, notes = _curvatures(basis, wanted, folder)
    by_tensor = {name: found[name] for name in menu}
    importance, source = _importance(by_tensor, estimator, given, request)
    errors_key = fingerprint(basis.key(estimator), source, _digest(importance))
    curvatures = Curvatures(by_tensor, estimator, text.n_tokens, errors_key)
    errors = weight_errors(
        header,
        menu,
        curvatures,
        importance,
        cache=cache,
        weights_key=shop.weights_key,
        threads=shop.threads,
        progress=shop.stage("price types"),
    )
    notes = (*text.warnings, *why, *notes, *_uncompensated(curvatures), *gaps)
    return Evidence(header, text, curvatures, importance, source, errors, notes)


def _metadata_sha256(header: GgufHeader) -> str:
    """Of everything in the file before the weights: the same weights run otherwise with another RoPE or vocabulary."""
    start = min(tensor.offset for tensor in header.tensors.values())
    with header.path.open("rb") as file:
        return hashlib.sha256(file.read(start)).hexdigest()


def _uncompensated(curvatures: Curvatures) -> tuple[str, ...]:
    """What to say of matrices whose rounding errors stay, where those of others are made up for.

    Probes decide it for each group of matrices, so for them it is only worth a word if it is so for all.
    """
    found = {name: c.correlation for name, c in curvatures.by_tensor.items() if name != EMBEDDING}
    without = [name for name, correlation in found.items() if correlation is None]
    if not without or (curvatures.estimator == "imatrix" and len(without) < len(found)):
        return ()
    share = f"{len(without)} of {len(found)} matrices ({without[0]} is the first)"
    return (f"rounding errors of {share} are not made up for by later columns",)


@dataclasses.dataclass(frozen=True)
class _Basis:
    """What curvatures are measured from."""

    header: GgufHeader
    names: tuple[str, ...]
    request: EvidenceRequest
    given: ImportanceMatrix | None
    text: TokenText
    cache: DiskCache
    shop: Workshop

    def key(self, estimator: Kind) -> str:
        text = self.text.text_sha256, self.text.n_tokens
        if estimator == "fisher":
            return fingerprint(*text, estimator, self.request.seed)
        return fingerprint(*text, estimator, None if self.given is None else self.given.sha256)


def _given(
    header: GgufHeader, names: Sequence[str], request: EvidenceRequest
) -> tuple[ImportanceMatrix | None, list[str]]:
    """The user's importance matrix, looked at before any work is done, and what is missing in it."""
    if request.imatrix is None:
        return None, []
    matrix = read_imatrix(request.imatrix)
    check_matches(matrix, header, names)
    notes = check_matches(matrix, header, [name for name in names if name in matrix.entries])
    if missing := [name for name in names if name not in matrix.entries]:
        notes.append(
            f"{request.imatrix.name} has no entry for {len(missing)} of {len(names)} matrices ({missing[0]} is the "
            "first): they are weighted by what was measured here"
        )
    return matrix, notes


def _curvatures(
    basis: _Basis, estimator: Kind, folder: Path | None
) -> tuple[dict[str, Curvature], Kind, tuple[str, ...]]:
    """Kept or measured, by which estimator in the end, and why it is not the better one."""
    if estimator == "fisher" and folder is not None:
        try:
            return _fisher(basis, folder), "fisher", ()
        except (UnsupportedModelError, MissingPackageError) as error:
            if basis.request.estimator == "fisher":
                raise
            return _probed(basis), "imatrix", (f"estimator imatrix, because {error.cause}",)
    return _probed(basis), "imatrix", ()


def _fisher(basis: _Basis, folder: Path) -> dict[str, Curvature]:
    key = basis.key("fisher")
    kept = load_curvatures(basis.cache, key, basis.header, basis.names)
    if kept is None:
        shop, seed = basis.shop, basis.request.seed
        kept = fisher_curvatures(
            folder, basis.text.chunks, seed=seed, threads=shop.threads, progress=shop.stage("curvature")
        )
        if absent := [name for name in basis.names if name not in kept]:
            raise UnsupportedModelError(f"torch has no gradient of {absent[0]}", "Use --estimator imatrix")
        keep_curvatures(basis.cache, key, kept)
    return kept


def _probed(basis: _Basis) -> dict[str, Curvature]:
    shop = basis.shop
    inputs = measured_inputs(
        basis.header,
        basis.names,
        basis.text,
        cache=basis.cache,
        threads=shop.threads,
        progress=shop.stage("collect imatrix"),
    )
    return probed_curvatures(
        basis.header,
        inputs if basis.given is None else weighted_by(basis.given, inputs),
        basis.text.chunks,
        cache=basis.cache,
        # Memory decides whether there are correlations to try.
        key=fingerprint(basis.key("imatrix"), any(c.correlation is not None for c in inputs.values())),
        work=shop.folder,
        threads=shop.threads,
        progress=shop.stage("probe"),
    )


def _calibration(header: GgufHeader, request: EvidenceRequest, cache: DiskCache, shop: Workshop) -> TokenText:
    if request.calibration is not None:
        return calibration_text(header.path, request.calibration, max_tokens=request.tokens)
    key = f"text-{fingerprint(request.tokens, request.seed, CHUNK_TOKENS)}"
    if (kept := cache.get(key, _Text)) is not None:
        chunks = tuple(np.frombuffer(chunk, np.int32) for chunk in kept.chunks)
        n_tokens = sum(map(len, chunks))
        return TokenText(chunks, kept.text_sha256, "self", kept.name, request.seed, n_tokens, kept.warnings)
    text = self_text(
        header.path,
        n_tokens=request.tokens,
        chunk_tokens=CHUNK_TOKENS,
        seed=request.seed,
        threads=shop.threads,
        progress=shop.stage("write calibration text"),
    )
    cache.put(key, _Text([c.tobytes() for c in text.chunks], text.text_sha256, text.name, text.warnings))
    return text


def _choose_estimator(
    request: EvidenceRequest, header: GgufHeader, folder: Path | None
) -> tuple[Kind, tuple[str, ...]]:
    """The estimator, and why it is not the better one where that was not asked for."""
    reason = None if request.estimator == "imatrix" else _why_no_fisher(header, folder)
    if reason is None:
        return "imatrix" if request.estimator == "imatrix" else "fisher", ()
    if request.estimator == "fisher":
        raise reason if isinstance(reason, EdgeqError) else UsageError(reason, "Use --estimator imatrix")
    return "imatrix", (f"estimator imatrix, because {reason.cause if isinstance(reason, EdgeqError) else reason}",)


def _why_no_fisher(header: GgufHeader, folder: Path | None) -> EdgeqError | str | None:
    import psutil

    if folder is None:
        return "the model is no Hugging Face folder, which torch could load"
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            return MissingPackageError(f"{package} is not installed", "Install it with: pip install 'edgeq[fisher]'")
    needed = fisher_memory_bytes([tensor.shape for tensor in header.tensors.values()])
    free = int(psutil.virtual_memory().available)
    if needed > free:
        return f"backward passes need about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free"
    return None


def _importance(
    by_tensor: Mapping[str, Curvature], estimator: Kind, given: ImportanceMatrix | None, request: EvidenceRequest
) -> tuple[dict[str, Floats], str]:
    """Column weights for the quantizer, scaled to a mean of one with a floor, and where they come from."""
    columns = {name: c.columns for name, c in by_tensor.items()}
    source = "fisher" if estimator == "fisher" else "activations"
    if given is not None and request.imatrix is not None:
        columns |= {name: w for name in columns if (w := given.weights(name)) is not None}
        source = request.imatrix.name
    return {name: _floored(w) for name, w in columns.items()}, source


def _floored(weights: Floats) -> Floats:
    mean = float(weights.mean(dtype=np.float64))
    if not math.isfinite(mean) or mean <= 0.0:
        return np.ones_like(weights)
    scaled: Floats = (weights / np.float32(mean) + np.float32(_FLOOR)).astype(np.float32)
    return scaled


def _digest(importance: Importance) -> str:
    total = hashlib.sha256()
    for name, weights in sorted(importance.items()):
        total.update(name.encode("utf-8", errors="surrogateescape"))
        total.update(weights.tobytes())
    return total.hexdigest()
