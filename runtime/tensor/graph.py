"""What a loaded graph says of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeq.errors import BundleError, SessionError
from edgeq.tensor_types import TensorArtifact, TensorSpec

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["check_artifact", "read_specs"]

_DTYPES = {
    "tensor(bool)": "bool",
    "tensor(double)": "float64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(int8)": "int8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(uint8)": "uint8",
}


def read_specs(arguments: Sequence[onnxruntime.NodeArg], what: str) -> tuple[TensorSpec, ...]:
    """Inputs or outputs of a session.

    Args:
        arguments: ``session.get_inputs()`` or ``session.get_outputs()``.
        what: ``"input"`` or ``"output"``.

    Raises:
        SessionError: one that is no tensor of a type that numpy has.
    """
    specs = []
    for argument in arguments:
        dtype = _DTYPES.get(argument.type)
        if dtype is None:
            raise SessionError(
                f"the {what} {argument.name!r} is {argument.type}, which numpy arrays cannot hold",
                "Export the model with float32, float16 or integers there",
            )
        # An axis of unknown size without a name is None; a name of its own says that nothing is known to equal it.
        shape = [
            size if isinstance(size, (int, str)) else f"{argument.name}.{axis}"
            for axis, size in enumerate(argument.shape)
        ]
        specs.append(TensorSpec(name=argument.name, dtype=dtype, shape=tuple(shape)))
    return tuple(specs)


def check_artifact(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], artifact: TensorArtifact) -> None:
    """Raise BundleError if a manifest tells other names or types than the graph has."""
    for what, found, told in (("inputs", inputs, artifact.inputs), ("outputs", outputs, artifact.outputs)):
        here, there = ([(spec.name, spec.dtype) for spec in specs] for specs in (found, told))
        if here != there:
            raise BundleError(
                f"the manifest tells the {what} {_names(there)}, and the graph has {_names(here)}",
                "Convert the model again",
            )


def _names(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in pairs)
