"""The last word on quality: the finished file against the unquantized model, on text that nothing was made for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeq.converters.calibration.overlap import refuse_overlap
from edgeq.converters.gguf.divergence import Judge
from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.judgement import summarize
from edgeq.converters.gguf.sensitivity.evidence import Evidence, Workshop
from edgeq.errors import BudgetError
from edgeq.gates import check_gates
from edgeq.planner.decide import Found, searched_plan
from edgeq.planner.plan import Request
from edgeq.planner.problem import Problem, SearchOptions
from edgeq.planner.search import Demand, Goal, held_out_text, selection_text
from edgeq.types import Quality

__all__ = ["USUAL_TOKENS", "Inspector", "QualityOptions", "judged_plan"]

Progress = Callable[[str, int, int, str], None]

_ROUNDS = 3
USUAL_TOKENS, _TOKENS_OF_PRESET = 4096, 1024
_NOISE_CHUNKS = 2
_SAFETY = 0.98  # how much further than needed the next round goes


@dataclasses.dataclass(frozen=True)
class QualityOptions:
    """On what a finished model is judged.

    Attributes:
        text: a file; None for the text inside Python.
        tokens: of it; 0 measures nothing, None takes enough for a search or a limit, and fewer for a preset.
    """

    text: Path | None = None
    tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Inspector:
    """Judges artifacts of one reference.

    Attributes:
        reference: the float GGUF.
        options: the text.
        goal: limits on quality.
        threads: 0 for the machine's cores.
        progress: told stage, done, total, detail.
    """

    reference: Path
    options: QualityOptions
    goal: Goal
    threads: int
    progress: Progress

    def judge(
        self, artifact: Path, evidence: Evidence | None, *, kv_type: str = "f16", part: int = 0
    ) -> Quality | None:
        """The figures for a manifest; None if no tokens were asked for.

        Args:
            artifact: the finished model.
            evidence: what its search stood on, if there was one.
            kv_type: of the KV cache that it is meant to run with.
            part: how many judgements there were before, each of which had a text of its own.

        Raises:
            UsageError: the text overlaps the calibration's or that of the trials, or is too short.
        """
        tokens = self.options.tokens
        if tokens is None:
            tokens = _TOKENS_OF_PRESET if evidence is None and self.goal == Goal() else USUAL_TOKENS
        if tokens <= 0:
            return None
        text = held_out_text(self.reference, self.options.text, tokens, part)
        overlap = None
        if evidence is not None:
            overlap = refuse_overlap(evidence.text, text)
            if text.source == "file":  # the halves of the built-in text share nothing
                refuse_overlap(selection_text(self.reference), text)
        with Judge(self.reference, text.chunks, threads=self.threads or None) as judge:
            divergence = judge.compare(
                [artifact],
                kv_type=kv_type,
                progress=lambda done, total, _what: self.progress("measure quality", done, total, text.name),
            )[0]
            noise = judge.noise_floor(n_chunks=_NOISE_CHUNKS)
        embedding = read_header(self.reference).tensors.get("token_embd.weight")
        reference = embedding.type if embedding is not None else "f16"
        return summarize(divergence, text, noise_floor=noise, overlap=overlap, reference=reference, kv_type=kv_type)

    def missed(self, quality: Quality | None, predicted_kld: float | None) -> list[str]:
        """What the limits on quality say, one line for each that is not met."""
        if quality is None:
            given = self.goal.max_kld is not None or self.goal.min_top1 is not None
            return ["quality is limited and was not measured"] if given else []
        verdicts = check_gates(
            quality, max_kld=self.goal.max_kld, min_top1=self.goal.min_top1, predicted_kld=predicted_kld
        )
        return [
            f"{v.label} {v.measured:.4g}, limit {v.limit:g}: {v.result}, {v.reason}"
            for v in verdicts
            if v.result != "PASS"
        ]

    def refuse_missed(self, quality: Quality | None, predicted_kld: float | None) -> None:
        """Raise BudgetError unless every limit on quality is met with confidence."""
        if missed := self.missed(quality, predicted_kld):
            raise BudgetError(
                f"The model misses its quality limit: {missed[0]}",
                "Raise the limit, allow more bytes, or judge on more text with --eval-tokens",
                details=tuple(missed[1:]),
            )


def judged_plan(
    problem: Problem,
    demand: Demand,
    request: Request,
    options: SearchOptions,
    shop: Workshop,
    notes: Sequence[str],
    inspector: Inspector,
    artifact: Path,
) -> tuple[Found, Quality | None]:
    """Search, judge on held-out text, and where a limit on KL is missed by a little, search again for less.

    Each judgement reads another part of the text, so that the last one was not aimed at what it is judged by.

    Args:
        problem: the model on its device.
        demand: limits and settings.
        request: what the user asked for.
        options: how to search; at least one trial is made, since it makes the file.
        shop: where and how.
        notes: for the plan.
        inspector: judges.
        artifact: where the model goes.

    Raises:
        BudgetError: a limit on quality is not met.
    """
    options = dataclasses.replace(options, trials=max(1, options.trials))

    def attempt(aim: float | None, part: int) -> tuple[Found, Quality | None]:
        goal = dataclasses.replace(demand.goal, max_kld=aim)
        found = searched_plan(problem, dataclasses.replace(demand, goal=goal), request, options, shop, notes)
        if found.file is None:
            message = "a search with trials made no file"
            raise AssertionError(message)
        found.file.replace(artifact)
        kv_type = demand.settings.kv_type
        return found, inspector.judge(artifact, problem.evidence, kv_type=kv_type, part=part)

    aim = demand.goal.max_kld
    found, quality = attempt(aim, 0)
    for part in range(1, _ROUNDS):
        if aim is None or (aim := _closer(aim, demand, quality, inspector)) is None:
            break
        try:
            found, quality = attempt(aim, part)
        except BudgetError:  # nothing is closer: what was found before misses the limit that the user set
            break
    inspector.refuse_missed(quality, None if found.plan.search is None else found.plan.search.predicted_kld)
    return found, quality


def _closer(aim: float, demand: Demand, quality: Quality | None, inspector: Inspector) -> float | None:
    """The mean KL to aim for next; None if all limits are met, or if another aim would change nothing."""
    limit = demand.goal.max_kld
    if quality is None or limit is None or not inspector.missed(quality, None):
        return None
    if demand.goal.objective(demand.asked) == "kld":  # it is as close as can be already
        return None
    upper = quality.mean_kld_interval.high
    if upper is None or upper <= limit:  # it is another limit that is missed
        return None
    return aim * _SAFETY * limit / upper
