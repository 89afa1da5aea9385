"""Loading a bundle."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, overload

from edgeq.bundle import Bundle, open_bundle
from edgeq.errors import BundleError, UsageError
from edgeq.llama_library import check_threads

if TYPE_CHECKING:  # a bundle needs what serves its own kind, and nothing of the other one
    from edgeq.profiles.onnx.session import Provider
    from edgeq.runtime.llm import LLMSession
    from edgeq.runtime.tensor.embedding import EmbeddingSession
    from edgeq.runtime.tensor.engine import Engine, TensorrtEngine
    from edgeq.runtime.tensor.session import TensorSession

__all__ = ["load"]

Kind = Literal["llm", "tensor", "embedding"]


@overload
def load(
    bundle: str | Path,
    *,
    kind: Literal["llm"],
    threads: int | None = None,
    context_tokens: int | None = None,
    verify: bool = False,
) -> LLMSession: ...
@overload
def load(
    bundle: str | Path,
    *,
    kind: Literal["embedding"],
    threads: int | None = None,
    cores: Sequence[int] = (),
    providers: Sequence[Provider] | None = None,
    device: str | None = None,
    verify: bool = False,
) -> EmbeddingSession: ...
@overload
def load(
    bundle: str | Path,
    *,
    kind: Literal["tensor"],
    threads: int | None = None,
    cores: Sequence[int] = (),
    providers: Sequence[Provider] | None = None,
    device: str | None = None,
    verify: bool = False,
) -> TensorSession: ...
@overload
def load(
    bundle: str | Path,
    *,
    kind: None = None,
    threads: int | None = None,
    context_tokens: int | None = None,
    cores: Sequence[int] = (),
    providers: Sequence[Provider] | None = None,
    device: str | None = None,
    verify: bool = False,
) -> LLMSession | TensorSession: ...
def load(
    bundle: str | Path,
    *,
    kind: Kind | None = None,
    threads: int | None = None,
    context_tokens: int | None = None,
    cores: Sequence[int] = (),
    providers: Sequence[Provider] | None = None,
    device: str | None = None,
    verify: bool = False,
) -> LLMSession | TensorSession:
    """Load a bundle and make it ready to use.

    Args:
        bundle: its folder.
        kind: what the caller can use: ``"llm"`` for `LLMSession`, ``"tensor"`` for `TensorSession`, ``"embedding"``
            for `EmbeddingSession`; another bundle is an error then. None for what the bundle holds, which for text
            encoders is an `EmbeddingSession`.
        threads: threads that compute; None for what the plan says, or else the physical cores.
        context_tokens: of a language model, less context than planned, to save memory; None for the plan's.
        cores: of a model that is called with arrays, CPUs to stay on; see `TensorSettings`.
        providers: of a model that is called with arrays, what ONNX Runtime computes with; None for what the bundle
            was made for, which may be TensorRT itself; its engine is then built on the first load.
        device: of a model that is called with arrays and made for several devices, the one whose graph to take, by
            its name in `TensorManifest.devices` or an alias of that profile; None for the first that this machine can
            run.
        verify: hash all files first.

    Raises:
        BundleError: no bundle, one that was changed, one of another kind, or one that was not made for that device.
        UsageError: no such kind, more context than planned, a number of threads outside of 1 to 512, CPUs that this
            process may not use, or an argument that this kind of bundle has no use for.
        SessionError: the model cannot be loaded, memory is too small, ONNX Runtime lacks a provider or leaves nodes to
            the CPU that was not asked for, there is no GPU for an engine of TensorRT, or one that does not answer, so
            that no graph can be chosen.
        MissingPackageError: llama-cpp-python, onnxruntime or ``tokenizers`` is not installed.
    """
    started = time.perf_counter()
    if kind is not None and kind not in get_args(Kind):
        raise UsageError(f"There is no kind {kind!r}", f"Choose one of {', '.join(get_args(Kind))}, or leave it out")
    opened = open_bundle(bundle, verify=verify)
    if threads is not None:
        check_threads(threads)
    if kind == "llm" or (kind is None and opened.manifest.kind == "llm"):
        _refuse(cores=tuple(cores), providers=tuple(providers or ()), device=device)
        return _load_llm(opened, threads, context_tokens, started)
    _refuse(context_tokens=context_tokens)
    from edgeq.runtime.tensor.devices import fitting_device, named_device

    manifest = opened.tensor
    chosen = fitting_device(manifest, providers) if device is None else named_device(manifest, device)
    return _load_tensor(opened.made_for(chosen), kind, threads, cores, providers, started)


def _refuse(**arguments: object) -> None:
    for name, value in arguments.items():
        if value not in (None, ()):
            raise UsageError(f"{name}={value!r} means nothing for this kind of bundle", f"Leave {name} out")


def _load_llm(opened: Bundle, threads: int | None, context_tokens: int | None, started: float) -> LLMSession:
    from edgeq.runtime.engine import EngineSettings
    from edgeq.runtime.llm import LLMSession

    plan = opened.llm.plan
    if context_tokens is not None and not 1 <= context_tokens <= plan.context_tokens:
        raise UsageError(
            f"context_tokens={context_tokens}, and the bundle was planned for {plan.context_tokens}",
            "Choose no more than planned, or convert again with a larger --context",
        )
    settings = EngineSettings.from_plan(plan, threads=threads, context_tokens=context_tokens)
    return LLMSession(opened.file("model"), settings, manifest=opened.llm, started=started)


def _load_tensor(
    opened: Bundle,
    kind: Kind | None,
    threads: int | None,
    cores: Sequence[int],
    providers: Sequence[Provider] | None,
    started: float,
) -> TensorSession:
    from edgeq.runtime.tensor.engine import OnnxEngine
    from edgeq.runtime.tensor.session import TensorSession
    from edgeq.runtime.tensor.settings import TENSORRT_BACKENDS, TensorSettings

    manifest = opened.tensor
    embedding = manifest.artifact.embedding
    if kind == "embedding" and embedding is None:
        raise BundleError(f"{opened.path} holds no text encoder", "Call it with arrays: edgeq.load(...).run(...)")
    texts = embedding if kind != "tensor" else None
    tokenizer = opened.file("tokenizer").parent if texts is not None else None
    engine: Engine
    if manifest.plan.backend in TENSORRT_BACKENDS and providers is None:
        _refuse(threads=threads, cores=tuple(cores))
        settings = TensorSettings(axes=manifest.plan.axes)
        engine = _tensorrt_engine(opened)
    else:
        if manifest.plan.scheme == "bf16":
            raise UsageError(
                "The bundle computes in BF16, for which ONNX Runtime lacks kernels: on CPUs all, for CUDA many",
                "Leave providers out: TensorRT computes it; or convert it in another --precision",
            )
        settings = TensorSettings.from_plan(
            manifest.plan, threads=threads, cores=cores, providers=providers, inputs=manifest.artifact.inputs
        )
        engine = OnnxEngine(opened.file("model"), settings)
    if texts is None or tokenizer is None:
        return TensorSession(engine, settings, manifest=manifest, started=started)
    from edgeq.runtime.tensor.embedding import EmbeddingSession

    return EmbeddingSession(engine, settings, tokenizer, texts, manifest=manifest, started=started)


def _tensorrt_engine(opened: Bundle) -> TensorrtEngine:
    from edgeq.runtime.tensor.engine import TensorrtEngine
    from edgeq.runtime.tensorrt.serving import BuildOptions, open_engine

    session = open_engine(opened, options=BuildOptions(tell=logging.getLogger("edgeq").info))
    return TensorrtEngine(session, opened.tensor.artifact, opened.tensor.plan.backend)
