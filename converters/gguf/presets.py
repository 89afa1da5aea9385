"""llama.cpp's uniform presets, by name.

The ids are ``enum llama_ftype`` of llama.h. What a preset does to each tensor is asked of llama.cpp itself (see
`edgeq.converters.gguf.quantize.preview`), never repeated here.
"""

from __future__ import annotations

import dataclasses

from edgeq.errors import UsageError
from edgeq.registry import nearest

__all__ = ["LADDER", "PRESETS", "Preset", "find_preset", "preset_of_type"]


@dataclasses.dataclass(frozen=True)
class Preset:
    """One ``--quant`` value.

    Attributes:
        name: lower case, as users type it.
        ftype: ``enum llama_ftype``.
        needs_imatrix: llama.cpp refuses it without an importance matrix.
    """

    name: str
    ftype: int
    needs_imatrix: bool = False

    @property
    def is_float(self) -> bool:
        """Whether it stores every weight by itself; llama.cpp then ignores overrides."""
        return self.name in ("f32", "f16", "bf16")


_ALL = (
    Preset("f32", 0),
    Preset("f16", 1),
    Preset("bf16", 32),
    Preset("q8_0", 7),
    Preset("q6_k", 18),
    Preset("q5_k_m", 17),
    Preset("q5_k_s", 16),
    Preset("q5_1", 9),
    Preset("q5_0", 8),
    Preset("q4_k_m", 15),
    Preset("q4_k_s", 14),
    Preset("q4_1", 3),
    Preset("q4_0", 2),
    Preset("iq4_nl", 25),
    Preset("iq4_xs", 30),
    Preset("q3_k_l", 13),
    Preset("q3_k_m", 12),
    Preset("q3_k_s", 11),
    Preset("iq3_m", 27),
    Preset("iq3_s", 26),
    Preset("q2_k", 10),
    Preset("q2_k_s", 21, needs_imatrix=True),
    Preset("iq3_xs", 22, needs_imatrix=True),
    Preset("iq3_xxs", 23, needs_imatrix=True),
    Preset("iq2_m", 29, needs_imatrix=True),
    Preset("iq2_s", 28, needs_imatrix=True),
    Preset("iq2_xs", 20, needs_imatrix=True),
    Preset("iq2_xxs", 19, needs_imatrix=True),
    Preset("iq1_m", 31, needs_imatrix=True),
    Preset("iq1_s", 24, needs_imatrix=True),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}

# What a plan chooses from when nobody says --quant. Presets below q3_k_m are left to those who ask for them: without an
# importance matrix they damage small models more than their bytes are worth.
LADDER: tuple[str, ...] = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs", "q3_k_m")


def find_preset(name: str, *, imatrix: bool = False) -> Preset:
    """The preset of that name, in any case.

    Args:
        name: such as ``"q4_k_m"``.
        imatrix: whether there will be an importance matrix.

    Raises:
        UsageError: there is none (the nearest names are given), or it needs an importance matrix.
    """
    found = PRESETS.get(name.lower())
    if found is None:
        close = nearest(name, list(PRESETS)) or list(PRESETS)
        raise UsageError(f"{name!r} is no quantization preset", f"Choose one of {', '.join(close)}")
    if found.needs_imatrix and not imatrix:
        raise UsageError(
            f"The preset {found.name} needs an importance matrix",
            "Give one with --imatrix FILE, search without --quant (--search always), or take iq3_s, q3_k_m or larger",
        )
    return found


def preset_of_type(type_name: str) -> Preset | None:
    """The preset whose main type is that one, for the ``general.file_type`` of mixed files."""
    aliases = {"q2_k": "q2_k", "q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m", "iq3_s": "iq3_s"}
    return PRESETS.get(aliases.get(type_name, type_name))
