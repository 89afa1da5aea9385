"""The tensors of an engine and the memory that they live in: on the device, and pinned on the host.

Memory is taken once, for the largest shapes, so that a robot that has started does not run out of it later, and so that
a CUDA graph, which holds addresses, stays valid.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import SessionError, UsageError
from edgeq.runtime.tensorrt.driver import Driver

__all__ = ["Buffer", "EngineTensor", "engine_tensors", "fit"]

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class EngineTensor:
    """An input or output.

    Attributes:
        name: in the graph.
        dtype: of its elements.
        is_input: or an output.
        least: the smallest shape of an input; empty for an output.
        most: the largest shape.
    """

    name: str
    dtype: np.dtype[Any]
    is_input: bool
    least: Shape
    most: Shape

    @property
    def most_bytes(self) -> int:
        """Of the largest shape; at least 1, since nothing has no address."""
        return max(1, math.prod(self.most) * self.dtype.itemsize)


class Buffer:
    """Memory for one tensor on both sides.

    Attributes:
        tensor: whose it is.
        device: address on the device.
        host: address of the pinned memory.
    """

    def __init__(self, tensor: EngineTensor, driver: Driver) -> None:
        self.tensor = tensor
        self._driver = driver
        self.device = driver.allocate(tensor.most_bytes)
        try:
            self.host = driver.allocate_host(tensor.most_bytes)
        except SessionError:
            driver.free(self.device)
            raise
        self._bytes = memoryview((ctypes.c_uint8 * tensor.most_bytes).from_address(self.host))

    def view(self, shape: Shape) -> npt.NDArray[Any]:
        """The pinned memory as an array; valid until `free`."""
        view: npt.NDArray[Any] = np.ndarray(shape, self.tensor.dtype, buffer=self._bytes)
        return view

    def free(self) -> None:
        """Give it back."""
        self._driver.free(self.device)
        self._driver.free_host(self.host)


def engine_tensors(trt: ModuleType, engine: Any, context: Any) -> tuple[EngineTensor, ...]:  # noqa: ANN401
    """The inputs and outputs of an engine, in its order; the context is left with the largest inputs.

    Raises:
        SessionError: a type that numpy lacks, or an output whose shape depends on values.
    """
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
    ranges: dict[str, tuple[Shape, Shape]] = {}
    for name in names:
        if name in inputs:
            shape = _shape(engine.get_tensor_shape(name))
            least, most = shape, shape
            if min(shape, default=0) < 0:
                profile = engine.get_tensor_profile_shape(name, 0)
                least, most = _shape(profile[0]), _shape(profile[2])
            ranges[name] = (least, most)
            context.set_input_shape(name, most)
    tensors = []
    for name in names:
        least, most = ranges.get(name) or ((), _shape(context.get_tensor_shape(name)))
        if min(most, default=0) < 0:
            raise SessionError(
                f"The shape of the output {name!r} depends on values, and no memory can be taken beforehand",
                "Export the model without that step, or run the bundle with onnxruntime",
            )
        tensors.append(EngineTensor(name, _dtype(trt, engine, name), name in inputs, least, most))
    return tuple(tensors)


def _shape(dims: Any) -> Shape:  # noqa: ANN401
    return tuple(int(size) for size in tuple(dims))


def _dtype(trt: ModuleType, engine: Any, name: str) -> np.dtype[Any]:  # noqa: ANN401
    kind = engine.get_tensor_dtype(name)
    try:
        dtype: np.dtype[Any] = np.dtype(trt.nptype(kind))
    except TypeError as error:
        raise SessionError(
            f"The tensor {name!r} is {kind}, which numpy does not have",
            "Export the model with float inputs and outputs",
        ) from error
    return dtype


def fit(tensors: tuple[EngineTensor, ...], arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Shape]:
    """The shapes of a call, if it is one that the engine takes.

    Raises:
        UsageError: names, types or shapes that it does not take, in one line.
    """
    wanted = {tensor.name: tensor for tensor in tensors if tensor.is_input}
    if arrays.keys() != wanted.keys():
        raise UsageError(
            f"The inputs are {', '.join(sorted(arrays)) or 'none'}, the model takes {', '.join(wanted)}",
            "Give each input once, by its name",
        )
    shapes: dict[str, Shape] = {}
    for name, tensor in wanted.items():
        array = arrays[name]
        if array.dtype != tensor.dtype:
            raise UsageError(
                f"The input {name!r} is {array.dtype}, the model takes {tensor.dtype}",
                f"Convert it with .astype({tensor.dtype.name!r})",
            )
        shape = array.shape
        limits = zip(tensor.least, shape, tensor.most, strict=False)
        if len(shape) != len(tensor.most) or not all(low <= size <= high for low, size, high in limits):
            raise UsageError(
                f"The input {name!r} has the shape {shape}, the engine takes {_told(tensor)}",
                "Change the input, or convert the model again for these sizes",
            )
        shapes[name] = shape
    return shapes


def _told(tensor: EngineTensor) -> str:
    return str(tensor.most) if tensor.least == tensor.most else f"{tensor.least} to {tensor.most}"
