"""Chat templates: messages to text, as Hugging Face renders them.

A template is code that came with a model, so it runs in Jinja's immutable sandbox. The environment (trimmed blocks,
loop controls, ``raise_exception``, ``strftime_now``, ``tojson``, ``generation`` blocks) follows the documentation of
chat templates in transformers, against which the tests compare.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from edgeq.errors import SessionError, UsageError, require_package

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.parser import Parser
    from jinja2.sandbox import SandboxedEnvironment

__all__ = ["ChatTemplate"]


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja.
        special: what the template may write besides the messages, such as ``bos_token``.

    Raises:
        SessionError: the template does not compile.
        MissingPackageError: jinja2 is not installed.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        jinja2 = require_package("jinja2", "cpu", "to render chat templates")
        self._error: type[Exception] = jinja2.TemplateError
        self._special = dict(special)
        try:
            self._template = _environment().from_string(source)
        except self._error as error:
            raise SessionError(
                f"the model's chat template does not compile: {error}", "Give the prompt as text instead of messages"
            ) from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text that the model is to continue.

        Args:
            messages: each with ``role`` and ``content``.
            add_generation_prompt: end with the beginning of the assistant's turn.

        Raises:
            UsageError: the template refuses these messages, or needs something that they lack.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except (self._error, TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
            # What a template does with unexpected messages is as varied as Python itself.
            raise UsageError(
                f"the model's chat template refuses these messages: {error}",
                "Give messages with the keys role and content, in an order that the model knows",
            ) from error


def _environment() -> SandboxedEnvironment:
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's words for training; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return dt.datetime.now().astimezone().strftime(form)
