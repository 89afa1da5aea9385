"""Which TensorRT is there, and what to install where there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgeq.errors import MissingPackageError, SessionError, UsageError
from edgeq.runtime.tensorrt.versions import (
    capability_names,
    find_tensorrt,
    flavour_for_backend,
    flavour_of,
    refuse_too_old,
    version_of,
)
from edgeq.system_files import SystemFiles


def _module(name: str, version: str) -> ModuleType:
    module = ModuleType(name)
    module.__dict__["__version__"] = version
    return module


def _jetson(root: Path) -> SystemFiles:
    (root / "etc").mkdir()
    (root / "etc" / "nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic")
    return SystemFiles(root)


def test_what_to_install_depends_on_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    pc = SystemFiles(tmp_path / "pc")
    with pytest.raises(MissingPackageError, match="pip install tensorrt, on the machine with the GPU"):
        find_tensorrt("tensorrt", files=pc)
    with pytest.raises(MissingPackageError, match="pip install tensorrt-rtx-cu13"):
        find_tensorrt("tensorrt_rtx", files=pc)
    board = _jetson(tmp_path)
    with pytest.raises(MissingPackageError, match=r"apt install python3-libnvinfer.*--system-site-packages"):
        find_tensorrt("tensorrt", files=board)
    with pytest.raises(MissingPackageError, match="does not run on a Jetson"):
        find_tensorrt("tensorrt_rtx", files=board)


def test_a_library_that_does_not_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MissingPackageError, match=r"does not load \(libnvinfer\.so\.10"):
        find_tensorrt("tensorrt", files=SystemFiles(tmp_path))


def test_the_installed_one_is_found(rtx: ModuleType) -> None:
    assert find_tensorrt("tensorrt_rtx") is rtx
    assert flavour_of(rtx) == "tensorrt_rtx"
    assert version_of(rtx).count(".") >= 2
    assert {"7.5", "8.0", "8.6", "8.9", "12.0"} <= set(capability_names(rtx))
    assert "8.7" not in capability_names(rtx)


@pytest.mark.parametrize("version", ["8.6.2", "10.0.1", "10.2.0.19"])
def test_old_ones_are_refused_with_the_jetpack_that_would_do(version: str) -> None:
    with pytest.raises(SessionError, match=r"too old, edgeq needs 10\.3 or later\. Update JetPack to 6\.1"):
        refuse_too_old(_module("tensorrt", version))


@pytest.mark.parametrize("version", ["10.3.0", "10.3.0.30", "10.16.2.10", "11.4.1"])
def test_from_10_3_on_all_are_taken(version: str) -> None:
    refuse_too_old(_module("tensorrt", version))
    assert capability_names(_module("tensorrt", version)) == ()


def test_a_module_of_another_name_is_refused() -> None:
    with pytest.raises(UsageError, match="neither of tensorrt, tensorrt_rtx"):
        flavour_of(_module("numpy", "2.0"))


def test_a_graph_for_the_cpu_is_no_graph_for_tensorrt() -> None:
    assert flavour_for_backend("tensorrt") == "tensorrt"
    assert flavour_for_backend("tensorrt-rtx") == "tensorrt_rtx"
    with pytest.raises(UsageError, match=r"made for onnxruntime-cpu.*--target jetson-orin"):
        flavour_for_backend("onnxruntime-cpu")
