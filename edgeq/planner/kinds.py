"""Whether a model writes text, and becomes a GGUF, or is called with arrays, and becomes an ONNX graph."""

from __future__ import annotations

from edgeq.converters.gguf.architectures import ARCHITECTURES
from edgeq.types import ModelSource

__all__ = ["is_called_with_arrays"]

_WRITES_TEXT = ("ForCausalLM", "LMHeadModel")


def is_called_with_arrays(source: ModelSource, *, task: str | None = None) -> bool:
    """Decide by the format and the architecture.

    Args:
        source: the model.
        task: that the user asked for: hidden states of a language model are arrays, too.
    """
    if source.format != "hf":
        return source.format == "onnx"
    return task is not None or not (
        source.architecture in ARCHITECTURES.names() or source.architecture.endswith(_WRITES_TEXT)
    )
