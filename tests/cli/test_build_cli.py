"""``edgeq build``: engines of a real bundle, built by TensorRT-RTX without a GPU."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from edgeq.runtime.tensorrt.cache import describe_engine
from edgeq.runtime.tensorrt.driver import find_gpu
from edgeq.runtime.tensorrt.records import EngineInfo
from edgeq.types import to_json

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
no_gpu = pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")


@pytest.fixture(scope="module")
def tiny(repo: Path) -> ModuleType:
    """The graphs of the runtime's tests."""
    name = "edgeq_tests_tiny_graphs"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, repo / "tests/runtime/tensorrt/tiny_graphs.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def bundle(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle around the INT8 classifier, and a cache of its own."""
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "cache"))
    folder: Path = tiny.write_tensor_bundle(tmp_path / "bundle", tiny.int8_graph(tmp_path / "int8.onnx", half=True))
    return folder


def _json(text: str) -> list[dict[str, Any]]:
    engines: list[dict[str, Any]] = json.loads(text)["engines"]
    return engines


@no_gpu
def test_several_gpus_in_one_folder(cli: Any, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "engines"
    done = cli("build", bundle, "--for", "laptop-rtx", "sm_75", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    laptop, turing = _json(done.stdout)
    assert (laptop["target"], laptop["compute_capability"], turing["compute_capability"]) == (
        "laptop-rtx",
        "8.9",
        "7.5",
    )
    for engine, name in ((laptop, "sm_89"), (turing, "sm_75")):
        assert Path(engine["engine"]) == out / name / "model.engine"
        assert describe_engine(out / name).precisions["INT8"] >= 2
        assert engine["built"]
        assert engine["check"] is None
    assert done.stderr.count("building the engine") == 2


@no_gpu
def test_the_second_time_nothing_is_built(cli: Any, bundle: Path) -> None:
    first = cli("build", bundle)
    assert first.returncode == 0, first.stderr
    assert "for      laptop-rtx, sm_89, with tensorrt_rtx" in first.stdout
    assert "no engine was built of this model yet" in first.stderr
    assert "checked  not here: this machine has no such GPU" in first.stdout
    second = cli("build", bundle)
    assert second.returncode == 0
    assert "was there" in second.stdout
    assert "building" not in second.stderr
    forced = cli("build", bundle, "--force", "--json")
    assert _json(forced.stdout)[0]["built"]
    assert "it is asked for" in forced.stderr


@no_gpu
def test_a_damaged_engine_is_built_again_with_the_reason(cli: Any, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "engines"
    engine = Path(_json(cli("build", bundle, "-o", out, "--json").stdout)[0]["engine"])
    engine.write_bytes(b"x" * engine.stat().st_size)
    done = cli("build", bundle)
    assert done.returncode == 0
    again = cli("build", bundle, "-o", out)
    assert "building" in again.stderr
    assert describe_engine(engine.parent).size_bytes == engine.stat().st_size


@no_gpu
def test_out_of_memory_names_a_limit_that_would_do(cli: Any, bundle: Path, tmp_path: Path) -> None:
    done = cli("build", bundle, "--memory-limit", "60MiB", "-o", tmp_path / "engines")
    assert done.returncode == 1
    assert "took more than the limit of 60.0 MiB" in done.stderr
    assert "use --memory-limit" in done.stderr
    assert not (tmp_path / "engines").exists()


def test_what_cannot_be_built_is_one_line(
    cli: Any, bundle: Path, tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        ((bundle, "--for", "sm_87"), 2, "does not build for sm_87"),
        ((bundle, "--for", "jetson-orin"), 2, "does not build for sm_87"),
        ((bundle, "--for", "laptop-cpu"), 2, "laptop-cpu has no GPU"),
        ((bundle, "--for", "nonsense"), 1, "no device 'nonsense'"),
        ((bundle, "--for", "laptop-rtx", "--dla", "0"), 2, "laptop-rtx has none"),
        ((bundle, "--for", "sm_89", "-o", bundle / "engines"), 2, "is in the bundle, which never changes"),
        ((bundle, "--for", "sm_89", "--memory-limit", "much"), 2, "much"),
        ((tmp_path, "--for", "sm_89"), 1, "is no bundle"),
    ]
    for arguments, code, told in cases:
        done = cli("build", *arguments)
        assert (done.returncode, done.stdout) == (code, ""), arguments
        assert told in done.stderr
        assert len([line for line in done.stderr.splitlines() if "error" in line]) == 1
    cpu = tiny.write_tensor_bundle(tmp_path / "cpu", tmp_path / "int8.onnx", backend="onnxruntime-cpu")
    assert "made for onnxruntime-cpu" in cli("build", cpu).stderr
    fp8 = tiny.write_tensor_bundle(tmp_path / "fp8", tmp_path / "int8.onnx", backend="tensorrt", scheme="fp8")
    refused = cli("build", fp8, "--for", "jetson-orin", "--module", "tensorrt_rtx")
    assert refused.returncode == 1
    assert "FP8, which sm_87 does not have" in refused.stderr
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    missing = cli("build", bundle, "--module", "tensorrt", "--for", "sm_89")
    assert missing.returncode == 1
    assert "pip install tensorrt" in missing.stderr


def test_help_has_examples(cli: Any) -> None:
    done = cli("build", "--help")
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert "edgeq build bundle --for laptop-rtx -o engines" in done.stdout


def _of_another_build(info: EngineInfo) -> EngineInfo:
    assert info.key is not None
    return msgspec.structs.replace(info, key=msgspec.structs.replace(info.key, version="1.0.0.1"))


@no_gpu
def test_a_shipped_engine_is_taken_as_it_is(cli: Any, bundle: Path, tmp_path: Path) -> None:
    from edgeq.bundle import describe_file, open_bundle, write_manifest
    from edgeq.runtime.tensorrt.serving import ship_engine
    from edgeq.runtime.tensorrt.targets import parse_target, settings_for
    from edgeq.runtime.tensorrt.versions import find_tensorrt

    trt = find_tensorrt("tensorrt_rtx")
    manifest, target = open_bundle(bundle).tensor, parse_target("laptop-rtx")
    settings = settings_for(target, manifest.plan, manifest.budget)
    shipped = ship_engine(trt, bundle / "model.onnx", bundle / "engines" / "sm_89", settings, target)
    roles = {"model.engine": "engine", "engine.json": "engine-info"}
    files = tuple(describe_file(bundle, f"engines/sm_89/{name}", role) for name, role in roles.items())
    write_manifest(bundle, msgspec.structs.replace(manifest, files=(*manifest.files, *files)))
    open_bundle(bundle, verify=True)
    done = cli("build", bundle, "--json")
    assert done.returncode == 0, done.stderr
    (engine,) = _json(done.stdout)
    assert not engine["built"]
    assert Path(engine["engine"]) == shipped.engine
    other = cli("build", bundle, "--for", "sm_86")
    assert "the engine that is there is for compute capability 8.9, now 8.6" in other.stderr
    (forced,) = _json(cli("build", bundle, "--force", "--json").stdout)
    assert Path(forced["engine"]) != shipped.engine
    (again,) = _json(cli("build", bundle, "--json").stdout)
    assert (again["built"], again["engine"]) == (False, forced["engine"])  # what was asked for stays
    shutil.rmtree(tmp_path / "cache")
    (bundle / "engines" / "sm_89" / "engine.json").write_bytes(to_json(_of_another_build(shipped.info)))
    files = tuple(describe_file(bundle, f"engines/sm_89/{name}", role) for name, role in roles.items())
    write_manifest(bundle, msgspec.structs.replace(manifest, files=(*manifest.files, *files)))
    older = cli("build", bundle)
    assert f"the engine that is there is for TensorRT 1.0.0.1, now {trt.__version__}" in older.stderr
