"""What llama.cpp multiplies its weights with, against hooks on transformers' linear layers; and what is refused."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.converters.gguf import observe
from edgeq.converters.gguf.export import export_gguf
from edgeq.converters.gguf.ggml_tensor import TensorHead, Tensors
from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.imatrix import check_matches
from edgeq.converters.gguf.observe import Collector, collect_imatrix, dense_squares, observe_inputs, routed_squares
from edgeq.converters.gguf.quantize import quantizable_tensors
from edgeq.errors import ConversionError, UsageError
from edgeq.llama import Context, Model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 320
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
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": False}),
    "phi3": ("Phi3Config", {}),
}
# Longer than a batch, of a few tokens, and of one: each shape of batch that there is.
LENGTHS = (150, 5, 1)
Sums = dict[str, npt.NDArray[np.float64]]


def _chunks(lengths: tuple[int, ...] = LENGTHS) -> list[npt.NDArray[np.int32]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in lengths]


@pytest.fixture(scope="module")
def tokenizer_folder(train_byte_level: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    train_byte_level(folder, pre_tokenizer, vocab_size=VOCAB)
    return folder


def _build(name: str, folder: Path, tokenizer_folder: Path) -> Any:
    """A random model of a case, saved in ``folder`` on the grid of f16."""
    config, changes = CONFIGS[name]
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**SMALL, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    model.save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return model.eval()


def _hooked(model: Any, names: dict[str, str]) -> Sums:
    """Sums of squares of the inputs of every linear layer, by GGUF name."""
    sums: Sums = {}

    def watch(name: str) -> Callable[..., None]:
        def add(_module: Any, inputs: tuple[Any, ...]) -> None:
            squares = inputs[0].double().square().sum(dim=(0, 1)).numpy()
            sums[name] = sums.get(name, 0) + squares

        return add

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(names[path]))
    with torch.no_grad():
        for chunk in _chunks():
            model(torch.tensor(chunk[np.newaxis].astype(np.int64)))
    return sums


@pytest.fixture(scope="module")
def tiny(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tied Llama of CONFIGS as a GGUF in f16."""
    folder = tmp_path_factory.mktemp("tiny")
    _build("llama-tied", folder / "model", tokenizer_folder)
    return export_gguf(folder / "model", folder / "model.gguf", float_type="f16").path


@pytest.mark.parametrize("name", CONFIGS)
def test_same_sums_as_hooks_on_torch(name: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    model = _build(name, tmp_path / "model", tokenizer_folder)
    architecture = {"llama": "LLAMA", "qwen3": "QWEN3", "phi3": "PHI3"}[name.split("-", maxsplit=1)[0]]
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], SMALL["num_hidden_layers"])
    names = {
        path: f"{mapping.get_name(path)}.weight" for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    if model.config.tie_word_embeddings:
        names["lm_head"] = "token_embd.weight"
    expected = _hooked(model, names)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", float_type="f16")
    seen: list[tuple[int, int, str]] = []
    found = collect_imatrix(
        tmp_path / "model.gguf", _chunks(), threads=1, progress=lambda *a: seen.append(a), datasets=("noise",)
    )
    assert (found.chunk_count, found.chunk_tokens, found.datasets) == (3, 150, ("noise",))
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})
    assert seen[-1][:2] == (3, 3)
    assert found.entries.keys() == expected.keys()
    for key, sums in expected.items():
        assert found.entries[key].counts.tolist() == [sum(LENGTHS)]
        # llama.cpp rounds activations to f16 before each product, and so the ones after it differ a little.
        assert found.entries[key].sums[0] == pytest.approx(sums, rel=0.01, abs=1e-3 * sums.mean()), key
        assert found.entries[key].sums.sum() == pytest.approx(sums.sum(), rel=1e-3), key
    header = read_header(tmp_path / "model.gguf")
    needed = quantizable_tensors(tmp_path / "model.gguf")
    warnings = check_matches(found, header, sorted(needed))
    # An embedding that is no output matrix is looked up, not multiplied.
    assert len(warnings) == (0 if model.config.tie_word_embeddings else 1)


def test_chunks_do_not_see_each_other(tiny: Path) -> None:
    together = collect_imatrix(tiny, _chunks((40, 30)), threads=1)
    apart = [collect_imatrix(tiny, [chunk], threads=1) for chunk in _chunks((40, 30))]
    for name, entry in together.entries.items():
        assert entry.sums == pytest.approx(sum(m.entries[name].sums for m in apart), rel=1e-5)
    again = collect_imatrix(tiny, _chunks((40, 30)), threads=1)
    assert again.sha256 == together.sha256


def test_threads_share_the_text_and_correlations_are_those_of_one(tiny: Path) -> None:
    chunks = _chunks((40, 30, 20, 35, 7))
    one, two = (observe_inputs(tiny, chunks, threads=threads, correlations=True) for threads in (1, 2))
    assert observe_inputs(tiny, chunks, threads=2, correlations=True).matrix.sha256 == two.matrix.sha256
    for name, entry in one.matrix.entries.items():
        assert two.matrix.entries[name].counts.tolist() == entry.counts.tolist() == [132]
        assert two.matrix.entries[name].sums == pytest.approx(entry.sums, rel=1e-5)
    assert one.correlations.keys() == two.correlations.keys() == one.matrix.entries.keys()
    for name, found in one.correlations.items():
        np.testing.assert_allclose(two.correlations[name], found, atol=2e-3)
    shared = {name: id(found) for name, found in two.correlations.items()}
    assert shared["blk.0.attn_q.weight"] == shared["blk.0.attn_k.weight"] == shared["blk.0.attn_v.weight"]
    assert shared["blk.0.ffn_gate.weight"] == shared["blk.0.ffn_up.weight"]
    assert len(set(shared.values())) == SMALL["num_hidden_layers"] * 4 + 1, (
        "four inputs in each layer, and the output's"
    )


def test_correlations_are_those_of_the_inputs_in_torch(tokenizer_folder: Path, tmp_path: Path) -> None:
    model = _build("llama-tied", tmp_path / "model", tokenizer_folder)
    seen: list[npt.NDArray[np.float64]] = []
    down = model.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda _m, received: seen.append(received[0][0].double().numpy()))
    with torch.no_grad():
        for chunk in _chunks():
            model(torch.from_numpy(chunk.astype(np.int64))[None])
    reference = export_gguf(tmp_path / "model", tmp_path / "model.gguf", float_type="f16").path
    found = observe_inputs(reference, _chunks(), threads=1, correlations=True).correlations["blk.1.ffn_down.weight"]
    x = np.concatenate(seen)
    gram = x.T @ x
    scale = np.sqrt(np.diag(gram))
    np.testing.assert_allclose(found, gram / np.outer(scale, scale), atol=0.01)


def test_smollm2_every_matrix_is_seen(smollm2_gguf: Path) -> None:
    """A real model, quantized: its types are read from memory as they lie in the file."""
    found = collect_imatrix(smollm2_gguf, [np.arange(1000, 1024, dtype=np.int32)], threads=1)
    assert len(found.entries) == 211
    assert all((entry.counts == 24).all() for entry in found.entries.values())
    assert all((entry.sums > 0).any() for entry in found.entries.values())


# Experts


def _mixture(path: Path, *, n_used: int) -> Path:
    """A random GGUF of a Llama with four experts a layer."""
    width, inner, n_experts = 64, 96, 4
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_vocab_size(VOCAB)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_expert_count(n_experts)
    writer.add_expert_used_count(n_used)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        dtype = np.float32 if len(shape) == 1 or "inp" in name else np.float16
        values = np.ones(shape) if len(shape) == 1 else 0.2 * rng.standard_normal(shape)
        writer.add_tensor(f"{name}.weight", values.astype(dtype))

    add("token_embd", VOCAB, width)
    add("output", VOCAB, width)
    add("output_norm", width)
    for i in range(2):
        add(f"blk.{i}.attn_norm", width)
        add(f"blk.{i}.ffn_norm", width)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{part}", width, width)
        add(f"blk.{i}.ffn_gate_inp", n_experts, width)
        add(f"blk.{i}.ffn_gate_exps", n_experts, inner, width)
        add(f"blk.{i}.ffn_up_exps", n_experts, inner, width)
        add(f"blk.{i}.ffn_down_exps", n_experts, width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("n_used", [1, 2, 4])
def test_experts_share_what_their_router_sees(n_used: int, tmp_path: Path) -> None:
    found = collect_imatrix(_mixture(tmp_path / "moe.gguf", n_used=n_used), _chunks(), threads=1)
    n_tokens = sum(LENGTHS)
    for i in range(2):
        router = found.entries[f"blk.{i}.ffn_gate_inp.weight"]
        assert router.counts.tolist() == [n_tokens]
        for part in ("gate", "up", "down"):
            entry = found.entries[f"blk.{i}.ffn_{part}_exps.weight"]
            assert entry.counts.sum() == n_used * n_tokens
            assert entry.sums.shape == (4, 96 if part == "down" else 64)
            assert ((entry.sums > 0).any(axis=1) == (entry.counts > 0)).all()
            if part != "down":
                assert entry.sums.sum(axis=0) == pytest.approx(n_used * router.sums[0], rel=1e-4)
            if n_used == 4:
                assert entry.counts.tolist() == [n_tokens] * 4
                assert part == "down" or entry.sums == pytest.approx(np.tile(router.sums, (4, 1)), rel=1e-4)
    up, down = (found.entries[f"blk.1.ffn_{part}_exps.weight"] for part in ("up", "down"))
    assert up.counts.tolist() == down.counts.tolist()


@given(
    n_tokens=st.integers(1, 12),
    n_used=st.integers(1, 4),
    shared=st.booleans(),
    n_experts=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_routed_squares_are_those_of_a_plain_loop(
    n_tokens: int, n_used: int, shared: bool, n_experts: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    activations = rng.standard_normal((n_tokens, 1 if shared else n_used, 5)).astype(np.float32)
    routes = rng.integers(0, n_experts, (n_tokens, n_used)).astype(np.int32)
    sums, counts = np.zeros((n_experts, 5)), np.zeros(n_experts, int)
    for token in range(n_tokens):
        for slot in range(n_used):
            expert = routes[token, slot]
            sums[expert] += activations[token, 0 if shared else slot].astype(float) ** 2
            counts[expert] += 1
    found = routed_squares(activations, routes, n_experts)
    assert found[0] == pytest.approx(sums, rel=1e-5)
    assert found[1].tolist() == counts.tolist()


def test_routes_beyond_the_experts_are_refused() -> None:
    activations = np.ones((1, 1, 3), np.float32)
    for wrong in (-1, 2):
        with pytest.raises(ConversionError, match="beyond the 2"):
            routed_squares(activations, np.array([[wrong]], np.int32), 2)


def test_dense_squares_take_strides_and_several_matrices() -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal((1, 2, 7, 5)).astype(np.float32)
    spread = np.zeros((1, 2, 14, 8), np.float32)
    spread[:, :, ::2, :5] = values
    strided = spread[:, :, ::2, :5]
    sums, counts = dense_squares(strided, 1, "w")
    assert sums[0] == pytest.approx((values.astype(float) ** 2).sum(axis=(0, 1, 2)), rel=1e-5)
    assert counts.tolist() == [14]
    sums, counts = dense_squares(strided, 2, "w")
    assert sums == pytest.approx((values[0].astype(float) ** 2).sum(axis=1), rel=1e-5)
    assert counts.tolist() == [7, 7]
    with pytest.raises(ConversionError, match="w has 3 matrices for 2"):
        dense_squares(strided, 3, "w")


# What is refused


def _shifted(before: str) -> type[ctypes.Structure]:
    """The layout with eight more bytes before a field."""
    fields: list[tuple[str, Any]] = []
    for field in TensorHead._fields_:
        if field[0] == before:
            fields.append(("inserted", ctypes.c_int64))
        fields.append((field[0], field[1]))
    return type("Shifted", (ctypes.Structure,), {"_fields_": tuple(fields)})


@pytest.mark.parametrize("field", ["type", "buffer", "ne", "nb", "op", "op_params", "flags", "src"])
def test_another_layout_is_detected_before_a_model_is_loaded(
    field: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tensors()  # the true one passes
    monkeypatch.setattr(observe, "TensorHead", _shifted(field))
    monkeypatch.setattr(Model, "load", lambda *_args, **_kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(ConversionError, match=r"lays ggml_tensor out in another way.*llama-cpp-python==") as error:
        collect_imatrix(tiny, _chunks((5,)), threads=1)
    assert "\n" not in str(error.value)


def test_swapped_shape_and_strides_are_detected() -> None:
    swap = {"ne": "nb", "nb": "ne"}
    fields = tuple((swap.get(field[0], field[0]), field[1]) for field in TensorHead._fields_)
    with pytest.raises(ConversionError, match="another way"):
        Tensors(type("Swapped", (ctypes.Structure,), {"_fields_": fields}))


def test_a_weight_that_is_not_the_files_is_detected(tiny: Path, tmp_path: Path) -> None:
    """The file changes between the loading of the model and the look at its weights."""
    changed = tmp_path / "changed.gguf"
    data = bytearray(tiny.read_bytes())
    offset = read_header(tiny).tensors["blk.1.ffn_up.weight"].offset
    data[offset] ^= 1
    changed.write_bytes(data)
    collector = Collector(Tensors(), read_header(changed))
    with Model.load(tiny, use_extra_bufts=False) as model, _context(model, collector) as context:
        context.decode([1, 2, 3], 0, logits="all")
    with pytest.raises(ConversionError, match=r"blk\.1\.ffn_up\.weight in memory is not what changed\.gguf holds"):
        _raise(collector)


def _context(model: Model, collector: Collector) -> Context:
    return Context(model, context_tokens=64, threads=1, max_outputs=16, eval_callback=collector)


def _raise(collector: Collector) -> None:
    assert collector.failure is not None
    raise collector.failure


def test_an_exception_in_the_callback_is_raised_after_the_decode(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def fail(_activations: object, _n_matrices: int, name: str) -> None:
        calls.append(name)
        if len(calls) == 10:
            raise ZeroDivisionError("the tenth product")

    def add(*args: Any) -> Any:
        fail(*args)
        return dense_squares(*args)

    monkeypatch.setattr(observe, "dense_squares", add)
    with pytest.raises(ZeroDivisionError, match="the tenth product"):
        collect_imatrix(tiny, _chunks((5, 5)), threads=1)
    assert len(calls) == 10  # nothing is looked at after a failure


def test_activations_that_are_not_finite_name_the_matrix(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    data = bytearray(tiny.read_bytes())
    tensor = read_header(tiny).tensors["blk.1.ffn_norm.weight"]
    data[tensor.offset : tensor.offset + 4] = np.array([np.inf], "<f4").tobytes()
    broken.write_bytes(data)
    with pytest.raises(ConversionError, match=r"activations of blk\.1\.ffn_(gate|up)\.weight are NaN or infinite"):
        collect_imatrix(broken, _chunks((5,)), threads=1)


def test_no_text_and_foreign_tokens_are_usage_errors(tiny: Path) -> None:
    for chunks in ([], [np.array([], np.int32)]):
        with pytest.raises(UsageError, match="no tokens"):
            collect_imatrix(tiny, chunks, threads=1)
    with pytest.raises(UsageError, match="not a token"):
        collect_imatrix(tiny, [np.array([VOCAB + 1000], np.int32)], threads=1)


def test_ctrl_c_stops_in_the_middle(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal while llama.cpp computes ends the run with KeyboardInterrupt, after the decode has stopped."""
    import _thread

    started = threading.Event()
    threads: list[threading.Thread] = []

    def add(*args: Any) -> Any:
        if not started.is_set():
            started.set()
            threads.append(threading.current_thread())
            _thread.interrupt_main()
        return dense_squares(*args)

    monkeypatch.setattr(observe, "dense_squares", add)
    with pytest.raises(KeyboardInterrupt):
        collect_imatrix(tiny, _chunks((100,) * 200), threads=1)
    assert started.is_set()
    assert threads[0] is not threading.main_thread()
    assert not threads[0].is_alive()


def test_a_context_without_a_callback_computes_the_same(tiny: Path) -> None:
    """Observing changes nothing of what is computed."""
    collector = Collector(Tensors(), read_header(tiny))
    tokens = _chunks((16,))[0]
    with Model.load(tiny, use_extra_bufts=False) as model:
        with Context(model, context_tokens=64, threads=1, max_outputs=16) as plain:
            plain.decode(tokens, 0, logits="all")
            expected = plain.all_logits()
        with _context(model, collector) as observed:
            observed.decode(tokens, 0, logits="all")
            assert np.array_equal(observed.all_logits(), expected)
    assert len(collector.entries()) == 3 * 7 + 1
