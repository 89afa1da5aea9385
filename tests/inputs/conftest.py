"""Images that look like photos: smooth shapes with edges and noise, of sizes that hit every branch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

Photo = Callable[[int, int], npt.NDArray[np.uint8]]


@pytest.fixture(scope="session")
def photo() -> Photo:
    """``photo(480, 640)``: uint8 of (480, 640, 3), always the same."""

    def make(height: int, width: int) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng(height * 10_000 + width)
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(x / rng.uniform(5, 90) + c) + np.cos(y / rng.uniform(5, 90)) for c in range(3)]
        image = np.stack(waves, axis=-1) * 55 + 128 + (x > width / 3)[..., None] * 40
        noisy: npt.NDArray[np.uint8] = np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
        return noisy

    return make
