"""Random models of a few kilobytes as GGUF files: everything that llama.cpp does with a model, in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TINY_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CORPUS = ["the robot moves its arm to the shelf and waits for the camera", "def area(w, h): return w * h\n"]
_HIDDEN, _INNER, _LAYERS, _HEADS, _KV_HEADS = 32, 64, 2, 4, 2


def _weights(rng: np.random.Generator, noise: float, vocab_size: int) -> dict[str, Any]:
    moved = np.random.default_rng(99)

    def random(*shape: int, scale: float = 0.2) -> Any:
        values = rng.normal(scale=scale, size=shape)
        return (values + noise * scale * moved.normal(size=shape)).astype(np.float16)

    tensors = {"model.embed_tokens.weight": random(vocab_size, _HIDDEN), "model.norm.weight": np.ones(_HIDDEN, "f4")}
    kv = _HIDDEN * _KV_HEADS // _HEADS
    shapes = {
        "self_attn.q_proj": (_HIDDEN, _HIDDEN),
        "self_attn.k_proj": (kv, _HIDDEN),
        "self_attn.v_proj": (kv, _HIDDEN),
        "self_attn.o_proj": (_HIDDEN, _HIDDEN),
        "mlp.gate_proj": (_INNER, _HIDDEN),
        "mlp.up_proj": (_INNER, _HIDDEN),
        "mlp.down_proj": (_HIDDEN, _INNER),
    }
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        for name, shape in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = random(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = np.ones(_HIDDEN, "f4")
    tensors["lm_head.weight"] = random(vocab_size, _HIDDEN, scale=0.5)
    return tensors


def _write_folder(folder: Path, *, vocab_size: int, chat_template: str | None, eos: str, corpus: Iterable[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*corpus] * 20, trainer)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    settings: dict[str, Any] = {"bos_token": "<|im_start|>", "eos_token": eos}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "vocab_size": vocab_size,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


class TinyGguf:
    """Makes the models, each only once.

    Args:
        folder: gives a new folder.
    """

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self._made: dict[tuple[object, ...], Path] = {}

    def __call__(
        self,
        *,
        seed: int = 0,
        noise: float = 0.0,
        vocab_size: int = 320,
        chat_template: str | None = None,
        eos: str = "<|im_end|>",
        corpus: Iterable[str] = _CORPUS,
    ) -> Path:
        """A llama of random weights (same for the same seed), each moved by ``noise`` of its spread."""
        from safetensors.numpy import save_file

        from edgeq.converters.gguf.export import export_gguf

        key = (seed, noise, vocab_size, chat_template, eos, tuple(corpus))
        if key not in self._made:
            folder = self._folder() / f"tiny-{seed}-{noise:g}"
            folder.mkdir()
            _write_folder(folder, vocab_size=vocab_size, chat_template=chat_template, eos=eos, corpus=corpus)
            save_file(_weights(np.random.default_rng(seed), noise, vocab_size), folder / "model.safetensors")
            export_gguf(folder, folder.with_suffix(".gguf"), float_type="f16")
            self._made[key] = folder.with_suffix(".gguf")
        return self._made[key]


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> TinyGguf:
    """``tiny_gguf(seed=1, noise=0.1)``: a GGUF in F16; tests must not change it."""
    return TinyGguf(lambda: tmp_path_factory.mktemp("tiny"))
