"""Parameters of operations: which part of the request each is read from, and how it is checked.

An operation declares them by the types of its arguments, such as ``Annotated[int, Query(ge=0)]``. Not declared are a `Request`,
which is passed, names of the path, and the body if it is a pydantic model. `api.openapi` describes the same declarations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast, get_args, get_origin

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from starlette.requests import Request

NO_BODY: Any = object()
"""In ``scope["state"]["body"]``: the request has no body."""
REQUIRED: Any = inspect.Parameter.empty


class Marker:
    """The arguments are those of `pydantic.Field`; ``alias`` is the name in the request, if it differs."""

    place: ClassVar[str]

    def __init__(self, **options: Any) -> None:
        self.options = options


class Path(Marker):
    place = "path"


class Query(Marker):
    place = "query"


class Header(Marker):
    """By default its name is that of the argument with hyphens."""

    place = "header"


class Body(Marker):
    place = "body"


@dataclass(frozen=True)
class Depends:
    """The argument is the result of this coroutine function, which has parameters as operations have."""

    function: Callable[..., Any]


class InvalidInput(Exception):
    def __init__(self, errors: list[Any]) -> None:
        super().__init__(f"{len(errors)} errors")
        self._errors = errors

    def errors(self) -> list[Any]:
        """In pydantic's form."""
        return self._errors


@dataclass(frozen=True)
class Parameter:
    """An argument that is read from the request."""

    name: str
    alias: str
    loc: tuple[str, ...]  # its place, for the text of an error
    adapter: TypeAdapter[Any]
    default: Any  # REQUIRED if there is none

    def read(self, given: object, values: dict[str, Any]) -> list[Any]:
        """Adds the checked value to ``values``, the default for ``NO_BODY``. Returns the errors, in pydantic's form."""
        if given is NO_BODY:
            if self.default is REQUIRED:
                return [{"loc": self.loc, "msg": "Field required"}]
            values[self.name] = self.default
            return []
        try:
            values[self.name] = self.adapter.validate_python(given, from_attributes=True)
        except ValidationError as error:
            return [{**one, "loc": (*self.loc, *one["loc"])} for one in error.errors(include_url=False)]
        return []

    def read_from(self, given: Mapping[str, str], values: dict[str, Any]) -> list[Any]:
        """The same for its value in the path, the query or the header fields."""
        return self.read(given.get(self.alias, NO_BODY), values)


@dataclass(frozen=True)
class Call:
    """An operation, or a function on which one depends, with its parameters in the order of their checks."""

    function: Callable[..., Any]
    request: str | None  # the argument that gets the Request
    needs: tuple[tuple[str, Call], ...]
    path: tuple[Parameter, ...]
    query: tuple[Parameter, ...]
    headers: tuple[Parameter, ...]
    body: Parameter | None

    async def collect(self, request: Request, values: dict[str, Any]) -> list[Any]:
        """Adds the arguments of the function to ``values``; returns the errors of all parameters."""
        errors: list[Any] = []
        for name, call in self.needs:
            arguments: dict[str, Any] = {}
            if found := await call.collect(request, arguments):
                errors += found
            else:
                values[name] = await call.function(**arguments)
        for parameter in self.path:
            errors += parameter.read_from(request.path_params, values)
        for parameter in self.query:
            errors += parameter.read_from(request.query_params, values)
        for parameter in self.headers:
            errors += parameter.read_from(request.headers, values)
        if self.body:
            errors += self.body.read(request.scope["state"]["body"], values)
        if self.request:
            values[self.request] = request
        return errors


def read_signature(function: Callable[..., Any], path: str = "") -> Call:
    """Raises TypeError for an argument whose place is not declared. ``path``: of the operation, with its names in braces."""
    request, needs = None, []
    found: dict[str, list[Parameter]] = {kind.place: [] for kind in (Path, Query, Header, Body)}
    for name, argument in inspect.signature(function, eval_str=True).parameters.items():
        if argument.annotation is Request:
            request = name
            continue
        base, extras = split_annotation(argument.annotation)
        if need := next((one for one in extras if isinstance(one, Depends)), None):
            needs.append((name, read_signature(need.function, path)))
            continue
        marker = next((one for one in extras if isinstance(one, Marker)), None) or _guess(name, base, path)
        found[marker.place].append(_build(name, base, extras, marker, argument.default))
    if len(found["body"]) > 1:
        raise TypeError(f"{function.__name__}: several bodies")
    body = found["body"][0] if found["body"] else None
    path_parameters, query, headers = (tuple(found[kind.place]) for kind in (Path, Query, Header))
    return Call(function, request, tuple(needs), path_parameters, query, headers, body)


def split_annotation(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type of ``Annotated``, and what it is annotated with."""
    if get_origin(annotation) is Annotated:
        base, *extras = get_args(annotation)
        return base, tuple(extras)
    return annotation, ()


def _guess(name: str, base: Any, path: str) -> Marker:
    if f"{{{name}}}" in path:
        return Path()
    if isinstance(base, type) and issubclass(base, BaseModel):
        return Body()
    raise TypeError(f"argument {name} is neither in the path {path}, nor a model, nor declared as Path, Query, Header or Body")


def _build(name: str, base: Any, extras: tuple[Any, ...], marker: Marker, default: Any) -> Parameter:
    options = dict(marker.options)
    alias = options.pop("alias", None) or (name.replace("_", "-") if isinstance(marker, Header) else name)
    checks = (base, *(one for one in extras if not isinstance(one, Marker)), Field(**options))
    loc = ("body",) if isinstance(marker, Body) else (marker.place, alias)
    return Parameter(name, alias, loc, TypeAdapter(cast(Any, Annotated[checks])), default)
