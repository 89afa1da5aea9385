"""edgeq: models onto robot hardware, proven to fit.

::

    import edgeq

    with edgeq.load("smollm2.edgeq") as session:
        print(session.generate("The capital of France is", max_tokens=16).text)

Names are loaded when they are first used, so that ``import edgeq`` itself takes almost no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from edgeq._version import __version__

if TYPE_CHECKING:
    from edgeq.bundle import Bundle as Bundle
    from edgeq.bundle import open_bundle as open_bundle
    from edgeq.converters.onnx.export.module_source import ModuleSource as ModuleSource
    from edgeq.errors import BudgetError as BudgetError
    from edgeq.errors import BundleError as BundleError
    from edgeq.errors import ConversionError as ConversionError
    from edgeq.errors import DiskFullError as DiskFullError
    from edgeq.errors import EdgeqError as EdgeqError
    from edgeq.errors import MissingPackageError as MissingPackageError
    from edgeq.errors import OutputExistsError as OutputExistsError
    from edgeq.errors import ProfileError as ProfileError
    from edgeq.errors import PromptTooLongError as PromptTooLongError
    from edgeq.errors import SessionClosedError as SessionClosedError
    from edgeq.errors import SessionError as SessionError
    from edgeq.errors import SourceError as SourceError
    from edgeq.errors import UnsupportedModelError as UnsupportedModelError
    from edgeq.errors import UsageError as UsageError
    from edgeq.planner.convert import Job as Job
    from edgeq.planner.convert import convert as convert
    from edgeq.planner.plan import Request as Request
    from edgeq.planner.tensors.convert import convert_tensor as convert_tensor
    from edgeq.planner.tensors.job import Calibration as Calibration
    from edgeq.planner.tensors.job import Gate as Gate
    from edgeq.planner.tensors.job import TensorJob as TensorJob
    from edgeq.profiles.device import DeviceProfile as DeviceProfile
    from edgeq.profiles.loader import load_profile as load_profile
    from edgeq.report import Report as Report
    from edgeq.runtime.generation import Generation as Generation
    from edgeq.runtime.generation import Timings as Timings
    from edgeq.runtime.generation import Token as Token
    from edgeq.runtime.gguf_embedding import GgufEmbeddingSession as GgufEmbeddingSession
    from edgeq.runtime.llm import LLMSession as LLMSession
    from edgeq.runtime.session import load as load
    from edgeq.runtime.stream import TokenStream as TokenStream
    from edgeq.runtime.tensor.embedding import EmbeddingSession as EmbeddingSession
    from edgeq.runtime.tensor.session import TensorSession as TensorSession
    from edgeq.tensor_types import TensorManifest as TensorManifest
    from edgeq.types import Budget as Budget
    from edgeq.types import Manifest as Manifest
    from edgeq.types import ModelSource as ModelSource
    from edgeq.types import Plan as Plan

# The module that each public name comes from. The same names stand above for type checkers; a test compares the two.
_HOMES = {
    "edgeq.bundle": ("Bundle", "open_bundle"),
    "edgeq.converters.onnx.export.module_source": ("ModuleSource",),
    "edgeq.errors": (
        "BudgetError",
        "BundleError",
        "ConversionError",
        "DiskFullError",
        "EdgeqError",
        "MissingPackageError",
        "OutputExistsError",
        "ProfileError",
        "PromptTooLongError",
        "SessionClosedError",
        "SessionError",
        "SourceError",
        "UnsupportedModelError",
        "UsageError",
    ),
    "edgeq.planner.convert": ("Job", "convert"),
    "edgeq.planner.plan": ("Request",),
    "edgeq.planner.tensors.convert": ("convert_tensor",),
    "edgeq.planner.tensors.job": ("Calibration", "Gate", "TensorJob"),
    "edgeq.profiles.loader": ("load_profile",),
    "edgeq.report": ("Report",),
    "edgeq.runtime.generation": ("Generation", "Timings", "Token"),
    "edgeq.runtime.gguf_embedding": ("GgufEmbeddingSession",),
    "edgeq.runtime.llm": ("LLMSession",),
    "edgeq.runtime.session": ("load",),
    "edgeq.runtime.stream": ("TokenStream",),
    "edgeq.runtime.tensor.embedding": ("EmbeddingSession",),
    "edgeq.runtime.tensor.session": ("TensorSession",),
    "edgeq.profiles.device": ("DeviceProfile",),
    "edgeq.tensor_types": ("TensorManifest",),
    "edgeq.types": ("Budget", "Manifest", "ModelSource", "Plan"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Budget",
    "BudgetError",
    "Bundle",
    "BundleError",
    "Calibration",
    "ConversionError",
    "DeviceProfile",
    "DiskFullError",
    "EdgeqError",
    "EmbeddingSession",
    "Gate",
    "Generation",
    "GgufEmbeddingSession",
    "Job",
    "LLMSession",
    "Manifest",
    "MissingPackageError",
    "ModelSource",
    "ModuleSource",
    "OutputExistsError",
    "Plan",
    "ProfileError",
    "PromptTooLongError",
    "Report",
    "Request",
    "SessionClosedError",
    "SessionError",
    "SourceError",
    "TensorJob",
    "TensorManifest",
    "TensorSession",
    "Timings",
    "Token",
    "TokenStream",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "convert",
    "convert_tensor",
    "load",
    "load_profile",
    "open_bundle",
]


if not TYPE_CHECKING:  # type checkers must go on refusing names that are not there

    def __getattr__(name: str) -> object:
        home = _HOME_OF.get(name)
        if home is None:
            message = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(message)
        value = getattr(importlib.import_module(home), name)
        globals()[name] = value  # the next access does not come here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
