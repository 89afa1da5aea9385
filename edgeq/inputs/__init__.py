"""From files to the arrays that a model is called with: images, texts, saved arrays, random numbers.

Converters calibrate and compare with them, the runtime serves with them, so both see the very same numbers.
"""

from __future__ import annotations

from edgeq.inputs.arrays import check_arrays
from edgeq.inputs.images import ImageProcessor, image_processor
from edgeq.inputs.read import read_inputs
from edgeq.inputs.synthetic import random_inputs
from edgeq.inputs.text import TextEncoder, text_encoder

__all__ = [
    "ImageProcessor",
    "TextEncoder",
    "check_arrays",
    "image_processor",
    "random_inputs",
    "read_inputs",
    "text_encoder",
]
