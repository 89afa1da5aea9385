from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.errors import SessionClosedError, SessionError, UsageError
from edgeq.ggml_types import TYPES
from edgeq.llama import KV_TYPES, Context, Model, capture_log, default_threads, library, system_info, versions

TEXT = "The robot moves to the charger, because its battery is low; then it waits until morning."


@pytest.fixture(scope="module")
def model(smollm2_gguf: Path) -> Iterator[Model]:
    with Model.load(smollm2_gguf) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def oracle(smollm2_gguf: Path) -> Iterator[Any]:
    import llama_cpp

    loaded = llama_cpp.Llama(
        str(smollm2_gguf), n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, flash_attn=True, verbose=False
    )
    yield loaded
    loaded.close()


def context(model: Model, **changes: Any) -> Context:
    return Context(model, **{"context_tokens": 256, "threads": 1, **changes})


def test_facts_of_the_model_equal_its_metadata(model: Model, oracle: Any) -> None:
    metadata = model.metadata()
    assert metadata == oracle.metadata
    assert model.n_layers == int(metadata["llama.block_count"]) == 30
    assert model.n_embd == int(metadata["llama.embedding_length"])
    assert model.n_ctx_train == int(metadata["llama.context_length"])
    assert model.n_vocab == oracle.n_vocab()
    assert model.eos == int(metadata["tokenizer.ggml.eos_token_id"])
    assert model.bos == int(metadata["tokenizer.ggml.bos_token_id"])
    assert model.chat_template == metadata["tokenizer.chat_template"]
    assert model.buffer_bytes == pytest.approx(model.path.stat().st_size, rel=0.05)


@pytest.mark.parametrize("text", ["", "Hello", "zero\0byte", "<|im_end|> ok", "ça 充電 \U0001f600", " \n\t x" * 300])
@pytest.mark.parametrize("parse_special", [True, False])
def test_tokenize_equals_llama_cpp_python_and_comes_back(
    model: Model, oracle: Any, text: str, parse_special: bool
) -> None:
    ids = model.tokenize(text, add_special=False, parse_special=parse_special)
    assert ids == oracle.tokenize(text.encode(), add_bos=False, special=parse_special)
    assert b"".join(model.token_bytes(token, special=True) for token in ids).decode() == text


def test_control_tokens(model: Model) -> None:
    assert model.eos is not None
    assert model.is_eog(model.eos)
    assert model.is_control(model.eos)
    assert model.token_bytes(model.eos) == b""
    assert model.token_bytes(model.eos, special=True) == b"<|im_end|>"
    assert not model.is_control(model.tokenize("a", add_special=False, parse_special=False)[0])


def test_text_that_is_no_unicode(model: Model) -> None:
    with pytest.raises(UsageError, match="lone surrogate at character 2"):
        model.tokenize("ab\ud800", add_special=False, parse_special=False)


@pytest.mark.parametrize("token", [-1, 49152, 2**31])
def test_tokens_outside_of_the_vocabulary(model: Model, token: int) -> None:
    for use in (model.token_bytes, model.is_eog, model.is_control):
        with pytest.raises(UsageError, match=f"{token} is not a token"):
            use(token)
    with context(model) as ctx, pytest.raises(UsageError, match="is not a token"):
        ctx.decode([1, token], 0, logits="last")


def test_a_model_without_a_vocabulary_computes_but_has_no_text(no_vocabulary_gguf: Path) -> None:
    """llama.cpp would end the process."""
    with Model.load(no_vocabulary_gguf) as nameless, context(nameless, context_tokens=64) as decoder:
        assert (nameless.n_vocab, nameless.bos, nameless.eos, nameless.add_bos) == (64, None, None, False)
        assert decoder.decode([1, 63], 0, logits="last")
        assert decoder.logits().shape == (64,)
        assert not nameless.is_eog(1)
        for use in (
            lambda: nameless.tokenize("x", add_special=False, parse_special=False),
            lambda: nameless.tokenize("", add_special=True, parse_special=True),
            lambda: nameless.token_bytes(1),
            lambda: nameless.token_bytes(1, special=True),
            lambda: nameless.is_control(1),
        ):
            with pytest.raises(SessionError, match=r"nameless\.gguf holds no vocabulary") as error:
                use()
            assert "\n" not in str(error.value)


def test_logits_of_all_positions_equal_llama_cpp_python(model: Model, oracle: Any) -> None:
    ids = model.tokenize(TEXT, add_special=True, parse_special=False)
    oracle.eval(ids)
    expected = np.array(oracle.scores[: len(ids)])
    with context(model, max_outputs=len(ids)) as ctx:
        assert ctx.decode(ids, 0, logits="all")
        rows = ctx.all_logits()
        assert rows.shape == (len(ids), model.n_vocab)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, expected, atol=1e-3)
        for index in (0, len(ids) - 1, -1, -len(ids)):
            np.testing.assert_array_equal(ctx.logits(index), rows[index])
        for index in (len(ids), -len(ids) - 1):
            with pytest.raises(IndexError):
                ctx.logits(index)


def test_decoding_in_steps_and_going_back(model: Model) -> None:
    ids = model.tokenize(TEXT, add_special=True, parse_special=False)
    with context(model) as ctx:
        ctx.decode(ids, 0, logits="last")
        whole = ctx.logits().copy()
        ctx.clear()
        ctx.decode(ids[:8], 0, logits="none")
        assert ctx.all_logits().shape == (0, model.n_vocab)
        for position, token in enumerate(ids[8:], start=8):
            ctx.decode_one(token, position)
        np.testing.assert_allclose(ctx.logits(), whole, atol=0.5)  # other kernels, other rounding
        assert ctx.logits().argmax() == whole.argmax()
        ctx.clear()
        ctx.decode(ids[:8], 0, logits="none")
        ctx.decode(ids[8:], 8, logits="last")
        first = ctx.logits().copy()
        assert ctx.keep(8)
        ctx.decode(ids[8:], 8, logits="last")
        np.testing.assert_array_equal(ctx.logits(), first)


def test_one_output_takes_less_memory_than_all(model: Model) -> None:
    with context(model, max_outputs=1) as one, context(model, max_outputs=256) as many:
        saved = many.buffer_bytes["compute"] - one.buffer_bytes["compute"]
        assert saved > 0.8 * 255 * model.n_vocab * 4 - 20 * 2**20
        # K and V, layers, cells, 3 heads of 64, f16; the log rounds to 0.01 MiB.
        assert one.buffer_bytes["kv"] == pytest.approx(2 * 30 * 256 * 192 * 2, abs=8192)


@pytest.mark.parametrize("kind", KV_TYPES)
def test_every_kv_type_decodes(model: Model, kind: str) -> None:
    ids = model.tokenize("The capital of France is", add_special=True, parse_special=False)
    with context(model, type_k=kind, type_v=kind) as ctx:
        ctx.decode(ids, 0, logits="last")
        assert model.token_bytes(int(ctx.logits().argmax())) in (b" Paris", b" the", b" located")
        blocks = 2 * 30 * 256 * 192 // TYPES[kind].block_weights
        assert ctx.buffer_bytes["kv"] == pytest.approx(blocks * TYPES[kind].block_bytes, abs=8192)


def test_contexts_that_cannot_be(model: Model, smollm2_gguf: Path) -> None:
    with pytest.raises(SessionError, match="V cache"):
        context(model, type_v="q8_0", flash_attention=False)
    with pytest.raises(UsageError, match="no type of a KV cache"):
        context(model, type_k="q2_k")
    with Model.load(smollm2_gguf, vocab_only=True) as vocabulary, pytest.raises(SessionError, match="vocab_only"):
        context(vocabulary)


def test_batches_that_cannot_be(model: Model) -> None:
    with context(model, batch_tokens=8) as ctx:
        for tokens in ([1] * 9, []):
            with pytest.raises(ValueError, match="batch of 8"):
                ctx.decode(tokens, 0, logits="none")
        with pytest.raises(ValueError, match="max_outputs=1"):
            ctx.decode([1, 1], 0, logits="all")
        with pytest.raises(SessionError, match="leave the context of 256"):
            ctx.decode([1] * 8, 250, logits="none")
        with pytest.raises(SessionError, match="leaves the context of 256"):
            ctx.decode_one(1, 256)
        ctx.decode([1], 0, logits="none")
        with pytest.raises(SessionError, match="refused the batch"):
            ctx.decode([1], 100, logits="none")  # nothing is between


def test_interrupt_stops_a_running_decode(model: Model) -> None:
    ids = (model.tokenize(TEXT, add_special=False, parse_special=False) * 20)[:256]
    with context(model) as ctx:
        timer = threading.Timer(0.02, ctx.interrupt)
        timer.start()
        finished = ctx.decode(ids, 0, logits="last")
        timer.join()
        assert not finished
        assert not ctx.decode(ids[:2], 0, logits="last"), "interrupt lasts until resume"
        ctx.resume()
        ctx.clear()
        assert ctx.decode(ids[:2], 0, logits="last")


def test_use_after_close(smollm2_gguf: Path) -> None:
    model = Model.load(smollm2_gguf)
    ctx = context(model)
    model.close()
    model.close()
    assert ctx.closed, "a context cannot outlive its model"
    for use in (
        lambda: ctx.decode([1], 0, logits="last"),
        lambda: ctx.decode_one(1, 0),
        lambda: ctx.keep(0),
        lambda: model.tokenize("x", add_special=False, parse_special=False),
        lambda: model.token_bytes(1),
        model.metadata,
        lambda: context(model),
    ):
        with pytest.raises(SessionClosedError, match="was closed"):
            use()
    ctx.interrupt()


def test_a_cycle_is_freed_in_the_right_order(smollm2_gguf: Path) -> None:
    code = f"""
import gc
from pathlib import Path
from edgeq.llama import Context, Model
class Cycle: pass
for _ in range(3):
    c = Cycle(); c.self = c
    c.model = Model.load(Path({str(smollm2_gguf)!r}))
    c.context = Context(c.model, context_tokens=256, threads=1)
    del c
gc.collect()
keep = Context(Model.load(Path({str(smollm2_gguf)!r})), context_tokens=256, threads=1)  # freed at exit
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("contents", "cause"),
    [(b"", "magic"), (b"no gguf at all", "magic"), (b"GGUF\x03\0\0\0" + b"\xff" * 64, "")],
)
def test_files_that_are_no_gguf(tmp_path: Path, capfd: pytest.CaptureFixture[str], contents: bytes, cause: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(contents)
    with pytest.raises(SessionError, match=f"bad.gguf cannot be loaded: .*{cause}") as caught:
        Model.load(path)
    assert "no reason" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", [2_000_000, 50_000_000])
def test_a_truncated_gguf(tmp_path: Path, smollm2_gguf: Path, size: int) -> None:
    path = tmp_path / "short.gguf"
    with smollm2_gguf.open("rb") as file:
        path.write_bytes(file.read(size))
    with pytest.raises(SessionError, match=r"short\.gguf cannot be loaded: .*(incomplete|read|bounds)"):
        Model.load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="does not exist"):
        Model.load(tmp_path / "none.gguf")


def test_loading_says_nothing_and_its_log_can_be_read(smollm2_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with capture_log() as log:
        library().llama_model_free(
            library().llama_model_load_from_file(str(smollm2_gguf).encode(), library().llama_model_default_params())
        )
    assert any("general.architecture" in line for line in log)
    assert not any("\n" in line for line in log)
    assert log.errors == []
    assert log.cause("nothing") == "nothing"
    assert capfd.readouterr() == ("", "")


def test_logs_of_threads_do_not_mix(tmp_path: Path) -> None:
    causes: dict[int, str] = {}

    def work(number: int) -> None:
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(str(number).encode() * 100)
        for _ in range(20):
            with pytest.raises(SessionError) as caught:
                Model.load(path)
            causes[number] = str(caught.value)
            assert f"'{str(number) * 4}'" in causes[number]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(causes) == 4
    assert all(f"'{str(number) * 4}'" in cause for number, cause in causes.items())


def test_the_table_of_types_equals_the_library() -> None:
    ggml = load_ggml()
    for kind in TYPES.values():
        assert ggml.ggml_blck_size(kind.id) == kind.block_weights, kind.name
        assert ggml.ggml_type_size(kind.id) == kind.block_bytes, kind.name
        assert ggml.ggml_type_name(kind.id).decode().lower() == kind.name


def load_ggml() -> ctypes.CDLL:
    library()
    from llama_cpp._ggml import libggml

    lib: ctypes.CDLL = libggml
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.ggml_type_name.restype = ctypes.c_char_p
    return lib


def test_threads_are_cores_that_this_process_may_use() -> None:
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from edgeq.llama import default_threads; print(default_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1\n"


def test_versions() -> None:
    import llama_cpp

    assert versions()["llama-cpp-python"] == llama_cpp.__version__
    assert versions()["llama.cpp"]
    assert "=" in system_info()


def test_a_dropped_model_is_freed(smollm2_gguf: Path) -> None:
    model = Model.load(smollm2_gguf, vocab_only=True)
    finalizer = model._finalizer
    del model
    gc.collect()
    assert not finalizer.alive
