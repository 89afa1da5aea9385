"""What a new engine is compared on: the bundle's own inputs, or drawn ones."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeq.bundle import MANIFEST, Bundle, describe_file, open_bundle, write_manifest
from edgeq.errors import BundleError
from edgeq.runtime.tensorrt.samples import SAMPLES_FILE, SAMPLES_ROLE, bundle_samples, write_samples
from edgeq.tensor_types import TensorManifest
from edgeq.types import from_json


def _with_samples(folder: Path) -> Bundle:
    """The bundle, with the file of samples that is in its folder now."""
    manifest = from_json((folder / MANIFEST).read_bytes(), TensorManifest)
    files = tuple(entry for entry in manifest.files if entry.role != SAMPLES_ROLE)
    entry = describe_file(folder, SAMPLES_FILE, SAMPLES_ROLE)
    write_manifest(folder, msgspec.structs.replace(manifest, files=(*files, entry)))
    return open_bundle(folder, verify=True)


def test_a_bundle_brings_its_samples(tiny: ModuleType, int8_bundle: Path) -> None:
    calls = tiny.calls([1, 4, 2, 1, 3])
    write_samples(int8_bundle / SAMPLES_FILE, calls)
    found = list(bundle_samples(_with_samples(int8_bundle)))
    assert len(found) == 4  # a few are enough, and keep the bundle small
    for call, sample in zip(calls, found, strict=False):
        assert sample.keys() == {"images"}
        np.testing.assert_array_equal(call["images"], sample["images"])


def test_without_samples_they_are_drawn_at_the_usual_sizes(int8_bundle: Path) -> None:
    bundle = open_bundle(int8_bundle)
    found = [sample["images"] for sample in bundle_samples(bundle)]
    assert {array.shape for array in found} == {(2, 3, 8, 8)}
    assert {array.dtype for array in found} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(found[0], next(iter(bundle_samples(bundle)))["images"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda array: array[:, :2], r"call 0: the input 'images' has the shape \(1, 2, 8, 8\)"),
        (lambda array: array.astype(np.float64), "is float64, and the model takes float32"),
        (lambda array: np.concatenate([array] * 9), "the axis 'batch' of 'images' has 9"),
    ],
)
def test_samples_that_do_not_fit_are_one_line(tiny: ModuleType, int8_bundle: Path, change: Any, told: str) -> None:
    write_samples(int8_bundle / SAMPLES_FILE, [{"images": change(call["images"])} for call in tiny.calls([1])])
    with pytest.raises(BundleError, match=told):
        list(bundle_samples(_with_samples(int8_bundle)))


def test_files_that_are_no_samples_are_one_line(tiny: ModuleType, int8_bundle: Path) -> None:
    path = int8_bundle / SAMPLES_FILE
    write_samples(path, tiny.calls([1, 2]))
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + b"\xff" * 40 + whole[100:])
    with pytest.raises(BundleError, match="holds no inputs of the model"):
        list(bundle_samples(_with_samples(int8_bundle)))
    for data in (b"", b"PK no archive", whole[: len(whole) // 2], b"PK\x03\x04"):
        path.write_bytes(data)
        with pytest.raises(BundleError, match="holds no inputs of the model"):
            list(bundle_samples(_with_samples(int8_bundle)))
    with path.open("wb") as file:
        strangers: dict[str, Any] = {"0.pictures": np.zeros(3)}
        np.savez(file, **strangers)
    with pytest.raises(BundleError, match="it has no whole call"):
        list(bundle_samples(_with_samples(int8_bundle)))
