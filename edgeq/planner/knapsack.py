"""The multiple-choice knapsack of the planner: every tensor takes exactly one type, sums are held to limits.

Records that callers build and read, and the padded arrays that the solvers compute with. Bytes are exact integers and
never exceeded; nanoseconds and KL divergence are predictions in floating point, whose sums are held to their limits
with a relative slack of `FLOAT_SLACK`, so that a solution's own figure can be given back as a limit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "BYTES",
    "FLOAT_SLACK",
    "QUANTITIES",
    "Infeasible",
    "Item",
    "Knapsack",
    "Limits",
    "Objective",
    "Option",
    "Quantity",
    "Solution",
    "Table",
    "upper_limit",
]

Objective = Literal["kld", "file_bytes", "memory_bytes", "ns"]
Quantity = Literal["kld", "file_bytes", "memory_bytes", "ns", "prompt_ns"]
Floats = npt.NDArray[np.float64]
Choice = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]

QUANTITIES: tuple[Quantity, ...] = ("file_bytes", "memory_bytes", "ns", "prompt_ns", "kld")
FLOAT_SLACK = 1e-9
BYTES: frozenset[Quantity] = frozenset({"file_bytes", "memory_bytes"})
_LARGEST = 2.0**52  # every sum of bytes below this is exact in float64


@dataclasses.dataclass(frozen=True)
class Option:
    """One type that a tensor can take.

    Attributes:
        type: the ggml type's name.
        file_bytes: in the GGUF.
        memory_bytes: resident when the model is served.
        ns: time that the matrix takes of one decoded token, in nanoseconds.
        kld: predicted contribution to the mean KL divergence, in nats.
        prompt_ns: time that the matrix takes of a whole prompt.
    """

    type: str
    file_bytes: int
    memory_bytes: int
    ns: float
    kld: float
    prompt_ns: float = 0.0


@dataclasses.dataclass(frozen=True)
class Item:
    """One tensor and the types that it can take."""

    name: str
    options: tuple[Option, ...]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Upper limits of the sums over all items; None leaves a quantity free. Constants are the caller's to subtract."""

    file_bytes: int | None = None
    memory_bytes: int | None = None
    ns: float | None = None
    kld: float | None = None
    prompt_ns: float | None = None

    @classmethod
    def of(cls, values: Mapping[Quantity, float]) -> Limits:
        """Limits from numbers by quantity; those of bytes are whole."""
        whole = {q: round(value) for q, value in values.items() if q in BYTES}
        return cls(
            file_bytes=whole.get("file_bytes"),
            memory_bytes=whole.get("memory_bytes"),
            ns=values.get("ns"),
            kld=values.get("kld"),
            prompt_ns=values.get("prompt_ns"),
        )

    def given(self) -> dict[Quantity, float]:
        """The limits that are set, in the order of `QUANTITIES`."""
        return {q: value for q in QUANTITIES if (value := getattr(self, q)) is not None}


@dataclasses.dataclass(frozen=True)
class Solution:
    """A type for every item, within the limits.

    Attributes:
        types: item name to type.
        file_bytes: exact sum.
        memory_bytes: exact sum.
        ns: sum, nanoseconds a token.
        kld: sum, nats.
        prompt_ns: sum, nanoseconds a prompt.
        gap: proven bound of the objective's distance from the optimum, relative to the objective; 0 if exact.
        method: which solver found it.
    """

    types: Mapping[str, str]
    file_bytes: int
    memory_bytes: int
    ns: float
    kld: float
    prompt_ns: float
    gap: float
    method: Literal["milp", "lagrangian"]


class Infeasible(ValueError):
    """No choice of types meets the limits (or every one that does is forbidden).

    Attributes:
        limits: what was asked.
        least: for each limit that was set, the least value that its quantity can take when nothing else is limited.
        contradiction: the smallest set of limits that cannot be met together; empty if only forbidden choices are left.
        raise_to: for each limit in ``contradiction`` the least value to which it must be raised when all other limits
            are kept; None if no value is enough, because the others contradict each other too.
        nearest: limits that can be met: each, in the order memory, file, times, KL, is kept or raised the least that
            those before it allow.
        proven: False if the time limit or a missing exact solver left a doubt.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        least: Mapping[Quantity, float],
        contradiction: tuple[Quantity, ...],
        raise_to: Mapping[Quantity, float | None],
        nearest: Limits,
        proven: bool,
    ) -> None:
        self.limits = limits
        self.least = dict(least)
        self.contradiction = contradiction
        self.raise_to = dict(raise_to)
        self.nearest = nearest
        self.proven = proven
        what = ", ".join(f"{q} <= {limits.given()[q]:g}" for q in contradiction)
        super().__init__(f"no choice of types meets {what}" if what else "every choice within the limits is forbidden")


@dataclasses.dataclass(frozen=True)
class Knapsack:
    """Minimise ``cost`` under ``use <= limit``, one column chosen in each row.

    Attributes:
        cost: (items, options); infinite where an item has fewer options than the widest.
        use: (resources, items, options); 0 there.
        limit: (resources,).
        priced: the first so many resources are real quantities, which the Lagrangian prices; the others are cuts.
    """

    cost: Floats
    use: Floats
    limit: Floats
    priced: int

    def used(self, choice: Choice) -> Floats:
        """Sums of the resources, shape (resources,)."""
        chosen: Floats = self.use[:, np.arange(len(choice)), choice].sum(axis=1)
        return chosen

    def value(self, choice: Choice) -> float:
        """Sum of the costs."""
        return math.fsum(self.cost[np.arange(len(choice)), choice])

    def feasible(self, choice: Choice) -> bool:
        """Whether every resource keeps its limit."""
        return bool((self.used(choice) <= self.limit).all())


def upper_limit(q: Quantity, limit: float) -> float:
    """What a sum is compared with: `FLOAT_SLACK` is part of it for sums of floats."""
    return limit if q in BYTES else limit + FLOAT_SLACK * abs(limit)


class Table:
    """Items in a canonical order, as arrays: what is solved does not depend on the order in which they were given.

    Args:
        items: at least one, with at least one option each and distinct names.
        prune: leave out options that another option of the same item beats or equals in all quantities.

    Raises:
        ValueError: an item without options, a name or type twice, a number that is not finite or too large.
    """

    def __init__(self, items: Sequence[Item], *, prune: bool) -> None:
        _check(items)
        ordered = sorted(items, key=lambda item: item.name)
        columns = [tuple(sorted(item.options, key=lambda option: option.type)) for item in ordered]
        self.names = tuple(item.name for item in ordered)
        self.options = tuple(_undominated(options) for options in columns) if prune else tuple(columns)
        width = max((len(options) for options in self.options), default=1)
        self.quantity: dict[Quantity, Floats] = {}
        for q in QUANTITIES:
            filled = np.full((len(self.options), width), np.inf)
            for i, options in enumerate(self.options):
                filled[i, : len(options)] = [getattr(option, q) for option in options]
            self.quantity[q] = filled
        self.real: Mask = np.isfinite(self.quantity["kld"])
        for q in BYTES:
            if np.abs(self.quantity[q], where=self.real, out=np.zeros_like(self.quantity[q])).sum() > _LARGEST:
                raise ValueError(f"{q} is more than any machine has")

    def least(self, q: Quantity) -> float:
        """The least sum that a quantity can take."""
        least: list[float] = self.quantity[q].min(axis=1, initial=np.inf).tolist()
        return math.fsum(least)

    def knapsack(self, objective: Quantity, limits: Limits, cuts: Sequence[tuple[Mask, int]] = ()) -> Knapsack:
        """The arrays of one problem.

        Args:
            objective: the quantity to minimise.
            limits: of the sums.
            cuts: (mask of options, how many of them may be chosen at most), from `cut`.
        """
        given = limits.given()
        priced = [np.where(self.real, self.quantity[q], 0.0) for q in given]
        bounds = [upper_limit(q, value) for q, value in given.items()]
        rows = [*priced, *(mask.astype(np.float64) for mask, _ in cuts)]
        return Knapsack(
            cost=self.quantity[objective],
            use=np.stack(rows) if rows else np.zeros((0, *self.real.shape)),
            limit=np.array([*bounds, *(at_most for _, at_most in cuts)], dtype=np.float64),
            priced=len(priced),
        )

    def cut(self, types: Mapping[str, str], distance: int) -> tuple[Mask, int]:
        """The row that asks a choice to differ from ``types`` in at least ``distance`` of the items that it names.

        Raises:
            ValueError: it names an item that there is not.
        """
        unknown = set(types) - set(self.names)
        if unknown:
            raise ValueError(f"a forbidden choice names {sorted(unknown)[0]!r}, which is no item")
        mask = np.zeros(self.real.shape, dtype=np.bool_)
        for i, (name, options) in enumerate(zip(self.names, self.options, strict=True)):
            for j, option in enumerate(options):
                mask[i, j] = types.get(name) == option.type
        return mask, len(types) - distance

    def choice(self, types: Mapping[str, str]) -> Choice:
        """The columns of a complete choice of types that this table holds."""
        rows = zip(self.names, self.options, strict=True)
        return np.array([[o.type for o in options].index(types[name]) for name, options in rows], dtype=np.intp)

    def solution(self, choice: Choice, *, gap: float, method: Literal["milp", "lagrangian"]) -> Solution:
        """A choice as callers read it, with exact sums."""
        chosen = [options[int(j)] for options, j in zip(self.options, choice, strict=True)]
        return Solution(
            types={name: option.type for name, option in zip(self.names, chosen, strict=True)},
            file_bytes=sum(option.file_bytes for option in chosen),
            memory_bytes=sum(option.memory_bytes for option in chosen),
            ns=math.fsum(option.ns for option in chosen),
            kld=math.fsum(option.kld for option in chosen),
            prompt_ns=math.fsum(option.prompt_ns for option in chosen),
            gap=gap,
            method=method,
        )


def _check(items: Sequence[Item]) -> None:
    if not items:
        raise ValueError("there are no items")
    names = {item.name for item in items}
    if len(names) != len(items):
        raise ValueError("two items have the same name")
    for item in items:
        if not item.options:
            raise ValueError(f"{item.name} has no option")
        if len({option.type for option in item.options}) != len(item.options):
            raise ValueError(f"{item.name} has the same type twice")
        if not all(math.isfinite(getattr(option, q)) for option in item.options for q in QUANTITIES):
            raise ValueError(f"{item.name} has an option with a number that is not finite")


def _undominated(options: tuple[Option, ...]) -> tuple[Option, ...]:
    """Without options that another one beats or equals everywhere; of exact equals the first stays."""
    figures = np.array([[getattr(option, q) for q in QUANTITIES] for option in options], dtype=np.float64)
    no_worse = (figures[:, None, :] <= figures[None, :, :]).all(axis=2)
    better = no_worse & ~(no_worse.T & (np.arange(len(options))[:, None] >= np.arange(len(options))[None, :]))
    return tuple(option for option, beaten in zip(options, better.any(axis=0), strict=True) if not beaten)
