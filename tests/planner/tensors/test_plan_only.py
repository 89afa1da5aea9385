"""What ``edgeq plan`` says of models that are called with arrays, against what a conversion then does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from edgeq.cli import main
from edgeq.cli.describe_tensor_plan import preview_lines
from edgeq.converters.onnx.export.export import export_model
from edgeq.errors import BudgetError, ProfileError, UsageError
from edgeq.planner.tensors.convert import convert_tensor
from edgeq.planner.tensors.job import Calibration, Gate, TensorJob
from edgeq.planner.tensors.memory_budget import sizes_that_fit
from edgeq.planner.tensors.plan_only import TensorPreview, plan_tensor
from edgeq.tensor_types import AxisRange
from edgeq.types import Budget, from_json
from edgeq.units import parse_bytes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

MIB = 2**20
SMALL = Calibration(samples=2, judged=2, method="minmax")
ANY = Gate(min_cosine=0.1, min_coverage=0.1)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertModel(config, add_pooling_layer=False).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder as an ONNX file of fixed shapes, so that it is exported once."""
    shapes: dict[str, tuple[int, ...]] = {"input_ids": (1, 16), "attention_mask": (1, 16)}
    return export_model(bert, tmp_path_factory.mktemp("fp32") / "model.onnx", shapes=shapes).path


def job(model: Path, target: str = "laptop-cpu", *, memory: int | None = None, **fields: object) -> TensorJob:
    budget = Budget(peak_memory_bytes=memory)
    wanted = TensorJob(model=str(model), target=target, budget=budget, calibration=SMALL, gate=ANY, threads=1)
    return TensorJob(**{**wanted.__dict__, **fields})


@pytest.fixture(scope="module")
def counted(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> TensorPreview:
    return plan_tensor(job(exported), tmp_path_factory.mktemp("plan") / "plan", decide=False)


def test_every_precision_is_there_in_order_or_with_a_reason(counted: TensorPreview) -> None:
    assert [option.scheme for option in counted.options][:3] == ["int8-static", "int8-dynamic", "fp32"]
    impossible = {option.scheme: option.reason for option in counted.options if option.predicted is None}
    assert impossible.keys() == {"fp16", "bf16", "fp8"}
    assert "FP32 on a CPU" in (impossible["fp16"] or "")
    assert counted.plan.scheme == "int8-static"
    assert (counted.decided, counted.quality) == (False, None)
    assert counted.coverage is not None
    assert counted.coverage.mac_share == pytest.approx(1.0)
    assert any("nothing was calibrated" in note for note in counted.plan.notes)


@pytest.mark.parametrize("precision", ["int8-static", "int8-dynamic"])
def test_what_was_counted_is_what_a_conversion_has(
    exported: Path, counted: TensorPreview, tmp_path: Path, precision: str
) -> None:
    manifest = convert_tensor(job(exported, precision=precision), tmp_path / "bundle").tensor
    option = next(o for o in counted.options if o.scheme == precision)
    assert option.predicted is not None
    # Numbers in the file have other digits, names may be longer.
    assert option.predicted.file_bytes == pytest.approx(manifest.plan.predicted.file_bytes, rel=0.02)
    assert option.predicted.weights_bytes == pytest.approx(manifest.plan.predicted.weights_bytes, rel=0.02)
    assert option.coverage is not None
    assert manifest.coverage is not None
    assert option.coverage.mac_share == pytest.approx(manifest.coverage.mac_share)


def test_a_plan_that_is_decided_is_that_of_a_conversion(exported: Path, tmp_path: Path) -> None:
    wanted = job(exported, "jetson-orin", precision="int8-static")
    preview = plan_tensor(wanted, tmp_path / "plan", decide=True)
    manifest = convert_tensor(wanted, tmp_path / "bundle").tensor
    assert preview.decided
    assert preview.plan == manifest.plan
    assert preview.quality == manifest.quality
    assert preview.coverage == manifest.coverage
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_devices_that_were_not_probed_have_memory_and_the_least_latency(exported: Path, tmp_path: Path) -> None:
    preview = plan_tensor(job(exported, "jetson-orin"), tmp_path / "plan", decide=False)
    predicted = preview.plan.predicted
    assert preview.plan.predicted.latency_is_floor
    assert predicted.latency_ms is not None
    assert 0 < predicted.latency_ms < 1
    assert predicted.activation_bytes > 16 * 64 * 2
    assert predicted.peak_memory_bytes >= predicted.weights_bytes + predicted.activation_bytes + predicted.runtime_bytes
    assert predicted.runtime_bytes > 100 * MIB
    assert any("not a prediction" in note for note in preview.plan.notes)


@pytest.mark.parametrize(("limit_ms", "verdict"), [(1e3, "may pass"), (1e-9, "unlikely to pass")])
def test_a_floor_from_a_datasheet_decides_nothing(
    exported: Path, tmp_path: Path, limit_ms: float, verdict: str
) -> None:
    budget = Budget(latency_ms=limit_ms)
    preview = plan_tensor(job(exported, "jetson-orin", budget=budget), tmp_path / "plan", decide=False)
    (line,) = [line for line in preview_lines(preview) if line.startswith("latency p99")]
    assert "≳ " in line
    assert line.endswith(f"  {verdict}")


@pytest.mark.slow
def test_memory_over_the_budget_names_sizes_that_fit(bert: Path, tmp_path: Path) -> None:
    wanted = job(bert, memory=62 * MIB)
    with pytest.raises(BudgetError, match="the limit is 62") as caught:
        plan_tensor(wanted, tmp_path / "plan", decide=False)
    with pytest.raises(BudgetError, match="the limit is 62"):
        convert_tensor(TensorJob(**{**wanted.__dict__, "precision": "int8-dynamic"}), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    words = caught.value.remedy.split()
    assert words[:1] == ["--shape"]
    shapes = dict(word.split("=") for word in words if "=" in word)
    sizes = {name: tuple(int(size) for size in text.split("x")) for name, text in shapes.items()}
    fitting = TensorJob(**{**wanted.__dict__, "shapes": sizes})
    found = plan_tensor(fitting, tmp_path / "plan", decide=False)
    assert found.plan.predicted.peak_memory_bytes <= 62 * MIB


@pytest.mark.parametrize(("limit", "found"), [(10_000, (16, 512)), (2_048, (4, 512)), (300, (1, 300)), (0, None)])
def test_the_batch_is_cut_first(limit: int, found: tuple[int, int] | None) -> None:
    axes = {"sequence": AxisRange(least=1, usual=128, most=512), "batch": AxisRange(least=1, usual=1, most=16)}

    def peak(sizes: Mapping[str, int]) -> int:
        return sizes["batch"] * sizes["sequence"]

    sizes = sizes_that_fit(axes, peak, limit)
    assert (None if sizes is None else (sizes["batch"], sizes["sequence"])) == found


def test_the_command_shows_and_prints_it(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(exported), "--target", "jetson-orin", "--threads", "1", "--max-memory", "2GiB"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for part in ("int8-static", "rejected int8-dynamic", "peak memory", "would pass", "may pass", "≳"):
        assert part in shown
    assert main([*words, "--json"]) == 0
    assert from_json(capsys.readouterr().out.encode(), TensorPreview).plan.backend == "tensorrt"


def test_every_device_is_previewed(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = job(exported, precision="int8-static", also_for=("jetson-orin",))
    preview = plan_tensor(wanted, tmp_path / "plan", decide=False)
    assert (preview.built_for, preview.plan.backend) == ("laptop-cpu", "onnxruntime-cpu")
    (other,) = preview.others
    assert (other.built_for, other.plan.backend, other.plan.activations) == ("jetson-orin-nano-8gb", "tensorrt", "s8")
    assert other == plan_tensor(job(exported, "jetson-orin", precision="int8-static"), tmp_path / "plan", decide=False)
    assert "for tensorrt of jetson-orin-nano-8gb" in "\n".join(preview_lines(preview))
    for device, code in (("no-such-device", ProfileError.exit_code), ("laptop-cpu", UsageError.exit_code)):
        assert main(["plan", str(exported), "--target", "laptop-cpu", "--also-for", device]) == code
        assert device in capsys.readouterr().err


def test_the_limit_that_is_advised_is_enough(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        plan_tensor(job(exported, memory=MIB), tmp_path / "plan", decide=False)
    advised = parse_bytes(caught.value.remedy.partition("raise --max-memory to ")[2])
    found = plan_tensor(job(exported, memory=advised), tmp_path / "plan", decide=False)
    assert advised - MIB / 10 < found.plan.predicted.peak_memory_bytes <= advised
    floats = next(option.predicted for option in found.options if option.scheme == "fp32")
    assert floats is not None
    too_little = job(exported, precision="fp32", memory=floats.peak_memory_bytes - 1)
    with pytest.raises(BudgetError, match=r"takes [\d,]+ bytes at its peak .* the limit is [\d,]+ bytes"):
        plan_tensor(too_little, tmp_path / "plan", decide=False)


def test_options_of_language_models_are_refused(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(exported), "--target", "laptop-cpu", "--export", "types.txt"]) == UsageError.exit_code
    assert "--export is for language models" in capsys.readouterr().err
    assert main(["plan", str(exported), "--target", "laptop-cpu", "--context", "10"]) == UsageError.exit_code
    assert "--context is for language models" in capsys.readouterr().err


def test_budget_errors_end_with_their_own_code(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(exported), "--target", "laptop-cpu", "--max-memory", "40MiB", "--threads", "1", "--json"]
    assert main(words) == BudgetError.exit_code
    assert "raise --max-memory to" in json.dumps(capsys.readouterr().err)
