"""All wanted tensors of a model, one after the other, without ever holding many of them.

ONNX Runtime keeps every output of a session until the call ends: with all activations as outputs a batch of images
takes gigabytes. Here the graph is cut where a wanted tensor is made, and each is let go before the next ones are made.
At the first call each wanted tensor ends a stage of its own, which shows how large they are; from the second call on a
stage makes as many as fit the limit, since cuts cost fusions and calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.pieces import CutModel, Piece, Values
from edgeq.tensor_types import TensorSpec

__all__ = ["StagedModel"]

_LIMIT_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A piece of the graph.

    Attributes:
        piece: that makes the wanted tensors, and what later stages read.
        wanted: names.
        dropped: values that no later stage reads.
    """

    piece: Piece
    wanted: tuple[str, ...]
    dropped: tuple[str, ...]


class StagedModel:
    """A model whose inner tensors can be looked at; a context manager.

    Args:
        model: the ``.onnx`` file, whose external data lies beside it; or one that is open, and stays so.
        wanted: names of tensors, inputs among them; nodes that none of them needs are not run.
        threads: of each call, if the model is a file.
        limit_bytes: of wanted tensors that are held at once; a single one may be larger.

    Raises:
        UsageError: a name that is no tensor of the graph, or that of a weight.
        MissingPackageError: the package onnx or onnxruntime is not installed.
        SourceError: no sound ONNX file.
        DiskFullError: no room for the weights in the folder for temporary files.
    """

    def __init__(
        self, model: Path | CutModel, wanted: Sequence[str], *, threads: int = 1, limit_bytes: int = _LIMIT_BYTES
    ) -> None:
        self._limit_bytes = limit_bytes
        self._sizes: dict[str, int] = {}
        self._planned_bytes = 0  # of all wanted tensors, when the stages were made
        self._own = isinstance(model, Path)
        self._model = CutModel(model, threads=threads) if isinstance(model, Path) else model
        try:
            self._model.check_names(wanted)
        except BaseException:
            self.close()
            raise
        self._fed = tuple(name for name in dict.fromkeys(wanted) if name not in self._model.makers)
        self._made = [name for name in dict.fromkeys(wanted) if name in self._model.makers]
        self._made.sort(key=self._model.makers.__getitem__)
        self._places = self._model.above(self._made)
        self._stages = self._cut([[name] for name in self._made])

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What a caller feeds."""
        return self._model.specs

    def __enter__(self) -> StagedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back its memory and its temporary file."""
        self._stages = []
        if self._own:
            self._model.close()

    def run(self, feeds: Values) -> Iterator[tuple[str, NDArray[np.generic]]]:
        """Each wanted tensor's name and value, inputs first, then in the order in which they are made.

        Args:
            feeds: the model's inputs.

        Raises:
            SessionError: ONNX Runtime cannot load a part of the model.
            ConversionError: it cannot run it on these inputs.
        """
        yield from ((name, feeds[name]) for name in self._fed)
        values = dict(feeds)
        for stage in self._stages:
            made = stage.piece.run(values)
            for name in stage.wanted:
                self._sizes[name] = made[name].nbytes
                yield name, made[name]
            values.update(made)
            del made  # or the next stage runs while these are held
            for name in stage.dropped:
                values.pop(name, None)
            if not self._planned_bytes:
                stage.piece.close()
        now_bytes = sum(self._sizes.values())
        if now_bytes > 2 * self._planned_bytes:  # the first call, or one that is much larger
            self._stages, self._planned_bytes = self._cut(self._groups()), now_bytes

    def _groups(self) -> list[list[str]]:
        """Neighbours together, as far as they fit the limit."""
        groups: list[list[str]] = []
        held = 0
        for name in self._made:
            held += self._sizes[name]
            if not groups or held > self._limit_bytes:
                groups.append([])
                held = self._sizes[name]
            groups[-1].append(name)
        return groups

    def _cut(self, groups: Sequence[Sequence[str]]) -> list[_Stage]:
        """Stages that end at the last tensor of each group; a node belongs to the first stage that reaches it."""
        model = self._model
        # Constants are made anew wherever they are read, so that kernels can be packed.
        places = [place for place in self._places if not model.is_constant(place)]
        places = sorted({*places, *(model.makers[name] for name in self._made)})
        parts: list[list[int]] = []
        for group in groups:
            end = model.makers[group[-1]]
            parts.append([place for place in places if place <= end])
            places = places[len(parts[-1]) :]
        read_last = {name: n for n, part in enumerate(parts) for place in part for name in model.reads[place]}
        wanted_names = frozenset(self._made)
        stages: list[_Stage] = []
        for index, part in enumerate(parts):
            made = [name for place in part for name in model.nodes[place].output if name]
            wanted = tuple(name for name in made if name in wanted_names)
            later = [n for n in made if read_last.get(n, -1) > index and n not in model.constants]
            gives = tuple(dict.fromkeys([*wanted, *later]))
            used = {name for place in part for name in model.reads[place]}
            dropped = tuple(name for name in used.union(gives) if read_last.get(name, -1) <= index)
            stages.append(_Stage(model.piece(part, gives), wanted, dropped))
        return stages
