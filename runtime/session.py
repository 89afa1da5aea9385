"""Loading a bundle."""

from __future__ import annotations

import time
from pathlib import Path

from edgeq.bundle import open_bundle
from edgeq.errors import UsageError
from edgeq.llama_library import check_threads
from edgeq.runtime.engine import EngineSettings
from edgeq.runtime.llm import LLMSession

__all__ = ["LLMSession", "load"]


def load(
    bundle: str | Path, *, threads: int | None = None, context_tokens: int | None = None, verify: bool = False
) -> LLMSession:
    """Load a bundle and make it ready to generate.

    Args:
        bundle: its folder.
        threads: threads that compute; None for what the plan says, or else the physical cores.
        context_tokens: less context than planned, to save memory; None for the plan's.
        verify: hash all files first.

    Raises:
        BundleError: no bundle or one that was changed.
        UsageError: more context than planned, or a number of threads outside of 1 to 512.
        SessionError: the model cannot be loaded, or memory is too small.
        MissingPackageError: llama-cpp-python is not installed.
    """
    started = time.perf_counter()
    opened = open_bundle(bundle, verify=verify)
    plan = opened.llm.plan
    if threads is not None:
        check_threads(threads)
    if context_tokens is not None and not 1 <= context_tokens <= plan.context_tokens:
        raise UsageError(
            f"context_tokens={context_tokens}, and the bundle was planned for {plan.context_tokens}",
            "Choose no more than planned, or convert again with a larger --context",
        )
    settings = EngineSettings.from_plan(plan, threads=threads, context_tokens=context_tokens)
    return LLMSession(opened.file("model"), settings, manifest=opened.llm, started=started)
