"""Curvature by backward passes against gradients position by position, and against true KL divergences in torch."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from edgeq.converters.gguf.assemble import read_tensor
from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.sensitivity import fisher
from edgeq.converters.gguf.sensitivity.curvature import Curvature
from edgeq.converters.gguf.sensitivity.fisher import fisher_curvatures, fisher_memory_bytes
from edgeq.errors import UnsupportedModelError
from edgeq.ggml_blocks import dequantize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = ["llama-tied", "llama-untied", "qwen2", "phi3"]
VOCAB, SEED = 320, 3
Chunks = Sequence[npt.NDArray[np.int32]]
Doubles = npt.NDArray[np.float64]


def _chunks(*lengths: int, seed: int = 5) -> list[npt.NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    # Each begins with token 0, which is BOS and the padding too.
    return [np.append(0, rng.integers(1, VOCAB, n - 1)).astype(np.int32) for n in lengths]


def _fisher(folder: Path, chunks: Chunks, seed: int = SEED) -> dict[str, Curvature]:
    return fisher_curvatures(folder, chunks, seed=seed, threads=1, progress=lambda *_: None)


def _model(folder: Path, dtype: str = "float32") -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.get_input_embeddings().padding_idx = None  # or torch would give the padding's row no gradient
    return model.eval()


def _gguf_names(folder: Path, model: Any) -> dict[str, str]:
    """Names of torch's parameters to those of the GGUF, for all matrices, by the gguf package."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[json.loads((folder / "config.json").read_text())["model_type"]], 2)
    return {
        name: names.get_name(name, try_suffixes=(".weight",)) or name
        for name, p in model.named_parameters()
        if p.dim() == 2
    }


def _labels(log_p: Any, generator: Any) -> Any:
    return torch.multinomial(log_p.detach().exp(), 1, generator=generator)[:, 0]


def _position_gradients(model: Any, chunks: Chunks) -> Iterator[dict[str, Doubles]]:
    """For each text the sum of the gradients of single positions, each by a backward pass of its own."""
    generator = torch.Generator().manual_seed(SEED)
    for chunk in chunks:
        ids = torch.from_numpy(chunk.astype(np.int64))[None]
        labels = _labels(torch.log_softmax(model(ids).logits[0], -1), generator)
        total: dict[str, Doubles] = {}
        for position, label in enumerate(labels):
            model.zero_grad()
            torch.log_softmax(model(ids).logits[0, position], -1)[label].backward()
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    total[name] = total.get(name, 0.0) + parameter.grad.double().numpy()
        yield total


def _row_order(folder: Path, name: str, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
    """Which of torch's rows each row of the GGUF is, found by their contents."""
    header = read_header(folder.with_suffix(".gguf"))
    stored = dequantize(read_tensor(header, name), "f16", weights.shape[1])
    order = [int(np.flatnonzero((weights == row).all(axis=1))[0]) for row in stored]
    assert sorted(order) == list(range(len(weights)))
    return np.array(order)


@pytest.mark.parametrize("case", CASES)
def test_rows_and_columns_are_those_of_gradients_position_by_position(case: str, tiny_hf: Callable[..., Path]) -> None:
    folder = tiny_hf(case)
    model, chunks = _model(folder), _chunks(6, 5)
    rows: dict[str, Doubles] = {}
    columns: dict[str, Doubles] = {}
    for gradients in _position_gradients(model, chunks):
        for name, gradient in gradients.items():
            rows[name] = rows.get(name, 0.0) + np.square(gradient).sum(axis=1)
            columns[name] = columns.get(name, 0.0) + np.square(gradient).sum(axis=0)
    found = _fisher(folder, chunks)
    names = _gguf_names(folder, model)
    assert found.keys() == set(names.values())
    moved = set()
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2:
            continue
        curvature = found[names[name]]
        order = _row_order(folder, names[name], parameter.detach().numpy())
        if (order != np.arange(len(order))).any():
            moved.add(names[name].split(".")[2])
        total = rows[name].sum()
        assert curvature.rows == pytest.approx(rows[name][order] / 11, rel=2e-3, abs=1e-6 * total)
        assert curvature.columns == pytest.approx(columns[name] / total, rel=2e-3, abs=1e-6)
        assert float(curvature.rows.sum() * curvature.columns.sum()) == pytest.approx(total / 11, rel=1e-3)
    assert moved == ({"attn_q", "attn_k"} if case.startswith("llama") else set())


def _watched(model: Any, chunk: npt.NDArray[np.int32], labels: Any) -> dict[str, tuple[Doubles, Doubles, Doubles]]:
    """By parameter: each linear layer's inputs, their gradients through this layer alone, and those of its outputs."""
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    names = {id(p): name for name, p in model.named_parameters()}

    def before(module: Any, received: Any) -> Any:
        copied = received[0].clone()
        copied.retain_grad()
        inputs[names[id(module.weight)]] = copied
        return (copied,)

    def after(module: Any, _received: Any, result: Any) -> None:
        result.retain_grad()
        outputs[names[id(module.weight)]] = result

    handles = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    model.zero_grad()
    log_p = torch.log_softmax(model(torch.from_numpy(chunk.astype(np.int64))[None]).logits[0], -1)
    log_p.gather(1, labels[:, None]).sum().backward()
    for handle in handles:
        handle.remove()

    def array(tensor: Any) -> Doubles:
        return np.asarray(tensor.detach()[0].double().numpy())

    return {n: (array(x), array(x.grad), array(outputs[n].grad)) for n, x in inputs.items()}


def _rounded(x: Doubles, block: int) -> Doubles:
    """Eight bits for each activation and one scale for a block, as ggml's kernels take them."""
    blocks = x.reshape(len(x), -1, block)
    scale = np.maximum(np.abs(blocks).max(axis=2, keepdims=True) / 127, 1e-30)
    return np.asarray((np.rint(blocks / scale) * scale).reshape(x.shape))


@pytest.mark.parametrize("case", ["llama-tied", "phi3"])
def test_rounding_and_correlations_are_those_of_an_explicit_simulation(case: str, tiny_hf: Callable[..., Path]) -> None:
    folder = tiny_hf(case, width=256)
    model, chunks = _model(folder), _chunks(12, 9)
    generator = torch.Generator().manual_seed(SEED)
    seen = []
    for chunk in chunks:
        ids = torch.from_numpy(chunk.astype(np.int64))[None]
        seen.append(_watched(model, chunk, _labels(torch.log_softmax(model(ids).logits[0], -1), generator)))
    found, names = _fisher(folder, chunks), _gguf_names(folder, model)
    grams: dict[tuple[str, ...], Doubles] = {}
    for name in seen[0]:
        inputs, gradients, _ = (np.concatenate([of[name][i] for of in seen]) for i in range(3))
        for block in (32, 256):
            cost = np.square(gradients * (_rounded(inputs, block) - inputs)).sum() / 2 / 21
            assert found[names[name]].activation_kld[block] == pytest.approx(cost, rel=0.01)
    # Whoever multiplies the same input shares its correlations.
    for name, (inputs, _, _) in seen[0].items():
        group = tuple(other for other, (x, _, _) in seen[0].items() if np.array_equal(x, inputs))
        if group not in grams:
            weights = [np.sum([np.square(of[m][2]).sum(axis=1) for m in group], axis=0) for of in seen]
            parts = [(of[name][0] * w[:, None]).T @ of[name][0] for of, w in zip(seen, weights, strict=True)]
            grams[group] = np.sum(parts, axis=0)
        scale = np.sqrt(np.diag(grams[group]))
        expected = grams[group] / scale / scale[:, None]
        correlation = found[names[name]].correlation
        assert correlation is not None
        assert (np.diag(correlation) == 1).all()
        if names[name] == "token_embd.weight":
            strength = correlation[expected > 0.9].mean()
            assert 0.2 < strength <= 1, "weakened by what the embedding does as a table"
        else:
            assert np.abs(correlation - expected).max() < 2e-3
            assert all(found[names[member]].correlation is correlation for member in group)
    sizes = sorted(len(group) for group in grams)
    assert sizes == ([1, 1, 1, 1, 1, 2, 2, 3, 3] if case == "llama-tied" else [1] * 9)


def _mean_kld(reference: Any, changed: Any, chunks: Chunks) -> float:
    total = 0.0
    with torch.no_grad():
        for chunk in chunks:
            ids = torch.from_numpy(chunk.astype(np.int64))[None]
            p, q = (torch.log_softmax(model(ids).logits[0], -1) for model in (reference, changed))
            total += float((p.exp() * (p - q)).sum())
    return total / sum(map(len, chunks))


@pytest.mark.parametrize("case", ["llama-untied", "qwen2"])
def test_predicted_kl_is_the_true_kl_of_small_changes(case: str, tiny_hf: Callable[..., Path]) -> None:
    """Many labels for a few texts take the noise out; what is left is whether the theory holds."""
    folder = tiny_hf(case)
    texts = _chunks(24, 24, 24)
    curvatures = _fisher(folder, texts * 25)
    reference = _model(folder, "float64")
    names, stored = _gguf_names(folder, reference), dict(reference.named_parameters())
    rng = np.random.default_rng(0)
    ratios = {}
    for role in ("attn_q", "attn_v", "attn_output", "ffn_up", "ffn_down", "token_embd"):
        true = predicted = 0.0
        for _ in range(4):
            changed = copy.deepcopy(reference)
            for name, parameter in changed.named_parameters():
                if role not in names.get(name, ""):
                    continue
                # Errors whose size differs by row and by column, as those of blocks do.
                noise = rng.standard_normal(parameter.shape) * rng.lognormal(0, 0.5, (1, parameter.shape[1]))
                errors = 2e-4 * (noise * rng.lognormal(0, 0.5, (parameter.shape[0], 1))).astype(np.float32)
                with torch.no_grad():
                    parameter.add_(torch.from_numpy(errors.astype(np.float64)))
                order = _row_order(folder, names[name], stored[name].detach().float().numpy())
                predicted += curvatures[names[name]].weight_kld(errors[order])
            true += _mean_kld(reference, changed, texts)
        ratios[role] = predicted / true
    assert all(0.75 < ratio < 1.33 for ratio in ratios.values()), ratios


def test_predicted_kl_of_rounded_activations_is_the_true_one(tiny_hf: Callable[..., Path]) -> None:
    folder, texts = tiny_hf("llama-untied"), _chunks(24, 24, 24)
    predicted = sum(curvature.activation_kld[32] for curvature in _fisher(folder, texts * 20).values())
    reference = _model(folder, "float64")
    rounded = copy.deepcopy(reference)

    def round_inputs(_module: Any, received: Any) -> Any:
        return (torch.from_numpy(_rounded(received[0][0].numpy(), 32))[None],)

    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(round_inputs)
    assert predicted == pytest.approx(_mean_kld(reference, rounded, texts), rel=0.3)


def test_rows_of_no_multiple_of_the_block_have_no_rounding_of_it(tiny_hf: Callable[..., Path]) -> None:
    found = _fisher(tiny_hf("llama-untied"), _chunks(5))
    for name, curvature in found.items():
        looked_up = name == "token_embd.weight"
        assert (curvature.activation_kld[32] == 0) == looked_up
        assert curvature.activation_kld[256] == 0
        assert (curvature.correlation is None) == looked_up


def test_the_seed_draws_the_labels_and_progress_counts_texts(tiny_hf: Callable[..., Path]) -> None:
    folder, chunks = tiny_hf("llama-tied"), _chunks(7, 4)
    seen: list[tuple[int, int]] = []
    before = torch.get_num_threads()
    first = fisher_curvatures(folder, chunks, seed=1, threads=1, progress=lambda *a: seen.append(a[:2]))
    assert torch.get_num_threads() == before
    assert seen == [(0, 2), (1, 2)]
    again, other = _fisher(folder, chunks, 1), _fisher(folder, chunks, 2)
    name = "blk.1.ffn_up.weight"
    assert np.array_equal(first[name].rows, again[name].rows)
    assert not np.allclose(first[name].rows, other[name].rows)


def test_very_wide_inputs_keep_their_diagonal_only(
    tiny_hf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, "MAX_CORRELATED", 64)
    found = _fisher(tiny_hf("llama-tied"), _chunks(5))
    for name, curvature in found.items():
        assert (curvature.correlation is None) == ("ffn_down" in name)  # 128 columns


def test_an_interrupt_leaves_torch_as_it_was(tiny_hf: Callable[..., Path]) -> None:
    before = torch.get_num_threads()

    def stop(done: int, _total: int, _detail: str) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fisher_curvatures(tiny_hf("llama-tied"), _chunks(5, 5), seed=0, threads=before + 1, progress=stop)
    assert torch.get_num_threads() == before


def _copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def test_models_that_transformers_cannot_load_name_the_other_estimator(
    tiny_hf: Callable[..., Path], tmp_path: Path
) -> None:
    folder = _copy(tiny_hf("llama-tied"), tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=r"transformers cannot load.*estimator imatrix") as error:
        _fisher(folder, _chunks(5))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("eps", "match"), [(0.0, "NaN or infinite"), (1e-38, "overflow")])
def test_figures_without_limits_are_refused(
    eps: float, match: str, tiny_hf: Callable[..., Path], tmp_path: Path
) -> None:
    """A row of zeros in the embedding: normalising it divides by the root of eps."""
    from safetensors.numpy import load_file, save_file

    folder = _copy(tiny_hf("llama-untied"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": eps}))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = 0.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=match):
        _fisher(folder, [np.array([7, 8, 9], np.int32)])


def _too_large_for_torch(*_args: Any, **_options: Any) -> None:
    torch.empty(1 << 50)


def _too_large_for_numpy(*_args: Any, **_options: Any) -> None:
    np.zeros(1 << 60, np.uint8)


@pytest.mark.parametrize("fail", [_too_large_for_torch, _too_large_for_numpy])
@pytest.mark.parametrize("where", ["_load", "_one_sequence", "_curvature"])
def test_too_little_memory_names_the_other_estimator_and_keeps_nothing(
    where: str, fail: Callable[..., None], tiny_hf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, where, fail)
    before = torch.get_num_threads()
    with pytest.raises(UnsupportedModelError, match=r"too little memory for gradients.*estimator imatrix") as error:
        _fisher(tiny_hf("llama-tied"), _chunks(5))
    assert error.value.__context__ is None, "a traceback would keep the model in memory"
    assert torch.get_num_threads() == before


def test_other_errors_of_torch_stay_what_they_are(
    tiny_hf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, "_one_sequence", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        _fisher(tiny_hf("llama-tied"), _chunks(5))


def test_memory_is_counted_with_the_vocabulary() -> None:
    matrices = [(64, 64)] * 8
    small, large = ([(64, n_vocab), *matrices, (64,)] for n_vocab in (1000, 262_144))
    logits = 256 * (262_144 - 1000) * 4
    weights = 2 * 64 * (262_144 - 1000) * 4
    more = fisher_memory_bytes(large) - fisher_memory_bytes(small)
    # Of a model of that width and vocabulary, 4.1 arrays as large as the logits were seen at the peak.
    assert 4.1 * logits + weights < more < 6 * logits + weights
    assert fisher_memory_bytes(large, chunk_tokens=512) - fisher_memory_bytes(large) == 5 * 256 * 262_144 * 4
    assert fisher_memory_bytes([(64,)]) >= 1 << 30
