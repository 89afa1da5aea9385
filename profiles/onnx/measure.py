"""What the probe measures of ONNX Runtime on the machine that it is on; the package onnx is not needed.

Every figure is the time of kernels that ONNX Runtime runs by itself, in sizes of perception transformers, with its
graph optimizer off so that what is timed is what was written. Under 10 s for each number of threads on 2 cores.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

from edgeq.errors import SessionError
from edgeq.profiles.kernels.cost_measure import undisturbed
from edgeq.profiles.onnx.cost import KernelTime, OnnxFigures, ProductTime, interpolate
from edgeq.profiles.onnx.memory import Kind, ProductKernel
from edgeq.profiles.onnx.probe_models import (
    KERNELS,
    ProbeModel,
    baseline_model,
    kernel_model,
    product_model,
    tiny_chain,
)
from edgeq.profiles.onnx.session import import_onnxruntime, onnx_session_options, start_session

__all__ = ["measure_onnx", "measure_runtime_bytes"]

_ROWS = (1, 16, 64, 256, 1024)
_HEADLINE_ROWS = 256
_ELEMENTS = (3_072, 24_576, 393_216, 3_145_728)  # scores and FFN of 16 tokens, 1024 x 384, 12 heads of 512 tokens
_TOKENS = (16, 128, 256)
_PIXELS = (28 * 28, 56 * 56)
_ROUNDS = (1, 13)  # of the chain of nodes that have nothing to do
_QUANTIZE = "DynamicQuantizeLinear"
_PROCESSES = 3
_FEWEST_CALLS, _MOST_CALLS = 5, 200
_WARM_UP_CALLS = 2

# It imports what a serving process imports (a program of its own, so it may know the runtime) and no more: numpy.random
# alone would add 5 MiB.
_CHILD = """
import sys
import edgeq.runtime.session
import edgeq.runtime.tensor.embedding
import numpy
from edgeq.profiles.onnx.session import open_onnx_session

def peak():
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

session = open_onnx_session(sys.stdin.buffer.read(), int(sys.argv[1]))
loaded = peak()
feeds = {i.name: numpy.zeros(i.shape, numpy.int64) for i in session.get_inputs()}
for _ in range(3):
    result = session.run(None, feeds)
print(loaded, peak())
"""


def measure_runtime_bytes(threads: int) -> tuple[int, int]:
    """Peaks of a process of its own when it has loaded a tiny model, and when it has served it.

    They are VmHWM of proc_pid_status(5); the largest of three processes, since the system maps more or less of a
    library at once.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        SessionError: the process failed, as where the kernel keeps no high-water mark.
    """
    import_onnxruntime()
    command = [sys.executable, "-c", _CHILD, str(threads)]
    model = baseline_model()
    peaks: list[tuple[int, int]] = []
    for _ in range(_PROCESSES):
        done = subprocess.run(command, capture_output=True, check=False, input=model)
        if done.returncode != 0:
            reason = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise SessionError(f"The memory of ONNX Runtime could not be measured: {reason}", "Run the probe on Linux")
        loaded, served = done.stdout.split()
        peaks.append((int(loaded), int(served)))
    return max(loaded for loaded, _ in peaks), max(served for _, served in peaks)


def measure_onnx(
    threads: int, *, seconds: float = 8.0, progress: Callable[[str], None] = lambda _: None
) -> OnnxFigures:
    """Measure ONNX Runtime with that many threads.

    Args:
        threads: of one call.
        seconds: about how long; each kernel is called five times at least, however long it takes.
        progress: told what is being measured.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        SessionError: ONNX Runtime refuses what it is given.
    """
    ort = import_onnxruntime()
    products = _products()
    each = seconds / (len(products) + len(KERNELS) * len(_ELEMENTS) + 3)
    progress("memory of a process")
    loaded_bytes, runtime_bytes = measure_runtime_bytes(threads)
    progress("calls and nodes")
    short, long = (tiny_chain(rounds) for rounds in _ROUNDS)
    short_ns, long_ns = (_call_ns(probe, threads, each) for probe in (short, long))
    node_ns = max(1.0, (long_ns - short_ns) / (long.nodes - short.nodes))
    call_ns = max(0.0, short_ns - short.nodes * node_ns)

    kernels: list[KernelTime] = []

    def per_node(probe: ProbeModel) -> float:
        """Time of one kernel of a chain without what else is in it; not below a hundredth of the whole."""
        total = _call_ns(probe, threads, each)
        points = [(float(k.elements), k.elements * k.ns_per_element) for k in kernels if k.op_type == _QUANTIZE]
        beside = sum(node_ns + interpolate(points, elements) for elements in probe.quantized)
        return max(total - beside - call_ns - probe.nodes * node_ns, 0.01 * total) / probe.nodes

    for op_type in KERNELS:
        progress(op_type)
        for elements in _ELEMENTS:
            probe = kernel_model(op_type, elements)
            ns = per_node(probe) / probe.elements
            kernels.append(KernelTime(op_type=op_type, elements=probe.elements, ns_per_element=ns))
    times = []
    for kernel, kind, rows in products:
        progress(f"{kernel} {kind} {rows}")
        probe = product_model(kernel, kind, rows)
        ns = per_node(probe) * probe.nodes / probe.elements
        times.append(ProductTime(kernel=kernel, kind=kind, rows=rows, ns_per_weight=ns))
    headline = {
        t.kind: 2 * t.rows / t.ns_per_weight * 1e9 for t in times if t.rows == _HEADLINE_ROWS and t.kernel == "matmul"
    }
    return OnnxFigures(
        onnxruntime=str(ort.__version__),
        threads=threads,
        loaded_bytes=loaded_bytes,
        runtime_bytes=runtime_bytes,
        call_overhead_us=call_ns / 1e3,
        node_overhead_us=node_ns / 1e3,
        fp32_flops_per_s=headline["fp32"],
        int8_ops_per_s=headline["int8"],
        products=tuple(times),
        kernels=tuple(kernels),
    )


def _products() -> list[tuple[ProductKernel, Kind, int]]:
    found: list[tuple[ProductKernel, Kind, int]] = []
    for rows in _ROWS:
        found.append(("matmul", "fp32", rows))
        found.append(("matmul", "int8", rows))
    found.extend(("activations", "fp32", tokens) for tokens in _TOKENS)
    found.extend(("conv", "fp32", pixels) for pixels in _PIXELS)
    return found


def _call_ns(probe: ProbeModel, threads: int, seconds: float) -> float:
    """Nanoseconds of one call on a quiet machine: the lower quartile of what was measured."""
    ort = import_onnxruntime()
    options = onnx_session_options(threads)
    if not probe.optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = start_session(probe.model, options)
    feeds, fetch = dict(probe.feeds), [probe.fetch]
    for _ in range(_WARM_UP_CALLS):
        session.run(fetch, feeds)
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < _FEWEST_CALLS or (len(times) < _MOST_CALLS and time.monotonic() < end):
        before = time.perf_counter_ns()
        session.run(fetch, feeds)
        times.append(float(time.perf_counter_ns() - before))
    return undisturbed(times)[0]
