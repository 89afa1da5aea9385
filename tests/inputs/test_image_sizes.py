"""Against the functions of transformers, over many sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.inputs.image_sizes import fit_both, fit_inside, fit_multiple, fit_shortest

pytest.importorskip("transformers")
edges = st.integers(1, 3000)
sizes = st.tuples(edges, edges)


@given(sizes, st.integers(1, 1500))
def test_fit_shortest(image: tuple[int, int], edge: int) -> None:
    from transformers.image_transforms import get_resize_output_image_size

    pixels = np.broadcast_to(np.uint8(0), (3, *image))
    wanted = get_resize_output_image_size(pixels, edge, default_to_square=False, input_data_format="channels_first")
    assert fit_shortest(image, edge) == wanted


@given(sizes, st.integers(1, 1500), st.integers(0, 1500))
def test_fit_both(image: tuple[int, int], shortest: int, more: int) -> None:
    from transformers.image_transforms import get_size_with_aspect_ratio
    from transformers.models.yolos.image_processing_pil_yolos import get_size_with_aspect_ratio_yolos

    longest = shortest + more
    assert fit_both(image, shortest, longest) == get_size_with_aspect_ratio(image, shortest, longest)
    wanted = get_size_with_aspect_ratio_yolos(image, shortest, longest)
    assert fit_both(image, shortest, longest, yolos=True) == wanted


@given(sizes, sizes)
def test_fit_inside(image: tuple[int, int], bound: tuple[int, int]) -> None:
    from transformers.image_utils import get_image_size_for_max_height_width

    assert fit_inside(image, bound) == get_image_size_for_max_height_width(image, *bound)


@given(sizes, sizes, st.integers(1, 64), st.booleans())
def test_fit_multiple(image: tuple[int, int], wanted: tuple[int, int], multiple: int, keep: bool) -> None:
    from transformers.models.dpt.image_processing_pil_dpt import get_resize_output_image_size

    theirs = get_resize_output_image_size(np.broadcast_to(np.uint8(0), (3, *image)), wanted, keep, multiple)
    assert fit_multiple(image, wanted, multiple, keep_ratio=keep) == (theirs.height, theirs.width)
