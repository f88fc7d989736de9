"""What the JSON Schema says of a key, in words: faults, and a commented file."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from agent.config_yaml import Document, Fault, KeyPath

Schema = Mapping[str, Any]

_NOUNS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "array": "a list",
    "object": "a section with keys of its own",
}
_LIMITS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "pattern": "matching",
    "minItems": "of ≥",
}


def explain(document: Document, error: ValidationError, schema: Schema) -> list[Fault]:
    """Each fault of `error`, as what `schema` expected and what the file has instead."""
    faults = []
    for detail in error.errors(include_url=False, include_input=False):
        path = detail["loc"]
        if detail["type"] == "extra_forbidden":
            messages = [_unknown(path, schema)]
        elif detail["type"] == "value_error":
            messages = str(detail["ctx"]["error"]).splitlines()
        else:
            messages = [_mismatch(document, path, schema) or detail["msg"]]
        faults += [Fault(document.line(path), path, message) for message in messages]
    return faults


def render(document: Document, faults: Iterable[Fault], schema: Schema) -> list[str]:
    """The lines an operator reads, in the order of the file."""
    return [
        f"{document.name}:{fault.line}: {dotted(_public(fault.path, schema))}: {fault.message}"
        for fault in sorted(faults, key=lambda fault: fault.line)
    ]


def dotted(path: KeyPath) -> str:
    """A path as people write it: `model.labels[3]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            # Other characters make no key: it may be a value gone astray, even a secret.
            text += ("." if text else "") + (part if re.fullmatch(r"[\w -]{1,60}", part) else "?")
    return text or "file"


def _mismatch(document: Document, path: KeyPath, schema: Schema) -> str | None:
    wanted, spot = _at(path, schema), document.spots.get(path)
    if wanted is None or spot is None:
        return None
    if wanted.get("writeOnly"):
        return f"expected text, got {spot.kind}: put it in quotes"
    # Text in the place of a section may be "password:secret", short of a space.
    got = spot.kind if "properties" in wanted or spot.kind == "nothing" else spot.written
    if spot.kind in ("a boolean", "a number") and wanted.get("type") == "string":
        got = f"{got}, which YAML reads as {spot.kind}: put it in quotes"
    return f"expected {expected(wanted)}, got {got}"


def expected(schema: Schema) -> str:
    """What a schema asks for, in words."""
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    noun = _NOUNS.get(schema.get("type", ""), "another value")
    limits = [f"{sign} {schema[key]}" for key, sign in _LIMITS.items() if key in schema]
    return f"{noun} {' and '.join(limits)}".strip()


def _unknown(path: KeyPath, schema: Schema) -> str:
    section, key = path[:-1], str(path[-1])
    siblings = (_at(section, schema) or {}).get("properties", {})
    near = [(*section, match) for match in difflib.get_close_matches(key, siblings, n=1)]
    near += [other for other in _keys(schema) if other[-1] == key]
    if near:
        return f"unknown key, did you mean {dotted(near[0])}?"
    return f"unknown key, expected one of {', '.join(siblings)}"


def _keys(schema: Schema) -> Iterator[KeyPath]:
    for name, part in schema["properties"].items():
        yield (name,)
        yield from ((name, key) for key in _resolve(part, schema).get("properties", {}))


def _resolve(part: Schema, schema: Schema) -> Schema:
    if "$ref" in part:
        resolved: Schema = schema["$defs"][part["$ref"].rsplit("/", 1)[-1]]
        return resolved
    for option in part.get("anyOf", ()):
        if option.get("type") != "null":
            return _resolve(option, schema)
    return part


def _at(path: KeyPath, schema: Schema) -> Schema | None:
    part: Schema | None = schema
    for step in path:
        if part is None:
            return None
        child = part.get("items") if isinstance(step, int) else part.get("properties", {}).get(step)
        part = None if child is None else _resolve(child, schema)
    return part


def _public(path: KeyPath, schema: Schema) -> KeyPath:
    """`path`, cut off at a secret: what stands below it may be the secret itself."""
    for end in range(1, len(path)):
        if (_at(path[:end], schema) or {}).get("writeOnly"):
            return path[:end]
    return path


def commented(data: Mapping[str, Any], schema: Schema) -> str:
    """`data` as YAML in which each key follows the sentence that describes it."""
    return "\n".join(
        "\n".join(_entry(key, data[key], part, schema)) + "\n"
        for key, part in schema["properties"].items()
    )


def _entry(key: str, value: Any, part: Schema, schema: Schema) -> Iterator[str]:
    resolved = _resolve(part, schema)
    sentence = part.get("description") or resolved.get("description", "")
    yield from (f"# {line}" for line in textwrap.wrap(" ".join(sentence.split()), 92))
    if "properties" not in resolved:
        yield yaml.safe_dump({key: value}, sort_keys=False, width=92).rstrip()
        return
    yield f"{key}:"
    for name, child in resolved["properties"].items():
        yield from (
            f"  {line}"
            for entry in _entry(name, value[name], child, schema)
            for line in entry.splitlines()
        )
