"""llama.cpp with Python's manners: loaded lazily, silent, checked, closed exactly once, never a NULL pointer.

Both the converters (vocabulary checks, quantization, smoke test) and the runtime stand on this; it knows nothing of
prompts or sampling. The parts: `edgeq.llama_library` (the shared library and its log), `edgeq.llama_model`,
`edgeq.llama_context`, and `edgeq.llama_batch` for many sequences at once.
"""

from __future__ import annotations

from edgeq.llama_context import KV_TYPES, Context
from edgeq.llama_library import CapturedLog, capture_log, default_threads, library, system_info, versions
from edgeq.llama_model import Model

__all__ = [
    "KV_TYPES",
    "CapturedLog",
    "Context",
    "Model",
    "capture_log",
    "default_threads",
    "library",
    "system_info",
    "versions",
]
