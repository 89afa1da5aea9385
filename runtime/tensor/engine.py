"""What computes the calls of a session, behind one face: ONNX Runtime, or an engine of TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from edgeq.inputs.arrays import Array
from edgeq.profiles.onnx.session import open_onnx_session
from edgeq.runtime.tensor.graph import read_specs
from edgeq.runtime.tensor.placement import placement_config, refuse_fallback
from edgeq.runtime.tensor.settings import TensorSettings
from edgeq.tensor_types import TensorArtifact, TensorSpec

if TYPE_CHECKING:
    import onnxruntime

    from edgeq.runtime.tensorrt.session import EngineSession

__all__ = ["Engine", "OnnxEngine", "TensorrtEngine"]


class Engine(Protocol):
    """Computes calls, from any thread.

    Attributes:
        inputs: what the graph takes.
        outputs: what it gives.
        threads: of the CPU that compute one call; 0 if none does.
        providers: names of what computes.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    threads: int
    providers: tuple[str, ...]

    def run(self, feed: dict[str, Array]) -> Sequence[Array]:
        """The outputs in their order; any exception for inputs that do not fit."""
        ...

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """What computes from these arrays into those, as often as it is called."""
        ...

    def close(self) -> None:
        """Free what is not freed by forgetting it."""
        ...


class OnnxEngine:
    """A graph in ONNX Runtime; see `Engine`.

    Args:
        path: the ``.onnx``.
        settings: how to run it.

    Raises:
        SessionError: ONNX Runtime cannot load the file, does not have a provider, or would leave nodes to the CPU's
            that was not asked for (`edgeq.runtime.tensor.placement`).
        UsageError: settings that make no sense.
        MissingPackageError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, settings: TensorSettings) -> None:
        self._session: onnxruntime.InferenceSession = open_onnx_session(
            path,
            settings.thread_count,
            dims=settings.fixed_axes,
            providers=settings.providers,
            disabled_optimizers=settings.disabled_optimizers,
            config={**settings.pool_config(), **placement_config(settings.providers)},
        )
        refuse_fallback(self._session, settings.providers)
        self.inputs = read_specs(self._session.get_inputs(), "input")
        self.outputs = read_specs(self._session.get_outputs(), "output")
        self.threads = settings.thread_count
        self.providers = tuple(self._session.get_providers())
        self._names = [spec.name for spec in self.outputs]

    def run(self, feed: dict[str, Array]) -> Sequence[Array]:
        """See `Engine.run`. ONNX Runtime itself compares names, types and fixed shapes."""
        # All outputs are tensors, as `read_specs` has made sure of.
        return cast("Sequence[Array]", self._session.run(self._names, feed))

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """See `Engine.bind`."""
        session = self._session
        bound = session.io_binding()
        for name, array in inputs.items():
            bound.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            bound.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return lambda: session.run_with_iobinding(bound)

    def close(self) -> None:
        """Nothing to do: ONNX Runtime frees a session with the last reference, and calls in progress hold one."""


class TensorrtEngine:
    """An engine of TensorRT; see `Engine`.

    Args:
        session: that runs it.
        artifact: of the model, whose dynamic axes have names.
        name: of the backend.
    """

    def __init__(self, session: EngineSession, artifact: TensorArtifact, name: str) -> None:
        self._session = session
        self.inputs, self.outputs = artifact.inputs, artifact.outputs
        self.threads = 0
        self.providers: tuple[str, ...] = (name,)
        self._names = [spec.name for spec in self.outputs]

    def run(self, feed: dict[str, Array]) -> Sequence[Array]:
        """See `Engine.run`."""
        outputs = self._session.run(feed)
        return [outputs[name] for name in self._names]

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """See `Engine.bind`. The engine has pinned memory of its own, from and to which arrays are copied."""

        def compute() -> None:
            for name, array in self._session.run(inputs).items():
                np.copyto(outputs[name], array)

        return compute

    def close(self) -> None:
        """Give all memory back."""
        self._session.close()
