"""How edgeq runs ONNX models on a CPU: the options that hold least memory, and whose memory can be foretold.

Tried on all-MiniLM-L6-v2 (FP32, 8 x 128 tokens, ONNX Runtime 1.31), peak of the process; each line is one option more:

======================================================  ==========  ==============================================
options                                                 peak, MiB   why
======================================================  ==========  ==============================================
ONNX Runtime's defaults                                 245 to 263  the arena doubles, and patterns hold it twice
no arena instead                                        302 to 313  glibc's heap does not give freed blocks back
no memory patterns                                      207 to 211  no second copy of the whole plan
an arena that grows by what is asked for                202 to 206  nothing is reserved in advance
a heap that gives back large blocks                     202         otherwise what loading needed stays
buffers freed after their last use, not reused by plan  187         a plan keeps them alive between two uses
======================================================  ==========  ==============================================

The last peak is that of loading. Weights in a file of external data are mapped instead of copied: loading then peaks
at 100 MiB. No option costs time beyond what runs differ by; without the arena a call takes twice as long. Prepacking
stays on: without it as much memory is taken, only later.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgeq.errors import SessionError, require_package
from edgeq.profiles.onnx.wire import WireError, read_fields

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "PROVIDERS",
    "Provider",
    "import_onnxruntime",
    "onnx_session_options",
    "open_onnx_session",
    "start_session",
]

Provider = str | tuple[str, dict[str, Any]]

PROVIDERS = ("CPUExecutionProvider",)
_REMEDIES = {
    "CUDAExecutionProvider": "Install onnxruntime-gpu in place of onnxruntime, and the CUDA and cuDNN that it needs",
    "TensorrtExecutionProvider": "Install onnxruntime-gpu in place of onnxruntime, and the TensorRT that it needs",
}
# Puts a float bias on a grid of 32 bits whose steps it computes in the type of the scales: in FP16 they vanish, and so
# does the model (1.31, convolutions between QDQ grids with FP16 scales).
_WRONG_OPTIMIZERS = ("WeightBiasQuantization",)
# Take every QuantizeLinear for one to integers (1.31): the first drops a Relu whose zero point is the type's least
# number, as if float8 had no numbers below 0; the others ask for kernels that there are not, so that nothing loads.
_WRONG_FOR_FLOAT8 = (
    "ReluQuantRewrite", "ClipQuantRewrite", "QDQPropagationTransformer", "QDQSelectorActionTransformer",
)  # fmt: skip
_FLOAT8 = frozenset({17, 18, 19, 20})  # TensorProto.DataType
_GRAPH, _NODE, _INITIALIZER = 7, 1, 5  # ModelProto.graph, GraphProto.node and .initializer
_ATTRIBUTE, _TENSOR, _DATA_TYPE = 5, 5, 2  # NodeProto.attribute, AttributeProto.t, TensorProto.data_type
_SAME_AS_REQUESTED = 1  # ArenaExtendStrategy::kSameAsRequested
_WARNINGS_OFF = 3  # errors only: what ONNX Runtime warns of while it optimizes is no concern of a robot's log
_M_MMAP_THRESHOLD = -3  # malloc.h
_MAPPED_WHILE_LOADING = 128 << 10  # glibc's own first value
_MAPPED_WHILE_SERVING = 32 << 20  # and its last, where a process with large arrays ends up


def import_onnxruntime() -> ModuleType:
    """The module ``onnxruntime``.

    Raises:
        MissingPackageError: it is not installed.
    """
    return require_package("onnxruntime", "perception", "to run ONNX models")


def onnx_session_options(threads: int, *, dims: Mapping[str, int] | None = None) -> onnxruntime.SessionOptions:
    """Options of a session on the CPU.

    Args:
        threads: that compute one call; calls are not run in parallel.
        dims: sizes of dynamic axes, if the session shall take no others: it then knows all shapes beforehand, which
            takes fewer nodes and less memory.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        SessionError: another part of the program registered an allocator with ONNX Runtime before.
    """
    ort = import_onnxruntime()
    _register_arena()
    options: onnxruntime.SessionOptions = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _WARNINGS_OFF
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    options.add_session_config_entry("session.use_env_allocators", "1")
    for name, size in (dims or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    return options


@functools.cache
def _register_arena() -> None:
    """One arena for all sessions of the process, which grows by exactly what is asked for."""
    ort = import_onnxruntime()
    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # 0 and -1 leave a setting to ONNX Runtime.
    settings = {
        "max_mem": 0,
        "arena_extend_strategy": _SAME_AS_REQUESTED,
        "initial_chunk_size_bytes": -1,
        "max_dead_bytes_per_chunk": -1,
    }
    try:
        ort.create_and_register_allocator(where, ort.OrtArenaCfg(settings))
    except RuntimeError as error:
        raise SessionError(
            f"ONNX Runtime refused edgeq's memory arena: {error}", "Let no other code register an allocator"
        ) from error


def open_onnx_session(
    model: str | os.PathLike[str] | bytes,
    threads: int,
    *,
    dims: Mapping[str, int] | None = None,
    providers: Sequence[Provider] = PROVIDERS,
    disabled_optimizers: Sequence[str] = (),
    config: Mapping[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """A session that gives back what it needed only to load, and that never falls back to another provider.

    Args:
        model: the ``.onnx`` file, or its contents.
        threads: see `onnx_session_options`.
        dims: see `onnx_session_options`.
        providers: what computes, in the order of preference: names, or names with options.
        disabled_optimizers: of ONNX Runtime, as ``"SkipLayerNormFusion"``.
        config: further entries of the session's configuration.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        SessionError: ONNX Runtime cannot load the model, or does not have one of the providers here.
    """
    ort = import_onnxruntime()
    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    _check_providers(names, ort.get_available_providers(), "was not built with")
    options = onnx_session_options(threads, dims=dims)
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    with _frugal_heap():
        session = start_session(model, options, providers=providers, disabled_optimizers=disabled_optimizers)
    # A provider whose libraries are missing is left out with no more than a line in the log.
    _check_providers(names, session.get_providers(), "could not start")
    return session


def start_session(
    model: str | os.PathLike[str] | bytes,
    options: onnxruntime.SessionOptions,
    *,
    providers: Sequence[Provider] = PROVIDERS,
    disabled_optimizers: Sequence[str] = (),
) -> onnxruntime.InferenceSession:
    """A session without the optimizers of ONNX Runtime that compute something else than the model says.

    Args:
        model: the ``.onnx`` file, or its contents.
        options: of the session.
        providers: see `open_onnx_session`.
        disabled_optimizers: further ones.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        SessionError: ONNX Runtime cannot load the model.
    """
    ort = import_onnxruntime()
    source: Any = model if isinstance(model, bytes) else os.fspath(model)
    wrong = _WRONG_OPTIMIZERS + (_WRONG_FOR_FLOAT8 if _has_float8(source) else ())
    try:
        session: onnxruntime.InferenceSession = ort.InferenceSession(
            source,
            options,
            providers=list(providers),
            disabled_optimizers=[*wrong, *disabled_optimizers],
            enable_fallback=0,
        )
    except Exception as error:  # its exceptions have no common base but Exception
        what = "the model" if isinstance(model, bytes) else os.fspath(model)
        reason = " ".join(str(error).split())  # some of its messages have several lines
        raise SessionError(
            f"ONNX Runtime cannot load {what}: {reason}", "Export it again, or install another onnxruntime"
        ) from error
    return session


def _has_float8(model: str | bytes) -> bool:
    """Whether a constant of the graph is float8, as the zero points of all its grids are; weights are skipped over."""
    try:
        if isinstance(model, bytes):
            return _graph_has_float8(memoryview(model))
        with Path(model).open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return False
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
                return _graph_has_float8(data)
    except (OSError, WireError):  # ONNX Runtime says better what is wrong with the file
        return False


def _graph_has_float8(data: memoryview) -> bool:
    def inside(at: tuple[int, int], number: int) -> Iterator[tuple[int, int]]:
        return ((field.payload, field.end) for field in read_fields(data, *at) if field.number == number)

    for graph in inside((0, len(data)), _GRAPH):
        tensors = [*inside(graph, _INITIALIZER)]
        for node in inside(graph, _NODE):
            tensors += [tensor for found in inside(node, _ATTRIBUTE) for tensor in inside(found, _TENSOR)]
        if any(f.number == _DATA_TYPE and f.value in _FLOAT8 for at in tensors for f in read_fields(data, *at)):
            return True
    return False


def _check_providers(wanted: Sequence[str], found: Sequence[str], fault: str) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise SessionError(
            f"ONNX Runtime {fault} {missing[0]}, and would have computed on {', '.join(found)}",
            _REMEDIES.get(missing[0], f"Choose among {', '.join(found)}"),
        )


@contextlib.contextmanager
def _frugal_heap() -> Iterator[None]:
    """Give each block above 128 KiB back to the system at once while a model is loaded, and the rest afterwards.

    glibc raises the size from which it does so with every large block that is freed, up to 32 MiB: weights that
    ONNX Runtime has copied or packed then stay in the heap. Other C libraries have neither habit nor calls.
    """
    libc = ctypes.CDLL(None)
    mallopt, trim = getattr(libc, "mallopt", None), getattr(libc, "malloc_trim", None)
    if mallopt is None or trim is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _MAPPED_WHILE_LOADING)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_WHILE_SERVING)
        trim(0)
