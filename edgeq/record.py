"""What all records share: immutable, keyword-only, strict about keys, and the limits of what is read back."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["Count", "Layers", "Record", "Sha256", "Share", "Threads", "Tokens"]

# Limits of what is read back: a manifest is untrusted, and llama.cpp is told its numbers as 32-bit integers.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Tokens = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Threads = Annotated[int, msgspec.Meta(ge=1, le=512)]  # GGML_MAX_N_THREADS
Layers = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every record: immutable, keyword-only, strict about keys."""
