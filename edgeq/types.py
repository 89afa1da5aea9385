"""The words of edgeq, as immutable records. One unit a quantity, in its name.

Everything here can be written to JSON and read back: `to_json` and `from_json` are exact inverses. A key that is not
known is an error, because a misspelt budget that is silently ignored would be a budget that is never checked.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar

import msgspec

from edgeq.quality import Quality
from edgeq.record import Count, Layers, Record, Sha256, Threads, Tokens
from edgeq.search_record import Calibration, SearchRecord, Trial

__all__ = [
    "BUDGET_LINES",
    "Artifact",
    "Budget",
    "BudgetLine",
    "BundleFile",
    "Calibration",
    "Fallback",
    "Manifest",
    "ModelSource",
    "Plan",
    "Prediction",
    "Quality",
    "Rejection",
    "SearchRecord",
    "SmokeCheck",
    "Target",
    "Trial",
    "from_json",
    "merge_budgets",
    "runs_on_gpu",
    "to_json",
]

T = TypeVar("T")


class ModelSource(Record, frozen=True, kw_only=True):
    """Where a model comes from.

    Attributes:
        id: what the user named: a hub id, or the folder's or file's name.
        revision: the commit on the hub; None for local models.
        path: the local folder, or the GGUF or ONNX file; empty for a module in memory.
        format: ``"hf"`` for a Hugging Face folder, ``"gguf"`` or ``"onnx"`` for such a file, ``"module"`` for a module
            of PyTorch.
        architecture: the first of ``architectures`` in config.json, or ``general.architecture`` of the GGUF.
        n_params: weights in all tensors.
        dtype: the dtype of most weights: ``"f32"``, ``"f16"`` or ``"bf16"``.
        weights_sha256: over the weight files in the order of their names; None until they were read.
        license: as the model card or the GGUF says it; None if neither does.
    """

    id: str
    revision: str | None = None
    path: str
    format: Literal["hf", "gguf", "onnx", "module"]
    architecture: str
    n_params: Count
    dtype: str
    weights_sha256: str | None = None
    license: str | None = None


class BudgetLine(Record, frozen=True, kw_only=True):
    """One quantity that a budget can constrain, and how it is judged. `BUDGET_LINES` holds them all.

    Attributes:
        field: the name in `Budget`.
        label: the name for people.
        unit: ``"bytes"``, ``"ms"``, ``"tok/s"`` or ``"W"``.
        percentile: which percentile of the samples is held to the limit; None for a single maximum.
        at_most: True if the limit is an upper one.
    """

    field: str
    label: str
    unit: str
    percentile: float | None
    at_most: bool = True


BUDGET_LINES: tuple[BudgetLine, ...] = (
    BudgetLine(field="peak_memory_bytes", label="peak memory", unit="bytes", percentile=None),
    BudgetLine(field="load_ms", label="load time p50", unit="ms", percentile=50),
    BudgetLine(field="ttft_ms", label="time to first token p95", unit="ms", percentile=95),
    BudgetLine(field="itl_ms", label="inter-token latency p99", unit="ms", percentile=99),
    BudgetLine(field="tokens_per_s", label="decode speed p50", unit="tok/s", percentile=50, at_most=False),
    BudgetLine(field="latency_ms", label="latency p99", unit="ms", percentile=99),
    BudgetLine(field="power_w", label="power", unit="W", percentile=None),
)


class Budget(Record, frozen=True, kw_only=True, omit_defaults=True):
    """Limits that a bundle must keep on its device. None leaves a quantity free.

    A quantity that is constrained but was not measured never passes.

    Attributes:
        peak_memory_bytes: of the serving process, weights and runtime included.
        load_ms: from nothing to ready, median.
        ttft_ms: time to first token, 95th percentile.
        itl_ms: inter-token latency, 99th percentile.
        tokens_per_s: decode speed, median; the one lower limit.
        latency_ms: of one call of a tensor model, 99th percentile.
        power_w: mean over the run.
    """

    peak_memory_bytes: Count | None = None
    load_ms: float | None = None
    ttft_ms: float | None = None
    itl_ms: float | None = None
    tokens_per_s: float | None = None
    latency_ms: float | None = None
    power_w: float | None = None

    def limit(self, line: BudgetLine) -> float | None:
        """The limit of one line, or None if it is free."""
        value: float | None = getattr(self, line.field)
        return value


def runs_on_gpu(backend: str) -> bool:
    """Whether a backend of this name keeps weights on the GPU."""
    return not backend.endswith("-cpu")


def merge_budgets(base: Budget, override: Budget) -> Budget:
    """``base`` with every line that ``override`` constrains replaced."""
    chosen = {f: v for f in Budget.__struct_fields__ if (v := getattr(override, f)) is not None}
    return msgspec.structs.replace(base, **chosen)


class Fallback(Record, frozen=True, kw_only=True):
    """A tensor that could not take the type it was meant to have.

    Attributes:
        tensor: its name in the GGUF.
        wanted: the type that the preset or override meant.
        got: the type that it has.
        reason: why, for people.
    """

    tensor: str
    wanted: str
    got: str
    reason: str


class Rejection(Record, frozen=True, kw_only=True):
    """An alternative that was not chosen.

    Attributes:
        option: what it was, for people ("q8_0, context 4096, KV f16").
        reason: the first limit that it misses, with both figures.
    """

    option: str
    reason: str


class Prediction(Record, frozen=True, kw_only=True):
    """What a plan will take. Bytes of file, weights and KV cache are exact, the rest is modelled.

    Attributes:
        file_bytes: of the GGUF.
        weights_bytes: resident tensor data.
        kv_cache_bytes: at the planned context and types.
        compute_bytes: scratch of the graph.
        runtime_bytes: interpreter, libraries, driver.
        peak_memory_bytes: the sum.
        itl_ms: mean time between tokens when the context is full.
        tokens_per_s: its inverse.
        ttft_ms: for a prompt of ``prompt_tokens``.
        prompt_tokens: the prompt that ``ttft_ms`` is for.
    """

    file_bytes: Count
    weights_bytes: Count
    kv_cache_bytes: Count
    compute_bytes: Count
    runtime_bytes: Count
    peak_memory_bytes: Count
    itl_ms: float
    tokens_per_s: float
    ttft_ms: float
    prompt_tokens: Count


class Plan(Record, frozen=True, kw_only=True):
    """Every decision about a bundle, made before a weight is read.

    Attributes:
        format: ``"gguf"``.
        preset: the uniform preset that the types started from; None for a recipe of its own.
        tensor_types: type of every tensor of the artifact.
        fallbacks: tensors that could not take the type that was asked for.
        context_tokens: tokens of prompt and answer together.
        kv_type_k: type of the key cache.
        kv_type_v: type of the value cache; a quantized one needs flash attention.
        flash_attention: whether it is switched on.
        ubatch_tokens: prompt tokens computed at once.
        threads: 1 to 512; None leaves it to the machine's physical cores.
        gpu_layers: layers on the accelerator; -1 for all.
        predicted: what it will take on the target.
        rejected: alternatives and why they were not chosen.
        search: how mixed types were found; None for a preset or a recipe.
        notes: what a user must know, one line each.
    """

    format: Literal["gguf"] = "gguf"
    preset: str | None = None
    tensor_types: dict[str, str]
    fallbacks: tuple[Fallback, ...] = ()
    context_tokens: Tokens
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    flash_attention: bool = True
    ubatch_tokens: Tokens
    threads: Threads | None = None
    gpu_layers: Layers = 0
    predicted: Prediction
    rejected: tuple[Rejection, ...] = ()
    search: SearchRecord | None = None
    notes: tuple[str, ...] = ()


class BundleFile(Record, frozen=True, kw_only=True):
    """One hashed file of a bundle.

    Attributes:
        path: relative to the bundle, with forward slashes.
        role: ``"model"`` or ``"recipe"``.
        size_bytes: exact.
        sha256: of its contents.
    """

    path: str
    role: str
    size_bytes: Count
    sha256: Sha256


class SmokeCheck(Record, frozen=True, kw_only=True):
    """The artifact against the unquantized model on a short fixed text: proof of life, no measure of quality.

    Attributes:
        tokens: positions compared.
        mean_kld: mean KL divergence of the artifact from the reference, in nats.
        max_kld: the largest at one position.
        top1_agreement: share of positions with the same most likely token.
        text_sha256: of the text.
    """

    tokens: Count
    mean_kld: float
    max_kld: float
    top1_agreement: float
    text_sha256: str


class Artifact(Record, frozen=True, kw_only=True):
    """Facts about the model that a session needs and a GGUF would have to be parsed for.

    Attributes:
        architecture: ``general.architecture`` of the GGUF.
        n_layers: transformer blocks.
        n_vocab: tokens in the vocabulary.
        trained_context_tokens: the context that the model was trained for.
        has_chat_template: whether ``generate(messages)`` is possible.
    """

    architecture: str
    n_layers: Count
    n_vocab: Count
    trained_context_tokens: Count
    has_chat_template: bool


class Target(Record, frozen=True, kw_only=True):
    """What a device must be for a bundle's measurements to count, as its profile says.

    Attributes:
        arch: ``"x86_64"``, ``"aarch64"`` or ``"any"``.
        accelerator: ``"cpu"``, or ``"cuda:sm_87"`` and its like.
    """

    arch: Literal["x86_64", "aarch64", "any"]
    accelerator: str


class Manifest(Record, frozen=True, kw_only=True):
    """``edgeq.json``, the contract between converters and runtime.

    Attributes:
        schema_version: of this record; readers refuse a newer one.
        kind: ``"llm"``.
        name: of the bundle.
        source: where the model comes from.
        artifact: what a session must know of it.
        plan: how it was made.
        files: the hashed set; reports are not part of it.
        smoke: artifact against reference, as proof of life.
        quality: artifact against reference on held-out text; None if it was not measured.
        budget: the limits that the plan was made for.
        built_for: name of the profile.
        target: what it says the device is; None in bundles of edgeq before 0.2.
        tools: name to version of what made it.
        created_utc: ISO 8601.
    """

    schema_version: int = 1
    kind: Literal["llm"] = "llm"
    name: str
    source: ModelSource
    artifact: Artifact
    plan: Plan
    files: tuple[BundleFile, ...]
    smoke: SmokeCheck | None
    quality: Quality | None = None
    budget: Budget
    built_for: str
    target: Target | None = None
    tools: dict[str, str]
    created_utc: str

    def __post_init__(self) -> None:
        """Refuse two entries for one file, which msgspec reports as an error of the manifest."""
        paths = [PurePosixPath(file.path) for file in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("files names a file twice")


def to_json(record: Any, *, indent: int = 2) -> bytes:  # noqa: ANN401 - any record of this module or of `report`
    """A record, or plain data that holds records, as UTF-8 JSON ended by a newline."""
    return msgspec.json.format(msgspec.json.encode(record), indent=indent) + b"\n"


def from_json(data: bytes, kind: type[T]) -> T:
    """The inverse of `to_json`.

    Raises:
        msgspec.ValidationError: a key or type is wrong; the message names its path.
        msgspec.DecodeError: not JSON.
    """
    return msgspec.json.decode(data, type=kind)
