"""The fields of nohype.toml as values: types and limits from the schema, texts from the comments at the fields of the models."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from orchestrator.config import DaemonConfig

_PLAIN = {"string": "string", "integer": "integer", "number": "number", "boolean": "true or false"}


@dataclass(frozen=True)
class Setting:
    name: str
    kind: str  # "integer, 1 to 65535"
    default: str  # as in TOML; "" for none
    required: bool
    text: str


@dataclass(frozen=True)
class Section:
    title: str  # "host", "tenants.NAME"
    text: str
    settings: tuple[Setting, ...]


def read_sections() -> tuple[Section, ...]:
    return tuple(_walk(DaemonConfig, ""))


def _walk(model: type[BaseModel], path: str) -> Iterator[Section]:
    """The section of a model, then those of the tables in it."""
    texts, tables, settings = read_comments(model), [], []
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        table, named = _find_table(field.annotation)
        if table:
            tables.append((table, ".".join(filter(None, (path, name, "NAME" if named else ""))), texts.get(name, "")))
            continue
        kind = _describe(schema["properties"][name], schema.get("$defs", {}))
        default = "" if field.is_required() else _as_toml(field.default)
        settings.append(Setting(name, kind, default, field.is_required(), texts.get(name, "")))
    if path:
        own = (model.__doc__ or "") if "__doc__" in vars(model) else ""
        yield Section(path, " ".join(own.replace("``", "`").split()), tuple(settings))
    for table, title, text in tables:
        for number, section in enumerate(_walk(table, title)):
            yield Section(section.title, text or section.text, section.settings) if not number else section


def _find_table(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The model of a table, and if its key is chosen by the operator."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    if get_origin(annotation) in (Union, UnionType):
        return next((found for one in get_args(annotation) if (found := _find_table(one))[0]), (None, False))
    if get_origin(annotation) is dict:
        value = _find_table(get_args(annotation)[1])[0]
        return (value, True) if value and not _is_rule(value) else (None, False)
    return None, False


def _is_rule(model: type[BaseModel]) -> bool:
    """A value with a short form in one word, such as "60/min", and no table of its own."""
    return model.__name__ == "Budget"


def _describe(schema: Mapping[str, Any], named: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return _describe(named[schema["$ref"].rpartition("/")[2]], named)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_describe(one, named) for one in schema["anyOf"] if one.get("type") != "null"))
    if "enum" in schema:
        return " or ".join(f'"{value}"' for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_describe(schema['items'], named)}".replace("of string", "of strings")
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        if not isinstance(values, dict) or "$ref" in values:
            return "table"
        return f"table of {_describe(values, named)}".replace("of integer", "of integers")
    return _PLAIN[schema["type"]] + _limits(schema)


def _limits(schema: Mapping[str, Any]) -> str:
    texts = [
        f"more than {_number(schema['exclusiveMinimum'])}" if "exclusiveMinimum" in schema else "",
        f"at least {_number(schema['minimum'])}" if "minimum" in schema else "",
        f"at most {_number(schema['maximum'])}" if "maximum" in schema else "",
    ]
    return "".join(f", {text}" for text in texts if text)


def _number(value: Any) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _as_toml(value: Any) -> str:
    if value is None or value in ((), {}):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


@cache
def read_comments(model: type[BaseModel]) -> dict[str, str]:
    """By field, its own and those of parent models: the comment lines above it, then the comment that follows it."""
    texts: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if issubclass(kind, BaseModel) and kind is not BaseModel:
            texts |= _read_comments(textwrap.dedent(inspect.getsource(kind)))
    return texts


def _read_comments(source: str) -> dict[str, str]:
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# fmt:"):
            comments[token.start[0]] = token.string.lstrip("# ")
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = [comments[line] for line in range(first, (node.end_lineno or node.lineno) + 1) if line in comments]
            found[node.target.id] = _sentence(" ".join(lines))
    return found


def _sentence(text: str) -> str:
    return text and text[0].upper() + text[1:].removesuffix(".") + "."
