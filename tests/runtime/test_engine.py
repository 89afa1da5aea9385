"""Taking over the cache of an earlier prompt must be exact to the bit, also where a sliding window forgets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgeq.runtime.engine import Engine, EngineSettings

VOCAB, WIDTH, HEADS, HEAD, HIDDEN, BLOCKS, WINDOW = 320, 64, 2, 32, 128, 6, 32
CHUNK = 16
SETTINGS = EngineSettings(context_tokens=512, ubatch_tokens=CHUNK, threads=1)


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 without a vocabulary: five blocks of six see only the last 32 tokens."""
    import gguf

    path = tmp_path_factory.mktemp("engine") / "gemma3.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(WINDOW)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")
    random = np.random.default_rng(7)

    def add(name: str, *shape: int) -> None:
        scale = 1.0 if len(shape) == 1 else 3.0 / np.sqrt(shape[-1])
        writer.add_tensor(name, (random.standard_normal(shape) * scale).astype(np.float32))

    add("token_embd.weight", VOCAB, WIDTH)
    add("output_norm.weight", WIDTH)
    for block in range(BLOCKS):
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add(f"blk.{block}.{norm}.weight", WIDTH)
        for norm in ("attn_q_norm", "attn_k_norm"):
            add(f"blk.{block}.{norm}.weight", HEAD)
        add(f"blk.{block}.attn_q.weight", HEADS * HEAD, WIDTH)
        add(f"blk.{block}.attn_k.weight", HEAD, WIDTH)
        add(f"blk.{block}.attn_v.weight", HEAD, WIDTH)
        add(f"blk.{block}.attn_output.weight", WIDTH, HEADS * HEAD)
        add(f"blk.{block}.ffn_gate.weight", HIDDEN, WIDTH)
        add(f"blk.{block}.ffn_up.weight", HIDDEN, WIDTH)
        add(f"blk.{block}.ffn_down.weight", WIDTH, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokens(seed: int, count: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, VOCAB, count, np.int32)


def run(engine: Engine, prompt: npt.NDArray[np.int32], n_decoded: int) -> tuple[int, npt.NDArray[np.float32]]:
    """Tokens taken over from before, and the logits after the prompt and ``n_decoded`` more tokens."""
    reused = position = engine.begin(prompt)
    while position < len(prompt):
        after = engine.prefill(prompt, position)
        assert after is not None
        position = after
    rows = [engine.context.logits().copy()]
    for step in range(n_decoded):
        assert engine.context.decode_one(int(rows[-1].argmax()), position + step)
        rows.append(engine.context.logits().copy())
    return reused, np.array(rows)


# llama.cpp gives the window at least 256 cells, so 400 tokens are needed until something is forgotten.
LONG = 400
CASES = [(common, before) for common in (0, CHUNK - 1, CHUNK, 35, 130) for before in (20, LONG)]


@pytest.mark.parametrize(
    ("model", "common", "before"),
    [("smollm2_gguf", 35, 70), *(("sliding", *case) for case in CASES)],
)
def test_logits_do_not_depend_on_what_was_asked_before(
    request: pytest.FixtureRequest, model: str, common: int, before: int
) -> None:
    path: Path = request.getfixturevalue(model)
    first = tokens(1, before)
    second = np.concatenate([first[:common], tokens(2, 5 * CHUNK + 9)])
    engine = Engine(path, SETTINGS)
    _, expected = run(engine, second, 3)
    engine.close()
    engine = Engine(path, SETTINGS)
    run(engine, first, 5)
    reused, rows = run(engine, second, 3)
    again, repeated = run(engine, second, 3)
    engine.close()
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(repeated, expected)
    if model == "smollm2_gguf":
        assert reused == common // CHUNK * CHUNK
        assert again == (len(second) - 1) // CHUNK * CHUNK
    else:
        assert reused == (0 if before == LONG else min(common, before) // CHUNK * CHUNK)


def test_an_interrupted_prompt_leaves_only_whole_chunks(smollm2_gguf: Path) -> None:
    prompt = tokens(3, 5 * CHUNK)
    engine = Engine(smollm2_gguf, SETTINGS)
    _, expected = run(engine, prompt, 2)
    engine.begin(tokens(4, CHUNK))
    assert engine.prefill(prompt, 0) == CHUNK
    engine.context.interrupt()
    assert engine.prefill(prompt, CHUNK) is None
    engine.context.resume()
    reused, rows = run(engine, prompt, 2)
    engine.close()
    assert reused == CHUNK
    np.testing.assert_array_equal(rows, expected)
