"""Options of models that are called with arrays, and what belongs to the other kind."""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import pytest

from edgeq.cli.parser import build_parser
from edgeq.cli.tensor_arguments import (
    refuse_language_options,
    refuse_other_kind,
    refuse_tensor_options,
    tensor_job_from,
)
from edgeq.errors import UsageError


def parsed(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(["convert", "model", "--target", "laptop-cpu", *words])


def test_nothing_given_is_the_default() -> None:
    job = tensor_job_from(parsed(), "laptop-cpu")
    assert (job.precision, job.gate.min_cosine, job.calibration.samples, job.shapes) == ("auto", 0.995, 64, {})


def test_everything_given_arrives(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    words = ["--shape", "pixel_values=1x3x224x224", "--precision", "int8", "--min-cosine", "0.999"]
    words += ["--calibration", str(tmp_path / "photos"), "--samples", "9", "--calibration-method", "mse"]
    words += ["--max-latency", "33ms"]
    words += ["--also-for", "jetson-orin", "--also-for", "laptop-rtx"]
    words += ["--keep-float", "head", "--min-coverage", "80%", "--task", "image-classification"]
    job = tensor_job_from(parsed(*words), "laptop-cpu")
    assert job.budget.latency_ms == 33
    assert job.shapes == {"pixel_values": (1, 3, 224, 224)}
    assert (job.gate.min_cosine, job.gate.min_coverage) == (0.999, 0.8)
    assert (job.calibration.inputs, job.calibration.samples) == (tmp_path / "photos", 9)
    assert job.also_for == ("jetson-orin", "laptop-rtx")
    assert (job.calibration.method, job.keep_float, job.task) == ("mse", ("head",), "image-classification")


@pytest.mark.parametrize(
    "words",
    [
        ["--shape", "pixel_values"],
        ["--shape", "x=1x0x3"],
        ["--shape", "x=1xax3"],
        ["--shape", "=1x3"],
        ["--min-cosine", "2"],
        ["--min-cosine", "nan"],
        ["--min-coverage", "0"],
        ["--percentile", "101"],
        ["--min-top1", "x"],
        ["--keep-float", "("],
    ],
)
def test_nonsense_is_one_line(words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        tensor_job_from(parsed(*words), "laptop-cpu")
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_options_of_the_other_kind_are_refused() -> None:
    with pytest.raises(UsageError, match="--quant is for language models"):
        refuse_language_options(parsed("--quant", "q8_0"))
    with pytest.raises(UsageError, match="--shape, --min-cosine is for others"):
        refuse_tensor_options(parsed("--shape", "x=1", "--min-cosine", "0.9"))
    with pytest.raises(UsageError, match="--max-itl, --max-ttft, --min-tps is for language models"):
        refuse_language_options(parsed("--max-itl", "5ms", "--max-ttft", "1s", "--min-tps", "9"))
    with pytest.raises(UsageError, match="--max-latency is for others"):
        refuse_tensor_options(parsed("--max-latency", "33ms"))
    refuse_language_options(parsed())
    refuse_tensor_options(parsed())


@pytest.mark.parametrize(
    ("architecture", "words", "told"),
    [
        ("ResNetForImageClassification", ["--minimize", "bytes"], "--minimize is for language models"),
        ("LlamaForCausalLM", ["--min-cosine", "2"], "--min-cosine is for others"),
    ],
)
def test_options_of_the_other_kind_are_refused_before_they_are_looked_into(
    tmp_path: Path, architecture: str, words: list[str], told: str
) -> None:
    tensors = b'{"w": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}'
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(tensors)) + tensors + bytes(4))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "any"}))
    for command in ("plan", "convert"):
        args = build_parser().parse_args([command, str(tmp_path), "--target", "laptop-cpu", *words])
        with pytest.raises(UsageError, match=told):
            refuse_other_kind(args)
    refuse_other_kind(parsed(*words))  # of a model that is not here nothing is known yet
