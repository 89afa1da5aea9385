"""The tensor session: what a program holds and calls with arrays."""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from edgeq.errors import BundleError, EdgeqError, SessionClosedError, SessionError, UsageError
from edgeq.inputs.arrays import Array, check_arrays
from edgeq.runtime.tensor.batching import join_calls, split_calls
from edgeq.runtime.tensor.binding import Binding, input_buffers
from edgeq.runtime.tensor.engine import Engine, OnnxEngine
from edgeq.runtime.tensor.graph import check_artifact
from edgeq.runtime.tensor.settings import TensorSettings
from edgeq.runtime.tensor.worker import Worker
from edgeq.tensor_types import TensorManifest

__all__ = ["TensorSession"]

T = TypeVar("T", bound="TensorSession")
Kinds = tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]  # shape and type of each input

_MOST_KINDS = 4096  # that are remembered as checked


class TensorSession:
    """A loaded model that is called with arrays. A context manager; every method may be called from any thread.

    Args:
        engine: what computes; the session closes it.
        settings: how it was made.
        manifest: of the bundle that it belongs to.
        started: when loading began, on the clock of `time.perf_counter`.

    Attributes:
        inputs: what the graph takes.
        outputs: what it gives.
        threads: of the CPU that compute one call.
        providers: what computes, the first for as much as it can.
        load_ms: from the call of `edgeq.load` to a session that is ready.

    Raises:
        BundleError: the graph is not what the manifest tells.
    """

    def __init__(
        self,
        engine: Engine,
        settings: TensorSettings,
        *,
        manifest: TensorManifest | None = None,
        started: float | None = None,
    ) -> None:
        began = time.perf_counter() if started is None else started
        self._engine: Engine | None = None  # until everything below has succeeded there is nothing to close
        try:
            if manifest is not None:
                check_artifact(engine.inputs, engine.outputs, manifest.artifact)
        except BundleError:
            engine.close()
            raise
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self.threads, self.providers = engine.threads, engine.providers
        self._manifest = manifest
        self._axes, self._cores = settings.axes, settings.cores
        self._input_names = [spec.name for spec in self.inputs]
        self._output_names = [spec.name for spec in self.outputs]
        self._checked: set[Kinds] = set()
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._bindings: weakref.WeakSet[Binding] = weakref.WeakSet()
        self._engine = engine
        self.load_ms = (time.perf_counter() - began) * 1000

    @staticmethod
    def open(path: Path, settings: TensorSettings | None = None) -> TensorSession:
        """A session over a bare ONNX file.

        Args:
            path: the ``.onnx``.
            settings: how to run it.

        Raises:
            SessionError: ONNX Runtime cannot load the file, or does not have a provider.
            UsageError: settings that make no sense.
            MissingPackageError: onnxruntime is not installed.
        """
        started = time.perf_counter()
        chosen = TensorSettings() if settings is None else settings
        return TensorSession(OnnxEngine(path, chosen), chosen, started=started)

    @property
    def manifest(self) -> TensorManifest:
        """Of the bundle. Raises SessionError for a session over a bare file."""
        if self._manifest is None:
            raise SessionError("this session runs a bare ONNX file, which has no manifest", "Load a bundle")
        return self._manifest

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute one call.

        Args:
            inputs: an array for each of `inputs`, of its type and shape.

        Returns:
            An array for each of `outputs`, which belongs to the caller.

        Raises:
            UsageError: a name, type or shape that the model does not take.
            SessionClosedError: the session was closed.
            SessionError: the runtime failed.
        """
        engine = self._engine
        if engine is None:
            raise _closed()
        try:
            # The engine itself compares names. Types and shapes are looked at here, if they were not seen yet: ONNX
            # Runtime takes any byte order and knows no limits of axes.
            kinds = tuple([((array := inputs[name]).shape, array.dtype) for name in self._input_names])
            feed = inputs if type(inputs) is dict and kinds in self._checked else self._check(inputs, kinds)
            return dict(zip(self._output_names, engine.run(feed), strict=True))
        except EdgeqError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            raise self._explain(error, inputs) from error

    def run_async(self, inputs: Mapping[str, Array]) -> Future[dict[str, Array]]:
        """Compute one call in the session's own thread, in the order of the calls.

        The arrays must not change until the future is done. What `run` would raise for its inputs is raised here, the
        rest by the future's ``result``; calls that wait when the session is closed end with SessionClosedError.
        """
        feed = dict(_as_mapping(inputs))
        check_arrays(feed, self.inputs, self._axes)
        with self._lock:
            if self._engine is None:
                raise _closed()
            if self._worker is None:
                self._worker = Worker(self._cores[:1])
            return self._worker.submit(lambda: self.run(feed))

    def run_batch(self, calls: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Compute several calls with as few runs as possible.

        Neighbours of the same shapes, but for the first axis, are joined along it where all inputs and outputs begin
        with the same dynamic axis, up to the most that it may have; others are run one by one. Outputs may be parts of
        larger arrays. They differ in the last digits from those of `run`, and by more of a model in dynamic INT8: it
        puts all rows of one run on one grid, which the largest number among them decides.

        Args:
            calls: the inputs of each, as for `run`.

        Returns:
            The outputs of each, in the same order.

        Raises:
            UsageError: a name, type or shape that the model does not take.
            SessionClosedError: the session was closed.
            SessionError: the runtime failed.
        """
        if not isinstance(calls, Sequence):
            raise UsageError(f"run_batch() takes a list of calls, not a {type(calls).__name__}", "Give a list")
        for index, call in enumerate(calls):
            check_arrays(_as_mapping(call), self.inputs, self._axes, source=f"call {index}")
        results: list[dict[str, Array]] = []
        for group in join_calls(calls, self.inputs, self.outputs, self._axes):
            outputs = self.run(group.inputs)
            results += split_calls(outputs, group.rows) if len(group.rows) > 1 else [outputs]
        return results

    def bind(self, shapes: Mapping[str, Sequence[int]] | None = None) -> Binding:
        """Buffers that are taken once, for calls of one shape that allocate nothing.

        The model is run once, on zeros, to learn the shapes of its outputs.

        Args:
            shapes: of the inputs; those that are not named have their fixed shape, with the usual size of each
                dynamic axis.

        Returns:
            What holds the buffers: fill its ``inputs``, call its ``run``, read its ``outputs``.

        Raises:
            UsageError: a shape that the model does not take, or a dynamic axis without a size.
            SessionClosedError: the session was closed.
            SessionError: the runtime failed.
        """
        inputs = input_buffers(self.inputs, self._axes, {} if shapes is None else shapes)
        outputs = {name: np.zeros_like(array, order="C") for name, array in self.run(inputs).items()}
        with self._lock:
            if self._engine is None:
                raise _closed()
            binding = Binding(self._engine.bind(inputs, outputs), inputs, outputs)
            self._bindings.add(binding)
        return binding

    def _check(self, inputs: Mapping[str, Array], kinds: Kinds) -> dict[str, Array]:
        check_arrays(inputs, self.inputs, self._axes)
        if len(self._checked) >= _MOST_KINDS:
            self._checked.clear()
        self._checked.add(kinds)
        return dict(inputs)

    def _explain(self, error: Exception, inputs: Mapping[str, Array]) -> EdgeqError:
        """The error to raise instead of one of Python's or the runtime's."""
        try:
            check_arrays(_as_mapping(inputs), self.inputs, self._axes)
        except EdgeqError as fault:
            return fault
        reason = " ".join(str(error).split())
        return SessionError(f"the runtime failed: {reason}", "Check the values of the inputs, and free memory")

    def close(self) -> None:
        """Free the model when the call that is being computed has ended. Calling it again does nothing."""
        with self._lock:
            engine, self._engine = self._engine, None
            worker, self._worker = self._worker, None
        for binding in list(self._bindings):
            binding.close()
        if worker is not None:
            worker.close()
        if engine is not None:
            engine.close()

    def __enter__(self: T) -> T:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._engine is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
            self.close()

    def __repr__(self) -> str:
        name = self._manifest.name if self._manifest is not None else ", ".join(self._input_names)
        return f"<{type(self).__name__} {name}{' (closed)' if self._engine is None else ''}>"


def _as_mapping(inputs: object) -> Mapping[str, Array]:
    """The inputs of a call. Raises UsageError for what has no names."""
    if not isinstance(inputs, Mapping):
        raise UsageError(
            f"the inputs of a call are a {type(inputs).__name__}, not a mapping of names to arrays",
            "Give a dict, as in run({'x': array})",
        )
    return inputs


def _closed() -> SessionClosedError:
    return SessionClosedError("the session was closed", "Load the bundle again")
