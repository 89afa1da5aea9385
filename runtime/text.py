"""From token bytes to text that may be shown: whole characters only, and never a piece of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

__all__ = ["TextStream"]


class TextStream:
    """Turns the bytes of tokens into text as they come.

    The result does not depend on how the bytes are cut: the text ends before the first stop string that is complete,
    the longest one where several end at the same character. Bytes that are no UTF-8 become U+FFFD, as
    ``bytes.decode(errors="replace")`` does; an unfinished character at the very end is dropped.

    Args:
        stops: non-empty strings that end the text.

    Attributes:
        stopped: whether a stop string was met; nothing more is accepted then.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stops = tuple(stops)
        self._held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes) -> str:
        """Take the bytes of one token and give the text that is certain by now, often none."""
        text = self._held + self._decoder.decode(data)
        if not self._stops:
            return text
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self.stopped = True
            self._held = ""
            return text[: min(matches)[1]]
        certain = len(text) - self._pending(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """The text that was held back because a stop string might have followed."""
        text, self._held = self._held, ""
        return text

    def _pending(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
