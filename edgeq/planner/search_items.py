"""From a model and its sensitivities to the solver's problem, and from budgets to its limits."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from edgeq.converters.gguf.recipe import Override, apply_overrides
from edgeq.converters.gguf.sensitivity.curvature import Curvatures, activation_block
from edgeq.errors import ConversionError
from edgeq.ggml_types import TYPES, ggml_type, tensor_bytes
from edgeq.planner.knapsack import Item, Limits, Option
from edgeq.profiles.device import DeviceProfile
from edgeq.profiles.llm.model_latency import Speeds, tensor_decode_ns, tensor_prompt_ns
from edgeq.profiles.llm.model_memory import held_twice
from edgeq.profiles.llm.model_shape import ModelShape
from edgeq.types import Budget, Prediction

__all__ = ["Pricing", "items_of", "legal_types", "limits_of", "token_limits_ms", "with_prompt"]

# Left out: f32 and bf16, which cost more than f16 and give nothing for it, and the types below two bits, which need
# rows so insensitive that no model of a robot's size has shown one.
_LEFT_OUT = frozenset({"f32", "bf16", "iq1_s", "iq1_m"})


@dataclasses.dataclass(frozen=True)
class Pricing:
    """What options cost on one device.

    Attributes:
        shape: the model.
        profile: the device.
        speeds: that times are predicted from.
    """

    shape: ModelShape
    profile: DeviceProfile
    speeds: Speeds

    def ns(self, tensor: str, type_name: str) -> float:
        """Of one decoded token; 0 for what is not multiplied."""
        return tensor_decode_ns(self.shape, tensor, type_name, self.speeds)

    def prompt_ns(self, tensor: str, type_name: str, chunks: Mapping[int, int]) -> float:
        """Of a whole prompt that is computed in these chunks, see `prompt_chunks`."""
        return tensor_prompt_ns(self.shape, tensor, type_name, self.speeds, chunks)

    def file_bytes(self, tensor: str, type_name: str) -> int:
        """With padding."""
        size = tensor_bytes(type_name, self.shape.tensors[tensor])
        return -(-size // self.shape.alignment) * self.shape.alignment

    def memory_bytes(self, tensor: str, type_name: str) -> int:
        """Resident when it is served."""
        copies = 2 if held_twice(self.shape, tensor, type_name, self.profile) else 1
        return copies * tensor_bytes(type_name, self.shape.tensors[tensor])


def legal_types(
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, str],
    quantizable: Iterable[str],
    pins: Sequence[Override],
) -> dict[str, tuple[str, ...]]:
    """The types that each tensor can take.

    Args:
        shapes: of all tensors, row length first.
        stored: their types in the float file.
        quantizable: those that llama.cpp lets anyone choose.
        pins: what the user fixed; the first that matches decides.

    Raises:
        UsageError: a pin that matches nothing, or a type that a tensor cannot have.
    """
    free = frozenset(quantizable)
    pinned = apply_overrides(stored, pins, free, shapes, imatrix=True)
    menu: dict[str, tuple[str, ...]] = {}
    for name, dims in shapes.items():
        if name not in free:
            continue
        if any(re.search(pin.match, name) for pin in pins):
            menu[name] = (pinned[name],)
            continue
        fitting = [kind.name for kind in TYPES.values() if kind.name not in _LEFT_OUT and kind.fits(dims[0])]
        # A type that stores weights as exactly as the file has them is the float option, whatever its name.
        menu[name] = tuple(stored[name] if ggml_type(k).is_float else k for k in fitting)
    return menu


def items_of(
    pricing: Pricing,
    menu: Mapping[str, Sequence[str]],
    curvatures: Curvatures,
    errors: Mapping[str, Mapping[str, float]],
) -> list[Item]:
    """One item for each tensor of the menu, with bytes, time and predicted KL of every option.

    Raises:
        ConversionError: none of a tensor's types can hold its weights.
    """
    items = []
    for name, types in menu.items():
        noise = curvatures.by_tensor[name].activation_kld
        options = []
        for kind in types:
            if not math.isfinite(errors[name][kind]):  # a weight is beyond what the scales of that type can hold
                continue
            block = activation_block(kind, pricing.profile.accelerator)
            rounding = noise.get(block, noise.get(32, 0.0)) if block else 0.0
            options.append(
                Option(
                    type=kind,
                    file_bytes=pricing.file_bytes(name, kind),
                    memory_bytes=pricing.memory_bytes(name, kind),
                    ns=pricing.ns(name, kind),
                    kld=max(0.0, errors[name][kind]) + rounding,
                )
            )
        if not options:
            raise ConversionError(f"{', '.join(types)} cannot hold the weights of {name}", "Choose another type for it")
        items.append(Item(name, tuple(options)))
    return items


def with_prompt(items: Sequence[Item], pricing: Pricing, chunks: Mapping[int, int]) -> list[Item]:
    """The items with the time that each option takes of a prompt in these chunks."""
    return [
        dataclasses.replace(
            item,
            options=tuple(
                dataclasses.replace(option, prompt_ns=pricing.prompt_ns(item.name, option.type, chunks))
                for option in item.options
            ),
        )
        for item in items
    ]


def token_limits_ms(budget: Budget) -> dict[str, float]:
    """The longest time of a decoded token that each line of a budget allows, by the line's name."""
    limits = {}
    if budget.itl_ms is not None:
        limits["itl_ms"] = budget.itl_ms
    if budget.tokens_per_s is not None:
        limits["tokens_per_s"] = 1e3 / budget.tokens_per_s
    return limits


def limits_of(
    budget: Budget,
    pricing: Pricing,
    base: Mapping[str, str],
    at_base: Prediction,
    *,
    names: Iterable[str],
    chunks: Mapping[int, int],
    max_file_bytes: int | None,
    max_kld: float | None,
) -> Limits:
    """What is left for the solver's tensors when everything else has taken its share.

    Args:
        budget: the device's limits.
        pricing: prices.
        base: some type for every tensor.
        at_base: the prediction for ``base``; whatever of it is not of the solver's tensors is a constant.
        names: the solver's tensors.
        chunks: of the prompt that ``at_base`` is for.
        max_file_bytes: of the GGUF.
        max_kld: mean KL divergence in nats.
    """
    chosen = list(names)
    file_constant = at_base.file_bytes - sum(pricing.file_bytes(n, base[n]) for n in chosen)
    memory_constant = at_base.peak_memory_bytes - sum(pricing.memory_bytes(n, base[n]) for n in chosen)
    ns_constant = 1e6 * at_base.itl_ms - sum(pricing.ns(n, base[n]) for n in chosen)
    prompt_constant = 1e6 * at_base.ttft_ms - sum(pricing.prompt_ns(n, base[n], chunks) for n in chosen)
    token_ms = token_limits_ms(budget).values()
    return Limits(
        file_bytes=None if max_file_bytes is None else max_file_bytes - file_constant,
        memory_bytes=None if budget.peak_memory_bytes is None else budget.peak_memory_bytes - memory_constant,
        ns=1e6 * min(token_ms) - ns_constant if token_ms else None,
        kld=max_kld,
        prompt_ns=None if budget.ttft_ms is None else 1e6 * budget.ttft_ms - prompt_constant,
    )
