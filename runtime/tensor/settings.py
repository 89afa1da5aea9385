"""How a tensor model is run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from edgeq.disk_cache import cache_root
from edgeq.errors import SessionError, UsageError
from edgeq.llama_library import check_threads, default_threads
from edgeq.profiles.onnx.session import PROVIDERS, Provider
from edgeq.runtime.tensorrt.providers import with_options
from edgeq.tensor_types import AxisRange, TensorPlan, TensorSpec

__all__ = ["BACKEND_PROVIDERS", "TENSORRT_BACKENDS", "TensorSettings"]

TENSORRT_BACKENDS = ("tensorrt", "tensorrt-rtx")
# What ONNX Runtime computes with for each of the plans' backends that are run by it. A GPU's leave out the CPU, which
# then may take shapes only (`edgeq.runtime.tensor.placement`).
BACKEND_PROVIDERS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime-cpu": PROVIDERS,
    "onnxruntime-cuda": ("CUDAExecutionProvider",),
}


@dataclasses.dataclass(frozen=True)
class TensorSettings:
    """How a model is run by ONNX Runtime.

    Attributes:
        threads: that compute one call; None for one on each of ``cores``, or on each physical core.
        cores: CPUs that the session's own threads stay on. The thread that calls `TensorSession.run` computes too and
            is left where it is; the one of `TensorSession.run_async` stays on the first of them.
        providers: of ONNX Runtime, in the order of preference; a session that lacks one is an error, and so is one
            that computes more than shapes on the CPU without its provider among these.
        disabled_optimizers: of ONNX Runtime.
        axes: sizes that dynamic axes may have; an axis of one size is fixed when the graph is optimized.
    """

    threads: int | None = None
    cores: tuple[int, ...] = ()
    providers: tuple[Provider, ...] = PROVIDERS
    disabled_optimizers: tuple[str, ...] = ()
    axes: Mapping[str, AxisRange] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_plan(
        cls,
        plan: TensorPlan,
        *,
        threads: int | None = None,
        cores: Sequence[int] = (),
        providers: Sequence[Provider] | None = None,
        inputs: Sequence[TensorSpec] = (),
    ) -> TensorSettings:
        """The settings of a plan, with what the caller overrides.

        Args:
            plan: of the bundle.
            threads: instead of the plan's.
            cores: see `TensorSettings`.
            providers: instead of those of the plan's backend; those for GPUs that have no options get the plan's.
            inputs: of the model, whose sizes TensorRT's provider is told.

        Raises:
            SessionError: the plan is for a backend that ONNX Runtime does not run.
            UsageError: a provider that cannot be asked for the plan's precision, or for a dynamic axis without sizes.
        """
        chosen = BACKEND_PROVIDERS.get(plan.backend) if providers is None else tuple(providers)
        if chosen is None:
            raise SessionError(
                f"this bundle was made for {plan.backend}, which ONNX Runtime does not run as such",
                "Name what shall compute it, as in edgeq.load(bundle, providers=['CPUExecutionProvider'])",
            )
        return cls(
            threads=threads or (None if cores else plan.threads),
            cores=tuple(cores),
            providers=with_options(chosen, plan, inputs, cache=cache_root() / "onnxruntime"),
            disabled_optimizers=plan.disabled_optimizers,
            axes=plan.axes,
        )

    @property
    def thread_count(self) -> int:
        """Threads that compute one call.

        Raises:
            UsageError: a number that makes no sense.
        """
        return check_threads(self.threads or len(self.cores) or default_threads())

    @property
    def fixed_axes(self) -> dict[str, int]:
        """Axes that can have one size only."""
        return {name: axis.least for name, axis in self.axes.items() if axis.least == axis.most}

    def pool_config(self) -> dict[str, str]:
        """ONNX Runtime's configuration that keeps its threads on ``cores``, each on one.

        Its pool has one thread less than compute, since the calling thread takes part; CPUs are counted from 1.
        """
        threads = self.thread_count
        unknown = sorted(set(self.cores) - os.sched_getaffinity(0))
        if unknown:
            raise UsageError(
                f"this process may not use the CPU {unknown[0]}",
                f"Choose among {', '.join(map(str, sorted(os.sched_getaffinity(0))))}",
            )
        if not self.cores or threads == 1:
            return {}
        places = [self.cores[index % len(self.cores)] + 1 for index in range(1, threads)]
        return {"session.intra_op_thread_affinities": ";".join(map(str, places))}
