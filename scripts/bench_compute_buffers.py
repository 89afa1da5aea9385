#!/usr/bin/env python3
"""Predicted against llama.cpp's own compute buffers, for the shapes of well-known models and without their weights.

    scripts/bench_compute_buffers.py [--json FILE]

Each model is a GGUF header over a hole of the right size, loaded with llama.cpp's ``no_alloc``, so that even an 8 B
model takes milliseconds and no memory. Exit code 3 if a buffer is under-predicted by more than 10 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.shape import model_shape
from edgeq.llama import capture_log, library
from edgeq.profiles.llm.model_memory import compute_buffer_bytes

if TYPE_CHECKING:
    import gguf

WORST = -0.10


@dataclasses.dataclass(frozen=True)
class Shape:
    """The hyperparameters of a published model's config.json."""

    name: str
    arch: str
    width: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocab: int


SHAPES = (
    Shape("SmolLM2-135M", "llama", 576, 1536, 30, 9, 3, 64, 49152),
    Shape("Qwen3-0.6B", "qwen3", 1024, 3072, 28, 16, 8, 128, 151936),
    Shape("Llama-3.2-1B", "llama", 2048, 8192, 16, 32, 8, 64, 128256),
    Shape("Qwen2.5-1.5B", "qwen2", 1536, 8960, 28, 12, 2, 128, 151936),
    Shape("Gemma-3-1B", "gemma3", 1152, 6912, 26, 4, 1, 256, 262144),
    Shape("Phi-3-mini", "phi3", 3072, 8192, 32, 32, 32, 96, 32064),
    Shape("Mistral-7B", "llama", 4096, 14336, 32, 32, 8, 128, 32768),
    Shape("Llama-3.1-8B", "llama", 4096, 14336, 32, 32, 8, 128, 128256),
)


def tensors(s: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes (rows first), tied embeddings throughout."""
    yield "token_embd.weight", (s.vocab, s.width)
    yield "output_norm.weight", (s.width,)
    q, kv = s.heads * s.head, s.kv_heads * s.head
    for i in range(s.layers):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (s.width,),
            "ffn_norm.weight": (s.width,),
            "attn_output.weight": (s.width, q),
            "ffn_down.weight": (s.width, s.feed_forward),
        }
        if s.arch == "phi3":
            block |= {"attn_qkv.weight": (q + 2 * kv, s.width), "ffn_up.weight": (2 * s.feed_forward, s.width)}
        else:
            block |= {"attn_q.weight": (q, s.width), "attn_k.weight": (kv, s.width), "attn_v.weight": (kv, s.width)}
            block |= {f"ffn_{half}.weight": (s.feed_forward, s.width) for half in ("up", "gate")}
        if s.arch == "qwen2":
            block |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if s.arch in ("qwen3", "gemma3"):
            block |= {"attn_q_norm.weight": (s.head,), "attn_k_norm.weight": (s.head,)}
        if s.arch == "gemma3":
            block |= {"post_attention_norm.weight": (s.width,), "post_ffw_norm.weight": (s.width,)}
        yield from ((f"blk.{i}.{name}", shape) for name, shape in block.items())


def write_header(s: Shape, path: Path) -> None:
    """A GGUF whose data is a hole."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, s.arch)
    add_hyperparameters(writer, s)
    n_bytes = 0
    for name, shape in tensors(s):
        kind = np.dtype(np.float16 if len(shape) > 1 else np.float32)
        size = int(np.prod(shape)) * kind.itemsize
        writer.add_tensor_info(name, shape, kind, size)
        n_bytes += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + n_bytes)


def add_hyperparameters(writer: gguf.GGUFWriter, s: Shape) -> None:
    """What llama.cpp refuses to do without."""
    writer.add_block_count(s.layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(s.width)
    writer.add_feed_forward_length(s.feed_forward)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_key_length(s.head)
    writer.add_value_length(s.head)
    writer.add_rope_dimension_count(s.head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(s.vocab)
    writer.add_tokenizer_model("no_vocab")
    if s.arch == "gemma3":
        writer.add_sliding_window(512)


def llama_cpp_bytes(path: Path, context: int, ubatch: int) -> float:
    """What llama.cpp reserves, from its log (two decimals of a MiB)."""
    lib = library()
    params = lib.llama_model_default_params()
    params.no_alloc, params.load_mode = True, lib.LLAMA_LOAD_MODE_NONE
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_outputs_max = context, 512, ubatch, 1
    settings.flash_attn_type, settings.swa_full = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, False
    with capture_log() as lines:
        pointer = lib.llama_init_from_model(model, settings)
    lib.llama_free(pointer)
    lib.llama_model_free(model)
    return sum(float(m[1]) * 2**20 for m in re.finditer(r"compute buffer size =\s+([\d.]+) MiB", "\n".join(lines)))


def main() -> int:
    """Exit code 3 when a buffer is under-predicted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    arguments = parser.parse_args()
    print(f"{'model':<16}{'context':>8}{'ubatch':>8}{'predicted':>11}{'llama.cpp':>11}{'error':>8}")
    rows = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory(prefix="edgeq-bench-") as folder:
            path = Path(folder) / "model.gguf"
            write_header(shape, path)
            known = model_shape(read_header(path))
            for context, ubatch in ((2048, 128), (8192, 128), (2048, 512), (8192, 512)):
                predicted = compute_buffer_bytes(known, context, ubatch)
                found = llama_cpp_bytes(path, context, ubatch)
                error = predicted / found - 1
                rows.append(
                    {
                        "model": shape.name,
                        "context": context,
                        "ubatch": ubatch,
                        "error": error,
                        "predicted_bytes": predicted,
                        "llama_cpp_bytes": found,
                    }
                )
                mib = 2**20
                print(
                    f"{shape.name:<16}{context:>8}{ubatch:>8}{predicted / mib:>11.2f}{found / mib:>11.2f}{error:>8.1%}"
                )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 3 if min(float(str(row["error"])) for row in rows) < WORST else 0


if __name__ == "__main__":
    sys.exit(main())
