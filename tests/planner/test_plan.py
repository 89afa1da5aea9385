from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgeq.converters.gguf.export import export_skeleton
from edgeq.converters.gguf.presets import LADDER
from edgeq.converters.gguf.recipe import parse_override
from edgeq.errors import BudgetError, UsageError
from edgeq.planner.candidates import effective_budget, misses
from edgeq.planner.plan import Request, make_plan, profile_notes
from edgeq.profiles.facts.system_facts import read_facts
from edgeq.profiles.loader import load_profile
from edgeq.profiles.measured import Measured
from edgeq.types import Budget

# A copy, so that a shipped figure may change.
_LAPTOP = load_profile(str(Path(__file__).parents[1] / "profiles" / "samples" / "laptop-cpu.yaml"))
_MIB = 2**20


@pytest.fixture(scope="module")
def gguf(smollm2_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_skeleton(smollm2_hf, tmp_path_factory.mktemp("plan") / "skeleton.gguf").path


def _request(**fields: object) -> Request:
    return Request(**fields)  # type: ignore[arg-type]


def test_without_limits_the_largest_preset_is_taken(gguf: Path) -> None:
    plan = make_plan(gguf, _LAPTOP, Budget(), Request())
    assert plan.preset == LADDER[0] == "f16"
    assert {r.option.split(",")[0] for r in plan.rejected} == set(LADDER[1:])


@pytest.mark.parametrize("limit_mib", [270, 300, 350, 400, 500])
def test_the_plan_meets_the_limit_and_no_larger_one_would(gguf: Path, limit_mib: int) -> None:
    budget = Budget(peak_memory_bytes=limit_mib * _MIB)
    plan = make_plan(gguf, _LAPTOP, budget, Request())
    assert plan.predicted.peak_memory_bytes <= limit_mib * _MIB
    for rejected in plan.rejected:
        name = rejected.option.split(",")[0]
        other = make_plan(gguf, _LAPTOP, Budget(), _request(preset=name))
        if other.predicted.file_bytes > plan.predicted.file_bytes:
            assert other.predicted.peak_memory_bytes > limit_mib * _MIB
            assert "peak memory" in rejected.reason


def test_latency_limits_too(gguf: Path) -> None:
    plan = make_plan(gguf, _LAPTOP, Budget(itl_ms=20.0), Request())
    assert plan.predicted.itl_ms <= 20.0
    assert plan.preset != "f16"
    fast = make_plan(gguf, _LAPTOP, Budget(tokens_per_s=70.0), Request())
    assert fast.predicted.tokens_per_s >= 70.0


def test_an_impossible_budget_lists_what_is_possible_with_figures(gguf: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        make_plan(gguf, _LAPTOP, Budget(peak_memory_bytes=190 * _MIB), Request())
    error = caught.value
    assert error.exit_code == 3
    assert "limit 190" in error.cause
    assert error.details
    # Every alternative is true: asked for as it is written, it is planned.
    for line in error.details:
        words = line.split("(")[0].split()
        options = dict(zip(words[::2], words[1::2], strict=True))
        request = _request(
            preset=options["--quant"],
            context_tokens=int(options["--context"]),
            kv_type=options["--kv-type"],
            ubatch_tokens=int(options["--ubatch"]),
        )
        plan = make_plan(gguf, _LAPTOP, Budget(peak_memory_bytes=190 * _MIB), request)
        assert plan.predicted.peak_memory_bytes <= 190 * _MIB


def test_a_preset_that_does_not_fit_is_answered_with_smaller_ones_too(gguf: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        make_plan(gguf, _LAPTOP, Budget(peak_memory_bytes=300 * _MIB), _request(preset="f16"))
    assert any("--quant q8_0" in line for line in caught.value.details)
    assert any("--context 4096 --kv-type f16" in line for line in caught.value.details)


def test_what_costs_more_quality_is_offered_when_nothing_else_fits(gguf: Path) -> None:
    limit = (_LAPTOP.backend.runtime_bytes or 0) + 103 * _MIB
    with pytest.raises(BudgetError) as caught:
        make_plan(gguf, _LAPTOP, Budget(peak_memory_bytes=limit), Request())
    assert any("--quant q3_k_s" in line or "--quant q2_k" in line for line in caught.value.details)


def test_a_limit_below_everything_says_so(gguf: Path) -> None:
    with pytest.raises(BudgetError, match="smaller model"):
        make_plan(gguf, _LAPTOP, Budget(peak_memory_bytes=50 * _MIB), Request())


def test_a_device_has_only_its_own_memory(gguf: Path) -> None:
    memory = msgspec.structs.replace(_LAPTOP.memory, visible_bytes=600 * _MIB, reserved_bytes=300 * _MIB)
    small = msgspec.structs.replace(_LAPTOP, memory=memory)
    assert effective_budget(Budget(), small).peak_memory_bytes == 300 * _MIB
    plan = make_plan(gguf, small, Budget(), Request())
    assert plan.predicted.peak_memory_bytes <= 300 * _MIB


def test_fallbacks_are_part_of_the_plan(gguf: Path) -> None:
    plan = make_plan(gguf, _LAPTOP, Budget(), _request(preset="q4_k_m"))
    assert len(plan.fallbacks) == 180
    assert plan.preset == "q4_k_m"


def test_overrides_make_a_recipe(gguf: Path) -> None:
    overrides = (parse_override("attn_v=q8_0"), parse_override("token_embd=q5_0"))
    plan = make_plan(gguf, _LAPTOP, Budget(), _request(preset="q4_0", overrides=overrides))
    assert plan.preset is None
    assert plan.tensor_types["blk.7.attn_v.weight"] == "q8_0"
    assert plan.tensor_types["token_embd.weight"] == "q5_0"
    assert plan.tensor_types["blk.7.attn_k.weight"] == "q4_0"
    assert not plan.fallbacks  # the only fallback of q4_0 was the embedding's


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context_tokens": 100_000}, "more than the 8192"),
        ({"kv_type": "q4_k"}, "no type of a KV cache"),
        ({"kv_type": "q9"}, "no type of a KV cache.*q8_0"),
        ({"preset": "q4"}, "no quantization preset"),
    ],
)
def test_what_the_model_cannot_have_is_refused(gguf: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(gguf, _LAPTOP, Budget(), _request(**fields))


def test_quantities_that_are_not_predicted_are_left_to_the_measurement(gguf: Path) -> None:
    plan = make_plan(gguf, _LAPTOP, Budget(), Request())
    assert misses(plan.predicted, Budget(load_ms=0.001, power_w=0.001)) == []
    assert [m.label for m in misses(plan.predicted, Budget(itl_ms=0.001))] == ["inter-token latency"]


def test_a_plan_says_what_its_predictions_stand_on() -> None:
    assert profile_notes(_LAPTOP, 4) == ()
    measured = Measured(
        taken_utc="2026-11-22T10:00:00+00:00",
        edgeq="0.1.0",
        threads=2,
        host_load=0.4,
        doubts=("host loaded: a lot",),
        facts=read_facts(),
    )
    probed = msgspec.structs.replace(_LAPTOP, name="robot", measured=measured)
    assert profile_notes(probed, None) == ("predicted from a probe that doubts itself: host loaded: a lot",)
    assert profile_notes(probed, 4)[1:] == ("times are predicted for 2 threads, as robot was probed, not 4",)
    assert len(profile_notes(probed, 2)) == 1
