"""What `edgeq.runtime.bench_worker` is told and answers: one line of JSON each way."""

from __future__ import annotations

import msgspec

__all__ = [
    "Call",
    "Called",
    "Command",
    "Exit",
    "Failed",
    "Fed",
    "Feed",
    "Finished",
    "Generate",
    "Load",
    "LoadTensor",
    "Loaded",
    "Ready",
    "Reply",
    "Sample",
    "TensorLoaded",
    "Usage",
]


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """Load a language model, and tokenize ``text`` without making it the start of a prompt."""

    bundle: str
    threads: int | None
    context_tokens: int | None
    text: str


class LoadTensor(msgspec.Struct, frozen=True, kw_only=True, tag="load-tensor"):
    """Load a model that is called with arrays, its graph for that device."""

    bundle: str
    device: str
    threads: int | None


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """Answer a prompt with exactly ``max_tokens`` tokens."""

    prompt: list[int]
    max_tokens: int


class Feed(msgspec.Struct, frozen=True, kw_only=True, tag="feed"):
    """Hold the inputs of calls: the path of an ``.npz`` with arrays named ``"INDEX.INPUT"``."""

    inputs: str


class Call(msgspec.Struct, frozen=True, kw_only=True, tag="call"):
    """Call the model, its inputs in turn: once at least, ``most`` times at most, none begun after ``seconds``."""

    most: int
    seconds: float


class Usage(msgspec.Struct, frozen=True, tag="usage"):
    """Tell what was used so far."""


class Exit(msgspec.Struct, frozen=True, tag="exit"):
    """Close the session and end."""


Command = Load | LoadTensor | Generate | Feed | Call | Usage | Exit


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """The session is ready: what every kind of session tells."""

    load_ms: float
    threads: int
    resident_before_load_bytes: int | None
    tools: dict[str, str]


class Loaded(Ready, frozen=True, kw_only=True, tag="loaded"):
    """A language model is ready."""

    context_tokens: int
    text_tokens: list[int]


class TensorLoaded(Ready, frozen=True, kw_only=True, tag="tensor-loaded"):
    """A model that is called with arrays is ready."""

    providers: tuple[str, ...]


class Sample(msgspec.Struct, frozen=True, kw_only=True, tag="sample"):
    """One answer's timings."""

    n_tokens: int
    cached_tokens: int
    ttft_ms: float
    gaps_ms: list[float]


class Fed(msgspec.Struct, frozen=True, kw_only=True, tag="fed"):
    """The inputs are there: how many calls they are for."""

    calls: int


class Called(msgspec.Struct, frozen=True, kw_only=True, tag="called"):
    """How long each call took, at least one."""

    latencies_ms: list[float]


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="usage"):
    """Processor time and memory of this process since it was executed; None where the kernel does not tell."""

    cpu_s: float
    peak_bytes: int | None
    anonymous_bytes: int | None
    file_bytes: int | None


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """A failure with its remedy. ``kind`` is the name of the class in `edgeq.errors`."""

    kind: str
    cause: str
    remedy: str
    details: tuple[str, ...]


Reply = Loaded | TensorLoaded | Sample | Fed | Called | Finished | Failed
