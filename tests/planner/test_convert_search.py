"""From a model to a bundle with searched types, and what decides whether there is a search."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgeq.bundle import open_bundle
from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.quantize import assert_types
from edgeq.converters.gguf.recipe import read_recipe
from edgeq.converters.gguf.sensitivity.evidence import EvidenceRequest
from edgeq.errors import BudgetError, SourceError, UsageError
from edgeq.llama import Context, Model
from edgeq.planner import search as search_module
from edgeq.planner.convert import Job, convert, plan_only
from edgeq.planner.decide import export_reference, wants_search
from edgeq.planner.inspection import QualityOptions
from edgeq.planner.plan import Request
from edgeq.planner.problem import SearchOptions
from edgeq.planner.search import Goal
from edgeq.profiles.loader import load_profile
from edgeq.types import Budget

SIZE = 120_000
OPTIONS = SearchOptions(evidence=EvidenceRequest(tokens=600), trials=3, decode_costs="profile")


@pytest.fixture(autouse=True)
def _short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "_SELECTION_TOKENS", 300)
    monkeypatch.setattr(search_module, "_SELECTION_CHUNK", 64)


def _job(model: Path, goal: Goal | None = None, **changes: Any) -> Job:
    job = Job(
        str(model),
        "laptop-cpu",
        goal=goal or Goal(max_file_bytes=SIZE),
        search=OPTIONS,
        quality=QualityOptions(tokens=400),
        request=Request(context_tokens=256),
        threads=1,
    )
    return dataclasses.replace(job, **changes)


def test_a_bundle_of_searched_types(tiny_hf: Callable[..., Path], tmp_path: Path) -> None:
    stages: list[str] = []
    bundle = convert(_job(tiny_hf("llama-tied")), tmp_path / "out", progress=lambda stage, *_: stages.append(stage))
    manifest = open_bundle(tmp_path / "out", verify=True).llm
    assert manifest == bundle.llm
    plan, quality = manifest.plan, manifest.quality
    assert plan.preset is None
    assert plan.search is not None
    assert quality is not None
    file = bundle.file("model")
    assert_types(file, plan.tensor_types)
    assert len(set(plan.tensor_types.values())) > 2
    assert file.stat().st_size == plan.predicted.file_bytes <= SIZE
    # What was measured is on record, and the mix that measured best is what was published.
    chosen = [trial for trial in plan.search.trials if trial.chosen]
    assert [trial.file_bytes for trial in chosen] == [plan.predicted.file_bytes]
    assert chosen[0].measured_kld == min(trial.measured_kld for trial in plan.search.trials)
    assert (plan.search.estimator, plan.search.compensated) == ("fisher", True)
    assert (quality.tokens, quality.overlap, quality.reference) == (400, 0.0, "f16")
    assert 0.2 < quality.mean_kld / plan.search.predicted_kld < 5
    assert manifest.smoke is not None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {"curvature", "price types", "try mixes", "measure quality", "check model"} <= set(stages)
    recipe = read_recipe(bundle.file("recipe"))
    assert {o.match.strip("^$").replace("\\", ""): o.type for o in recipe.overrides} == plan.tensor_types
    with Model.load(file) as model, Context(model, context_tokens=32, threads=1) as context:
        assert context.decode([2, 3, 4], 0, logits="last")


def test_the_plan_alone_is_the_predicted_optimum_and_writes_nothing(
    tiny_hf: Callable[..., Path], tmp_path: Path
) -> None:
    looks: list[tuple[Any, ...]] = []
    _, profile, plan = plan_only(
        _job(tiny_hf("llama-tied")), tmp_path / "beside", look=lambda *seen: looks.append(seen)
    )
    assert profile.name == "laptop-cpu"
    assert plan.search is not None
    assert plan.search.trials == ()
    assert plan.predicted.file_bytes <= SIZE
    assert list(tmp_path.iterdir()) == []
    assert len(looks) == 1
    assert looks[0][2] == plan


def test_a_gguf_without_its_folder_is_searched_by_activations(tiny_hf: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_hf("llama-untied").with_suffix(".gguf")
    bundle = convert(_job(model, Goal(max_kld=0.05)), tmp_path / "out")
    plan, quality = bundle.llm.plan, bundle.llm.quality
    assert plan.search is not None
    assert (plan.search.estimator, plan.search.objective, plan.search.compensated) == ("imatrix", "file_bytes", True)
    assert any("no Hugging Face folder" in note for note in plan.notes)
    assert quality is not None
    assert quality.mean_kld_interval.high is not None
    assert quality.mean_kld_interval.high <= 0.05
    assert plan.predicted.file_bytes < 0.7 * model.stat().st_size


@pytest.mark.parametrize(
    ("goal", "budget", "match"),
    [
        (Goal(max_file_bytes=1000), Budget(), "file size <= 1000 B"),
        (
            Goal(max_file_bytes=75_000, max_kld=1e-6),
            Budget(),
            "file size <= .* and predicted mean KL divergence <= 1e-06 at once",
        ),
        (Goal(max_file_bytes=75_000, min_top1=0.9999), Budget(), "same top token"),
        (Goal(max_kld=0.1), Budget(peak_memory_bytes=1), "peak memory <= 1 B"),
    ],
)
def test_what_cannot_be_had_leaves_nothing(
    goal: Goal, budget: Budget, match: str, tiny_hf: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=match) as error:
        convert(_job(tiny_hf("llama-tied"), goal, budget=budget), tmp_path / "new" / "out")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "stage", ["write calibration text", "curvature", "price types", "try mixes", "measure quality"]
)
def test_an_interrupt_leaves_no_bundle(
    stage: str, tiny_hf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "cache"))

    def stop(name: str, *_: object) -> None:
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(_job(tiny_hf("llama-tied")), tmp_path / "sub" / "out", progress=stop)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_weights_that_are_not_numbers_are_refused_before_the_search(
    tiny_hf: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_hf("llama-tied").with_suffix(".gguf")
    data = bytearray(source.read_bytes())
    offset = read_header(source).tensors["blk.0.ffn_up.weight"].offset
    data[offset : offset + 2] = np.array([np.nan], "<f2").tobytes()
    (tmp_path / "nan.gguf").write_bytes(data)
    with pytest.raises(SourceError, match=r"blk\.0\.ffn_up\.weight holds 1 weights that are NaN"):
        convert(_job(tmp_path / "nan.gguf"), tmp_path / "out")


# Whether there is a search


def _wants(gguf_file: Path, *, budget: Budget | None = None, goal: Goal | None = None, **fields: Any) -> bool:
    request = Request(context_tokens=256, **{k: v for k, v in fields.items() if k != "when"})
    options = dataclasses.replace(OPTIONS, when=fields.get("when", "auto"))
    profile = load_profile("laptop-cpu")
    return wants_search(gguf_file, profile, budget or Budget(), request, goal or Goal(), options)


def test_where_nothing_is_lost_without_there_is_no_search(tiny_hf: Callable[..., Path]) -> None:
    path = tiny_hf("llama-tied").with_suffix(".gguf")
    assert not _wants(path)
    assert not _wants(path, preset="q4_0")
    assert not _wants(path, when="never", goal=Goal(max_kld=0.1))
    assert _wants(path, when="always")
    for goal in (Goal(max_file_bytes=10**9), Goal(max_kld=1.0), Goal(min_top1=0.5), Goal(minimize="ns")):
        assert _wants(path, goal=goal)
    runtime_bytes = load_profile("laptop-cpu").backend.runtime_bytes or 0
    assert _wants(path, budget=Budget(peak_memory_bytes=runtime_bytes + 200_000))
    assert not _wants(path, budget=Budget(peak_memory_bytes=2**30))


def test_a_search_and_given_types_exclude_each_other(tiny_hf: Callable[..., Path]) -> None:
    path = tiny_hf("llama-tied").with_suffix(".gguf")
    given_types: list[dict[str, Any]] = [{"preset": "q4_0"}, {"from_recipe": True}]
    for given in given_types:
        with pytest.raises(UsageError, match="--search always"):
            _wants(path, when="always", **given)
        with pytest.raises(UsageError, match="--minimize needs a search"):
            _wants(path, goal=Goal(minimize="ns"), **given)
    with pytest.raises(UsageError, match="--minimize needs a search"):
        _wants(path, when="never", goal=Goal(minimize="ns"))


def test_a_tensor_beyond_f16_is_in_bf16_in_the_reference(tiny_hf: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_hf("llama-tied"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    export_reference(folder, tmp_path / "reference.gguf", lambda *_: None)
    types = {name: tensor.type for name, tensor in read_header(tmp_path / "reference.gguf").tensors.items()}
    assert types["blk.0.ffn_up.weight"] == "bf16"
    assert types["blk.1.ffn_up.weight"] == "f16"
