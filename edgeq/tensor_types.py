"""The words for tensor bundles: models that are called with arrays and answer with arrays.

Perception, embedding and policy networks. What `edgeq.types` says of units and of strictness holds here too.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

import msgspec

from edgeq.record import Count, Record, Sha256, Share, Threads, Tokens
from edgeq.types import Budget, BundleFile, ModelSource, Rejection, Target, runs_on_gpu

__all__ = [
    "FLOAT_SCHEMES",
    "AxisRange",
    "Coverage",
    "Embedding",
    "NodeGroup",
    "OutputQuality",
    "Scheme",
    "TensorArtifact",
    "TensorManifest",
    "TensorPlan",
    "TensorPrediction",
    "TensorQuality",
    "TensorSpec",
    "TensorVariant",
]

Scheme = Literal["fp32", "fp16", "bf16", "int8-static", "int8-dynamic", "int8-weights", "int4-weights", "fp8"]
"""How the weights' operators compute: floats, INT8 by calibrated or by running scales, weights alone, FP8 E4M3."""
FLOAT_SCHEMES: tuple[Scheme, ...] = ("fp32", "fp16", "bf16")
"""Those that quantize nothing, so that coverage says nothing of them."""

_Axis = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class TensorSpec(Record, frozen=True, kw_only=True):
    """An input or output of a model.

    Attributes:
        name: in the graph.
        dtype: numpy's name of the element type, ``"float32"``, ``"int64"``.
        shape: sizes, or the names of dynamic axes.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class AxisRange(Record, frozen=True, kw_only=True):
    """Sizes of a dynamic axis.

    Attributes:
        least: the smallest that a call may have.
        usual: that latency is planned, measured and tuned for.
        most: the largest that a call may have.
    """

    least: _Axis
    usual: _Axis
    most: _Axis

    def __post_init__(self) -> None:
        """Refuse sizes out of order, which msgspec reports as an error of the record."""
        if not self.least <= self.usual <= self.most:
            raise ValueError(f"sizes of an axis are out of order: {self.least}, {self.usual}, {self.most}")


class Embedding(Record, frozen=True, kw_only=True):
    """How hidden states become one vector a text, as the model's own files say.

    Attributes:
        pooling: over the tokens that the attention mask keeps; ``"cls"`` is the first one's, ``"last"`` the last one's.
        normalize: to length 1.
        max_tokens: longer texts are cut.
        lowercase: texts before they are tokenized, whatever the tokenizer itself does.
    """

    pooling: Literal["mean", "cls", "max", "last"]
    normalize: bool
    max_tokens: Tokens
    lowercase: bool = False


class TensorArtifact(Record, frozen=True, kw_only=True):
    """Facts about the model that a session needs.

    Attributes:
        architecture: the first of ``architectures`` in config.json, or ``"onnx"`` for a file from elsewhere.
        task: as transformers' pipelines call it, ``"image-classification"``; ``"tensor"`` where it is not known.
        opset: of the default domain.
        inputs: in the graph's order.
        outputs: likewise.
        embedding: for ``embed``; None if the model is no text encoder.
        labels: of classes, by index; empty where the model has none.
    """

    architecture: str
    task: str
    opset: Annotated[int, msgspec.Meta(ge=7, le=64)]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    embedding: Embedding | None = None
    labels: tuple[str, ...] = ()


class NodeGroup(Record, frozen=True, kw_only=True):
    """Nodes of one operator that compute in one precision, in the graph that the runtime executes.

    Attributes:
        op_type: ``"QLinearConv"``.
        precision: ``"int8"``, ``"fp8"``, ``"int4"``, ``"fp16"``, ``"bf16"`` or ``"fp32"``.
        nodes: how many.
        macs: multiply-adds of one call.
        weight_bytes: that they read.
    """

    op_type: str
    precision: str
    nodes: Count
    macs: Count
    weight_bytes: Count


class Coverage(Record, frozen=True, kw_only=True):
    """What of a model is truly quantized, in the graph that the runtime executes.

    Attributes:
        weight_share: of the weights of matrix products and convolutions, by number.
        mac_share: of their multiply-adds, products of two activations left out.
        groups: all of them.
        left: names of such nodes that stayed in floats, the costliest first.
    """

    weight_share: Share
    mac_share: Share
    groups: tuple[NodeGroup, ...]
    left: tuple[str, ...] = ()


class OutputQuality(Record, frozen=True, kw_only=True):
    """One output of the artifact against the float model's, on inputs that neither was made for.

    Attributes:
        name: of the output.
        mean_cosine: mean over the inputs.
        min_cosine: the worst input.
        sqnr_db: signal to quantization noise over all inputs together: 10 log10 of energy over squared error; None
            if there is no error at all.
        max_error: the largest absolute difference.
    """

    name: str
    mean_cosine: float
    min_cosine: float
    sqnr_db: float | None
    max_error: float


class TensorQuality(Record, frozen=True, kw_only=True):
    """How near the artifact is to the float model.

    Attributes:
        inputs: calls compared.
        outputs: one each.
        top1: share of inputs with the same largest class; None where there are no classes.
        detection_map: mean average precision against what the float model detects; None for other tasks, and if it
            detects nothing.
        detection_iou: mean overlap (intersection over union) of the boxes that are found again; None likewise.
        metric: of the user's own function, artifact and float model; None if none was given.
        source: where the inputs come from, for people.
        sha256: of the inputs.
    """

    inputs: Count
    outputs: tuple[OutputQuality, ...]
    top1: Share | None = None
    detection_map: Share | None = None
    detection_iou: Share | None = None
    metric: tuple[float, float] | None = None
    source: str
    sha256: Sha256


class TensorPrediction(Record, frozen=True, kw_only=True):
    """What a plan will take. Bytes of the file and weights are exact, the rest is modelled.

    Attributes:
        file_bytes: of the model with its external data.
        weights_bytes: in memory while it serves.
        activation_bytes: of one call.
        runtime_bytes: interpreter, libraries, driver.
        peak_memory_bytes: of the serving process.
        latency_ms: of one call at the usual sizes; None where nothing could be predicted.
        latency_is_floor: whether that is the least which datasheet figures allow, and no prediction.
    """

    file_bytes: Count
    weights_bytes: Count
    activation_bytes: Count
    runtime_bytes: Count
    peak_memory_bytes: Count
    latency_ms: float | None = None
    latency_is_floor: bool = False


class TensorPlan(Record, frozen=True, kw_only=True):
    """Every decision about a tensor bundle.

    Attributes:
        format: ``"onnx"``.
        backend: that it is made for, ``"onnxruntime-cpu"``, ``"tensorrt"``, ``"tensorrt-rtx"``, ``"onnxruntime-cuda"``.
        scheme: what most of the weights compute in.
        activations: of INT8 activations, ``"u8"`` or ``"s8"``; None for other schemes.
        float_nodes: nodes that could be quantized and were not, with the reason.
        axes: sizes of the dynamic axes by name.
        threads: of a call; None leaves it to the machine's physical cores.
        opset: of the graph, if the scheme needs a newer one than the model's; None for the model's.
        disabled_optimizers: of ONNX Runtime, where its fusion is slower than what it fuses.
        predicted: what it will take on the target.
        speedup: over the float model, measured where the plan was made, and only there; None if it was not measured.
        rejected: alternatives and why they were not chosen.
        notes: what a user must know, one line each.
    """

    format: Literal["onnx"] = "onnx"
    backend: str
    scheme: Scheme
    activations: Literal["u8", "s8"] | None = None
    float_nodes: dict[str, str] = msgspec.field(default_factory=dict)
    axes: dict[str, AxisRange] = msgspec.field(default_factory=dict)
    threads: Threads | None = None
    opset: int | None = None
    disabled_optimizers: tuple[str, ...] = ()
    predicted: TensorPrediction
    speedup: float | None = None
    rejected: tuple[Rejection, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes it."""
        return runs_on_gpu(self.backend)


class TensorVariant(Record, frozen=True, kw_only=True):
    """The same model made for another device, in a folder of its own within the bundle.

    Attributes:
        built_for: name of that profile.
        target: what it says the device is.
        plan: how it was made.
        files: the hashed set of its own: ``"model"`` and its ``"data"``, ``"layers"``, engines. What comes before and
            after the model it shares.
        coverage: what is truly quantized; None for a float model.
        quality: it against the float model; None if it is the float model.
        budget: the limits that the plan was made for.
    """

    built_for: str
    target: Target
    plan: TensorPlan
    files: tuple[BundleFile, ...]
    coverage: Coverage | None = None
    quality: TensorQuality | None = None
    budget: Budget


# Roles of files that belong to one device's graph, and not to the model as such.
_OWN_ROLES = frozenset({"model", "data", "layers", "answers", "engine", "engine-info"})


class TensorManifest(Record, frozen=True, kw_only=True):
    """``edgeq.json`` of a tensor bundle.

    Attributes:
        schema_version: of this record; readers refuse a newer one.
        kind: ``"tensor"``.
        name: of the bundle.
        source: where the model comes from.
        artifact: what a session must know of it.
        plan: how it was made.
        files: the hashed set: ``"model"`` and its ``"data"``, and what comes before and after the model, by role.
        coverage: what is truly quantized; None for a float model.
        quality: artifact against the float model; None if it is the float model.
        budget: the limits that the plan was made for.
        built_for: name of the profile.
        target: what it says the device is.
        others: the same model for other devices.
        tools: name to version of what made it.
        created_utc: ISO 8601.
    """

    schema_version: int = 1
    kind: Literal["tensor"] = "tensor"
    name: str
    source: ModelSource
    artifact: TensorArtifact
    plan: TensorPlan
    files: tuple[BundleFile, ...]
    coverage: Coverage | None = None
    quality: TensorQuality | None = None
    budget: Budget
    built_for: str
    target: Target
    others: tuple[TensorVariant, ...] = ()
    tools: dict[str, str]
    created_utc: str

    def __post_init__(self) -> None:
        """Refuse two entries for one file or device, which msgspec reports as an error of the manifest."""
        paths = [PurePosixPath(file.path) for file in self.all_files]
        if len(set(paths)) != len(paths):
            raise ValueError("files names a file twice")
        if len(set(self.devices)) != len(self.devices):
            raise ValueError("others names a device twice")

    @property
    def all_files(self) -> tuple[BundleFile, ...]:
        """Of all devices."""
        return (*self.files, *(file for other in self.others for file in other.files))

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the profiles that the bundle has a graph for, the one that it was made for first."""
        return (self.built_for, *(other.built_for for other in self.others))

    def made_for(self, device: str) -> TensorManifest:
        """The manifest as if the bundle held the graph for that device alone.

        Raises:
            KeyError: it has none.
        """
        if device == self.built_for:
            return msgspec.structs.replace(self, others=())
        found = next((other for other in self.others if other.built_for == device), None)
        if found is None:
            raise KeyError(device)
        return msgspec.structs.replace(
            self,
            built_for=found.built_for,
            target=found.target,
            plan=found.plan,
            files=(*found.files, *(file for file in self.files if file.role not in _OWN_ROLES)),
            coverage=found.coverage,
            quality=found.quality,
            budget=found.budget,
            others=(),
        )
