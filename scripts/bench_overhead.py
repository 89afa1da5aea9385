#!/usr/bin/env python3
"""Measure what a session costs on top of llama.cpp: the time of a token against a bare loop in the same process.

    scripts/bench_overhead.py BUNDLE_OR_GGUF [--tokens 64] [--rounds 6] [--threads N] [--json FILE]

The bare loop does nothing but llama_decode and a greedy choice in C, with a batch that is made once, in a context of
its own on the same loaded model. Both decode the same tokens after the same prompt, in turn: one token here, one token
there. The figure is the median over all pairs of (time of the session's token / time of the bare token just before it),
so drifts of the machine cancel and a preempted token does not count. The session's time is taken outside of it, around
``next(stream)``. Exit code 3 if the ratio exceeds the limit.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

from edgeq.bundle import open_bundle
from edgeq.errors import EdgeqError
from edgeq.llama import Context, library, versions
from edgeq.runtime.engine import EngineSettings
from edgeq.runtime.llm import LLMSession

PROMPT = "The robot reached the end of the corridor, stopped in front of the door, and"


class BareLoop:
    """Greedy decoding straight on llama.cpp's C functions."""

    def __init__(self, context: Context) -> None:
        self._lib = lib = library()
        self._pointer = context.pointer
        self._context = context
        self._pick = lib.llama_sampler_init_greedy()
        self._token, self._position = ctypes.c_int32(), ctypes.c_int32()
        self._fixed = (ctypes.c_int32(1), ctypes.c_int32(0), ctypes.c_int8(1))
        n_seq, seq, wanted = (ctypes.pointer(value) for value in self._fixed)
        token, position = ctypes.pointer(self._token), ctypes.pointer(self._position)
        self._batch = lib.llama_batch(1, token, None, position, n_seq, ctypes.pointer(seq), wanted)

    def start(self, prompt: list[int]) -> int:
        """Compute the prompt as the session does. Returns the first token."""
        self._context.clear()
        size = self._context.batch_tokens
        for start in range(0, len(prompt), size):
            self._context.decode(prompt[start : start + size], start, logits="last")
        self._position.value = len(prompt) - 1
        self._token.value = self._lib.llama_sampler_sample(self._pick, self._pointer, -1)
        return self._token.value

    def step(self) -> int:
        """Decode one token and choose the next."""
        self._position.value += 1
        if self._lib.llama_decode(self._pointer, self._batch) != 0:
            raise RuntimeError("llama_decode failed")
        self._token.value = self._lib.llama_sampler_sample(self._pick, self._pointer, -1)
        return self._token.value

    def close(self) -> None:
        """Free the sampler."""
        self._lib.llama_sampler_free(self._pick)


@dataclasses.dataclass(frozen=True)
class Figures:
    """Times of each pair of tokens, and what they say."""

    threads: int
    session_ms: list[float]
    bare_ms: list[float]
    ratio_median: float
    versions: dict[str, str]


def measure(session: LLMSession, bare: BareLoop, n_tokens: int, n_rounds: int) -> Figures:
    """Decode ``n_rounds`` times ``n_tokens`` tokens on both, in turn."""
    prompt = session.tokenize(PROMPT)
    session_ms: list[float] = []
    bare_ms: list[float] = []
    for _ in range(n_rounds):
        expected = bare.start(prompt)
        with session.stream(prompt, max_tokens=n_tokens, ignore_eos=True) as stream:
            if next(stream).id != expected:
                raise RuntimeError("the session and the bare loop decoded different tokens")
            for _ in range(n_tokens - 1):
                before = time.perf_counter()
                expected = bare.step()
                between = time.perf_counter()
                token = next(stream)
                after = time.perf_counter()
                if token.id != expected:
                    raise RuntimeError("the session and the bare loop decoded different tokens")
                bare_ms.append((between - before) * 1000)
                session_ms.append((after - between) * 1000)
    ratios = [ours / theirs for ours, theirs in zip(session_ms, bare_ms, strict=True)]
    return Figures(session.threads, session_ms, bare_ms, statistics.median(ratios), versions())


def main() -> int:
    """Command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a bundle, or a GGUF file")
    parser.add_argument("--tokens", type=int, default=64, help="of a round (default 64)")
    parser.add_argument("--rounds", type=int, default=6, help="(default 6)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--limit", type=float, default=1.02, help="largest median ratio (default 1.02)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args()
    path: Path = args.model
    settings = EngineSettings(context_tokens=args.tokens + 64, threads=args.threads)
    if path.is_dir():
        bundle = open_bundle(path)
        path = bundle.file("model")
        settings = EngineSettings.from_plan(bundle.llm.plan, threads=args.threads)
    with LLMSession(path, settings) as session:
        engine = session._engine  # noqa: SLF001 - the bare loop shares the session's weights
        bare = BareLoop(engine.new_context())
        figures = measure(session, bare, args.tokens, args.rounds)
        bare.close()
    print(f"{'ms a token':>12} {'median':>8} {'p10':>8} {'p90':>8}")
    for name, times in (("session", figures.session_ms), ("bare loop", figures.bare_ms)):
        deciles = statistics.quantiles(times, n=10)
        print(f"{name:>12} {statistics.median(times):>8.3f} {deciles[0]:>8.3f} {deciles[-1]:>8.3f}")
    pairs = len(figures.bare_ms)
    print(f"median ratio of {pairs} pairs: {figures.ratio_median:.4f} (limit {args.limit}, {figures.threads} threads)")
    if args.json is not None:
        args.json.write_text(json.dumps(dataclasses.asdict(figures), indent=2) + "\n", encoding="utf-8")
    return 0 if figures.ratio_median <= args.limit else 3


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EdgeqError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
