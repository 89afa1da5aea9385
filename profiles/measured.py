"""What the probe finds on a machine, as a part of its profile."""

from __future__ import annotations

from typing import Annotated

import msgspec

from edgeq.probe_points import AttentionPoint, BandwidthPoint, MatmulPoint
from edgeq.profiles.facts.system_facts import SystemFacts
from edgeq.profiles.kernels.cost_table import DecodeCosts
from edgeq.profiles.onnx.cost import OnnxFigures
from edgeq.record import Count, Record, Threads

__all__ = ["LanguageCosts", "Measured"]

_NotNegative = Annotated[float, msgspec.Meta(ge=0, lt=1e18)]


class LanguageCosts(Record, frozen=True, kw_only=True):
    """What language models cost on the CPU, with llama.cpp's kernels.

    Attributes:
        decode: matrices of one token.
        matmuls: matrices of many tokens.
        attention: layers.
        token_ns: of every computed batch, whatever the model.
        layer_ns: of every layer in every computed batch.
        layer_ns_per_value: of every layer, for each token of a batch and value of the embedding.
        runtime_bytes: of a serving process beside the model, its buffers and its vocabulary.
        reference_decode_ns: of one kernel that reads memory (`edgeq.probe.reference`), the median over the probe: all
            times above are at that speed.
        reference_prompt_ns: of one kernel that computes, likewise.
    """

    decode: DecodeCosts
    matmuls: tuple[MatmulPoint, ...]
    attention: tuple[AttentionPoint, ...]
    token_ns: _NotNegative
    layer_ns: _NotNegative
    layer_ns_per_value: _NotNegative
    runtime_bytes: Count
    reference_decode_ns: _NotNegative
    reference_prompt_ns: _NotNegative


class Measured(Record, frozen=True, kw_only=True):
    """Everything that ``edgeq devices probe`` measured.

    Attributes:
        taken_utc: ISO 8601.
        edgeq: its version.
        threads: of a session.
        host_load: share of the CPU time that others took meanwhile; None if the system does not tell.
        doubts: why the figures should not be trusted (a loaded host, clocks that changed); empty if nothing speaks
            against them.
        facts: what the machine says of itself.
        bandwidth: by number of threads.
        language: None if llama.cpp was not there.
        onnx: None if ONNX Runtime was not there.
    """

    taken_utc: str
    edgeq: str
    threads: Threads
    host_load: _NotNegative | None
    doubts: tuple[str, ...] = ()
    facts: SystemFacts
    bandwidth: tuple[BandwidthPoint, ...] = ()
    language: LanguageCosts | None = None
    onnx: OnnxFigures | None = None
