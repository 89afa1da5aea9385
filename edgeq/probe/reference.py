"""How fast the machine is at this moment, by the same two kernels again and again.

Memory that is shared with others, heat and power limits change a machine's speed within seconds. Readings taken between
the parts of a measurement tell whether the parts can be compared, and by how much the machine has changed since.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence

from edgeq.ggml_backend import CpuBackend
from edgeq.ggml_kernels import Matrices, MatrixSet
from edgeq.ggml_types import ggml_type
from edgeq.llama_handle import Handle
from edgeq.profiles.kernels.cost_measure import default_working_set, free_bytes, undisturbed
from edgeq.profiles.kernels.sample_weights import sample_blocks

__all__ = ["Reading", "SpeedReference", "between", "spread_of"]

_TYPE = "q8_0"
_DECODE_SHAPE, _PROMPT_SHAPE, _BATCH = (2048, 4096), (512, 2048), 128
_PROMPT_COPIES = 8  # some ten milliseconds
_ROUNDS = 7
_MEMORY_SHARE = 4  # at most this fraction of what is free


@dataclasses.dataclass(frozen=True)
class Reading:
    """Times of the two kernels.

    Attributes:
        decode_ns: one matrix of a token, which comes from memory.
        prompt_ns: one matrix of a prompt's chunk, which is computed from the caches.
    """

    decode_ns: float
    prompt_ns: float


class SpeedReference(Handle):
    """The two kernels, ready to be timed: four last-level caches of matrices. A context manager."""

    def __init__(self, threads: int) -> None:
        """Fill the matrices.

        Args:
            threads: of a session.

        Raises:
            UsageError: a number of threads that cannot be.
            SessionError: too little memory.
        """
        kind = ggml_type(_TYPE)
        size = kind.row_bytes(_DECODE_SHAPE[0]) * _DECODE_SHAPE[1]
        self._copies = max(1, -(-min(default_working_set(), free_bytes() // _MEMORY_SHARE) // size))
        kinds = [
            Matrices(_TYPE, _DECODE_SHAPE, sample_blocks(kind, _DECODE_SHAPE[0]), self._copies),
            Matrices(_TYPE, _PROMPT_SHAPE, sample_blocks(kind, _PROMPT_SHAPE[0]), _PROMPT_COPIES, _BATCH),
        ]
        with contextlib.ExitStack() as stack:
            backend = stack.enter_context(CpuBackend(threads))
            self._matrices = stack.enter_context(MatrixSet(backend, kinds))
            owned = stack.pop_all()
        super().__init__(owned, contextlib.ExitStack.close, "reference of speed")

    def read(self) -> Reading:
        """Time both kernels, in a fraction of a second."""
        self.check_open()
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(_ROUNDS + 1):  # the first one fills the caches
            for index, copies in enumerate((self._copies, _PROMPT_COPIES)):
                before = time.perf_counter_ns()
                self._matrices.compute(index)
                if turn:
                    times[index].append((time.perf_counter_ns() - before) / copies)
        decode, prompt = (undisturbed(found)[0] for found in times)
        return Reading(decode, prompt)


def between(before: Reading, after: Reading) -> Reading:
    """The speed between two readings: the faster one, since a disturbance of one of them says little of the rest."""
    return Reading(min(before.decode_ns, after.decode_ns), min(before.prompt_ns, after.prompt_ns))


def spread_of(readings: Sequence[Reading]) -> tuple[float, float]:
    """By what share the slowest reading is above the fastest, for a token's matrix and a prompt's."""
    decode, prompt = [r.decode_ns for r in readings], [r.prompt_ns for r in readings]
    return max(decode) / min(decode) - 1, max(prompt) / min(prompt) - 1
