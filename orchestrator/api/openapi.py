"""Builds the OpenAPI document at the first request for it: FastAPI's document with the declared answers and problems added."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from orchestrator.api.routing import Route
from orchestrator.client.problems import MEDIA_TYPE, STATUS

_ALWAYS = ("bad-request", "unauthorized", "forbidden", "too-large", "media-type", "too-many", "internal")

_ABOUT = (
    "Every error is a problem document (RFC 9457) with a stable `code`. Tenants see only their own guests; others are"
    " `not-found`. Only `conflict` reveals a name."
)
_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"}, int: {"type": "integer"}, bool: {"type": "boolean"}, float: {"type": "number"},
    type(None): {"type": "null"}, object: {},
}  # fmt: skip


def build_document(routes: Iterable[Route]) -> dict[str, Any]:
    """Imports FastAPI, which nothing else uses."""
    from orchestrator.api.fastapi_import import build_app, get_openapi

    routes = tuple(routes)
    app = build_app(routes)
    document = get_openapi(title=app.title, version=app.version, description=_ABOUT, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    declared = {route.name: route for route in routes}
    for operation in (one for path in document["paths"].values() for one in path.values()):
        operation["responses"] = _build_responses(declared[operation["operationId"]], schemas)
    schemas["Problem"] = _problem_schema()
    document["components"]["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "description": "Over TLS; see `nohype token new`."},
        "certificate": {"type": "mutualTLS", "description": "A client certificate that the configuration names."},
    }
    # The empty one: over the Unix socket the kernel identifies the caller.
    document["security"] = [{"token": []}, {"certificate": []}, {}]
    return document


def build_schema(kind: Any, named: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a type of `shapes`; adds the schemas of TypedDicts to ``named``."""
    if kind in _PLAIN:
        return dict(_PLAIN[kind])
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is list:
        return {"type": "array", "items": build_schema(arguments[0], named)}
    if origin is dict:
        return {"type": "object", "additionalProperties": build_schema(arguments[1], named)}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [build_schema(one, named) for one in arguments]}
    assert typing.is_typeddict(kind), kind
    if kind.__name__ not in named:
        named[kind.__name__] = {}  # so that a type can contain itself
        fields = {name: build_schema(one, named) for name, one in get_type_hints(kind).items()}
        named[kind.__name__] = {**_object(fields, list(fields)), "description": kind.__doc__}
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _build_responses(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    success: dict[str, Any] = {"description": "Done."}
    if route.answer is not None:
        success["content"] = {route.media: {"schema": build_schema(route.answer, schemas)}}
    if route.etag:
        success["headers"] = {"ETag": {"description": "The guest's version, for If-Match.", "schema": {"type": "string"}}}
    responses = {str(route.status): success}
    if route.repeatable:
        responses["200"] = {**success, "description": "Created earlier, by a request with the same id and fields."}
    by_status: dict[int, list[str]] = {}
    for code in (*_ALWAYS, *route.codes):
        by_status.setdefault(int(STATUS[code]), []).append(code)
    for status, codes in sorted(by_status.items()):
        content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
        responses[str(status)] = {"description": "Code " + " or ".join(f"`{code}`" for code in codes), "content": content}
    return responses


def _problem_schema() -> dict[str, Any]:
    text = {"type": "string"}
    fields = {
        "title": text, "status": {"type": "integer"}, "code": {"enum": sorted(STATUS)}, "detail": text, "hint": text,
        "reasons": {"type": "array", "items": text, "description": "With `no-room` and `quota`: why each candidate was refused."},
        "wait": {"type": "number", "description": "With `too-many`: seconds."},
    }  # fmt: skip
    return _object(fields, ["title", "status", "code", "detail", "hint"])


def _object(fields: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}
