"""Mixes that any solver must beat at equal bytes: by hand, at random, and by weighted error alone.

Pure functions from the planner's items to a type for every tensor; a benchmark quantizes and measures what they give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from edgeq.planner.solver import Item, Limits, Option, solve

__all__ = ["greedy_by_size", "mse_only", "random_mixes"]

_BELOW = 0.005
_STARTS = 200


def greedy_by_size(items: Sequence[Item], max_file_bytes: int) -> dict[str, str]:
    """What people do by hand: lower whatever is largest until the file fits.

    Every tensor starts at its largest type. Then, as long as the sum is above the limit, the tensor that has the most
    bytes now goes down to its next smaller size; among tensors of the same bytes the first by name, among types of the
    same bytes the one with the lower predicted KL, which is kinder than a hand would be.

    Args:
        items: tensors and their options; only bytes and, between types of equal bytes, KL are looked at.
        max_file_bytes: the sum to come down to.

    Raises:
        ValueError: even the smallest types are too large.
    """
    ladders = {item.name: _ladder(item) for item in items}
    level = dict.fromkeys(sorted(ladders), 0)

    def bytes_now(name: str) -> int:
        return ladders[name][level[name]].file_bytes

    total = sum(bytes_now(name) for name in level)
    while total > max_file_bytes:
        lowerable = [name for name in level if level[name] + 1 < len(ladders[name])]
        if not lowerable:
            raise ValueError(f"the smallest types take {total} bytes, more than {max_file_bytes}")
        largest = max(lowerable, key=bytes_now)
        total -= bytes_now(largest)
        level[largest] += 1
        total += bytes_now(largest)
    return {name: ladders[name][level[name]].type for name in level}


def random_mixes(items: Sequence[Item], max_file_bytes: int, n: int, seed: int) -> list[dict[str, str]]:
    """Mixes drawn at random whose bytes lie at most 0.5 % below the limit.

    Each starts from types drawn independently for every tensor, comes into the window by random changes that lead
    towards it, and is then shuffled by random changes that stay in it, ten for every tensor. All types of a tensor are
    equally likely to be proposed, those that another type beats included.

    Args:
        items: tensors and their options; only bytes are looked at.
        max_file_bytes: upper end of the window.
        n: how many; two may be equal where few are possible.
        seed: of the generator.

    Raises:
        ValueError: no mix in the window was found.
    """
    ordered = sorted(items, key=lambda item: item.name)
    sizes = [np.array([option.file_bytes for option in item.options], dtype=np.int64) for item in ordered]
    lowest = int(np.ceil(max_file_bytes * (1 - _BELOW)))
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        choice = _random_choice(sizes, lowest, max_file_bytes, rng)
        found.append({item.name: item.options[j].type for item, j in zip(ordered, choice, strict=True)})
    return found


def mse_only(
    items: Sequence[Item], weighted_mse: Mapping[tuple[str, str], float], max_file_bytes: int
) -> dict[str, str]:
    """The exact solution for the sum of weighted relative squared errors: the same solver without sensitivities.

    Args:
        items: tensors and their options.
        weighted_mse: (tensor, type) to its squared error, weighted by the importance matrix and relative to the
            weighted square of the tensor.
        max_file_bytes: the limit on their sum.

    Raises:
        Infeasible: even the smallest types are too large.
        KeyError: an option has no error.
    """
    by_error = [
        dataclasses.replace(
            item,
            options=tuple(dataclasses.replace(o, kld=weighted_mse[item.name, o.type]) for o in item.options),
        )
        for item in items
    ]
    return dict(solve(by_error, Limits(file_bytes=max_file_bytes), "kld").types)


def _ladder(item: Item) -> list[Option]:
    """One option a size, the largest first."""
    best: dict[int, Option] = {}
    for option in sorted(item.options, key=lambda option: (option.kld, option.type)):
        best.setdefault(option.file_bytes, option)
    return [best[size] for size in sorted(best, reverse=True)]


def _random_choice(
    sizes: list[np.ndarray[tuple[int], np.dtype[np.int64]]], lowest: int, highest: int, rng: np.random.Generator
) -> list[int]:
    for _ in range(_STARTS):
        choice = [int(rng.integers(len(size))) for size in sizes]
        total = sum(int(size[j]) for size, j in zip(sizes, choice, strict=True))
        for i in _shuffled(len(sizes), 20, rng):
            if lowest <= total <= highest:
                break
            after = total - int(sizes[i][choice[i]]) + sizes[i]
            nearer = np.flatnonzero(_distance(after, lowest, highest) < _distance(np.array([total]), lowest, highest))
            if nearer.size:
                choice[i] = int(rng.choice(nearer))
                total = int(after[choice[i]])
        if not lowest <= total <= highest:
            continue
        for i in _shuffled(len(sizes), 10, rng):
            j = int(rng.integers(len(sizes[i])))
            after_one = total - int(sizes[i][choice[i]]) + int(sizes[i][j])
            if lowest <= after_one <= highest:
                choice[i], total = j, after_one
        return choice
    raise ValueError(f"no mix of {lowest} to {highest} bytes was found in {_STARTS} random starts")


def _shuffled(n: int, rounds: int, rng: np.random.Generator) -> list[int]:
    """Every item once in each round, in random order."""
    return [int(i) for _ in range(rounds) for i in rng.permutation(n)]


def _distance(
    totals: np.ndarray[tuple[int], np.dtype[np.int64]], lowest: int, highest: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """From the window."""
    return np.maximum(np.maximum(lowest - totals, totals - highest), 0)
