from __future__ import annotations

import gc
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeq.errors import PromptTooLongError, SessionClosedError, SessionError, UsageError
from edgeq.runtime.engine import EngineSettings
from edgeq.runtime.generation import Generation, Token
from edgeq.runtime.llm import LLMSession

PROMPTS = ["The capital of France is", "A robot arm has six", "def fibonacci(n):\n", "Once upon a time, in a"]
LONG = "The robot moves to the charger and waits. " * 22  # 199 tokens, in four chunks


def open_session(path: Path, context_tokens: int = 512) -> LLMSession:
    return LLMSession(path, EngineSettings(context_tokens=context_tokens, threads=1))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_equals_llama_cpp_python(session: LLMSession, oracle: Any, prompt: str) -> None:
    expected = oracle.create_completion(prompt, max_tokens=20, temperature=0.0, repeat_penalty=1.0)["choices"][0]
    ours = session.generate(prompt, max_tokens=20)
    assert ours.text == expected["text"]
    assert ours.finish_reason == expected["finish_reason"]


@pytest.fixture(scope="module")
def oracle(smollm2_gguf: Path) -> Iterator[Any]:
    import llama_cpp

    model = llama_cpp.Llama(
        str(smollm2_gguf), n_ctx=512, n_batch=64, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False
    )
    yield model
    model.close()


def test_messages_are_answered_and_the_turn_ends_by_itself(session: LLMSession) -> None:
    answer = session.generate([{"role": "user", "content": "What is 2+2?"}], max_tokens=24)
    assert "4" in answer.text
    assert answer.finish_reason == "stop"
    assert "<|im_end|>" not in answer.text


def test_timings_add_up(session: LLMSession) -> None:
    answer = session.generate(PROMPTS[0], max_tokens=16)
    timings = answer.timings
    assert len(answer.token_ids) == 16
    assert len(timings.gaps_ms) == 15
    assert timings.ttft_ms is not None
    assert timings.ttft_ms == pytest.approx(timings.queue_ms + timings.prompt_ms)
    assert timings.ttft_ms + sum(timings.gaps_ms) <= timings.total_ms
    assert timings.tokens_per_s == pytest.approx(15_000 / sum(timings.gaps_ms))
    assert answer.prompt_tokens == len(session.tokenize(PROMPTS[0]))


def test_the_callers_own_time_is_no_gap(session: LLMSession) -> None:
    slow = session.generate(PROMPTS[0], max_tokens=6, on_token=lambda _: time.sleep(0.2))
    assert sum(slow.timings.gaps_ms) < slow.timings.total_ms - 5 * 200


def test_stream_gives_the_same_as_generate(session: LLMSession) -> None:
    with session.stream(PROMPTS[1], max_tokens=20, stop=["zzz"]) as stream:
        tokens = list(stream)
    whole = session.generate(PROMPTS[1], max_tokens=20)
    assert "".join(token.text for token in tokens) == stream.result.text == whole.text
    assert tuple(token.id for token in tokens if token.id is not None) == whole.token_ids
    assert [token.gap_ms for token in tokens[1:]] == list(stream.result.timings.gaps_ms)


def test_on_token_sees_every_token(session: LLMSession) -> None:
    seen: list[Token] = []
    answer = session.generate(PROMPTS[0], max_tokens=8, on_token=seen.append)
    assert "".join(token.text for token in seen) == answer.text


@pytest.mark.parametrize("length", [1, 3, 9])
def test_stop_strings_across_token_borders(session: LLMSession, length: int) -> None:
    full = session.generate(PROMPTS[3], max_tokens=24).text
    for start in range(4, len(full) - length, 20):
        stop = full[start : start + length]
        with session.stream(PROMPTS[3], max_tokens=24, stop=stop) as stream:
            shown = [token.text for token in stream]
        answer = stream.result
        assert answer.text == "".join(shown) == full[: full.index(stop)]
        assert answer.finish_reason == "stop"


def test_characters_of_several_tokens_come_out_whole(session: LLMSession) -> None:
    prompt = session.tokenize(
        "Repeat: \U0001f916\U0001f916\U0001f916\U0001f916\U0001f916\U0001f916 \U0001f916\U0001f916"
    )
    seen: list[str] = []
    session.generate(prompt, max_tokens=24, on_token=lambda token: seen.append(token.text))
    assert not any("\ufffd" in text for text in seen)
    assert "\U0001f916" in "".join(seen)


def test_the_same_seed_gives_the_same_text(session: LLMSession) -> None:
    first, second = (session.generate(PROMPTS[3], max_tokens=24, temperature=1.0, seed=7).text for _ in range(2))
    others = {session.generate(PROMPTS[3], max_tokens=24, temperature=1.0, seed=seed).text for seed in range(8, 11)}
    assert first == second
    assert len(others | {first}) > 1
    unseeded = {session.generate(PROMPTS[3], max_tokens=24, temperature=1.0).text for _ in range(3)}
    assert len(unseeded) > 1


def test_sampling_with_one_candidate_is_greedy(session: LLMSession) -> None:
    greedy = session.generate(PROMPTS[0], max_tokens=12).text
    assert session.generate(PROMPTS[0], max_tokens=12, temperature=1.5, top_k=1).text == greedy
    assert session.generate(PROMPTS[0], max_tokens=12, temperature=1.5, top_k=0, top_p=1e-6).text == greedy
    assert session.generate(PROMPTS[0], max_tokens=12, temperature=1.5, top_k=0, top_p=1.0, min_p=1.0).text == greedy


def test_a_cached_prefix_changes_nothing(smollm2_gguf: Path) -> None:
    with open_session(smollm2_gguf) as session:
        ids = session.tokenize(LONG)
        other = ids[:150] + session.tokenize(" Then it turns around and looks for")
        fresh = [session.generate(prompt, max_tokens=12) for prompt in (ids, other)]
    with open_session(smollm2_gguf) as session:
        session.generate(ids, max_tokens=12)
        again = [session.generate(prompt, max_tokens=12) for prompt in (ids, other, ids)]
    assert [a.token_ids for a in again] == [fresh[0].token_ids, fresh[1].token_ids, fresh[0].token_ids]
    assert [a.timings.cached_tokens for a in again] == [(len(ids) - 1) // 64 * 64, 128, 128]
    assert fresh[0].timings.cached_tokens == 0


def test_max_tokens_is_cut_at_the_end_of_the_context(smollm2_gguf: Path) -> None:
    with open_session(smollm2_gguf, context_tokens=64) as session:
        prompt = session.tokenize(LONG)[:60]
        answer = session.generate(prompt, max_tokens=50, ignore_eos=True)
        assert (len(answer.token_ids), answer.finish_reason) == (5, "length")
        full = session.generate(session.tokenize(LONG)[:64], max_tokens=50, ignore_eos=True)
        assert (len(full.token_ids), full.finish_reason) == (1, "length")
        with pytest.raises(PromptTooLongError, match=r"65 tokens.*holds 64"):
            session.generate(session.tokenize(LONG)[:65])


def test_ignore_eos_gives_the_exact_length(session: LLMSession) -> None:
    messages = [{"role": "user", "content": "What is 2+2?"}]
    assert session.generate(messages, max_tokens=30).finish_reason == "stop"
    answer = session.generate(messages, max_tokens=30, ignore_eos=True)
    assert (len(answer.token_ids), answer.finish_reason) == (30, "length")


def test_a_deadline_in_the_prompt(session: LLMSession) -> None:
    whole = session.generate(LONG.upper()[:400], max_tokens=1).timings.total_ms
    answer = session.generate(LONG.swapcase()[:400], max_tokens=400, deadline_ms=whole / 10)
    assert (answer.finish_reason, answer.text, answer.timings.ttft_ms) == ("deadline", "", None)
    assert answer.timings.total_ms >= whole / 10
    assert answer.timings.total_ms < whole


def test_a_deadline_in_the_answer_keeps_the_text_so_far(session: LLMSession) -> None:
    full = session.generate(PROMPTS[0], max_tokens=60, ignore_eos=True)
    deadline = full.timings.total_ms / 2
    answer = session.generate(PROMPTS[0], max_tokens=500, ignore_eos=True, deadline_ms=deadline)
    assert answer.finish_reason == "deadline"
    assert answer.timings.total_ms >= deadline
    common = min(len(full.token_ids), len(answer.token_ids))
    assert common > 0
    assert full.token_ids[:common] == answer.token_ids[:common]
    assert answer.text


def test_a_deadline_in_the_queue(session: LLMSession) -> None:
    with running(session, PROMPTS[0]) as thread:
        answer = session.generate(PROMPTS[1], deadline_ms=30)
        assert thread.is_alive()
    assert (answer.finish_reason, answer.token_ids, answer.timings.ttft_ms) == ("deadline", (), None)
    assert answer.timings.queue_ms >= 30


class running:
    """A generation that goes on in another thread until the block ends."""

    def __init__(self, session: LLMSession, prompt: str) -> None:
        self.session = session
        self.started = threading.Event()
        self.result: Generation | None = None
        self.thread = threading.Thread(target=self._run, args=(prompt,))

    def _run(self, prompt: str) -> None:
        self.result = self.session.generate(
            prompt, max_tokens=10**6, ignore_eos=True, on_token=lambda _: self.started.set()
        )

    def __enter__(self) -> threading.Thread:
        self.thread.start()
        assert self.started.wait(60)
        return self.thread

    def __exit__(self, *_: object) -> None:
        self.session.cancel()
        self.thread.join(60)
        assert not self.thread.is_alive()


def test_cancel_from_another_thread(session: LLMSession) -> None:
    block = running(session, PROMPTS[0])
    with block:
        pass
    assert block.result is not None
    assert block.result.finish_reason == "cancelled"
    assert block.result.token_ids
    assert session.generate(PROMPTS[0], max_tokens=8).finish_reason == "length"


def test_cancel_stops_a_long_prompt_at_once(session: LLMSession) -> None:
    text = "Quite another text, so that nothing is cached. " * 20
    whole = session.generate(text, max_tokens=1).timings.total_ms
    timer = threading.Timer(whole / 10_000, session.cancel)
    timer.start()
    answer = session.generate(text.replace("Quite", "Yet"), max_tokens=1)
    assert answer.finish_reason == "cancelled"
    assert session.generate(PROMPTS[0], max_tokens=8).text == session.generate(PROMPTS[0], max_tokens=8).text


def test_cancel_without_a_request_does_nothing(session: LLMSession) -> None:
    session.cancel()
    assert session.generate(PROMPTS[0], max_tokens=4).finish_reason == "length"


def test_four_threads_give_the_same_texts_as_one(session: LLMSession) -> None:
    prompts = [PROMPTS[0], LONG, LONG[:400] + " And then"]
    sequential = [session.generate(prompt, max_tokens=8, temperature=0.7, seed=5) for prompt in prompts]
    results: dict[int, list[Generation]] = {}

    def work(number: int) -> None:
        order = prompts[number:] + prompts[:number]
        answers = [session.generate(prompt, max_tokens=8, temperature=0.7, seed=5) for prompt in order]
        results[number] = answers[len(prompts) - number :] + answers[: len(prompts) - number]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for number in range(4):
        assert [answer.token_ids for answer in results[number]] == [answer.token_ids for answer in sequential]
    assert max(answer.timings.queue_ms for answers in results.values() for answer in answers) > 10


def test_an_exception_of_on_token_leaves_the_session_usable(session: LLMSession) -> None:
    def fail(token: Token) -> None:
        raise ZeroDivisionError(token.text)

    with pytest.raises(ZeroDivisionError):
        session.generate(PROMPTS[0], on_token=fail)
    assert session.generate(PROMPTS[0], max_tokens=4).finish_reason == "length"


def test_keyboard_interrupt_leaves_the_session_usable(session: LLMSession) -> None:
    import _thread

    expected = session.generate(LONG, max_tokens=8).text
    session.generate(PROMPTS[0], max_tokens=2)  # so that LONG is computed again
    timer = threading.Timer(0.05, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        session.generate(LONG, max_tokens=10**6, ignore_eos=True)
    assert session.generate(LONG, max_tokens=8).text == expected


def test_a_stream_that_is_left_gives_the_session_back(session: LLMSession) -> None:
    with session.stream(PROMPTS[0]) as stream:
        for _ in stream:
            break
    assert stream.result.finish_reason == "cancelled"
    assert len(stream.result.token_ids) == 1
    for _ in session.stream(PROMPTS[0]):  # no `with`: dropped by the garbage collector
        break
    gc.collect()
    assert session.generate(PROMPTS[0], max_tokens=4).finish_reason == "length"


def test_a_stream_that_was_never_started_holds_nothing(session: LLMSession) -> None:
    stream = session.stream(PROMPTS[0])
    with pytest.raises(SessionError, match="not at its end"):
        _ = stream.result
    assert session.generate(PROMPTS[0], max_tokens=4).finish_reason == "length"
    stream.close()
    assert stream.result.token_ids == ()


def test_a_second_request_inside_of_a_stream_is_refused_instead_of_hanging(session: LLMSession) -> None:
    with session.stream(PROMPTS[0], max_tokens=8) as stream:
        next(stream)
        with pytest.raises(SessionError, match="this thread has an unfinished stream"):
            session.generate(PROMPTS[1])
        assert len(list(stream)) == 7


def test_stream_cancel(session: LLMSession) -> None:
    with session.stream(PROMPTS[0], max_tokens=10**6, ignore_eos=True) as stream:
        for number, _ in enumerate(stream):
            if number == 3:
                stream.cancel()
    assert (stream.result.finish_reason, len(stream.result.token_ids)) == ("cancelled", 4)


def test_close_while_another_thread_generates(smollm2_gguf: Path) -> None:
    session = open_session(smollm2_gguf)
    block = running(session, PROMPTS[0])
    refused: list[BaseException] = []

    def wait_in_queue() -> None:
        try:
            session.generate(PROMPTS[1])
        except SessionClosedError as error:
            refused.append(error)

    with block:
        waiting = threading.Thread(target=wait_in_queue)
        waiting.start()
        while len(session._turns._queue) < 2:
            time.sleep(0.001)
        session.close()
        waiting.join(60)
    assert block.result is not None
    assert block.result.finish_reason == "cancelled"
    assert len(refused) == 1


def test_close_ends_an_idle_stream(smollm2_gguf: Path) -> None:
    session = open_session(smollm2_gguf)
    stream = session.stream(PROMPTS[0])
    first = next(stream)
    session.close()
    assert list(stream) == []
    assert (stream.result.text, stream.result.finish_reason) == (first.text, "cancelled")


def test_use_after_close(smollm2_gguf: Path) -> None:
    with open_session(smollm2_gguf) as session:
        stream = session.stream(PROMPTS[0])
    session.close()
    for use in (
        lambda: session.generate(PROMPTS[0]),
        lambda: session.tokenize("x"),
        lambda: session.render([{"role": "user", "content": "x"}]),
        lambda: next(stream),
    ):
        with pytest.raises(SessionClosedError, match="closed"):
            use()
    session.cancel()


def test_a_session_that_is_dropped_says_so_and_frees_its_memory(smollm2_gguf: Path) -> None:
    session = open_session(smollm2_gguf)
    context = session._engine.context
    with pytest.warns(ResourceWarning, match="unclosed <LLMSession"):
        del session
    assert context.closed


def test_a_closed_session_warns_of_nothing(smollm2_gguf: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_session(smollm2_gguf) as session:
            session.generate(PROMPTS[0], max_tokens=2, temperature=1.0, deadline_ms=60_000)
        del session
        gc.collect()


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 2**32 - 1},
        {"deadline_ms": 0},
        {"stop": ""},
    ],
)
def test_arguments_that_make_no_sense(session: LLMSession, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(arguments))):
        session.generate(PROMPTS[0], **arguments)


def test_a_bare_gguf_has_no_manifest(session: LLMSession) -> None:
    with pytest.raises(SessionError, match="no manifest"):
        _ = session.manifest


def test_a_model_without_a_vocabulary_is_refused_at_once(no_vocabulary_gguf: Path) -> None:
    with pytest.raises(SessionError, match=r"nameless\.gguf holds no vocabulary"):
        LLMSession(no_vocabulary_gguf, EngineSettings(context_tokens=64, threads=1))
