"""What a search for mixed types did: kept in the plan, so that it can be judged and repeated."""

from __future__ import annotations

from typing import Literal

from edgeq.record import Count, Record

__all__ = ["Calibration", "SearchRecord", "Trial"]


class Calibration(Record, frozen=True, kw_only=True):
    """The text that sensitivities were measured on.

    Attributes:
        source: ``"self"`` (the model wrote it), ``"file"`` or ``"builtin"``.
        name: for people.
        tokens: in all.
        chunks: texts that they come from.
        seed: of what was drawn at random; None if nothing was.
        text_sha256: of it.
        importance: where the column weights come from: ``"fisher"``, ``"activations"``, or an imatrix file's name.
    """

    source: Literal["self", "file", "builtin"]
    name: str
    tokens: Count
    chunks: Count
    seed: int | None
    text_sha256: str
    importance: str


class Trial(Record, frozen=True, kw_only=True):
    """One mix that was really quantized and judged.

    Attributes:
        label: how it was found.
        file_bytes: exact.
        predicted_kld: by the sensitivities, in nats.
        measured_kld: mean KL divergence on the selection text, in nats; every trial saw the same tokens.
        chosen: whether it became the plan.
    """

    label: str
    file_bytes: Count
    predicted_kld: float
    measured_kld: float
    chosen: bool


class SearchRecord(Record, frozen=True, kw_only=True):
    """How the types of a plan were found.

    Attributes:
        estimator: ``"fisher"`` or ``"imatrix"``.
        objective: what was minimised: ``"kld"``, ``"file_bytes"`` or ``"ns"``.
        predicted_kld: mean KL divergence that the sensitivities add up to, in nats.
        gap: proven bound of the objective's distance from the optimum of the predicted problem, relative.
        compensated: whether errors of a block are made up for by later columns.
        calibration: the text.
        costs: where the times of the types come from.
        trials: mixes that were measured; empty if only planned.
        selection: the text of the trials; empty without.
        selection_tokens: positions of it.
    """

    estimator: Literal["fisher", "imatrix"]
    objective: Literal["kld", "file_bytes", "memory_bytes", "ns"]
    predicted_kld: float
    gap: float
    compensated: bool
    calibration: Calibration
    costs: str
    trials: tuple[Trial, ...] = ()
    selection: str = ""
    selection_tokens: Count = 0
