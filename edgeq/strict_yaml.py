"""YAML from strangers as plain data, without the corners where YAML surprises.

Duplicate keys (of which YAML keeps the last), aliases (a few lines of them expand without end) and tags are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from edgeq.errors import UsageError

if TYPE_CHECKING:
    from yaml import MappingNode, Node, SafeLoader

__all__ = ["load_yaml"]


def load_yaml(text: str, where: str) -> object:
    """Read one YAML document.

    Args:
        text: the YAML.
        where: its file, for messages.

    Returns:
        Dictionaries, lists, strings, numbers, booleans, dates and None; None for an empty text.

    Raises:
        UsageError: no YAML, a value that Python cannot hold, a key that is there twice, an alias, or a tag.
    """
    import yaml

    try:
        data: object = yaml.load(text, _strict_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}, line {mark.line + 1}" if mark is not None else where
        raise UsageError(f"{place} is no valid YAML: {error.problem}", "Correct the file") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UsageError(f"{where} is no valid YAML: {error}", "Correct the file") from error
    except RecursionError as error:
        raise UsageError(f"{where} is nested too deeply", "Correct the file") from error
    return data


@functools.cache
def _strict_loader() -> type[SafeLoader]:
    """PyYAML's safe loader with the refusals; made on first use, since importing PyYAML takes a while."""
    import yaml
    from yaml.composer import ComposerError
    from yaml.constructor import ConstructorError

    class StrictLoader(yaml.SafeLoader):
        def compose_node(self, parent: Node | None, index: Any) -> Node | None:  # noqa: ANN401 - PyYAML's signature
            parser: Any = self  # PyYAML's parser has no types
            event = parser.peek_event()
            if parser.check_event(yaml.AliasEvent) or event.tag is not None:
                raise ComposerError(None, None, "aliases and tags are not read here", event.start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            seen = set()
            keys: list[Any] = [key for key, _ in node.value]
            for key_node in keys:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, Hashable) and key in seen:
                    problem = f"the key {key!r} is there twice"
                    raise ConstructorError(None, None, problem, key_node.start_mark)
                if isinstance(key, Hashable):
                    seen.add(key)
            return super().construct_mapping(node, deep=deep)

    return StrictLoader
