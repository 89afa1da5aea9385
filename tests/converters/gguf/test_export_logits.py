"""The proof of the converter: llama.cpp computes from the GGUF what transformers computes from the folder.

Tiny models with random weights, scaled so that distributions are peaked and differ by position; every case is compared
over all positions, and the controls show that each thing the converter does is needed to pass.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from edgeq.converters.gguf import weights
from edgeq.converters.gguf.architectures import gemma3, rope
from edgeq.converters.gguf.architectures.base import Dims, Settings
from edgeq.converters.gguf.config import Rope
from edgeq.converters.gguf.export import export_gguf
from edgeq.llama import Context, Model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

MAX_MEAN_KL = 1e-3
MIN_TOP1 = 0.99
VOCAB = 320
POSITIONS = 240

Logits = npt.NDArray[np.float64]

# Widths that make mistakes visible: grouped heads, and where the architecture allows it heads of a width of their own.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
SHORT = [1.0, 1.1, 1.2, 1.3, 1.5, 2.0]
GEMMA = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "num_hidden_layers": 4,
    "sliding_window": 32,
    "initializer_range": 0.2,
}
TEXT = """The quadruped waited at the edge of the warehouse while its operator read the map again. "Two pallets have
moved," she said, "so the shortest way is blocked." It turned left, slowed to 0.4 m/s near the crossing, and let a
forklift pass. In the next aisle the light was poor, and the cameras raised their exposure until the labels could be
read: B-17, B-18, B-19. The box was where it should be, on the second shelf. The arm unfolded, closed its gripper around
the handle, and lifted 3.2 kilograms without shaking. On the way back the battery fell to 31 percent, which was enough.
for attempt in range(3):
    if gripper.close(force=12.5):
        break
Nobody had to help. When it reached the dock it wrote down what it had done, how long it took, and what it would do
differently next time: look at the map first, and trust it less.
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """One model to build.

    Attributes:
        config: class in transformers.
        settings: on top of SMALL.
        dtype: that the weights are saved in.
        shard: max_shard_size.
        rewrite: changes config.json after saving, as older versions wrote it.
        context: of llama.cpp.
        positions: that are compared.
    """

    config: str
    settings: dict[str, Any]
    dtype: str = "float32"
    shard: str = "5GB"
    rewrite: Callable[[dict[str, Any]], None] | None = None
    context: int = 256
    positions: int = POSITIONS


def _old_rope(values: dict[str, Any]) -> None:
    """rope_scaling, rope_theta and torch_dtype, as transformers 4 wrote them."""
    parameters = values.pop("rope_parameters")
    values["rope_theta"] = parameters.pop("rope_theta")
    parameters["type"] = parameters.pop("rope_type")
    values["rope_scaling"] = parameters
    values["torch_dtype"] = values.pop("dtype")


def _old_longrope(values: dict[str, Any]) -> None:
    """LongRoPE under the name that the first Phi-3 models gave it."""
    values["partial_rotary_factor"] = values["rope_parameters"].pop("partial_rotary_factor")
    _old_rope(values)
    values["rope_scaling"]["type"] = "su"


def _old_gemma(values: dict[str, Any]) -> None:
    parameters = values.pop("rope_parameters")
    values["rope_theta"] = parameters["full_attention"]["rope_theta"]
    values["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    values["rope_scaling"] = {"rope_type": "linear", "factor": parameters["full_attention"]["factor"]}
    values["sliding_window_pattern"] = 3
    del values["layer_types"]


CASES: dict[str, Case] = {
    "llama-tied": Case("LlamaConfig", {"tie_word_embeddings": True}, dtype="bfloat16", shard="60KB"),
    "llama-bias": Case("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": Case("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "llama3-rope-old": Case("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}, rewrite=_old_rope),
    "llama-linear": Case(
        "LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}
    ),
    "mistral-window": Case("MistralConfig", {"head_dim": 24, "sliding_window": 128}, positions=128, context=128),
    "mistral-no-window": Case("MistralConfig", {"head_dim": 24, "sliding_window": None}, dtype="float16"),
    "qwen2": Case("Qwen2Config", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2-yarn": Case(
        "Qwen2Config",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen3": Case("Qwen3Config", {"head_dim": 32, "rope_parameters": {"rope_theta": 1e6}}),
    "gemma3": Case("Gemma3TextConfig", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gemma3-multimodal": Case("Gemma3Config", {**GEMMA, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}),
    "gemma3-softcap-irregular": Case(
        "Gemma3TextConfig",
        {
            **GEMMA,
            "final_logit_softcapping": 12.0,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gemma3-old-linear": Case(
        "Gemma3TextConfig",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
            },
        },
        rewrite=_old_gemma,
    ),
    "phi3": Case("Phi3Config", {"sliding_window": 128}, positions=128, context=128),
    "phi3-longrope-long": Case(
        "Phi3Config",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.75,
                "long_factor": LONG,
                "short_factor": SHORT,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "phi3-longrope-short-old": Case(
        "Phi3Config",
        {
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.75,
                "long_factor": LONG,
                "short_factor": SHORT,
                "original_max_position_embeddings": 256,
            },
        },
        rewrite=_old_longrope,
    ),
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of VOCAB tokens, trained here."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the robot moves its arm to the left and the gripper closes"] * 50, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _random_model(case: Case) -> Any:
    settings = {**SMALL, **case.settings}
    if case.config == "Gemma3Config":
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14}  # fmt: skip
        config = transformers.Gemma3Config(text_config=settings, vision_config=vision, mm_tokens_per_image=4)
        return transformers.Gemma3ForConditionalGeneration(config)
    config = getattr(transformers, case.config)(**settings)
    return transformers.AutoModelForCausalLM.from_config(config)


def _build(case: Case, folder: Path, tokenizer_folder: Path) -> Logits:
    """Save the model of a case. Returns transformers' log-probabilities, float64 of (positions, vocab)."""
    torch.manual_seed(1)
    model = _random_model(case)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            if tuple(parameter.shape) == (VOCAB, SMALL["hidden_size"]) and "Gemma" not in case.config:
                parameter.mul_(2.0)  # peaked distributions
            # Onto the grid of what is written, so that only the computation is compared.
            parameter.copy_(parameter.half())
    model.to(getattr(torch, case.dtype)).save_pretrained(folder, max_shard_size=case.shard)
    if case.rewrite is not None:
        values = json.loads((folder / "config.json").read_text())
        case.rewrite(values)
        (folder / "config.json").write_text(json.dumps(values))
    # Read back in float32: casting the model above also rounded the angles of its RoPE.
    model = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with torch.no_grad():
        logits = model(torch.tensor([_tokens(case)])).logits[0]
        result: Logits = torch.log_softmax(logits.double(), dim=-1).numpy()
    return result


def _tokens(case: Case) -> list[int]:
    rng = np.random.default_rng(7)
    return [int(token) for token in rng.integers(0, VOCAB, case.positions)]


def _llama_log_probabilities(path: Path, tokens: list[int], context_tokens: int) -> Logits:
    room: dict[str, Any] = {"batch_tokens": len(tokens), "max_outputs": len(tokens)}
    # No error but that of the weights and of llama.cpp's own products.
    cache: dict[str, Any] = {"type_k": "f32", "type_v": "f32", "flash_attention": False, "threads": 1}
    with Model.load(path) as model, Context(model, context_tokens=context_tokens, **room, **cache) as context:
        context.decode(tokens, 0, logits="all")
        logits = context.all_logits().astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    return np.asarray(logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True)))


def _compare(reference: Logits, other: Logits) -> tuple[float, float]:
    """Mean KL divergence in nats, share of positions with the same top token."""
    kl = (np.exp(reference) * (reference - other)).sum(axis=1).mean()
    return float(kl), float((reference.argmax(axis=1) == other.argmax(axis=1)).mean())


@pytest.mark.parametrize("name", CASES)
def test_same_logits_as_transformers(name: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    case = CASES[name]
    reference = _build(case, tmp_path / "model", tokenizer_folder)
    # A flat distribution would agree with anything.
    assert np.exp(reference).max(axis=1).mean() > 0.1
    assert len(set(reference.argmax(axis=1).tolist())) > 20
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", float_type="f16")
    kl, top1 = _compare(reference, _llama_log_probabilities(tmp_path / "model.gguf", _tokens(case), case.context))
    assert kl <= MAX_MEAN_KL
    assert top1 >= MIN_TOP1


def _without_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("linear", "llama3", "yarn"):
        monkeypatch.setitem(rope._SCALINGS, kind, rope._default)


def _without_interleaving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "interleave_halves", lambda rows, _head: rows)


def _without_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma3, "_window_keys", lambda _config, _dims: {})


def _without_one_added(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = weights._convert
    monkeypatch.setattr(weights, "_convert", lambda raw, entry, kind, _add: convert(raw, entry, kind, 0.0))


def _with_short_factors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    longrope = rope._longrope

    def patched(settings: Rope, dims: Dims, width: int) -> Settings:
        values = {**settings.values, "long_factor": settings.values["short_factor"]}
        return longrope(dataclasses.replace(settings, values=values), dims, width)

    monkeypatch.setitem(rope._SCALINGS, "longrope", patched)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("llama-tied", _without_interleaving),
        ("llama-linear", _without_scaling),
        ("llama3-rope", _without_scaling),
        ("qwen2-yarn", _without_scaling),
        ("gemma3", _without_window),
        ("gemma3", _without_one_added),
        ("gemma3-old-linear", _without_scaling),
        ("phi3-longrope-long", _with_short_factors_only),
    ],
)
def test_control_a_step_left_out_is_seen(
    name: str,
    spoil: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch)
    case = CASES[name]
    reference = _build(case, tmp_path / "model", tokenizer_folder)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", float_type="f16")
    kl, _ = _compare(reference, _llama_log_probabilities(tmp_path / "model.gguf", _tokens(case), case.context))
    assert kl > 20 * MAX_MEAN_KL


@pytest.mark.parametrize("name", ["mistral-window", "phi3"])
def test_beyond_the_window_llama_cpp_differs_so_the_context_ends_there(
    name: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    case = dataclasses.replace(CASES[name], positions=POSITIONS, context=256)
    reference = _build(case, tmp_path / "model", tokenizer_folder)
    result = export_gguf(tmp_path / "model", tmp_path / "model.gguf", float_type="f16")
    other = _llama_log_probabilities(tmp_path / "model.gguf", _tokens(case), case.context)
    within, _ = _compare(reference[:128], other[:128])
    beyond, _ = _compare(reference[128:], other[128:])
    assert within <= MAX_MEAN_KL
    assert beyond > 20 * MAX_MEAN_KL
    assert any("sliding window of 128" in note for note in result.notes)
    with Model.load(tmp_path / "model.gguf", vocab_only=True) as model:
        arch = model.metadata()["general.architecture"]
        assert model.metadata()[f"{arch}.context_length"] == "128"


@pytest.mark.parametrize("float_type", ["source", "bf16", "f32"])
def test_other_float_types_compute_the_same(
    float_type: Literal["source", "bf16", "f32"], tmp_path: Path, tokenizer_folder: Path
) -> None:
    case = CASES["llama-tied"]
    reference = _build(case, tmp_path / "model", tokenizer_folder)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", float_type=float_type)
    kl, _ = _compare(reference, _llama_log_probabilities(tmp_path / "model.gguf", _tokens(case), case.context))
    assert kl <= MAX_MEAN_KL


def test_the_real_smollm2(smollm2_hf: Path, tmp_path: Path) -> None:
    tokens = transformers.AutoTokenizer.from_pretrained(smollm2_hf)(TEXT)["input_ids"]
    assert len(tokens) > 150
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_hf, dtype=torch.float32).eval()
    with torch.no_grad():
        reference: Logits = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1).numpy()
    del model
    export_gguf(smollm2_hf, tmp_path / "model.gguf", float_type="f16")
    kl, top1 = _compare(reference, _llama_log_probabilities(tmp_path / "model.gguf", tokens, 512))
    assert kl <= MAX_MEAN_KL
    assert top1 >= MIN_TOP1
