"""The two types of 16 bits that models compute in: FP16 has more digits, BF16 has FP32's range."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["BFLOAT16", "FLOAT16", "HalfKind"]


@dataclasses.dataclass(frozen=True)
class HalfKind:
    """A type of 16 bits.

    Attributes:
        name: as ONNX writes it.
        largest: finite number.
        has_float_range: whether its exponents are those of float32, so that nothing overflows or vanishes.
        opset: from which ONNX takes it in convolutions and pooling.
        unbuilt: operators that TensorRT-RTX 1.7.1 refuses in it, tried one by one.
    """

    name: str
    largest: float
    has_float_range: bool
    opset: int
    unbuilt: frozenset[str] = frozenset()

    @property
    def dtype(self) -> ir.DataType:
        """Of onnx_ir."""
        import onnx_ir as ir

        return ir.DataType.BFLOAT16 if self.has_float_range else ir.DataType.FLOAT16

    def rounded(self, array: NDArray[Any]) -> NDArray[Any]:
        """To the nearest, ties to even; what lies beyond is infinite."""
        with np.errstate(over="ignore"):
            rounded: NDArray[Any] = array.astype(self.dtype.numpy())
        return rounded


_UNBUILT = frozenset({"ConvTranspose", "GRU", "HardSwish", "LpPool", "Mish"})
FLOAT16 = HalfKind("float16", 65504.0, has_float_range=False, opset=1)
BFLOAT16 = HalfKind("bfloat16", float.fromhex("0x1.fep127"), has_float_range=True, opset=22, unbuilt=_UNBUILT)
