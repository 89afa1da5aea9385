"""Prompts to token ids. Text of users never becomes a control token, whatever it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeq.errors import SessionError, UsageError
from edgeq.llama import Model
from edgeq.runtime.chat import ChatTemplate
from edgeq.runtime.generation import Prompt

__all__ = ["PromptEncoder"]

# A noncharacter: no tokenizer, template or valid interchange text uses it.
_SEAM = "\ufdd0"


class PromptEncoder:
    """Encodes prompts for one model.

    Args:
        model: gives tokenizer and chat template.

    Raises:
        SessionError: the model holds no vocabulary.
    """

    def __init__(self, model: Model) -> None:
        model.check_vocabulary()
        self._model = model
        self._template: ChatTemplate | None = None

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: raw text (BOS is added where the model wants it), messages for the chat template, or token ids.

        Raises:
            UsageError: an empty prompt, ids outside of the vocabulary, messages that the template refuses.
            SessionError: messages for a model without a chat template.
        """
        if isinstance(prompt, str):
            ids = self._model.tokenize(prompt, add_special=True, parse_special=False)
        else:
            messages = [item for item in prompt if isinstance(item, Mapping)]
            ids = [int(item) for item in prompt if isinstance(item, int | np.integer)]
            if len(messages) + len(ids) != len(prompt) or (messages and ids):
                raise UsageError(
                    "a prompt is a text, a list of messages, or a list of token ids", "Give one of the three"
                )
            for token in ids:
                self._model.check_token(token)
            if messages:
                ids = self._encode_chat(messages)
        if not ids:
            raise UsageError("the prompt is empty", "Give at least one token to continue from")
        return ids

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Messages as the text that the model sees.

        Raises:
            UsageError: the template refuses these messages.
            SessionError: the model has no chat template.
        """
        return self._render(messages).replace(_SEAM, "")

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        if self._template is None:
            self._template = ChatTemplate(self._template_source(), self._special_texts())
        return self._template.render([self._defuse(dict(message)) for message in messages])

    def _encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        # The template writes BOS itself where the model wants it. Its control tokens are parsed; those that stood in a
        # message were cut apart by `_defuse`, so no piece holds a whole one.
        ids: list[int] = []
        for piece in self._render(messages).split(_SEAM):
            ids += self._model.tokenize(piece, add_special=False, parse_special=True, at_start=not ids)
        return ids

    def _defuse(self, value: Any) -> Any:  # noqa: ANN401 - messages hold whatever JSON holds
        """Put a seam into every control token that a message spells out."""
        if isinstance(value, str):
            return self._defuse_text(value.replace(_SEAM, ""))
        if isinstance(value, Mapping):
            return {key: self._defuse(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._defuse(item) for item in value]
        return value

    def _defuse_text(self, text: str) -> str:
        while True:
            controls = {
                token
                for token in self._model.tokenize(text, add_special=False, parse_special=True)
                if self._model.is_control(token)
            }
            spelled = {self._model.token_bytes(token, special=True).decode("utf-8", "replace") for token in controls}
            before = text
            for word in sorted(spelled, key=len, reverse=True):
                # A control token of a single character cannot be cut, so it is left out.
                text = text.replace(word, word[:1] + _SEAM + word[1:] if len(word) > 1 else _SEAM)
            if text == before:
                return text

    def _template_source(self) -> str:
        if self._model.chat_template is None:
            raise SessionError(
                f"{self._model.path.name} has no chat template, so messages mean nothing to it",
                "Give the prompt as text",
            )
        return self._model.chat_template

    def _special_texts(self) -> dict[str, str]:
        tokens = {"bos_token": self._model.bos, "eos_token": self._model.eos}
        return {
            name: self._model.token_bytes(token, special=True).decode("utf-8", "replace")
            for name, token in tokens.items()
            if token is not None
        }
