"""From the sizes of dynamic axes to TensorRT's optimization profile: least, usual and largest shape of each input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeq.errors import SessionError, UsageError
from edgeq.runtime.tensorrt.records import InputShapes
from edgeq.tensor_types import AxisRange

__all__ = ["add_profile", "input_shapes"]


def input_shapes(network: Any, axes: Mapping[str, AxisRange]) -> tuple[InputShapes, ...]:  # noqa: ANN401
    """The shapes of all inputs of a network.

    Args:
        network: parsed.
        axes: sizes by the axes' names.

    Raises:
        UsageError: a dynamic axis has no name, or no size under its name.
        SessionError: an input whose values are shapes, which no plan describes.
    """
    return tuple(_shapes_of(network.get_input(i), axes) for i in range(network.num_inputs))


def _shapes_of(tensor: Any, axes: Mapping[str, AxisRange]) -> InputShapes:  # noqa: ANN401
    if tensor.is_shape_tensor:
        raise SessionError(
            f"The input {tensor.name!r} holds a shape, and an engine would need its values beforehand",
            "Export the model with that shape as a constant",
        )
    sizes = [_size(tensor, axis, int(size), axes) for axis, size in enumerate(tuple(tensor.shape))]
    return InputShapes(
        name=tensor.name,
        least=tuple(size.least for size in sizes),
        usual=tuple(size.usual for size in sizes),
        most=tuple(size.most for size in sizes),
    )


def _size(tensor: Any, axis: int, size: int, axes: Mapping[str, AxisRange]) -> AxisRange:  # noqa: ANN401
    if size > 0:
        return AxisRange(least=size, usual=size, most=size)
    name = tensor.get_dimension_name(axis)
    if name in axes:
        return axes[name]
    if name is None:
        raise UsageError(
            f"Axis {axis} of the input {tensor.name!r} is dynamic and has no name", "Export the model with named axes"
        )
    known = f"known are {', '.join(sorted(axes))}" if axes else "the plan has none"
    raise UsageError(
        f"The plan has no sizes for the axis {name!r} of the input {tensor.name!r} ({known})",
        "Convert the model again with sizes for it, or with a fixed shape",
    )


def add_profile(builder: Any, config: Any, shapes: tuple[InputShapes, ...]) -> bool:  # noqa: ANN401
    """Add one optimization profile if any shape is dynamic; whether it was.

    Raises:
        SessionError: TensorRT refuses it.
    """
    if all(shape.least == shape.most for shape in shapes):
        return False
    profile = builder.create_optimization_profile()
    try:
        for shape in shapes:
            profile.set_shape(shape.name, shape.least, shape.usual, shape.most)
    except (ValueError, RuntimeError) as error:
        raise _refused(shapes, str(error)) from error
    if config.add_optimization_profile(profile) < 0:
        raise _refused(shapes, "it is not valid")
    return True


def _refused(shapes: tuple[InputShapes, ...], why: str) -> SessionError:
    told = ", ".join(f"{s.name} from {_text(s.least)} to {_text(s.most)}" for s in shapes)
    return SessionError(f"TensorRT refused the shapes {told}: {why}", "Convert the model again with other sizes")


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
