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
from edgeq.converters.calibration.texts import TokenText, file_text
from edgeq.converters.gguf.header import GgufHeader
from edgeq.converters.gguf.imatrix import ImportanceMatrix, check_matches, read_imatrix, write_imatrix
from edgeq.converters.gguf.observe import collect_imatrix
from edgeq.converters.gguf.sensitivity.curvature import Curvature, Curvatures
from edgeq.converters.gguf.sensitivity.fisher import fisher_curvatures, fisher_memory_bytes
from edgeq.converters.gguf.sensitivity.matrix import Importance
from edgeq.converters.gguf.sensitivity.probes import probed_curvatures
from edgeq.converters.gguf.sensitivity.table import weight_errors
from edgeq.disk_cache import DiskCache, cache_root, fingerprint
from edgeq.errors import EdgeqError, MissingPackageError, UnsupportedModelError, UsageError
from edgeq.llama_library import versions

__all__ = ["ESTIMATORS", "Evidence", "EvidenceRequest", "Workshop", "gather"]

ESTIMATORS = ("auto", "fisher", "imatrix")
Estimator = Literal["auto", "fisher", "imatrix"]
Kind = Literal["fisher", "imatrix"]
Progress = Callable[[str, int, int, str], None]
Floats = npt.NDArray[np.float32]

CHUNK_TOKENS = 256
_FEWEST_TOKENS = 2048
_FLOOR = 1e-3  # of the mean importance: a column that calibration never saw may still be needed
_VERSION = 2  # of everything that is cached here


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
        imatrix: a file whose column weights are used for the quantizer instead of own ones.
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


class _CurvatureRecord(msgspec.Struct, frozen=True):
    rows: bytes
    columns: bytes
    activation_kld: dict[int, float]
    correlation: int | None


class _CurvaturesRecord(msgspec.Struct, frozen=True):
    by_tensor: dict[str, _CurvatureRecord]
    correlations: list[bytes]


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
    cache = DiskCache(cache_root() / "search" / fingerprint(_VERSION, shop.weights_key, versions()["llama.cpp"]))
    text = _calibration(header, request, cache, shop)
    basis = _Basis(header, tuple(menu), request, text, cache, shop)
    by_tensor, estimator, notes = _curvatures(basis, folder)
    key = basis.key(estimator)
    given = None if request.imatrix is None else read_imatrix(request.imatrix)
    if given is not None:
        notes += check_matches(given, header, list(menu))
    importance, source = _importance(by_tensor, estimator, given, request)
    errors_key = fingerprint(key, source, _digest(importance))
    curvatures = Curvatures({name: by_tensor[name] for name in menu}, estimator, text.n_tokens, errors_key)
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
    return Evidence(header, text, curvatures, importance, source, errors, (*text.warnings, *notes))


@dataclasses.dataclass(frozen=True)
class _Basis:
    """What curvatures are measured from."""

    header: GgufHeader
    names: tuple[str, ...]
    request: EvidenceRequest
    text: TokenText
    cache: DiskCache
    shop: Workshop

    def key(self, estimator: str) -> str:
        return fingerprint(
            self.text.text_sha256, self.text.n_tokens, estimator, self.request.seed, self.request.imatrix
        )


def _curvatures(basis: _Basis, folder: Path | None) -> tuple[dict[str, Curvature], Kind, list[str]]:
    """Kept or measured, by the best estimator that can be had, and why it is not the better one."""
    estimator, why = _choose_estimator(basis.request, basis.header, folder)
    notes = [why] if why else []
    if estimator == "fisher" and folder is not None:
        try:
            return _fisher(basis, folder), "fisher", notes
        except (UnsupportedModelError, MissingPackageError) as error:
            if basis.request.estimator == "fisher":
                raise
            notes.append(f"estimator imatrix, because {error.cause}")
    return _probed(basis), "imatrix", notes


def _fisher(basis: _Basis, folder: Path) -> dict[str, Curvature]:
    key = basis.key("fisher")
    kept = _load_curvatures(basis.cache, key, basis.header, basis.names)
    if kept is None:
        shop, seed = basis.shop, basis.request.seed
        kept = fisher_curvatures(
            folder, basis.text.chunks, seed=seed, threads=shop.threads, progress=shop.stage("curvature")
        )
        _keep_curvatures(basis.cache, key, kept)
    return kept


def _probed(basis: _Basis) -> dict[str, Curvature]:
    key = basis.key("imatrix")
    kept = _load_curvatures(basis.cache, key, basis.header, basis.names)
    if kept is None:
        matrix = _imatrix(basis, key)
        weights = {name: w for name in basis.names if (w := matrix.weights(name)) is not None}
        _refuse_gaps(basis.names, weights)
        kept = probed_curvatures(
            basis.header,
            basis.names,
            weights,
            basis.text.chunks,
            work=basis.shop.folder,
            threads=basis.shop.threads,
            progress=basis.shop.stage("probe"),
        )
        _keep_curvatures(basis.cache, key, kept)
    return kept


def _calibration(header: GgufHeader, request: EvidenceRequest, cache: DiskCache, shop: Workshop) -> TokenText:
    if request.calibration is not None:
        return file_text(
            header.path,
            request.calibration,
            chunk_tokens=CHUNK_TOKENS,
            max_tokens=request.tokens,
            min_tokens=min(_FEWEST_TOKENS, request.tokens),
        )
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


def _choose_estimator(request: EvidenceRequest, header: GgufHeader, folder: Path | None) -> tuple[Kind, str]:
    """The estimator, and why it is not the better one where that was not asked for."""
    if request.estimator == "imatrix":
        return "imatrix", ""
    reason = _why_no_fisher(header, folder)
    if reason is None:
        return "fisher", ""
    if request.estimator == "fisher":
        raise reason if isinstance(reason, EdgeqError) else UsageError(reason, "Use --estimator imatrix")
    return "imatrix", f"estimator imatrix, because {reason.cause if isinstance(reason, EdgeqError) else reason}"


def _why_no_fisher(header: GgufHeader, folder: Path | None) -> EdgeqError | str | None:
    import psutil

    if folder is None:
        return "the model is no Hugging Face folder, which torch could load"
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            return MissingPackageError(f"{package} is not installed", "Install it with: pip install 'edgeq[fisher]'")
    needed = fisher_memory_bytes(sum(math.prod(t.shape) for t in header.tensors.values()))
    free = int(psutil.virtual_memory().available)
    if needed > free:
        return f"backward passes need about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free"
    return None


def _imatrix(basis: _Basis, key: str) -> ImportanceMatrix:
    """The user's importance matrix, or one that is collected now or was before."""
    header, names = basis.header, list(basis.names)
    if basis.request.imatrix is not None:
        return read_imatrix(basis.request.imatrix)
    path = basis.cache.folder / f"imatrix-{key}.gguf"
    if path.is_file():
        try:
            kept = read_imatrix(path)
            check_matches(kept, header, names)
        except EdgeqError:  # damaged: collected again
            path.unlink(missing_ok=True)
        else:
            return kept
    matrix = collect_imatrix(
        header.path,
        basis.text.chunks,
        threads=basis.shop.threads,
        progress=basis.shop.stage("collect imatrix"),
        datasets=(basis.text.name,),
    )
    basis.cache.folder.mkdir(parents=True, exist_ok=True)
    write_imatrix(matrix, path)
    return matrix


def _refuse_gaps(names: Sequence[str], weights: Importance) -> None:
    if missing := [name for name in names if name not in weights]:
        raise UsageError(
            f"The importance matrix says nothing about {missing[0]} ({len(missing)} of {len(names)} matrices)",
            "Leave out --imatrix, so that one is collected",
        )


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
    for name, weights in importance.items():
        total.update(name.encode())
        total.update(weights.tobytes())
    return total.hexdigest()


def _keep_curvatures(cache: DiskCache, key: str, by_tensor: Mapping[str, Curvature]) -> None:
    places: dict[int, int] = {}
    arrays: list[bytes] = []
    records = {}
    for name, c in by_tensor.items():
        place = None
        if c.correlation is not None:
            place = places.setdefault(id(c.correlation), len(arrays))
            if place == len(arrays):
                arrays.append(c.correlation.tobytes())
        records[name] = _CurvatureRecord(c.rows.tobytes(), c.columns.tobytes(), dict(c.activation_kld), place)
    cache.put(f"curvature-{key}", _CurvaturesRecord(records, arrays))


def _load_curvatures(
    cache: DiskCache, key: str, header: GgufHeader, names: Sequence[str]
) -> dict[str, Curvature] | None:
    kept = cache.get(f"curvature-{key}", _CurvaturesRecord)
    if kept is None or not set(names) <= set(kept.by_tensor):
        return None
    matrices = [np.frombuffer(data, np.float16) for data in kept.correlations]
    result = {}
    for name in names:
        record, (n_columns, n_rows) = kept.by_tensor[name], header.tensors[name].shape[:2]
        rows, columns = np.frombuffer(record.rows, np.float32), np.frombuffer(record.columns, np.float32)
        if len(rows) != n_rows or len(columns) != n_columns:
            return None
        correlation = None
        if record.correlation is not None:
            correlation = matrices[record.correlation].reshape(n_columns, n_columns)
        result[name] = Curvature(rows, columns, record.activation_kld, correlation)
    return result
