"""An importance matrix as a file: a model's own text, or the user's, run through its float weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from edgeq.converters.calibration.generate import self_text
from edgeq.converters.calibration.texts import CHUNK_TOKENS, TokenText, calibration_text, check_text_file
from edgeq.converters.gguf.export import export_skeleton
from edgeq.converters.gguf.external import export_with_llama_cpp
from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.imatrix import ImportanceMatrix, check_matches, write_imatrix
from edgeq.converters.gguf.observe import collect_imatrix
from edgeq.converters.gguf.quantize import quantizable_tensors
from edgeq.converters.gguf.sensitivity.evidence import EvidenceRequest
from edgeq.converters.source import resolve, weight_files
from edgeq.errors import ConversionError, OutputExistsError, UsageError
from edgeq.planner.decide import export_reference
from edgeq.staging import staging_folder
from edgeq.types import ModelSource

__all__ = ["Collection", "ImatrixJob", "make_imatrix"]

Progress = Callable[[str, int, int, str], None]

_USUAL = EvidenceRequest()


def _silent(stage: str, done: int, total: int, detail: str) -> None:
    """A progress callback for those who want none."""


@dataclasses.dataclass(frozen=True)
class ImatrixJob:
    """What to collect an importance matrix of, and on which text.

    Attributes:
        model: a hub id, a Hugging Face folder, or a float GGUF.
        revision: of a hub id.
        llama_cpp: a checkout whose converter replaces edgeq's own.
        calibration: a text file; None lets the model write the text.
        tokens: of that text, at most.
        seed: of a text that the model writes.
        threads: None for the machine's physical cores.
    """

    model: str
    revision: str | None = None
    llama_cpp: Path | None = None
    calibration: Path | None = None
    tokens: int = _USUAL.tokens
    seed: int = _USUAL.seed
    threads: int | None = None


@dataclasses.dataclass(frozen=True)
class Collection:
    """An importance matrix that was written, and what it stands on.

    Attributes:
        source: the model.
        matrix: what the file holds.
        text: that was run.
        without_entry: matrices that could be quantized and that nothing was multiplied with, such as an embedding with
            an output matrix beside it; quantizers weigh all their columns the same.
        notes: what makes the text less than good, one line each.
    """

    source: ModelSource
    matrix: ImportanceMatrix
    text: TokenText
    without_entry: tuple[str, ...]
    notes: tuple[str, ...]


def make_imatrix(job: ImatrixJob, out: Path, *, force: bool = False, progress: Progress = _silent) -> Collection:
    """Collect an importance matrix and write it in llama.cpp's format.

    Args:
        job: of what.
        out: the file; it appears whole or not at all, and a float GGUF of the model lies beside it meanwhile.
        force: replace a file that is there.
        progress: told stage, amount done, amount in all, and a detail.

    Raises:
        OutputExistsError: something is there, and ``force`` is off or it is no file; or the work would read from it.
        UsageError: a calibration text that cannot be read or is too short.
        UnsupportedModelError: the model is quantized, or of a kind that edgeq does not convert.
        EdgeqError: anything else that `edgeq.errors` names; nothing is left behind.
    """
    _refuse_occupied(out, force=force)
    if job.calibration is not None:
        check_text_file(job.calibration)
    source = resolve(job.model, revision=job.revision, progress=lambda d, t, n: progress("download", d, t, n))
    if source.format == "gguf" and job.llama_cpp is not None:
        raise UsageError("--llama-cpp converts Hugging Face folders, and this is a GGUF", "Leave it out")
    _refuse_own_source(out, [*weight_files(source), *([] if job.calibration is None else [job.calibration])])
    with staging_folder(out) as work:
        text, reference = _text_and_reference(job, source, work, progress)
        matrix = collect_imatrix(
            reference,
            text.chunks,
            threads=job.threads,
            progress=lambda done, total, what: progress("collect imatrix", done, total, what),
            datasets=(_description(text),),
        )
        names = sorted(quantizable_tensors(reference))
        without_entry = tuple(name for name in names if name not in matrix.entries)
        gaps = check_matches(matrix, read_header(reference), [name for name in names if name in matrix.entries])
        write_imatrix(matrix, work / "imatrix.gguf")
        _refuse_occupied(out, force=force)
        try:
            (work / "imatrix.gguf").replace(out)
        except OSError as error:
            raise _not_writable(out, error) from error
    return Collection(source, matrix, text, without_entry, (*text.warnings, *gaps))


def _refuse_occupied(out: Path, *, force: bool) -> None:
    try:
        out.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _not_writable(out, error) from error
    if not (force and out.is_file()):
        remedy = "Add --force to overwrite it" if out.is_file() else "Choose another file"
        raise OutputExistsError(f"{out} exists", remedy)


def _not_writable(out: Path, error: OSError) -> ConversionError:
    return ConversionError(f"{out} cannot be written: {error.strerror}", "Choose another file with -o")


def _refuse_own_source(out: Path, files: list[Path]) -> None:
    if out.exists() and any(out.samefile(file) for file in files):
        raise OutputExistsError(f"{out} is what the importance matrix is made from", "Choose another file with -o")


def _text_and_reference(job: ImatrixJob, source: ModelSource, work: Path, progress: Progress) -> tuple[TokenText, Path]:
    """The text, and the model as a float GGUF. A text that will not do is refused before any weight is converted."""
    if job.calibration is not None:
        text = calibration_text(_vocabulary(job, source, work, progress), job.calibration, max_tokens=job.tokens)
        # A file's name may be no text, which a GGUF's strings and JSON have to be.
        name = text.name.encode("utf-8", errors="backslashreplace").decode()
        return dataclasses.replace(text, name=name), _reference(job, source, work, progress)
    reference = _reference(job, source, work, progress)
    text = self_text(
        reference,
        n_tokens=job.tokens,
        chunk_tokens=CHUNK_TOKENS,
        seed=job.seed,
        threads=job.threads,
        progress=lambda done, total, what: progress("write calibration text", done, total, what),
    )
    return dataclasses.replace(text, name=f"written by {source.id}"), reference


def _vocabulary(job: ImatrixJob, source: ModelSource, work: Path, progress: Progress) -> Path:
    """A GGUF of which only the tokenizer is needed."""
    if source.format == "gguf" or job.llama_cpp is not None:
        return _reference(job, source, work, progress)
    return export_skeleton(Path(source.path), work / "skeleton.gguf").path


def _reference(job: ImatrixJob, source: ModelSource, work: Path, progress: Progress) -> Path:
    folder, out = Path(source.path), work / "reference.gguf"
    if source.format == "gguf":
        return folder
    if out.exists():
        return out
    if job.llama_cpp is None:
        export_reference(folder, out, progress)
        return out

    def tell(line: str) -> None:
        progress("convert with llama.cpp", 0, 0, line)

    export_with_llama_cpp(folder, out, job.llama_cpp, float_type=source.dtype, progress=tell)
    return out


def _description(text: TokenText) -> str:
    """What the file calls its text. llama-quantize keeps the first 126 bytes in what it makes."""
    seed = "" if text.seed is None else f", seed {text.seed}"
    return f"{text.name}, {text.n_tokens} tokens{seed}, sha256 {text.text_sha256}"
