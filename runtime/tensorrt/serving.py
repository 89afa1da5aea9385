"""From a bundle to an engine that is ready: the one that it brings, the one in the cache, or a new one.

An engine is used if its key is the one of this machine and this library, down to the power mode. Otherwise it is built
here, under a limit of memory, and the reason is told. On each GPU it is compared with its graph before it first serves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import msgspec

from edgeq.bundle import Bundle
from edgeq.errors import BundleError, SessionError
from edgeq.runtime.tensorrt.build_process import Progress, build_limited
from edgeq.runtime.tensorrt.cache import EngineFolder, EngineStore, describe_engine, put_engine, shipped_engines
from edgeq.runtime.tensorrt.check import Arrays, answered, check_engine
from edgeq.runtime.tensorrt.engine_key import differences, engine_key
from edgeq.runtime.tensorrt.records import EngineInfo, EngineKey, EngineSettings
from edgeq.runtime.tensorrt.samples import bundle_answers, bundle_samples
from edgeq.runtime.tensorrt.session import EngineSession
from edgeq.runtime.tensorrt.targets import EngineTarget, settings_for, target_here
from edgeq.runtime.tensorrt.versions import find_tensorrt, flavour_for_backend, flavour_of

__all__ = ["DEFAULTS", "BuildOptions", "bundle_key", "engine_for", "engine_in", "open_engine", "serve", "ship_engine"]

Tell = Callable[[str], None]


def _silent(_line: str) -> None:
    """For those who want to hear nothing."""


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How to go about building, if it must be done.

    Attributes:
        limit_bytes: memory of the building process; None for no limit.
        force: build again what is there.
        progress: of building, see `edgeq.runtime.tensorrt.build_process.build_limited`.
        tell: gets one line when an engine is built, with the reason.
    """

    limit_bytes: int | None = None
    force: bool = False
    progress: Progress | None = None
    tell: Tell = _silent


DEFAULTS = BuildOptions()


def bundle_key(trt: ModuleType, bundle: Bundle, settings: EngineSettings, target: EngineTarget) -> EngineKey:
    """The key of a bundle's engine on a target; hashes are the manifest's, so that nothing large is read.

    Raises:
        BundleError: the bundle has no model.
    """
    by_role = {entry.role: entry.sha256 for entry in bundle.tensor.files}
    graph = bundle.file("model")
    hashes = (by_role["model"], by_role.get("data"))
    return engine_key(trt, graph, settings, target.compute_capability, target.machine, hashes=hashes)


def engine_for(
    trt: ModuleType,
    bundle: Bundle,
    settings: EngineSettings,
    target: EngineTarget,
    *,
    store: EngineStore | None = None,
    options: BuildOptions = DEFAULTS,
) -> EngineFolder:
    """The engine of a bundle for a target: the store's, the bundle's own, or a new one.

    Args:
        trt: the library.
        bundle: that is opened.
        settings: of `edgeq.runtime.tensorrt.targets.settings_for`.
        target: that it is for.
        store: where engines are kept; the user's cache by default.
        options: how to build.

    Raises:
        EdgeqError: as `edgeq.runtime.tensorrt.build_process.build_limited`.
    """
    store = EngineStore() if store is None else store
    key = bundle_key(trt, bundle, settings, target)
    shipped = shipped_engines(bundle)
    if not options.force:
        # The store's own first: it may have been built because the shipped one was found wrong here.
        found = store.find(key) or next((engine for engine in shipped if engine.info.key == key), None)
        if found is not None:
            return found
    _tell(options.tell, bundle, target, "it is asked for" if options.force else store.why_not(key, shipped))
    cached = msgspec.structs.replace(settings, timing_cache=str(store.timing_cache(key)))
    return store.make(key, _builder(trt, bundle.file("model"), cached, options), force=options.force)


def engine_in(
    place: Path,
    trt: ModuleType,
    bundle: Bundle,
    settings: EngineSettings,
    target: EngineTarget,
    *,
    options: BuildOptions = DEFAULTS,
) -> EngineFolder:
    """The engine of a bundle in a folder of the user's choice; see `engine_for`.

    Args:
        place: the folder of this one engine. An engine there that is of another key is replaced.
        trt: the library.
        bundle: that is opened.
        settings: of `edgeq.runtime.tensorrt.targets.settings_for`.
        target: that it is for.
        options: how to build.

    Raises:
        OutputExistsError: the folder holds something else.
        EdgeqError: as `engine_for`.
    """
    key = bundle_key(trt, bundle, settings, target)
    reason = "it is asked for"
    if not options.force:
        try:
            info = describe_engine(place)
        except BundleError:
            reason = f"{place} has none"
        else:
            if info.key == key:
                return EngineFolder(place, info)
            told = () if info.key is None else differences(info.key, key)
            reason = f"the engine that is there is for {'; '.join(told) or 'something unknown'}"
    _tell(options.tell, bundle, target, reason)
    return put_engine(place, key, _builder(trt, bundle.file("model"), settings, options))


def ship_engine(
    trt: ModuleType,
    onnx: Path,
    place: Path,
    settings: EngineSettings,
    target: EngineTarget,
    *,
    options: BuildOptions = DEFAULTS,
) -> EngineFolder:
    """Build an engine into a bundle that is being made, so that the target need not.

    The bundle's manifest then names ``model.engine`` with the role ``"engine"`` and ``engine.json`` with the role
    ``"engine-info"``. Of use with TensorRT-RTX, whose engines depend on the compute capability alone.

    Args:
        trt: the library.
        onnx: the bundle's graph, in its final bytes.
        place: a folder in the bundle for this one engine.
        settings: of `edgeq.runtime.tensorrt.targets.settings_for`.
        target: that it is for.
        options: how to build.

    Raises:
        EdgeqError: as `engine_for`.
    """
    key = engine_key(trt, onnx, settings, target.compute_capability, target.machine)
    return put_engine(place, key, _builder(trt, onnx, settings, options))


def _tell(tell: Tell, bundle: Bundle, target: EngineTarget, reason: str) -> None:
    name = target.name if target.name == target.sm else f"{target.name} ({target.sm})"
    tell(f"building the engine of {bundle.path} for {name}: {reason}")


def _builder(
    trt: ModuleType, graph: Path, settings: EngineSettings, options: BuildOptions
) -> Callable[[Path], EngineInfo]:
    def build(out: Path) -> EngineInfo:
        return build_limited(
            flavour_of(trt), graph, out, settings, limit_bytes=options.limit_bytes, progress=options.progress
        )

    return build


def open_engine(
    bundle: Bundle,
    *,
    trt: ModuleType | None = None,
    store: EngineStore | None = None,
    samples: Iterable[Arrays] | None = None,
    options: BuildOptions = DEFAULTS,
    cuda_graph: bool = True,
) -> EngineSession:
    """A session over a bundle's engine on this machine's GPU; the first time it is built and checked.

    Args:
        bundle: that is opened.
        trt: the library; by default the one that the bundle was made for.
        store: where engines are kept.
        samples: inputs to check a new engine with; by default the bundle's own.
        options: how to build.
        cuda_graph: record calls.

    Raises:
        MissingPackageError: TensorRT is not installed, or onnxruntime to check with.
        SessionError: no GPU, or the engine is not what its graph says.
        EdgeqError: as `engine_for`.
    """
    manifest = bundle.tensor
    trt = find_tensorrt(flavour_for_backend(manifest.plan.backend)) if trt is None else trt
    target = target_here(manifest.built_for)
    settings = settings_for(target, manifest.plan, manifest.budget)
    store = EngineStore() if store is None else store
    found = engine_for(trt, bundle, settings, target, store=store, options=options)
    return serve(trt, bundle, found, target, store, samples=samples, cuda_graph=cuda_graph)


def serve(
    trt: ModuleType,
    bundle: Bundle,
    found: EngineFolder,
    target: EngineTarget,
    store: EngineStore,
    *,
    samples: Iterable[Arrays] | None = None,
    cuda_graph: bool = True,
    session: Callable[..., EngineSession] = EngineSession,
) -> EngineSession:
    """Open an engine, and compare it with its graph if that was not done on this GPU yet.

    Args:
        trt: the library.
        bundle: that the engine is of.
        found: the engine.
        target: this machine.
        store: remembers the comparison; of an engine that fails it, nothing is left there.
        samples: inputs to compare with; by default the bundle's own.
        cuda_graph: record calls.
        session: what opens an engine.

    Raises:
        SessionError: the engine does not load, or is not what its graph says.
    """
    kernels = store.runtime_cache(found, target.machine.sms, target.compute_capability)
    opened = session(trt, found.engine, cuda_graph=cuda_graph, runtime_cache=kernels)
    if store.check_of(found, target.machine.sms, target.compute_capability) is not None:
        return opened
    try:
        check = check_engine(opened.run, _expected(bundle, samples))
    except BaseException as error:
        opened.close()
        if isinstance(error, SessionError):
            store.discard(found)
        raise
    store.remember(found, target.machine.sms, target.compute_capability, check)
    return opened


def _expected(bundle: Bundle, samples: Iterable[Arrays] | None) -> Iterable[tuple[Arrays, Arrays]]:
    """Inputs, and what the graph makes of them: computed here, or where no CPU computes it, what the bundle brings."""
    if bundle.tensor.plan.scheme != "bf16":
        return answered(bundle.file("model"), bundle_samples(bundle) if samples is None else samples)
    if samples is None:
        return bundle_answers(bundle)
    raise SessionError(
        "ONNX Runtime's CPU kernels do not take BF16: an engine cannot be compared with its graph on other inputs",
        "Leave samples out: the bundle brings some, with answers",
    )
