"""The profile that figures for CPUs with VNNI are made for."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from edgeq.planner.tensors.prepare import needs_narrow_weights
from edgeq.profiles.loader import load_profile
from tests.fixtures.language_models import load_script

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("bench_accuracy")


def test_only_the_cpus_instructions_differ(bench: ModuleType, tmp_path: Path) -> None:
    plain, made = load_profile("laptop-cpu"), load_profile(bench.with_vnni("laptop-cpu", tmp_path))
    assert set(made.cpu.features) - set(plain.cpu.features) == {"avx512_vnni"}
    (backend,) = (backend for backend in made.backends if backend.name == "onnxruntime-cpu")
    assert needs_narrow_weights(plain, backend)
    assert not needs_narrow_weights(made, backend)
    changed = {"name", "aliases", "cpu", "sources"}
    for field in set(plain.__struct_fields__) - changed:
        assert getattr(made, field) == getattr(plain, field), field
    assert msgspec.structs.replace(made.cpu, features=plain.cpu.features) == plain.cpu


def test_a_file_may_be_the_target(bench: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("{extends: laptop-cpu, name: mine, memory: {reserved_bytes: 5GiB}, sources: {memory: mine}}")
    (tmp_path / "work").mkdir()
    made = load_profile(bench.with_vnni(str(file), tmp_path / "work"))
    assert made.memory.reserved_bytes == 5 << 30
    assert "avx512_vnni" in made.cpu.features
