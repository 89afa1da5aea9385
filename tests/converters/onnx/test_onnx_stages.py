"""Models in stages: the same tensors as from one session, and few of them at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters.onnx.pieces import CutModel
from edgeq.converters.onnx.stages import StagedModel
from edgeq.errors import ConversionError, SessionError, SourceError, UsageError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

Feeds = dict[str, NDArray[np.float32]]
ALL = ["c1", "r1", "c2", "sum", "r2", "pool", "flat", "logits"]


class MakeNetwork(Protocol):
    def __call__(self, *, name: str = "model", external: bool = False, extra: Any = ()) -> Path: ...


def expected(path: Path, names: list[str], feeds: Feeds) -> dict[str, NDArray[np.float32]]:
    model = onnx.load(path)
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("limit", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("names", [ALL, ["sum"], ["logits", "r1"], ["pool", "c1", "c2"]])
def test_stages_make_what_one_session_makes(
    make_network: MakeNetwork, images: list[Feeds], names: list[str], limit: int, external: bool
) -> None:
    path = make_network(external=external)
    with StagedModel(path, names, limit_bytes=limit) as staged:
        for feeds in images:
            found = dict(staged.run(feeds))
            assert set(found) == set(names)
            for name, value in expected(path, names, feeds).items():
                assert np.allclose(found[name], value, rtol=1e-5, atol=1e-5)


def test_later_calls_take_as_few_stages_as_fit(make_network: MakeNetwork, images: list[Feeds]) -> None:
    def stages(limit: int) -> list[int]:
        with StagedModel(make_network(), ALL, limit_bytes=limit) as staged:
            counts = []
            for feeds in images[:1] * 2:
                counts.append(len(staged._stages))
                list(staged.run(feeds))
            return [*counts, len(staged._stages)]

    assert stages(1) == [8, 8, 8]
    assert stages(1 << 30) == [8, 1, 1]
    # c1, r1, c2, sum and r2 have 4,096 bytes each.
    assert stages(8192) == [8, 3, 3]


def test_stages_are_cut_again_when_calls_grow(make_network: MakeNetwork, images: list[Feeds]) -> None:
    with StagedModel(make_network(), ALL, limit_bytes=64 * 1024) as staged:
        list(staged.run(images[0]))
        assert len(staged._stages) == 1
        list(staged.run({"image": np.zeros((32, 3, 8, 8), np.float32)}))
        assert len(staged._stages) > 4


def test_only_what_is_needed_is_run(make_network: MakeNetwork, images: list[Feeds]) -> None:
    # Gemm would fail on this input, but nobody asks for what it makes.
    extra = [onnx.helper.make_node("Gemm", ["flat", "w1"], ["never"])]
    model = onnx.load(make_network())
    model.graph.node.extend(extra)
    path = make_network(name="other").with_name("broken.onnx")
    onnx.save(model, path)
    with StagedModel(path, ["r1"]) as staged:
        assert [name for name, _ in staged.run(images[0])] == ["r1"]
    with StagedModel(path, ["never"]) as staged, pytest.raises(SessionError, match=r"The part .* that makes 'never'"):
        list(staged.run(images[0]))


def test_constants_go_wherever_they_are_read(make_network: MakeNetwork, images: list[Feeds]) -> None:
    two = onnx.numpy_helper.from_array(np.array(2, np.float32))
    extra = [
        onnx.helper.make_node("Constant", [], ["two"], value=two),
        onnx.helper.make_node("Mul", ["two", "two"], ["four"]),
        onnx.helper.make_node("Mul", ["pool", "four"], ["a"]),
        onnx.helper.make_node("Add", ["a", "four"], ["b"]),
    ]
    path = make_network(extra=extra)
    with CutModel(path) as model:
        assert {"two", "four", "w1"} <= model.constants
        assert "a" not in model.constants
        piece = model.piece([model.makers["b"]], ["b"])
        assert piece.reads == ("a",)
        assert [node.op_type for node in piece.nodes] == ["Constant", "Mul", "Add"]
        assert piece.run({"a": np.ones((1, 2), np.float32)})["b"].tolist() == [[5.0, 5.0]]
    with StagedModel(path, ["four", "b"], limit_bytes=1) as staged:
        for _ in range(2):
            found = dict(staged.run(images[0]))
            assert found["four"] == 4
            assert np.allclose(found["b"], expected(path, ["b"], images[0])["b"], atol=1e-5)


def test_subgraphs_see_what_lies_outside(make_network: MakeNetwork, images: list[Feeds]) -> None:
    info = onnx.helper.make_tensor_value_info

    def branch(name: str) -> Any:
        node = onnx.helper.make_node("Mul", ["r1", "w1_scale"], [name])
        return onnx.helper.make_graph([node], name, [], [info(name, 1, None)])

    scale = onnx.numpy_helper.from_array(np.array([3], np.float32))
    extra = [
        onnx.helper.make_node("Constant", [], ["w1_scale"], value=scale),
        onnx.helper.make_node("ReduceMax", ["pool"], ["most"], keepdims=0),
        onnx.helper.make_node("Cast", ["most"], ["flag"], to=9),
        onnx.helper.make_node("If", ["flag"], ["chosen"], then_branch=branch("yes"), else_branch=branch("no")),
    ]
    path = make_network(extra=extra)
    with StagedModel(path, ["pool", "chosen"], limit_bytes=1) as staged:
        for _ in range(2):
            found = dict(staged.run(images[0]))
            assert np.allclose(found["chosen"], 3 * expected(path, ["r1"], images[0])["r1"], atol=1e-5)


def test_outputs_of_one_node_are_one_stage(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network(extra=[onnx.helper.make_node("Split", ["r1"], ["left", "right"], axis=1, num_outputs=2)])
    with StagedModel(path, ["right", "left"], limit_bytes=1) as staged:
        for _ in range(2):
            found = dict(staged.run(images[0]))
            whole = np.concatenate([found["left"], found["right"]], axis=1)
            assert np.allclose(whole, expected(path, ["r1"], images[0])["r1"], atol=1e-5)


def test_names_and_files_that_are_none_are_refused(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network()
    with pytest.raises(UsageError, match="no tensor 'c3'"):
        StagedModel(path, ["c3"])
    with pytest.raises(UsageError, match="is a weight"):
        StagedModel(path, ["w2"])
    (path.parent / "cut.onnx").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SourceError, match="cut off"):
        StagedModel(path.parent / "cut.onnx", ["c1"])
    with StagedModel(path, ["c1"]) as staged, pytest.raises(ConversionError, match="cannot compute 'c1'"):
        list(staged.run({"image": np.zeros((1, 4, 8, 8), np.float32)}))


def test_data_outside_of_the_folder_is_never_read(make_network: MakeNetwork) -> None:
    path = make_network(external=True)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    path.write_bytes(model.SerializeToString())
    (path.parent.parent / "secret").write_bytes(b"\0" * 65536)
    with pytest.raises(SourceError, match="outside its own folder"):
        StagedModel(path, ["c1"])


def test_nothing_is_left_in_the_folder_for_temporary_files(
    make_network: MakeNetwork, images: list[Feeds], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_network()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with StagedModel(path, ["c1"]) as staged:
        list(staged.run(images[0]))
        assert [*(tmp_path / "temporary").iterdir()]
    with pytest.raises(UsageError):
        StagedModel(path, ["c3"])
    assert not [*(tmp_path / "temporary").iterdir()]
