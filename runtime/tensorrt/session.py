"""Running an engine: pinned buffers, one stream, and a CUDA graph of the whole call.

A call is three kinds of work on one stream: inputs to the device, the engine, outputs back. From the second call of a
shape on, all of it is one CUDA graph: one launch instead of hundreds, which is most of the time of a small network.

Not run on hardware yet: its order of work is tested with a stand-in for the driver, and the tests marked ``cuda`` run
it where a GPU is at hand.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import SessionClosedError, SessionError
from edgeq.runtime.tensorrt.buffers import Buffer, EngineTensor, engine_tensors, fit
from edgeq.runtime.tensorrt.driver import CudaDriver, Driver
from edgeq.runtime.tensorrt.log import Messages, logger_of

__all__ = ["EngineSession"]

Shapes = dict[str, tuple[int, ...]]


class EngineSession:
    """An engine that is ready to be called. Calls from several threads wait for each other.

    Args:
        trt: the library that built it.
        engine: the file.
        device: of CUDA.
        cuda_graph: record calls of one shape and replay them.
        runtime_cache: where TensorRT-RTX keeps the kernels that it compiles on this GPU; None to compile them anew.
        driver: what stands for CUDA's in tests.

    Attributes:
        tensors: inputs and outputs.
        notes: what a user should know, such as why calls are not recorded; one line each.

    Raises:
        SessionError: no GPU, an engine that the library refuses, or too little memory.
    """

    def __init__(
        self,
        trt: ModuleType,
        engine: Path,
        *,
        device: int = 0,
        cuda_graph: bool = True,
        runtime_cache: Path | None = None,
        driver: Driver | None = None,
    ) -> None:
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._closed = False
        self._cleanup = contextlib.ExitStack()
        self._graph: int | None = None
        self._shapes: Shapes = {}
        self._warm = False  # whether the engine ran once with the shapes that it has now
        self._runtime_cache = runtime_cache
        self._driver = CudaDriver.open(device) if driver is None else driver
        self._cleanup.callback(self._driver.close)
        try:
            self._driver.enter()
            logger, self._messages = logger_of(trt)
            self._messages.clear()
            self._engine = _deserialize(trt, logger, self._messages, engine)
            self._context, self._cache, captures = _context(
                trt, self._engine, self._messages, runtime_cache, cuda_graph
            )
            # TensorRT-RTX records by itself, and a recording within a recording fails.
            self._record = cuda_graph and not captures
            self.tensors = engine_tensors(trt, self._engine, self._context)
            self._shapes = {tensor.name: tensor.most for tensor in self.tensors if tensor.is_input}
            self._buffers = [self._buffer(tensor) for tensor in self.tensors]
            self._stream = self._driver.create_stream()
            self._cleanup.callback(self._driver.destroy_stream, self._stream)
        except BaseException:
            self._cleanup.close()
            raise

    def _buffer(self, tensor: EngineTensor) -> Buffer:
        buffer = Buffer(tensor, self._driver)
        self._cleanup.callback(buffer.free)
        if not self._context.set_tensor_address(tensor.name, buffer.device):
            raise self._failed(f"TensorRT refused the memory of {tensor.name!r}")
        return buffer

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """One call.

        Args:
            inputs: every input by its name, of its type.

        Returns:
            Every output by its name; the arrays are the caller's.

        Raises:
            UsageError: names, types or shapes that the engine does not take.
            SessionClosedError: it was closed.
            SessionError: the GPU failed.
        """
        with self._lock:
            if self._closed:
                raise SessionClosedError("The session was closed", "Load the bundle again")
            shapes = fit(self.tensors, inputs)
            self._driver.enter()
            self._set_shapes(shapes)
            for buffer in self._buffers:
                if buffer.tensor.is_input:
                    name = buffer.tensor.name
                    np.copyto(buffer.view(shapes[name]), inputs[name])
            self._execute()
            self._driver.wait(self._stream)
            return {
                buffer.tensor.name: buffer.view(self._shape_of(buffer)).copy()
                for buffer in self._buffers
                if not buffer.tensor.is_input
            }

    def _set_shapes(self, shapes: Shapes) -> None:
        """Tell the context the shapes of the inputs; a graph that was recorded for others is worth nothing then."""
        if shapes == self._shapes:
            return
        self._drop_graph()
        self._warm = False
        self._shapes = {}
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise self._failed(f"TensorRT refused the shape {shape} of {name!r}")
        self._shapes = dict(shapes)

    def _shape_of(self, buffer: Buffer) -> tuple[int, ...]:
        name = buffer.tensor.name
        return self._shapes[name] if buffer.tensor.is_input else tuple(self._context.get_tensor_shape(name))

    def _execute(self) -> None:
        # The first run of a shape does work that a recording must not hold.
        if self._graph is None and self._warm and self._record:
            self._graph = self._capture()
            self._record = self._graph is not None
        if self._graph is not None:
            self._driver.launch(self._graph, self._stream)
            return
        self._enqueue()
        self._warm = True

    def _enqueue(self) -> None:
        for buffer in self._buffers:
            if buffer.tensor.is_input:
                view = buffer.view(self._shape_of(buffer))
                self._driver.to_device(buffer.device, buffer.host, view.nbytes, self._stream)
        if not self._context.execute_async_v3(self._stream):
            raise self._failed("TensorRT could not run the engine")
        for buffer in self._buffers:
            if not buffer.tensor.is_input:
                view = buffer.view(self._shape_of(buffer))
                self._driver.to_host(buffer.host, buffer.device, view.nbytes, self._stream)

    def _capture(self) -> int | None:
        """Record a call; where the engine does not allow it, say so and go on without."""
        self._driver.begin_capture(self._stream)
        failure: SessionError | None = None
        try:
            self._enqueue()
        except SessionError as error:
            failure = error
        try:
            graph = self._driver.end_capture(self._stream)
        except SessionError as error:
            failure = failure or error
        else:
            if failure is None:
                return graph
            self._driver.destroy_graph(graph)
        self.notes.append(f"Calls are not recorded as a CUDA graph: {failure.cause}")
        return None

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            self._driver.destroy_graph(graph)

    def _failed(self, what: str) -> SessionError:
        said = f": {self._messages.errors[-1]}" if self._messages.errors else ""
        return SessionError(f"{what}{said}", "Run it again; see dmesg if it stays so")

    def close(self) -> None:
        """Give all memory back; calling it twice does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._driver.enter()
            self._drop_graph()
            self._keep_kernels()
            del self._context, self._engine
            self._cleanup.close()

    def _keep_kernels(self) -> None:
        """Write what TensorRT-RTX has compiled; a full or read-only disk only costs the next start its time."""
        if self._cache is None or self._runtime_cache is None:
            return
        partial = self._runtime_cache.with_name(f"{self._runtime_cache.name}.{os.getpid()}.part")
        try:
            partial.write_bytes(memoryview(self._cache.serialize()))
            partial.replace(self._runtime_cache)
        except OSError as error:
            self.notes.append(f"{self._runtime_cache} cannot be written: {error.strerror}")
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def __enter__(self) -> EngineSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _deserialize(trt: ModuleType, logger: Any, messages: Messages, path: Path) -> Any:  # noqa: ANN401
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror}", "Build the engine again") from error
    engine = trt.Runtime(logger).deserialize_cuda_engine(data)
    if engine is None:
        said = messages.errors[0] if messages.errors else "no reason given"
        raise SessionError(
            f"TensorRT refused the engine {path}: {said}", "Build it again with: edgeq build BUNDLE --force"
        )
    return engine


def _context(
    trt: ModuleType,
    engine: Any,  # noqa: ANN401
    messages: Messages,
    runtime_cache: Path | None,
    cuda_graph: bool,
) -> tuple[Any, Any, bool]:
    """An execution context, TensorRT-RTX's cache of kernels, and whether the library records calls by itself."""
    cache, captures = None, False
    if hasattr(trt, "IRuntimeConfig") and hasattr(trt.IRuntimeConfig, "create_runtime_cache"):
        config = engine.create_runtime_config()
        cache = config.create_runtime_cache()
        if runtime_cache is not None:
            with contextlib.suppress(FileNotFoundError):
                cache.deserialize(runtime_cache.read_bytes())  # one of another driver or GPU is passed over by itself
        config.set_runtime_cache(cache)
        strategies = getattr(trt, "CudaGraphStrategy", None)
        if cuda_graph and strategies is not None:
            config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE
            captures = True
        context = engine.create_execution_context(config)
    else:
        context = engine.create_execution_context()
    if context is None:
        said = messages.errors[0] if messages.errors else "no reason given"
        raise SessionError(
            f"TensorRT cannot make ready for the engine: {said}",
            "Stop other programs that use the GPU's memory, or convert for a smaller batch or resolution",
        )
    return context, cache, captures
