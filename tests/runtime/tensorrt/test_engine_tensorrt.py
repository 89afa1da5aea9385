"""What only TensorRT itself has, which needs a GPU: timing caches, accelerators, older and newer interfaces.

A stand-in with the interface of 10.3 or 11.4 answers; graph and builder are the real ones in test_engine_builder.
"""

from __future__ import annotations

import enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from edgeq.bundle import open_bundle
from edgeq.errors import SessionError, UnsupportedModelError, UsageError
from edgeq.runtime.tensorrt import builder, targets
from edgeq.runtime.tensorrt.builder import build_engine
from edgeq.runtime.tensorrt.driver import Gpu
from edgeq.runtime.tensorrt.records import EngineSettings
from edgeq.runtime.tensorrt.serving import open_engine

ORIN = Gpu(index=0, name="Orin", compute_capability="8.7", sms=8, memory_bytes=8 << 30, integrated=True)


class Library:
    """One build's state: what was asked for, and what the library shall answer."""

    def __init__(self, version: str) -> None:
        self.flags: int | None = None
        self.config_flags: list[str] = []
        self.parser_flags: list[str] = []
        self.pools: dict[str, int] = {}
        self.timing = b"times of this GPU"
        self.timing_given: bytes | None = None
        self.fits_timing = True
        self.dla_cores = 0
        self.dla_layers = 0
        self.types = ["FLOAT", "INT8", "FLOAT"]
        self.built: bytes | None = b"engine"
        self.says: list[str] = []
        self.starts = True
        self.config = self._config()
        self.module = self._module(version)

    def _config(self) -> Any:
        library = self

        class Config:
            builder_optimization_level = 3
            default_device_type = "GPU"
            hardware_compatibility_level = None
            DLA_core = -1

            def set_flag(self, flag: str) -> None:
                library.config_flags.append(flag)

            def set_memory_pool_limit(self, pool: str, n_bytes: int) -> None:
                library.pools[pool] = min(n_bytes, 1 << 30)

            def get_memory_pool_limit(self, pool: str) -> int:
                return library.pools[pool]

            def create_timing_cache(self, data: bytes) -> Any:
                library.timing_given = bytes(data)
                return SimpleNamespace(serialize=lambda: library.timing)

            def set_timing_cache(self, _cache: Any, *, ignore_mismatch: bool) -> bool:
                assert not ignore_mismatch
                return library.fits_timing or library.timing_given == b""

            def get_timing_cache(self) -> Any:
                return SimpleNamespace(serialize=lambda: library.timing)

            def can_run_on_DLA(self, layer: Any) -> bool:
                return bool(layer.index < library.dla_layers)

            def add_optimization_profile(self, _profile: Any) -> int:
                return 0

        return Config()

    def _layer(self, index: int) -> Any:
        dtype = SimpleNamespace(name=self.types[index])
        return SimpleNamespace(index=index, num_outputs=1, get_output=lambda _i: SimpleNamespace(dtype=dtype))

    def _module(self, version: str) -> ModuleType:
        class Severity(enum.IntEnum):
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2

        class Logger:
            pass

        Logger.Severity = Severity  # type: ignore[attr-defined]
        images = SimpleNamespace(name="images", shape=(2, 3), is_shape_tensor=False)

        def make_builder(logger: Any) -> Any:
            if not self.starts:
                logger.log(Severity.ERROR, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            return SimpleNamespace(
                num_DLA_cores=self.dla_cores, create_network=create_network, create_builder_config=lambda: self.config,
                build_serialized_network=lambda _n, _c: build(logger),
            )  # fmt: skip

        def create_network(flags: int) -> Any:
            self.flags = flags
            return SimpleNamespace(
                num_layers=len(self.types), get_layer=self._layer, num_inputs=1, get_input=lambda _i: images
            )  # fmt: skip

        def build(logger: Any) -> bytes | None:
            for line in self.says:
                logger.log(Severity.ERROR, line)
            return self.built

        def make_parser(_network: Any, _logger: Any) -> Any:
            return SimpleNamespace(parse_from_file=lambda _path: True, set_flag=self.parser_flags.append)

        newer = version.startswith("11")
        module = ModuleType("tensorrt")
        module.__dict__.update(
            __version__=version,
            ILogger=Logger,
            Builder=make_builder,
            OnnxParser=make_parser,
            NetworkDefinitionCreationFlag=SimpleNamespace() if newer else SimpleNamespace(STRONGLY_TYPED=1),
            OnnxParserFlag=SimpleNamespace(ADJUST_FOR_DLA="adjust") if newer else SimpleNamespace(),
            MemoryPoolType=SimpleNamespace(WORKSPACE="workspace", TACTIC_DRAM="tactic"),
            HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere"),
            DeviceType=SimpleNamespace(DLA="DLA"),
            BuilderFlag=SimpleNamespace(GPU_FALLBACK="fallback"),
        )
        return module


@pytest.fixture
def orin(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """This machine is an Orin."""
    monkeypatch.setattr(builder, "find_gpu", lambda: ORIN)
    return ORIN


@pytest.fixture
def graph(tiny: ModuleType, tmp_path: Path) -> Path:
    """A graph, which the stand-in does not read."""
    path: Path = tiny.float_graph(tmp_path / "m.onnx")
    return path


pytestmark = pytest.mark.usefixtures("orin")


def test_strong_types_are_asked_for_where_that_is_a_choice(graph: Path, tmp_path: Path) -> None:
    for version, flags in (("10.3.0.30", 2), ("11.4.1", 0)):
        library = Library(version)
        info = build_engine(library.module, graph, tmp_path / "m.engine", EngineSettings())
        assert library.flags == flags
        assert (info.flavour, info.version, info.precisions) == ("tensorrt", version, {"FLOAT": 2, "INT8": 1})
    assert (tmp_path / "m.engine").read_bytes() == b"engine"


def test_only_for_the_gpu_at_hand(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, out = Library("10.3.0"), tmp_path / "m.engine"
    build_engine(library.module, graph, out, EngineSettings(compute_capability="8.7"))
    with pytest.raises(UsageError, match=r"this machine has sm_87, not sm_89\. Run edgeq build on the target"):
        build_engine(library.module, graph, out, EngineSettings(compute_capability="8.9"))
    monkeypatch.setattr(builder, "find_gpu", lambda: None)
    with pytest.raises(UsageError, match="this machine has no GPU, not sm_89"):
        build_engine(library.module, graph, out, EngineSettings(compute_capability="8.9"))
    with pytest.raises(SessionError, match=r"no GPU on this machine to build an engine for\. Build on the machine"):
        build_engine(library.module, graph, out, EngineSettings())


def test_times_of_kernels_are_kept(graph: Path, tmp_path: Path) -> None:
    library, times = Library("10.3.0"), tmp_path / "cache" / "times"
    settings = EngineSettings(timing_cache=str(times))
    build_engine(library.module, graph, tmp_path / "m.engine", settings)
    assert library.timing_given == b""
    assert times.read_bytes() == b"times of this GPU"
    build_engine(library.module, graph, tmp_path / "m.engine", settings)
    assert library.timing_given == b"times of this GPU"
    library.fits_timing = False
    info = build_engine(library.module, graph, tmp_path / "m.engine", settings)
    assert library.timing_given == b""
    assert info.warnings == (f"{times} is of another GPU or build, and is written anew",)


def test_fp8_on_orin_is_refused_whatever_the_plan_said(graph: Path, tmp_path: Path) -> None:
    library = Library("10.3.0")
    library.types = ["FLOAT", "FP8"]
    with pytest.raises(UnsupportedModelError, match=r"FP8, which sm_87 does not have .*Ada Lovelace, sm_89"):
        build_engine(library.module, graph, tmp_path / "m.engine", EngineSettings())


def test_the_dla_gets_what_it_can_and_the_gpu_the_rest(graph: Path, tmp_path: Path) -> None:
    library, settings = Library("11.4.1"), EngineSettings(dla_core=1)
    with pytest.raises(SessionError, match=r"TensorRT 11\.4\.1 finds 0 DLA cores here, and core 1"):
        build_engine(library.module, graph, tmp_path / "m.engine", settings)
    library.dla_cores = 2
    with pytest.raises(SessionError, match="No layer of the model can run on the DLA"):
        build_engine(library.module, graph, tmp_path / "m.engine", settings)
    library.dla_layers = 2
    info = build_engine(library.module, graph, tmp_path / "m.engine", settings)
    assert (info.dla_layers, info.layers) == (2, 3)
    assert (library.config.default_device_type, library.config.DLA_core) == ("DLA", 1)
    assert library.config_flags[-1] == "fallback"
    assert library.parser_flags[-1] == "adjust"


def test_limits_that_the_library_does_not_take_are_told(graph: Path, tmp_path: Path) -> None:
    library = Library("10.3.0")
    settings = EngineSettings(
        workspace_bytes=1 << 20, tactic_bytes=4 << 30, optimization_level=5, hardware_compatibility="ampere-plus"
    )
    info = build_engine(library.module, graph, tmp_path / "m.engine", settings)
    assert library.pools == {"workspace": 1 << 20, "tactic": 1 << 30}
    assert info.warnings == (f"The memory pool TACTIC_DRAM keeps TensorRT's limit of {1 << 30} bytes, not {4 << 30}",)
    assert (library.config.builder_optimization_level, library.config.hardware_compatibility_level) == (5, "ampere")
    with pytest.raises(UsageError, match="has no hardware compatibility same-compute-capability"):
        build_engine(
            library.module, graph, tmp_path / "m.engine",
            EngineSettings(hardware_compatibility="same-compute-capability"),
        )  # fmt: skip


def test_a_builder_that_does_not_start_tells_why(graph: Path, tmp_path: Path) -> None:
    library = Library("10.3.0")
    library.starts = False
    with pytest.raises(SessionError, match="TensorRT cannot start: CUDA initialization failure with error: 35"):
        build_engine(library.module, graph, tmp_path / "m.engine", EngineSettings())


def test_a_build_that_fails_tells_what_to_change(graph: Path, tmp_path: Path) -> None:
    library = Library("10.3.0")
    library.built, library.says = (
        None,
        ["Requested amount of GPU memory (99 bytes) could not be allocated: OutOfMemory"],
    )
    with pytest.raises(SessionError, match=r"ran out of memory: Requested .*--workspace 256MiB"):
        build_engine(library.module, graph, tmp_path / "m.engine", EngineSettings(workspace_bytes=512 << 20))
    library.says = ["Cannot compile operation 'fc' for Turing (SM75): FP32 GEMM is not supported."]
    with pytest.raises(SessionError, match=r"operation 'fc' .* with FP16 for what is not quantized"):
        build_engine(library.module, graph, tmp_path / "m.engine", EngineSettings())
    library.says = ["[checkMacros.cpp::catchCudaError::250] Error", "no kernel for node 'conv'"]
    with pytest.raises(SessionError, match=r"cannot build the engine: no kernel for node 'conv'\."):
        build_engine(library.module, graph, tmp_path / "m.engine", EngineSettings())


def test_serving_needs_a_gpu(int8_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_gpu", lambda: None)
    with pytest.raises(SessionError, match="no NVIDIA GPU on this machine"):
        open_engine(open_bundle(int8_bundle), trt=Library("10.3.0").module)
