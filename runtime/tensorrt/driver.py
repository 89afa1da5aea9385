"""CUDA's driver, as far as a session needs it: memory, copies, streams, graphs.

By ctypes on ``libcuda``, which is wherever a GPU can be used at all: no toolkit and no package of a matching version is
needed, as CUDA's runtime library would. Both work on the device's primary context, so TensorRT's own calls meet ours.
Names and numbers are those of cuda.h (CUDA Driver API reference).

Not run on hardware yet: the tests marked ``cuda`` do that where a GPU is at hand.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from typing import Any, Protocol

from edgeq.errors import SessionError

__all__ = ["CudaDriver", "Driver", "Gpu", "find_gpu"]

_LIBRARIES = ("libcuda.so.1", "libcuda.so")
_SUCCESS = 0
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_NO_DEVICE = {3, 34, 100, 101}  # not initialized, a library that only stands for the driver, no device, invalid device
_STREAM_NON_BLOCKING = 1
_CAPTURE_THREAD_LOCAL = 1
# CUdevice_attribute
_SMS, _INTEGRATED, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 18, 75, 76

Handle = int


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A CUDA device of this machine.

    Attributes:
        index: as CUDA counts.
        name: as the driver calls it.
        compute_capability: such as ``"8.7"``.
        sms: streaming multiprocessors that are switched on.
        memory_bytes: of the device; on a Jetson that of the system.
        integrated: whether it shares the system's memory.
    """

    index: int
    name: str
    compute_capability: str
    sms: int
    memory_bytes: int
    integrated: bool


class Driver(Protocol):
    """What a session does with a GPU. Addresses, streams and graphs are numbers; all errors are `SessionError`."""

    def enter(self) -> None:
        """Make the device current in the calling thread."""
        ...

    def allocate(self, n_bytes: int) -> int:
        """Memory on the device."""
        ...

    def free(self, address: int) -> None:
        """Give it back."""
        ...

    def allocate_host(self, n_bytes: int) -> int:
        """Pinned memory of the host, which the device reads and writes without a detour."""
        ...

    def free_host(self, address: int) -> None:
        """Give it back."""
        ...

    def create_stream(self) -> Handle:
        """An order in which work is done."""
        ...

    def destroy_stream(self, stream: Handle) -> None:
        """Give it back."""
        ...

    def to_device(self, device: int, host: int, n_bytes: int, stream: Handle) -> None:
        """Enqueue a copy."""
        ...

    def to_host(self, host: int, device: int, n_bytes: int, stream: Handle) -> None:
        """Enqueue a copy."""
        ...

    def wait(self, stream: Handle) -> None:
        """Until all that was enqueued is done."""
        ...

    def begin_capture(self, stream: Handle) -> None:
        """Record what is enqueued from now on instead of doing it."""
        ...

    def end_capture(self, stream: Handle) -> Handle:
        """What was recorded, ready to be launched."""
        ...

    def launch(self, graph: Handle, stream: Handle) -> None:
        """Enqueue all that was recorded."""
        ...

    def destroy_graph(self, graph: Handle) -> None:
        """Give it back."""
        ...

    def close(self) -> None:
        """Let go of the device."""
        ...


class CudaDriver:
    """The real one.

    Args:
        library: of ``_load``, or what stands for it in tests.
        device: as CUDA counts.

    Raises:
        SessionError: there is no such device.
    """

    def __init__(self, library: Any, device: int = 0) -> None:  # noqa: ANN401 - a ctypes library
        self._library = library
        self._device = ctypes.c_int()
        self._context = ctypes.c_void_p()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(device))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._closed = False

    @classmethod
    def open(cls, device: int = 0) -> CudaDriver:
        """The driver of this machine.

        Raises:
            SessionError: there is none, or no such device.
        """
        library = _load()
        if library is None:
            raise SessionError(
                "There is no CUDA driver (libcuda.so.1) on this machine",
                "Run the engine on a machine with an NVIDIA GPU; in a container, start it with --gpus all or "
                "--runtime nvidia",
            )
        return cls(library, device)

    def _call(self, name: str, *arguments: Any) -> None:  # noqa: ANN401 - of any ctypes type
        code = int(getattr(self._library, name)(*arguments))
        if code != _SUCCESS:
            raise _error(self._library, name, code)

    def describe(self, index: int) -> Gpu:
        """What the device is."""
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, ctypes.c_int(len(name)), self._device)
        memory = ctypes.c_size_t()
        self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), self._device)

        def attribute(number: int) -> int:
            value = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), self._device)
            return value.value

        return Gpu(
            index=index,
            name=name.value.decode("utf-8", errors="replace"),
            compute_capability=f"{attribute(_CAPABILITY_MAJOR)}.{attribute(_CAPABILITY_MINOR)}",
            sms=attribute(_SMS),
            memory_bytes=memory.value,
            integrated=bool(attribute(_INTEGRATED)),
        )

    def enter(self) -> None:
        """Make the device current in the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, n_bytes: int) -> int:
        """Memory on the device, aligned to 256 bytes."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(n_bytes))
        return address.value

    def free(self, address: int) -> None:
        """Give it back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def allocate_host(self, n_bytes: int) -> int:
        """Pinned memory of the host."""
        address = ctypes.c_void_p()
        self._call("cuMemAllocHost_v2", ctypes.byref(address), ctypes.c_size_t(n_bytes))
        return address.value or 0

    def free_host(self, address: int) -> None:
        """Give it back."""
        self._call("cuMemFreeHost", ctypes.c_void_p(address))

    def create_stream(self) -> Handle:
        """A stream that does not wait for the default one."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_STREAM_NON_BLOCKING))
        return stream.value or 0

    def destroy_stream(self, stream: Handle) -> None:
        """Give it back."""
        self._call("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def to_device(self, device: int, host: int, n_bytes: int, stream: Handle) -> None:
        """Enqueue a copy from the host."""
        self._call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(device),
            ctypes.c_void_p(host),
            ctypes.c_size_t(n_bytes),
            ctypes.c_void_p(stream),
        )

    def to_host(self, host: int, device: int, n_bytes: int, stream: Handle) -> None:
        """Enqueue a copy from the device."""
        self._call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(host),
            ctypes.c_uint64(device),
            ctypes.c_size_t(n_bytes),
            ctypes.c_void_p(stream),
        )

    def wait(self, stream: Handle) -> None:
        """Until all that was enqueued is done; other threads run meanwhile."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def begin_capture(self, stream: Handle) -> None:
        """Record what this thread enqueues; other threads may go on as they like."""
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), ctypes.c_int(_CAPTURE_THREAD_LOCAL))

    def end_capture(self, stream: Handle) -> Handle:
        """What was recorded, ready to be launched."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        finally:
            self._call("cuGraphDestroy", graph)
        return executable.value or 0

    def launch(self, graph: Handle, stream: Handle) -> None:
        """Enqueue all that was recorded."""
        self._call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def destroy_graph(self, graph: Handle) -> None:
        """Give it back."""
        self._call("cuGraphExecDestroy", ctypes.c_void_p(graph))

    def close(self) -> None:
        """Let go of the device."""
        if not self._closed:
            self._closed = True
            self._call("cuDevicePrimaryCtxRelease_v2", self._device)


def find_gpu(device: int = 0) -> Gpu | None:
    """The GPU of this machine; None if there is no driver, or no device for it.

    Raises:
        SessionError: there is one, and it does not answer, as with a driver of another version than its library.
    """
    library = _load()
    if library is None:
        return None
    code = int(library.cuInit(ctypes.c_uint(0)))
    if code in _NO_DEVICE:
        return None
    if code != _SUCCESS:
        raise _error(library, "cuInit", code)
    count = ctypes.c_int()
    code = int(library.cuDeviceGetCount(ctypes.byref(count)))
    if code != _SUCCESS:
        raise _error(library, "cuDeviceGetCount", code)
    if device >= count.value:
        return None
    driver = CudaDriver(library, device)
    try:
        return driver.describe(device)
    finally:
        driver.close()


def _load() -> ctypes.CDLL | None:
    for name in _LIBRARIES:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _error(library: Any, name: str, code: int) -> SessionError:  # noqa: ANN401 - a ctypes library
    text = ctypes.c_char_p()
    library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
    what = (text.value or b"unknown error").decode("utf-8", errors="replace")
    if code == _OUT_OF_MEMORY:
        return SessionError(
            "The GPU's memory is full", "Stop other programs that use it, or plan with a smaller batch or resolution"
        )
    return SessionError(f"CUDA refused {name}: {what} (error {code})", "See dmesg and nvidia-smi, then run it again")
