#!/usr/bin/env python3
"""How near INT8 stays to FP32 on inputs that nothing was tuned on: plain INT8, and what ``edgeq convert`` ships.

    scripts/bench_accuracy.py [--models MODEL ...] [--target PROFILE] [--vnni] [--quick] [--json FILE]

MiniLM is judged by its sentence embeddings, from text to vector of length 1; a ViT-B/16 with outliers of 1,400 in its
residual stream by its last hidden states, beside the cosine between the float model's answers to different photos:
where that is near 1, a high cosine would say nothing. Inputs to calibrate with and to judge on come from different
sources (`accuracy_inputs`). Speed-ups are medians of ratios of processor time on one thread, in turns with the fastest
of four float graphs. Exit code 3 when what is shipped misses what the models must keep.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for scripts.accuracy_inputs

from edgeq.errors import EdgeqError
from edgeq.inputs import read_inputs
from edgeq.planner.tensors.candidates import Candidate
from edgeq.planner.tensors.job import Calibration, Gate, TensorJob
from edgeq.planner.tensors.prepare import Prepared, decision_of, prepare
from edgeq.planner.tensors.timing import time_in_turns
from edgeq.planner.tensors.writing import DISABLED_OPTIMIZERS
from edgeq.profiles.loader import load_profile
from edgeq.profiles.onnx.session import open_onnx_session
from edgeq.runtime.tensor.pooling import normalized, pool
from scripts.accuracy_inputs import minilm_folder, planted_vit, write_photos, write_texts

Call = Mapping[str, npt.NDArray[np.generic]]
Answers = npt.NDArray[np.float64]

MUST = {"minilm": 0.995, "vit-planted": 0.99}
AIM = 0.999
_TIMED_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Line:
    """One way to compute one model.

    Attributes:
        model: its name.
        way: ``"plain dynamic"``, or what is shipped.
        cosine: to FP32, mean over the judged inputs.
        worst: likewise, the least.
        speedup: over the fastest float graph.
        megabytes: of the file.
        inputs: that were judged.
        between: largest cosine between the float model's answers to two different inputs.
    """

    model: str
    way: str
    cosine: float
    worst: float
    speedup: float
    megabytes: float
    inputs: int
    between: float


@dataclasses.dataclass(frozen=True)
class Size:
    """Inputs and blocks: fewer for a quick look."""

    texts: tuple[int, int]
    photos: tuple[int, int]
    layers: int
    rounds: int


FULL = Size(texts=(192, 256), photos=(24, 28), layers=12, rounds=25)
QUICK = Size(texts=(48, 64), photos=(8, 8), layers=4, rounds=8)


def with_vnni(target: str, folder: Path) -> str:
    """A profile file that differs from a target in its CPU alone, which multiplies bytes with AVX512-VNNI."""
    features = dict.fromkeys([*load_profile(target).cpu.features, "avx512_vnni"])
    extended = str(Path(target).resolve()) if Path(target).is_file() else target
    own = {
        "extends": extended,
        "name": "with-vnni",
        "cpu": {"features": list(features)},
        "sources": {"cpu": f"{target}, and AVX512-VNNI to compare with"},
    }
    file = folder / "with-vnni.yaml"
    file.write_text(json.dumps(own), encoding="utf-8")  # which is YAML, too
    return str(file)


def job_of(model: str, target: str, size: Size, work: Path) -> tuple[TensorJob, Path]:
    """What a user would ask for, and the inputs to judge on, which the conversion does not see."""
    folder = work / "inputs"
    folder.mkdir()
    if model == "minilm":
        calibrated, judged = write_texts(folder, *size.texts)
        source, shapes, count = minilm_folder(), {}, size.texts[0]
    else:
        calibrated, judged = write_photos(folder, *size.photos)
        source = planted_vit(work / "planted", layers=size.layers)
        shapes, count = {"pixel_values": (1, 3, 224, 224)}, size.photos[0]
    calibration = Calibration(inputs=calibrated, samples=min(64, count * 2 // 3), judged=min(32, count // 3))
    gate = Gate(min_cosine=MUST[model])
    return TensorJob(str(source), target, shapes=shapes, calibration=calibration, gate=gate, threads=1), judged


def answers(path: Path, prepared: Prepared, calls: Sequence[Call]) -> Answers:
    """What a model says to each call: an embedding, or all of its first output; of shape [calls, numbers]."""
    embedding = prepared.exported.artifact.embedding
    session = open_onnx_session(path, 1, disabled_optimizers=DISABLED_OPTIMIZERS)
    found = []
    for call in calls:
        hidden = np.asarray(session.run(None, dict(call))[0])
        if embedding is not None:
            mask = call["attention_mask"].astype(np.int64)
            hidden = pool(hidden, mask, embedding.pooling)
            hidden = normalized(hidden) if embedding.normalize else hidden
        found.append(hidden.reshape(-1).astype(np.float64))
    return np.stack(found)


def cosines(first: Answers, second: Answers) -> Answers:
    """Of each row with its like."""
    found: Answers = (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    return found


def timed_call(prepared: Prepared, calls: Sequence[Call]) -> Call:
    """A photo, or a text of 128 tokens put together of several."""
    if prepared.exported.artifact.embedding is None:
        return calls[0]
    joined = {name: np.concatenate([call[name] for call in calls], axis=1) for name in calls[0]}
    return {name: array[:, :_TIMED_TOKENS] for name, array in joined.items()}


def speedups(prepared: Prepared, candidates: Sequence[Path], calls: Sequence[Call], rounds: int) -> list[float]:
    """Of each over the fastest of the exported and the cleaned graph, with all fusions and with edgeq's."""
    paths = (prepared.exported.path, prepared.bench.reference)
    floats = list(itertools.product(paths, ((), DISABLED_OPTIMIZERS)))
    models = [*(path for path, _ in floats), *candidates]
    disabled: list[Sequence[str]] = [*(off for _, off in floats), *([DISABLED_OPTIMIZERS] * len(candidates))]
    call = timed_call(prepared, calls)
    times = time_in_turns(models, [call], threads=1, disabled_optimizers=disabled, rounds=rounds, most_seconds=120)
    best = min(timing.cpu_ratio for timing in times[: len(floats)])
    return [best / timing.cpu_ratio for timing in times[len(floats) :]]


def measured(model: str, target: str, size: Size, work: Path) -> list[Line]:
    """Convert one model and judge what came out."""
    job, fresh = job_of(model, target, size, work)
    folder = work / "convert"
    folder.mkdir()
    prepared = prepare(job, folder, lambda *_: None)
    bench = dataclasses.replace(prepared.bench, folder=folder / "plain")
    ways: list[tuple[str, Candidate]] = [
        ("plain dynamic", bench.dynamic({})),
        ("plain static", bench.static(bench.ranges(("minmax",))["minmax"], {}, "int8-static-minmax")),
    ]
    chosen = decision_of(job, prepared).chosen
    ways = [("fp32", bench.float_model()), *ways, (f"shipped: {chosen.label}", chosen)]
    most = max(size.texts[1], size.photos[1])
    calls = list(read_inputs(fresh, prepared.exported.artifact, Path(str(job.model)), most, axes=prepared.axes))
    expected = answers(prepared.bench.reference, prepared, calls)
    between = float(max(cosines(expected, np.roll(expected, shift, axis=0)).max() for shift in (1, 2, 3)))
    faster = speedups(prepared, [way.path for _, way in ways], calls, size.rounds)
    lines = []
    for (name, way), ratio in zip(ways, faster, strict=True):
        found = cosines(expected, answers(way.path, prepared, calls))
        megabytes = sum(file.stat().st_size for file in way.path.parent.glob("model.onnx*")) / 1e6
        figures = float(found.mean()), float(found.min()), ratio, megabytes
        lines.append(Line(model, name, *figures, len(calls), between))
    return lines


def show(line: Line) -> None:
    """One row of the table."""
    print(
        f"{line.model:<13}{line.way:<36}{line.cosine:>9.5f}{line.worst:>9.5f}{line.speedup:>9.2f}"
        f"{line.megabytes:>8.1f}{line.inputs:>8}{line.between:>9.3f}{MUST[line.model]:>7}{AIM:>7}",
        flush=True,
    )


def main() -> int:
    """Exit code 3 when what is shipped misses what must be kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MUST), default=list(MUST), metavar="MODEL")
    parser.add_argument("--target", default="laptop-cpu", metavar="PROFILE", help="a profile's name or file")
    parser.add_argument("--vnni", action="store_true", help="as if the target's CPU had AVX512-VNNI")
    parser.add_argument("--quick", action="store_true", help="fewer inputs, and a ViT of 4 blocks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    arguments = parser.parse_args()
    found: list[Line] = []
    head = f"{'model':<13}{'way':<36}{'cosine':>9}{'worst':>9}{'speed-up':>9}{'MB':>8}{'inputs':>8}"
    print(f"{head}{'between':>9}{'must':>7}{'aim':>7}")
    try:
        for model in arguments.models:
            with tempfile.TemporaryDirectory(prefix="edgeq-accuracy-") as folder:
                target = with_vnni(arguments.target, Path(folder)) if arguments.vnni else arguments.target
                lines = measured(model, target, QUICK if arguments.quick else FULL, Path(folder))
            for line in lines:
                show(line)
            found += lines
    except EdgeqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([dataclasses.asdict(line) for line in found], indent=2) + "\n")
    shipped = [line for line in found if line.way.startswith("shipped")]
    return 3 if any(line.cosine < MUST[line.model] for line in shipped) else 0


if __name__ == "__main__":
    sys.exit(main())
