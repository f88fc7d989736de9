"""Reads a YAML file so that every fault in it can be pointed at.

Nothing here knows the agent's keys.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml
from yaml.constructor import SafeConstructor

from agent.errors import InvalidConfig

#: What the parser stumbled over, which might be half a password; its names of tokens are not.
_QUOTED = re.compile(r"'(?!<|\\)[^' ]{3,}'")

#: Where a value stands: keys by name, list items by index.
KeyPath = tuple[str | int, ...]

#: The configuration is two levels and a list deep; more is a mistake, or meant to exhaust us.
_MAX_DEPTH = 8
_TAG = "tag:yaml.org,2002:"
_KINDS = {
    f"{_TAG}null": "nothing",
    f"{_TAG}str": "text",
    f"{_TAG}bool": "a boolean",
    f"{_TAG}int": "a number",
    f"{_TAG}float": "a number",
}


class Fault(NamedTuple):
    """Something wrong with the value at `path`, which stands on `line` (from 1)."""

    line: int
    path: KeyPath
    message: str


class Spot(NamedTuple):
    """Where a value stands in the file, what YAML makes of it and how it is written there."""

    line: int
    kind: str
    written: str


@dataclass(frozen=True)
class Document:
    """A parsed file: its values, where each of them stands, and what could not be read."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    spots: dict[KeyPath, Spot] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def line(self, path: KeyPath) -> int:
        """The line of the value at `path`, or of the nearest section around it."""
        while path and path not in self.spots:
            path = path[:-1]
        return self.spots[path].line if path in self.spots else 1


class _Loader(yaml.SafeLoader):
    """Safe YAML without its surprises: dates and `<<` stay text, and 1e-3 is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _KINDS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read(text: str, name: str) -> Document:
    """Parse `text`; `name` is what faults call the file.

    Raises:
        InvalidConfig: the text is not YAML, so that nothing in it can be relied on.
    """
    try:
        _refuse_bombs(text, name)
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = _QUOTED.sub("'…'", error.problem or error.context or "unreadable")
        raise InvalidConfig([f"{name}:{line}: not YAML: {problem}"]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InvalidConfig([f"{name}:{line}: expected text, got a control character"]) from None
    document = Document(name)
    if isinstance(root, yaml.MappingNode):
        document.data.update(_mapping(root, (), document))
    elif root is not None and root.tag != f"{_TAG}null":
        tagged = not root.tag.startswith(_TAG)
        got = f"a value with the tag {root.tag[:40]}" if tagged else _spot(root).kind
        message = f"expected sections such as 'model:', got {got}"
        raise InvalidConfig([f"{name}:{root.start_mark.line + 1}: {message}"])
    return document


def _refuse_bombs(text: str, name: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        where = f"{name}:{event.start_mark.line + 1 if event.start_mark else 1}"
        if isinstance(event, yaml.NodeEvent) and event.anchor:
            message = "anchors and aliases are not read: quote text that starts with '&' or '*'"
            raise InvalidConfig([f"{where}: {message}"])
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise InvalidConfig([f"{where}: nested deeper than {_MAX_DEPTH} levels"])


def _mapping(node: yaml.MappingNode, path: KeyPath, document: Document) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            document.faults.append(Fault(line, path, "a key must be text"))
            continue
        key = key_node.value
        here = (*path, key)
        if here in document.spots:
            first = document.spots[here].line
            document.faults.append(Fault(line, here, f"given twice, first on line {first}"))
            continue
        document.spots[here] = _spot(value_node)._replace(line=line)
        for value in _value(value_node, here, document):
            values[key] = value
    return values


def _value(node: yaml.Node, path: KeyPath, document: Document) -> Iterator[Any]:
    """The value of a node, or none if it cannot be read."""
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
        yield _mapping(node, path, document)
    elif isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        items: list[Any] = []
        for index, item in enumerate(node.value):
            document.spots[(*path, index)] = _spot(item)
            items += _value(item, (*path, index), document)
        if len(items) == len(node.value):  # else the indices of later faults would be off
            yield items
    elif isinstance(node, yaml.ScalarNode) and node.tag in _KINDS:
        try:
            yield SafeConstructor().construct_object(node)
        except (ValueError, LookupError):
            message = f"expected {_KINDS[node.tag]}, got something else"
            document.faults.append(Fault(node.start_mark.line + 1, path, message))
    else:
        message = "tags are not read: quote text that starts with '!'"
        document.faults.append(Fault(node.start_mark.line + 1, path, message))


def _spot(node: yaml.Node) -> Spot:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        kind = _KINDS.get(node.tag, "a tagged value")
        shown = textwrap.shorten(node.value, 60, placeholder="…")
        return Spot(line, kind, repr(shown) if kind == "text" else shown)
    kind = "a section" if isinstance(node, yaml.MappingNode) else f"a list of {len(node.value)}"
    return Spot(line, kind, kind)
