"""The architectures that edgeq converts by itself, one module each."""

from __future__ import annotations

from edgeq.converters.gguf.architectures import gemma3, llama, mistral, phi3, qwen2, qwen3
from edgeq.converters.gguf.architectures.base import Architecture
from edgeq.registry import Registry

__all__ = ["ARCHITECTURES"]

ARCHITECTURES: Registry[Architecture] = Registry("architecture")
"""By the name in config.json."""

for _module in (gemma3, llama, mistral, phi3, qwen2, qwen3):
    for _name in _module.ARCHITECTURE.names:
        ARCHITECTURES.add(_name, _module.ARCHITECTURE)
