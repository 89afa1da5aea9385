"""Which precisions a GPU computes in, and the refusal of those that it lacks."""

from __future__ import annotations

from collections.abc import Mapping

from edgeq.errors import UnsupportedModelError
from edgeq.tensor_types import Scheme

__all__ = ["refuse_missing_precisions", "refuse_missing_scheme"]

# NVIDIA TensorRT support matrix, "Hardware and Precision": the first compute capability and its architecture.
_FIRST: dict[str, tuple[tuple[int, int], str]] = {
    "BF16": ((8, 0), "Ampere"),
    "FP8": ((8, 9), "Ada Lovelace"),
    "FP4": ((10, 0), "Blackwell"),
}


def refuse_missing_scheme(scheme: Scheme, capability: str, device: str) -> None:
    """Refuse a plan whose scheme the GPU does not have, before any work is done.

    Args:
        scheme: of the plan.
        capability: of the GPU, ``"8.7"``.
        device: for people.

    Raises:
        UnsupportedModelError: with the reason.
    """
    if scheme in ("bf16", "fp8"):
        _refuse(scheme.upper(), capability, device)


def refuse_missing_precisions(precisions: Mapping[str, int], capability: str) -> None:
    """Refuse a network with tensors in a type that the GPU does not have.

    Args:
        precisions: tensors by TensorRT's name of their type.
        capability: of the GPU.

    Raises:
        UnsupportedModelError: with the reason.
    """
    for name in precisions:
        _refuse(name, capability, "the GPU")


def _refuse(name: str, capability: str, device: str) -> None:
    if name not in _FIRST:
        return
    least, architecture = _FIRST[name]
    major, minor = (int(part) for part in capability.split("."))
    if (major, minor) < least:
        number = f"{major}{minor}"
        raise UnsupportedModelError(
            f"The model computes in {name}, which sm_{number} does not have ({device}): its tensor cores came with "
            f"{architecture}, sm_{least[0]}{least[1]}",
            "Convert the model again with INT8 or FP16, or for a device that has it",
        )
