"""How facts about a machine are collected: what cannot be read is stated with a remedy, and never stops the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from edgeq.record import Record
from edgeq.system_files import NOT_THERE, PERMISSION_DENIED, UNKNOWN_FORMAT, SystemFiles

__all__ = ["FactReader", "MissingFact"]

T = TypeVar("T")
_REPORT = "send the file's contents to edgeq's developers: this format is new to edgeq"


class MissingFact(Record, frozen=True, kw_only=True):
    """Something that this kind of machine should tell, and did not.

    Attributes:
        fact: what is not known, for people ("EMC clock").
        path: the file that would have told it.
        why: ``"not there"``, ``"permission denied"``, ``"unknown format: …"`` or what else the kernel answered.
        remedy: what to do, an imperative sentence without a full stop.
    """

    fact: str
    path: str
    why: str
    remedy: str


class FactReader:
    """`SystemFiles` with a list of what is missing.

    Attributes:
        files: below the root that is read.
        missing: in the order in which it was found missing.
    """

    def __init__(self, files: SystemFiles) -> None:
        self.files = files
        self.missing: list[MissingFact] = []

    def lacks(self, fact: str, *paths: str, remedy: str) -> None:
        """State that none of ``paths`` told ``fact``; the path with the most telling reason is named.

        Args:
            fact: what is not known.
            paths: the files that were tried, the most likely first.
            remedy: what to do if the file is not there; for other reasons the remedy follows from the reason.
        """
        reasons = [(path, self.files.why_unread(path) or f"{UNKNOWN_FORMAT}: nothing in it names it") for path in paths]
        # A refusal or an odd file says that the fact is there to be had; absence says the least.
        path, why = min(reasons, key=lambda item: (item[1] == NOT_THERE, item[1] != PERMISSION_DENIED))
        if why == PERMISSION_DENIED:
            remedy = "run it again with sudo"
        elif why.startswith(UNKNOWN_FORMAT):
            remedy = _REPORT
        self.missing.append(MissingFact(fact=fact, path=path, why=why, remedy=remedy))

    def attempt(self, fact: str, path: str, read: Callable[[], T], default: T) -> T:
        """``read()``, or ``default`` and a statement if the file is of a form that ``read`` stumbles over."""
        try:
            return read()
        except Exception as error:  # noqa: BLE001 - files of machines that nobody tried; the failure is stated
            why = f"{UNKNOWN_FORMAT}: {type(error).__name__}: {error}"
            self.missing.append(MissingFact(fact=fact, path=path, why=why[:200], remedy=_REPORT))
            return default
