from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import edgeq
from edgeq.errors import BundleError, SessionError, UsageError


def test_a_bundle_is_loaded_as_it_was_planned(smollm2_bundle: Path) -> None:
    with edgeq.load(smollm2_bundle, kind="llm", verify=True) as session:
        assert session.manifest.name == "smollm2"
        assert session.context_tokens == session.manifest.plan.context_tokens
        assert session.load_ms > 0
        assert "Paris" in session.generate("The capital of France is", max_tokens=4).text


def test_less_context_and_threads_than_planned(smollm2_bundle: Path) -> None:
    with edgeq.load(str(smollm2_bundle), kind="llm", context_tokens=128, threads=1) as session:
        assert (session.context_tokens, session.threads) == (128, 1)


@pytest.mark.parametrize("arguments", [{"context_tokens": 100_000}, {"context_tokens": 0}, {"threads": 0}])
def test_settings_that_make_no_sense(smollm2_bundle: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(arguments))):
        edgeq.load(smollm2_bundle, **arguments)


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        edgeq.load(tmp_path)


def test_a_model_that_is_no_gguf(smollm2_bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(smollm2_bundle, broken, ignore=shutil.ignore_patterns("model.gguf"))
    size = (smollm2_bundle / "model.gguf").stat().st_size
    with (broken / "model.gguf").open("wb") as file:
        file.truncate(size)
    with pytest.raises(SessionError, match=r"model\.gguf cannot be loaded: .*magic") as caught:
        edgeq.load(broken)
    assert "\n" not in str(caught.value)
