"""Download a model from a Hugging Face hub: only what a conversion reads, and every failure as one line.

``huggingface_hub`` keeps the cache, resumes broken connections and reads ``HF_HOME``, ``HF_HUB_OFFLINE``,
``HF_ENDPOINT`` and ``HF_TOKEN``; what is decided here is which files come, and what a user must do when they do not.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import errno
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgeq.errors import DiskFullError, EdgeqError, SourceError, UnsupportedModelError, require_package

__all__ = ["Download", "Progress", "download", "looked_up_once"]

Progress = Callable[[int, int, str], None]

# Never pickles (*.bin, *.pt), and nothing of subfolders: those hold the same weights for other frameworks.
ALLOW = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "README.md", "LICENSE*")
IGNORE = ("*/*", "consolidated*.safetensors", "adapter_*")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_log = logging.getLogger("edgeq")


@dataclasses.dataclass(frozen=True)
class Download:
    """A model in the hub's local cache.

    Attributes:
        folder: the snapshot.
        revision: the commit that it is of.
    """

    folder: Path
    revision: str


@dataclasses.dataclass(frozen=True)
class _Request:
    repo_id: str
    revision: str | None
    token: str | None
    cache: Path | None

    @property
    def name(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id} at revision {self.revision}"


_FOUND: contextvars.ContextVar[dict[_Request, Download] | None] = contextvars.ContextVar("found", default=None)


@contextlib.contextmanager
def looked_up_once() -> Iterator[None]:
    """Within it `download` asks the hub once for each model, as a command does that is about one state of it."""
    before = _FOUND.set({})
    try:
        yield
    finally:
        _FOUND.reset(before)


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Download:
    """Bring a model's safetensors, configuration and tokenizer into the local cache.

    When the hub cannot be reached, a complete snapshot in the cache is used and a warning is logged. It is asked each
    time, but for `looked_up_once`.

    Args:
        repo_id: ``owner/name``.
        revision: branch, tag or commit; the default branch when None.
        token: for private and gated models; the environment's or the stored one when None.
        cache: instead of the hub's own cache folder.
        progress: called with bytes done, bytes in all and the model's id, from several threads, one at a time.

    Raises:
        MissingPackageError: huggingface_hub is not installed.
        SourceError: no such model or revision, no permission, offline and not cached, or the network failed.
        UnsupportedModelError: the model has no safetensors.
        DiskFullError: no room left in the cache.
    """
    require_package("huggingface_hub", "convert", "to download models")
    request = _Request(repo_id, revision, token, cache)
    known = _FOUND.get()
    if known is None:
        return _downloaded(request, progress)
    if request not in known or not known[request].folder.is_dir():
        known[request] = _downloaded(request, progress)
    return known[request]


def _downloaded(request: _Request, progress: Progress | None) -> Download:
    failures = _failures()
    try:
        _look_up(request)
    except failures as error:
        if _is_answer(error):
            raise _explained(error, request) from error
        return _from_cache(request, error)
    try:
        return _snapshot(request, progress)
    except failures as error:
        raise _explained(error, request) from error


def _failures() -> tuple[type[Exception], ...]:
    """What a download can raise.

    The HTTP client differs between versions of huggingface_hub; its errors are those that the hub's own derive from.
    """
    from huggingface_hub.errors import HfHubHTTPError

    client = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    return (OSError, RuntimeError, *client)


def _look_up(request: _Request) -> None:
    """Ask the hub what the model holds, before gigabytes of the wrong kind are fetched."""
    from huggingface_hub import HfApi

    info = HfApi(token=request.token).model_info(request.repo_id, revision=request.revision)
    names = [file.rfilename for file in info.siblings or () if "/" not in file.rfilename]
    if any(name.endswith(".safetensors") for name in names):
        if "config.json" not in names:
            raise UnsupportedModelError(
                f"{request.name} has no config.json", "Choose a model in the format of transformers"
            )
        return
    if any(name.endswith(".gguf") for name in names):
        raise UnsupportedModelError(
            f"{request.name} holds GGUF files, not a Hugging Face checkpoint",
            "Give the id of the model that they were made from, or download an F16 GGUF and give its path",
        )
    if any(name.endswith(PICKLES) for name in names):
        raise UnsupportedModelError(
            f"{request.name} holds its weights as pickles only, which can run code when they are loaded",
            "Choose a revision or model with safetensors, or save it again with save_pretrained",
        )
    raise UnsupportedModelError(f"{request.name} holds no weights", "Choose a model with safetensors")


def _snapshot(request: _Request, progress: Progress | None, *, cached_only: bool = False) -> Download:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        request.repo_id,
        revision=request.revision,
        token=request.token,
        cache_dir=request.cache,
        allow_patterns=list(ALLOW),
        ignore_patterns=list(IGNORE),
        local_files_only=cached_only,
        tqdm_class=_reporter(progress, request.repo_id),
    )
    return Download(Path(folder), Path(folder).name)


def _from_cache(request: _Request, unreachable: BaseException) -> Download:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    offline = isinstance(unreachable, OfflineModeIsEnabled)
    try:
        found = _snapshot(request, None, cached_only=True)
    except LocalEntryNotFoundError as error:
        if offline:
            raise SourceError(
                f"{request.name} is not, or not completely, in the cache, and HF_HUB_OFFLINE forbids to download it",
                "Unset HF_HUB_OFFLINE, or give the path of a local folder",
            ) from error
        raise SourceError(
            f"the hub cannot be reached ({_short(unreachable)}), and {request.name} is not complete in the cache",
            "Check the network, the proxy and HF_ENDPOINT; files that are complete are kept",
        ) from unreachable
    if not offline:
        _log.warning("the hub cannot be reached; using %s from the cache, commit %s", request.name, found.revision)
    return found


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_answer(error: BaseException) -> bool:
    """Whether the hub itself refused, rather than being out of reach or out of order."""
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in (408, 429)


def _explained(error: BaseException, request: _Request) -> EdgeqError:
    """The hub's error as one of ours, with what to do next."""
    from huggingface_hub import errors

    for cause in (error, error.__cause__):  # the hub wraps an answer to a download as "not found locally"
        if isinstance(cause, errors.GatedRepoError) or (cause is not None and _status(cause) == 403):
            return SourceError(
                f"{request.repo_id} is gated: its owner must grant you access",
                "Accept its licence on the model's page, then set HF_TOKEN or run: hf auth login",
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return SourceError(
                f"{request.repo_id} has no revision {request.revision!r}", "Give a branch, tag or commit that exists"
            )
        if isinstance(cause, errors.RepositoryNotFoundError) or (cause is not None and _status(cause) == 401):
            return SourceError(
                f"{request.repo_id} was not found on the hub, or is private",
                "Check the id; for a private model set HF_TOKEN to a valid token or run: hf auth login",
            )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(
            f"no room left while downloading {request.name}", "Free some space, or move the cache with HF_HOME"
        )
    return SourceError(
        f"downloading {request.name} failed ({_short(error)})", "Run it again: files that are complete are kept"
    )


def _short(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def _reporter(progress: Progress | None, label: str) -> type[Any]:
    """A progress bar that draws nothing and passes on the bytes of the whole download."""
    from huggingface_hub.utils.tqdm import tqdm

    start: Callable[..., None] = tqdm.__init__
    lock = threading.Lock()

    class Reporter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - tqdm's own signature
            # Two bars count bytes, those received and those written; the second is what a resumed run is about.
            received = str(kwargs.get("name")).endswith(".transfer")
            self.reports = kwargs.get("unit") == "B" and not received
            start(self, *args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                if self.reports and progress is not None:
                    progress(int(self.n), int(self.total or 0), label)

    return Reporter
