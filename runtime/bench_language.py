"""A language model as the subject of a benchmark: prompts of one length, answers of one length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from edgeq.bundle import Bundle
from edgeq.errors import PromptTooLongError, SessionError
from edgeq.report import LanguageDetails, LanguageWorkload, Metric, metric, predictions
from edgeq.runtime.bench_messages import Generate, Load, Loaded, Sample
from edgeq.runtime.bench_process import WorkerProcess
from edgeq.runtime.bench_run import Ask, Findings, Run, Subject
from edgeq.runtime.bench_text import TEXT

__all__ = ["LanguageSubject", "prompts", "samples_per_answer"]

_PROMPT_STRIDE = 37


class LanguageSubject(Subject[Loaded, Sample]):
    """A bundle of a language model; see `Subject`.

    Args:
        bundle: that was verified.
        workload: what is asked of it.

    Raises:
        BundleError: another kind of bundle.
        PromptTooLongError: prompt and answer together do not fit the context.
    """

    ready = Loaded
    fewest_repetitions = 10
    fewest_loads = 1
    uncounted_loads = 0

    def __init__(self, bundle: Bundle, workload: LanguageWorkload) -> None:
        self._plan, self._workload = bundle.llm.plan, workload
        context_tokens = workload.context_tokens or self._plan.context_tokens
        wanted = workload.prompt_tokens + workload.output_tokens
        if wanted > context_tokens:
            raise PromptTooLongError(
                f"{workload.prompt_tokens} prompt and {workload.output_tokens} output tokens make {wanted}, "
                f"the context holds {context_tokens}",
                "Lower --prompt-tokens or --output-tokens",
            )
        self.load = Load(
            bundle=str(bundle.path), threads=workload.threads, context_tokens=workload.context_tokens, text=TEXT
        )
        self.per_repetition = samples_per_answer(workload)
        self.on_gpu = self._plan.gpu_layers != 0

    def ask(self, worker: WorkerProcess, loaded: Loaded) -> Ask[Sample]:
        """See `Subject.ask`; one answer at a time."""
        row, output_tokens = prompts(loaded.text_tokens, self._workload.prompt_tokens), self._workload.output_tokens

        def take(_most: int, _seconds: float) -> list[Sample]:
            sample = worker.request(Generate(prompt=next(row), max_tokens=output_tokens), Sample)
            if sample.n_tokens != output_tokens:
                raise SessionError(
                    f"The model stopped after {sample.n_tokens} of {output_tokens} tokens",
                    "Raise --context or lower --output-tokens",
                )
            return [sample]

        return take

    def findings(self, run: Run[Loaded, Sample], confidence: float) -> Findings:
        """See `Subject.findings`."""
        metrics = _answer_metrics(run.samples, confidence)
        unmeasured = {"latency_ms": "a language model has no latency of a single call; constrain ttft and itl"}
        for name in ("itl_ms", "tokens_per_s"):
            if name not in metrics:
                unmeasured[name] = "not measured: an answer of one token has no gap"
        predicted = self._plan.predicted
        return Findings(
            metrics=metrics,
            warmup=_answer_metrics(run.warmup, confidence),
            unmeasured=unmeasured,
            predicted=predictions(predicted, self._workload.prompt_tokens),
            details=LanguageDetails(context_tokens=run.loaded.context_tokens, predicted=predicted),
            notes=self._notes(run),
        )

    def _notes(self, run: Run[Loaded, Sample]) -> list[str]:
        prompt_tokens, predicted_prompt_tokens = self._workload.prompt_tokens, self._plan.predicted.prompt_tokens
        notes = []
        if prompt_tokens != predicted_prompt_tokens:
            notes.append(
                f"The plan predicts the time to first token for prompts of {predicted_prompt_tokens} tokens, "
                f"not {prompt_tokens}"
            )
        answered = prompt_tokens + self._workload.output_tokens
        if answered < self._plan.context_tokens:
            notes.append(
                f"Predicted times are means; inter-token latency and decode speed for a full context of "
                f"{self._plan.context_tokens} tokens, measured with at most {answered}"
            )
        cached = max(sample.cached_tokens for sample in run.samples)
        if cached > 0:
            notes.append(f"Up to {cached} of {prompt_tokens} prompt tokens were found in the cache")
        return notes


def samples_per_answer(workload: LanguageWorkload) -> Mapping[str, int]:
    """Samples that one answer gives, by `Budget` field."""
    gaps = workload.output_tokens - 1
    return {"ttft_ms": 1, "itl_ms": gaps, "tokens_per_s": min(gaps, 1)}


def prompts(text_tokens: Sequence[int], n_tokens: int) -> Iterator[list[int]]:
    """Endless prompts of exactly ``n_tokens``, cut from a text that is repeated as needed.

    Each begins with another token than the one before it, so that a cache of prefixes helps none of them. They need
    not make sense: the time that a prompt takes does not depend on what it says. The text must hold at least two
    different tokens.
    """
    size, start, first = len(text_tokens), 0, None
    while True:
        while text_tokens[start % size] == first:
            start += 1
        prompt = [text_tokens[(start + i) % size] for i in range(n_tokens)]
        yield prompt
        first = prompt[0]
        start += _PROMPT_STRIDE


def _answer_metrics(samples: Sequence[Sample], confidence: float) -> dict[str, Metric]:
    """Metrics of answers, by `Budget` field; those without a sample are left out."""
    found = {
        "ttft_ms": metric(
            "ms", "from the call to the first token", [s.ttft_ms for s in samples], confidence=confidence
        ),
        "itl_ms": metric(
            "ms", "every gap between two tokens", [gap for s in samples for gap in s.gaps_ms], confidence=confidence
        ),
        "tokens_per_s": metric(
            "tok/s",
            "of each answer after its first token",
            [1e3 * len(s.gaps_ms) / sum(s.gaps_ms) for s in samples if s.gaps_ms],
            confidence=confidence,
        ),
    }
    return {name: entry for name, entry in found.items() if entry.samples}
