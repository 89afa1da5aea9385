"""From an ONNX graph with explicit Q/DQ nodes to an engine.

The network is strongly typed: the graph alone says what computes in which precision, and TensorRT adds no precision of
its own. In TensorRT 10 that is a flag, from 11 on there is nothing else, though the flag is still there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeq.errors import ConversionError, SessionError, UnsupportedModelError, UsageError
from edgeq.runtime.tensorrt.driver import find_gpu
from edgeq.runtime.tensorrt.graph_file import external_files
from edgeq.runtime.tensorrt.log import Messages, logger_of
from edgeq.runtime.tensorrt.precisions import refuse_missing_precisions
from edgeq.runtime.tensorrt.records import EngineInfo, EngineSettings, InputShapes
from edgeq.runtime.tensorrt.shapes import add_profile, input_shapes
from edgeq.runtime.tensorrt.versions import capability_names, flavour_of, refuse_too_old, version_of

__all__ = ["build_engine"]

_MOST_WARNINGS = 20
_MOST_ERRORS = 5
_LONGEST_LINE = 300
_SAYS_LITTLE = ("Invalid Node - ", "catchCudaError")
# Of every model that takes token ids; sessions bind what the engine's own tensors say.
_NOTHING_WRONG = re.compile(r"Make sure (?:input|output) .* has Int64 binding")
_NO_PLUGIN = "was not found in plugin registry"
_NO_FP32_PRODUCT = "FP32 GEMM is not supported"  # TensorRT-RTX for Turing, of INT8 products with FP32 scales too
_COMPATIBILITY = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}
_OUT_OF_MEMORY = ("out of memory", "outofmemory", "bad_alloc", "insufficient memory", "cudaerrormemoryallocation")


def build_engine(trt: ModuleType, onnx: Path, out: Path, settings: EngineSettings) -> EngineInfo:
    """Build an engine in this process.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        onnx: the graph; external data lies beside it.
        out: the engine; written whole or not at all.
        settings: what it shall be.

    Raises:
        SourceError: the model cannot be read, or asks for files outside its folder.
        UnsupportedModelError: TensorRT does not take the graph (the node is named), or the GPU lacks a precision that
            it asks for.
        UsageError: settings that this library cannot fulfil.
        SessionError: no GPU where one is needed, out of memory, or TensorRT failed.
        ConversionError: the engine cannot be written.
    """
    refuse_too_old(trt)
    external_files(onnx)
    target = _target(trt, settings.compute_capability)
    logger, messages = logger_of(trt)
    messages.clear()
    started = time.perf_counter()
    builder = _builder(trt, logger, messages)
    if settings.threads is not None:
        builder.max_threads = settings.threads
    network = builder.create_network(_network_flags(trt))
    config = builder.create_builder_config()
    parser = _parse(trt, network, logger, messages, onnx, dla=settings.dla_core is not None)
    precisions = _precisions(network)
    refuse_missing_precisions(precisions, target)
    dla_layers = _configure(trt, builder, network, config, settings, messages)
    shapes = input_shapes(network, settings.axes)
    add_profile(builder, config, shapes)
    plan = builder.build_serialized_network(network, config)
    del parser  # the network's weights lie in it until here
    if plan is None:
        raise _build_failed(trt, messages, settings)
    build_ms = (time.perf_counter() - started) * 1e3
    _save_timing_cache(trt, config, settings)
    sha256, size = _write(out, plan)
    return _info(trt, settings, shapes, messages, sha256=sha256, size_bytes=size, build_ms=build_ms,
                 layers=network.num_layers, dla_layers=dla_layers, precisions=precisions)  # fmt: skip


def _info(
    trt: ModuleType,
    settings: EngineSettings,
    shapes: tuple[InputShapes, ...],
    messages: Messages,
    **facts: Any,  # noqa: ANN401
) -> EngineInfo:
    return EngineInfo(
        flavour=flavour_of(trt),
        version=version_of(trt),
        compute_capability=settings.compute_capability,
        shapes=shapes,
        warnings=tuple(line[:_LONGEST_LINE] for line in messages.warnings if not _NOTHING_WRONG.search(line))[
            :_MOST_WARNINGS
        ],
        created_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **facts,
    )


def _target(trt: ModuleType, wanted: str | None) -> str:
    """The compute capability that the engine is for.

    Raises:
        UsageError: the library cannot build for it.
        SessionError: none is named, and there is no GPU.
    """
    gpu = find_gpu()
    able = capability_names(trt)
    if wanted is None:
        if gpu is None:
            raise SessionError(
                "There is no GPU on this machine to build an engine for",
                f"Name what it is for, one of {', '.join(_sm(name) for name in able)}" if able else
                "Build on the machine with the GPU; TensorRT-RTX (tensorrt_rtx) builds without one",
            )  # fmt: skip
        return gpu.compute_capability
    if able and wanted not in able:
        remedy = f"{flavour_of(trt)} {version_of(trt)} builds for {', '.join(_sm(name) for name in able)}"
        raise UsageError(
            f"TensorRT-RTX does not build for {_sm(wanted)}",
            f"{remedy}; on a Jetson, build there with TensorRT (--module tensorrt)",
        )
    if not able and (gpu is None or gpu.compute_capability != wanted):
        here = "has no GPU" if gpu is None else f"has {_sm(gpu.compute_capability)}"
        raise UsageError(
            f"TensorRT builds for the GPU that it runs on, and this machine {here}, not {_sm(wanted)}",
            "Run edgeq build on the target itself, or use TensorRT-RTX (tensorrt_rtx) for an RTX GPU",
        )
    return wanted


def _sm(capability: str) -> str:
    return f"sm_{capability.replace('.', '')}"


def _builder(trt: ModuleType, logger: Any, messages: Messages) -> Any:  # noqa: ANN401 - the library's objects
    try:
        return trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # pybind11's way to say that the factory gave nothing
        said = messages.errors[0] if messages.errors else str(error)
        raise SessionError(
            f"TensorRT cannot start: {said}",
            "Check the driver with nvidia-smi (tegrastats on a Jetson); TensorRT-RTX (tensorrt_rtx) builds without one",
        ) from error


def _network_flags(trt: ModuleType) -> int:
    """Strongly typed where that is a choice."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(
    trt: ModuleType,
    network: Any,  # noqa: ANN401
    logger: Any,  # noqa: ANN401
    messages: Messages,
    onnx: Path,
    *,
    dla: bool,
) -> Any:  # noqa: ANN401
    parser = trt.OnnxParser(network, logger)
    adjust = getattr(getattr(trt, "OnnxParserFlag", None), "ADJUST_FOR_DLA", None)
    if dla and adjust is not None:
        parser.set_flag(adjust)
    if not parser.parse_from_file(os.fspath(onnx)):
        raise _parse_error(parser, messages, onnx)
    return parser


def _parse_error(parser: Any, messages: Messages, onnx: Path) -> UnsupportedModelError:  # noqa: ANN401
    told = [_describe(parser.get_error(i)) for i in range(min(parser.num_errors, _MOST_ERRORS))]
    told = told or _telling(messages.errors)
    return UnsupportedModelError(
        f"TensorRT does not take {onnx.name}: {told[0]}",
        "Convert the model again for this target; a node that TensorRT lacks must be exported in other ones",
        details=tuple(dict.fromkeys(told[1:])),
    )


def _describe(error: Any) -> str:  # noqa: ANN401
    """One line: node, operator, and the first message that says why."""
    lines = [" ".join(line.split()) for line in str(error.desc()).splitlines()]
    text = _telling([line for line in lines if line])[0]
    if text == "false" or _NO_PLUGIN in text:  # a check that failed, and a look for somebody's own operator
        text = "there is no such operator in it"
    name, operator = error.node_name(), error.node_operator()
    where = f"node {name!r}" if name else f"node {error.node()}" if error.node() >= 0 else ""
    what = f"{where} ({operator})" if where and operator else where or operator
    return f"{what}: {text}" if what else text


def _telling(lines: list[str]) -> list[str]:
    """The lines that say why, shortened; what only repeats a name, or that there is no GPU, comes last."""
    lines = sorted(lines, key=lambda line: any(mark in line for mark in _SAYS_LITTLE))  # a stable sort
    return [line[:_LONGEST_LINE] for line in lines] or ["no reason given"]


def _precisions(network: Any) -> dict[str, int]:  # noqa: ANN401
    """Tensors by element type."""
    found: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        found.update(layer.get_output(output).dtype.name for output in range(layer.num_outputs))
    return dict(sorted(found.items()))


def _configure(
    trt: ModuleType,
    builder: Any,  # noqa: ANN401
    network: Any,  # noqa: ANN401
    config: Any,  # noqa: ANN401
    settings: EngineSettings,
    messages: Messages,
) -> int | None:
    """Tell the builder all that was asked; the number of layers on the DLA, if it was asked for."""
    able = capability_names(trt)
    if settings.compute_capability is not None and able:
        number = settings.compute_capability.replace(".", "")
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), 0):
            raise UsageError(f"TensorRT-RTX refused to build for sm_{number}", f"Choose one of {', '.join(able)}")
    _limit(trt, config, "WORKSPACE", settings.workspace_bytes, messages)
    _limit(trt, config, "TACTIC_DRAM", settings.tactic_bytes, messages)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.hardware_compatibility is not None:
        wanted = _COMPATIBILITY[settings.hardware_compatibility]
        level = getattr(getattr(trt, "HardwareCompatibilityLevel", None), wanted, None)
        if level is None:
            raise UsageError(
                f"{flavour_of(trt)} {version_of(trt)} has no hardware compatibility {settings.hardware_compatibility}",
                "Leave it out, or update the library",
            )
        config.hardware_compatibility_level = level
    _load_timing_cache(trt, config, settings, messages)
    return None if settings.dla_core is None else _use_dla(trt, builder, network, config, settings.dla_core)


def _limit(trt: ModuleType, config: Any, name: str, n_bytes: int | None, messages: Messages) -> None:  # noqa: ANN401
    pool = getattr(trt.MemoryPoolType, name, None)
    if n_bytes is None or pool is None:
        return
    # More than the device has is refused, and then the library's own limit is the stricter one; without a GPU there is
    # no memory of one to be limited.
    config.set_memory_pool_limit(pool, n_bytes)
    messages.take_errors()
    left = config.get_memory_pool_limit(pool)
    if left != n_bytes and find_gpu() is not None:
        messages.add(f"The memory pool {name} keeps TensorRT's limit of {left} bytes, not {n_bytes}", error=False)


def _use_dla(trt: ModuleType, builder: Any, network: Any, config: Any, core: int) -> int:  # noqa: ANN401
    """Send layers to the deep learning accelerator where it can compute them, and the others to the GPU."""
    here = f"TensorRT {version_of(trt)}"
    # 11.0 and 11.1 have none on any device, by their own documentation.
    remedy = "Build for the GPU alone, or with a TensorRT that has the DLA on this device"
    if core >= builder.num_DLA_cores:
        raise SessionError(f"{here} finds {builder.num_DLA_cores} DLA cores here, and core {core} is asked for", remedy)
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    taken = sum(bool(config.can_run_on_DLA(network.get_layer(index))) for index in range(network.num_layers))
    if not taken:
        raise SessionError(f"No layer of the model can run on the DLA with {here}", remedy)
    return taken


def _load_timing_cache(trt: ModuleType, config: Any, settings: EngineSettings, messages: Messages) -> None:  # noqa: ANN401
    """Times of kernels from earlier builds. TensorRT-RTX times nothing, and has none."""
    if settings.timing_cache is None or flavour_of(trt) == "tensorrt_rtx":
        return
    data = b""
    with contextlib.suppress(OSError):
        data = Path(settings.timing_cache).read_bytes()
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        messages.add(f"{settings.timing_cache} is of another GPU or build, and is written anew", error=False)
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _save_timing_cache(trt: ModuleType, config: Any, settings: EngineSettings) -> None:  # noqa: ANN401
    if settings.timing_cache is None or flavour_of(trt) == "tensorrt_rtx":
        return
    cache = config.get_timing_cache()
    if cache is not None:
        _write(Path(settings.timing_cache), cache.serialize())


def _build_failed(trt: ModuleType, messages: Messages, settings: EngineSettings) -> SessionError:
    told = _telling(messages.errors)[:_MOST_ERRORS]
    if any(word in line.lower() for line in messages.errors for word in _OUT_OF_MEMORY):
        limit = settings.workspace_bytes
        remedy = "Stop other programs that use the GPU"
        if limit is not None:
            remedy += f", or give it less to try out with: --workspace {max(64, (limit >> 20) // 2)}MiB"
        return SessionError(f"Building the engine ran out of memory: {told[0]}", remedy, details=tuple(told[1:]))
    remedy = "Convert the model again with this node in floats, or with another scheme"
    if _NO_FP32_PRODUCT in told[0]:
        remedy = "Convert the model again with FP16 for what is not quantized"
    return SessionError(
        f"{flavour_of(trt)} {version_of(trt)} cannot build the engine: {told[0]}",
        remedy,
        details=tuple(told[1:]),
    )


def _write(path: Path, data: Any) -> tuple[str, int]:  # noqa: ANN401 - bytes of the library
    """Write a file in one step; its SHA-256 and size."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    view = memoryview(data)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(view)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConversionError(
            f"{path} cannot be written: {error.strerror or error}", "Free some space, or choose another folder with -o"
        ) from error
    return hashlib.sha256(view).hexdigest(), view.nbytes
