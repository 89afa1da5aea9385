"""A model on a device as a problem for the solver: what is measured once, and serves every budget."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.quantize import quantizable_tensors
from edgeq.converters.gguf.recipe import Override
from edgeq.converters.gguf.sensitivity.evidence import Evidence, EvidenceRequest, Workshop, gather
from edgeq.converters.gguf.shape import model_shape
from edgeq.errors import UsageError
from edgeq.ggml_types import TYPES
from edgeq.planner.candidates import Settings
from edgeq.planner.knapsack import Item, Solution
from edgeq.planner.search_items import Pricing, items_of, legal_types
from edgeq.profiles.device import DeviceProfile
from edgeq.profiles.kernels.decode_costs import costs_for
from edgeq.profiles.llm.cost import predict
from edgeq.profiles.llm.model_latency import Speeds, speeds_of
from edgeq.types import Prediction

__all__ = ["Problem", "SearchOptions", "pose"]


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """How a search is done.

    Attributes:
        when: ``"auto"`` searches where neither f16 nor q8_0 fits, or where quality or bytes are limited.
        evidence: what sensitivities stand on.
        trials: mixes that are really quantized and judged; 0 leaves it at the prediction.
        decode_costs: ``"auto"`` measures kernels here if the target is a CPU of this machine's kind, ``"profile"``
            takes the profile's bandwidth.
    """

    when: Literal["auto", "always", "never"] = "auto"
    evidence: EvidenceRequest = dataclasses.field(default_factory=EvidenceRequest)
    trials: int = 4
    decode_costs: Literal["auto", "profile"] = "auto"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model on a device, ready to be solved for any budget.

    Attributes:
        evidence: what was measured about the model.
        pricing: what options cost on the device.
        items: for the solver.
        base: types of all tensors before the solver's choice.
        costs_note: where the times come from, for people.
    """

    evidence: Evidence
    pricing: Pricing
    items: list[Item]
    base: dict[str, str]
    costs_note: str

    def types(self, solution: Solution) -> dict[str, str]:
        """Of every tensor."""
        return {**self.base, **solution.types}

    def predict(self, types: Mapping[str, str], settings: Settings, prompt_tokens: int) -> Prediction:
        """What a mix takes on the device."""
        return predict(
            self.pricing.shape,
            types,
            self.pricing.profile,
            context_tokens=settings.context_tokens,
            kv_types=(settings.kv_type, settings.kv_type),
            ubatch_tokens=settings.ubatch_tokens,
            prompt_tokens=min(prompt_tokens, settings.context_tokens),
            speeds=self.pricing.speeds,
        )


def pose(
    reference: Path,
    folder: Path | None,
    profile: DeviceProfile,
    pins: Sequence[Override],
    options: SearchOptions,
    shop: Workshop,
) -> Problem:
    """Measure a model and its kernels, or find on disk what was measured before.

    Args:
        reference: a float GGUF with its weights.
        folder: the Hugging Face folder that it was made from, if any.
        profile: the device.
        pins: types that the user fixed.
        options: how.
        shop: where and how.

    Raises:
        UsageError: a pin that no tensor can take or that matches nothing, or a model without a matrix.
    """
    header = read_header(reference)
    shape = model_shape(header)
    stored = {name: tensor.type for name, tensor in header.tensors.items()}
    menu = legal_types(shape.tensors, stored, quantizable_tensors(reference), pins)
    if not menu:
        raise UsageError(f"{reference.name} has no tensor that can be quantized", "Use --quant f16")
    speeds, note = _speeds(menu, stored, shape.tensors, profile, options, shop)
    evidence = gather(header, folder, menu, options.evidence, shop)
    pricing = Pricing(shape, profile, speeds)
    return Problem(evidence, pricing, items_of(pricing, menu, evidence.curvatures, evidence.errors), stored, note)


def _speeds(
    menu: Mapping[str, Sequence[str]],
    stored: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    profile: DeviceProfile,
    options: SearchOptions,
    shop: Workshop,
) -> tuple[Speeds, str]:
    """What times are predicted from, and where it comes from."""
    speeds = speeds_of(profile)
    if speeds.decode.measured:
        return speeds, f"kernels as {profile.name} was measured on {profile.cpu.name}"
    here = profile.accelerator == "cpu" and profile.arch in {platform.machine(), "any"}
    if options.decode_costs == "profile" or not here:
        return speeds, f"bytes over the bandwidth of the profile {profile.name}; no kernel was timed"
    wanted = sorted({(shapes[name][0], shapes[name][1]) for name in menu})
    # What is not on the menu (a router of experts) and what is pinned to another type have a time as they are, too.
    as_they_are = {kind for name, kind in stored.items() if len(shapes[name]) > 1}
    types = [kind for kind in TYPES if kind in as_they_are or any(kind in kinds for kinds in menu.values())]
    # Five bits a weight: about the size of what will be decoded.
    costs = costs_for(
        wanted,
        types,
        threads=profile.threads or shop.threads,
        working_set_bytes=sum(math.prod(shapes[name]) for name in menu) * 5 // 8,
        progress=shop.stage("time kernels"),
    )
    note = f"kernels timed on {costs.machine} with {costs.threads} threads"
    return dataclasses.replace(speeds, decode=costs), note
