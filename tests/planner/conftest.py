"""A tiny model as a problem for the search, with sensitivities that are really measured once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgeq.converters.gguf.sensitivity.evidence import EvidenceRequest, Workshop
from edgeq.planner.candidates import Settings, effective_budget
from edgeq.planner.problem import Problem, SearchOptions, pose
from edgeq.planner.search import Demand, Goal
from edgeq.profiles.loader import load_profile
from edgeq.types import Budget

SETTINGS = Settings(context_tokens=256, kv_type="f16", ubatch_tokens=64)
OPTIONS = SearchOptions(when="always", evidence=EvidenceRequest(tokens=600), trials=3, decode_costs="profile")


@pytest.fixture(scope="session")
def tiny_problem(tiny_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """A tied llama of two layers on a laptop; its sensitivities are by gradients."""
    folder = tiny_hf("llama-tied")
    shop = Workshop(tmp_path_factory.mktemp("problem"), "tiny problem", 1, lambda *_: None)
    return pose(folder.with_suffix(".gguf"), folder, load_profile("laptop-cpu"), (), OPTIONS, shop)


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    """A folder for trials, and nobody who listens."""
    (tmp_path / "shop").mkdir()
    return Workshop(tmp_path / "shop", str(tmp_path), 1, lambda *_: None)


@pytest.fixture
def make_demand() -> Callable[..., Demand]:
    """``make_demand(Goal(...), Budget(...))`` on a laptop, with a context of 256 tokens."""

    def make(goal: Goal | None = None, budget: Budget | None = None) -> Demand:
        asked = budget or Budget()
        return Demand(goal or Goal(), effective_budget(asked, load_profile("laptop-cpu")), asked, SETTINGS, 64)

    return make
