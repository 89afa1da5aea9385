"""torch, onnxscript and transformers without their chatter, and as they were afterwards."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

__all__ = ["quiet"]

_LOGGERS = (
    "torch",
    "torch.onnx",
    "torch.export",
    "torch.fx",
    "torch._dynamo",
    "torch.__trace",
    "onnxscript",
    "onnx_ir",
    "transformers",
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within this block nothing is printed, no warning or progress bar shown, and nothing below an error logged."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), _no_bars(), Path(os.devnull).open("w") as nowhere:
            warnings.simplefilter("ignore")
            # torch prints the graph in which tracing failed.
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Transformers draws one while it loads weights."""
    try:
        from transformers.utils import logging as bars
    except ImportError:
        yield
        return
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
