"""Every failure that a user can cause, as one tree.

::

    EdgeqError                      exit code 1
    ├── UsageError                  2   an argument or a unit that makes no sense
    ├── MissingPackageError         1   an extra that this command needs is not installed
    ├── ProfileError                1   a device profile that is unknown or wrong
    ├── SourceError                 1   the model that was given cannot be read
    │   └── UnsupportedModelError   1   it can be read, but not converted
    ├── ConversionError             1   writing or quantizing failed; nothing was published
    │   ├── OutputExistsError       1   the output folder holds something already
    │   └── DiskFullError           1   no room left while writing
    ├── BundleError                 1   a folder that is no bundle, or one that was changed after publishing
    ├── SessionError                1   the runtime refused or failed
    │   ├── PromptTooLongError      1   prompt and answer do not fit the context
    │   └── SessionClosedError      1   used after close()
    └── BudgetError                 3   no plan can meet the budget

Each carries a ``cause`` and a ``remedy``; ``str(error)`` is both on one line. A traceback that a user sees is our bug.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import ClassVar

__all__ = [
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
    "require_package",
]


class EdgeqError(Exception):
    """A failure with a cause and a next step.

    Args:
        cause: what went wrong, with the name of the file or option; no trailing full stop.
        remedy: what to do next, an imperative sentence without a trailing full stop.
        details: lines that a terminal shows below the error (alternatives, names); may be empty.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, cause: str, remedy: str = "", *, details: tuple[str, ...] = ()) -> None:
        self.cause = _one_line(cause)
        self.remedy = _one_line(remedy)
        self.details = details
        super().__init__(f"{self.cause}. {self.remedy}." if self.remedy else f"{self.cause}.")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by the constructor's own arguments, so that errors cross process borders."""
        return (_rebuild, (type(self), self.cause, self.remedy, self.details))


def _rebuild(kind: type[EdgeqError], cause: str, remedy: str, details: tuple[str, ...]) -> EdgeqError:
    return kind(cause, remedy, details=details)


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


class UsageError(EdgeqError):
    """An argument that makes no sense: an unknown unit, option, type or regular expression."""

    exit_code = 2


class MissingPackageError(EdgeqError):
    """A package of an extra is not installed."""


class ProfileError(EdgeqError):
    """A device profile is unknown or not valid."""


class SourceError(EdgeqError):
    """The given model is missing, truncated, or in a form that edgeq does not read."""


class UnsupportedModelError(SourceError):
    """The model can be read, but its architecture or tokenizer cannot be converted."""


class ConversionError(EdgeqError):
    """Converting, quantizing or verifying failed; nothing was published."""


class OutputExistsError(ConversionError):
    """The output folder already holds something."""


class DiskFullError(ConversionError):
    """The disk or quota filled up while writing."""


class BundleError(EdgeqError):
    """A folder is no bundle, or its contents are not what its manifest says."""


class SessionError(EdgeqError):
    """The runtime could not load or run a model."""


class PromptTooLongError(SessionError):
    """The prompt does not fit the context that the bundle was planned for."""


class SessionClosedError(SessionError):
    """The session was used after it was closed."""


class BudgetError(EdgeqError):
    """No plan meets the budget."""

    exit_code = 3


def require_package(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional module or say which extra brings it.

    Args:
        module: what to import, such as ``"llama_cpp"``.
        extra: the extra of edgeq that installs it.
        purpose: what it is needed for, as in "to run GGUF models".

    Raises:
        MissingPackageError: the module is not installed, or is installed but broken.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".", maxsplit=1)[0]:
            cause = f"{module} is installed, but {error.name}, which it needs, is not"
        else:
            cause = f"{module} is not installed; edgeq needs it {purpose}"
        raise MissingPackageError(cause, f"Install it with: pip install 'edgeq[{extra}]'") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingPackageError(
            f"{module} is installed but does not load ({error})",
            f"Reinstall it with: pip install --force-reinstall 'edgeq[{extra}]'",
        ) from error
