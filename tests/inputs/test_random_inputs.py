from __future__ import annotations

import numpy as np
import pytest

from edgeq.errors import UsageError
from edgeq.inputs import check_arrays, random_inputs
from edgeq.tensor_types import AxisRange, TensorArtifact, TensorSpec


def artifact(*specs: tuple[str, str, tuple[int | str, ...]]) -> TensorArtifact:
    inputs = tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in specs)
    return TensorArtifact(architecture="onnx", task="tensor", opset=20, inputs=inputs, outputs=())


TEXT = artifact(
    ("input_ids", "int64", ("batch", "sequence")),
    ("attention_mask", "int64", ("batch", "sequence")),
    ("token_type_ids", "int32", ("batch", "sequence")),
    ("position_ids", "int64", ("batch", "sequence")),
)
RANGES: dict[str, AxisRange | int] = {"batch": AxisRange(least=1, usual=2, most=8), "sequence": 6}


def test_texts() -> None:
    calls = list(random_inputs(TEXT, RANGES, 3, seed=1, limits={"input_ids": 7}))
    assert len(calls) == 3
    for call in calls:
        check_arrays(call, TEXT.inputs)
        assert call["input_ids"].shape == (2, 6)
        assert call["attention_mask"].all()
        assert not call["token_type_ids"].any()
        np.testing.assert_array_equal(call["position_ids"], [range(6)] * 2)
    ids = np.stack([call["input_ids"] for call in calls])
    assert set(ids.flat) <= set(range(7))
    assert not np.array_equal(ids[0], ids[1])


def test_images_in_any_float_and_the_same_for_the_same_seed() -> None:
    model = artifact(("pixel_values", "float16", (1, 3, 40, 50)), ("flag", "bool", (100,)), ("byte", "uint8", (9,)))
    first, again, other = (next(random_inputs(model, {}, 1, seed=seed, limits={"byte": 999})) for seed in (3, 3, 4))
    check_arrays(first, model.inputs)
    values = first["pixel_values"].astype(np.float64)
    assert abs(values.mean()) < 0.1
    assert abs(values.std() - 1) < 0.1
    assert 20 < first["flag"].sum() < 80
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    assert not np.array_equal(values, other["pixel_values"])


def test_what_cannot_be_made() -> None:
    with pytest.raises(UsageError, match="'sequence' of 'input_ids' has no size"):
        random_inputs(TEXT, {"batch": 1}, 1)
    with pytest.raises(UsageError, match="'z' is complex64"):
        random_inputs(artifact(("z", "complex64", (1,))), {}, 1)
