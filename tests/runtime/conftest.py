"""The real SmolLM2 as a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeq.runtime.engine import EngineSettings
from edgeq.runtime.llm import LLMSession

CONTEXT_TOKENS = 512
# llama.cpp's threads wait for each other at every operation: two of them on a busy machine crawl.
SETTINGS = EngineSettings(context_tokens=CONTEXT_TOKENS, threads=1)


@pytest.fixture(scope="module")
def session(smollm2_gguf: Path) -> Iterator[LLMSession]:
    """A session that the tests of a module share; they must leave it usable."""
    with LLMSession(smollm2_gguf, SETTINGS) as opened:
        yield opened
