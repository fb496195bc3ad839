"""Finds the operation of a request, checks its input and calls it.

FastAPI reads the signatures of the operations and describes them in the OpenAPI document. It does not serve them: its layers take
several times the processor time of the same checks here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orchestrator.api.body import ClientDisconnected
from orchestrator.api.error_answers import answer_disconnected, answer_error, answer_invalid, answer_no_operation
from orchestrator.api.fastapi_import import FastAPI, Request, RequestValidationError
from orchestrator.api.fields import NO_BODY, Known, find_known, reject_unknown_input
from orchestrator.api.routing import RouteTable
from orchestrator.errors import OrchestratorError


@dataclass(frozen=True)
class _Field:
    """A parameter of an operation that is read from the request."""

    name: str
    alias: str
    loc: tuple[str, ...]  # its place, for the text of an error
    model: Any  # FastAPI's ModelField

    def read(self, given: object, values: dict[str, Any]) -> list[Any]:
        """Adds the checked value to ``values``, the default for ``NO_BODY``. Returns the errors, in pydantic's form."""
        if given is NO_BODY:
            if self.model.field_info.is_required():
                return [{"loc": self.loc, "msg": "Field required"}]
            values[self.name] = self.model.default
            return []
        values[self.name], errors = self.model.validate(given, loc=self.loc)
        return errors or []

    def read_from(self, given: Mapping[str, str], values: dict[str, Any]) -> list[Any]:
        """The same for its value in the path, the query or the header fields."""
        return self.read(given.get(self.alias, NO_BODY), values)


@dataclass(frozen=True)
class _Call:
    """An operation, or a function on which one depends, with its parameters in the order in which FastAPI checks them."""

    function: Any
    request: str | None  # the parameter that gets the Request
    needs: tuple[tuple[str, _Call], ...]
    path: tuple[_Field, ...]
    query: tuple[_Field, ...]
    headers: tuple[_Field, ...]
    body: _Field | None

    async def collect(self, request: Request, values: dict[str, Any]) -> list[Any]:
        """Adds the arguments of the function to ``values``; returns the errors of all parameters."""
        errors: list[Any] = []
        for name, call in self.needs:
            arguments: dict[str, Any] = {}
            if found := await call.collect(request, arguments):
                errors += found
            else:
                values[name] = await call.function(**arguments)
        for field in self.path:
            errors += field.read_from(request.path_params, values)
        for field in self.query:
            errors += field.read_from(request.query_params, values)
        for field in self.headers:
            errors += field.read_from(request.headers, values)
        if self.body:
            errors += self.body.read(request.scope["state"]["body"], values)
        if self.request:
            values[self.request] = request
        return errors


class Dispatcher:
    """The ASGI application behind the guard, which has put the caller and the parsed body into ``scope["state"]``.

    HEAD is handled as GET (RFC 9110 9.3.2); the connection omits the content.
    """

    def __init__(self, app: FastAPI, table: RouteTable) -> None:
        self._app, self._table = app, table
        self._operations: dict[object, tuple[_Call, Known]] = {}
        for route in app.routes:
            if dependant := getattr(route, "dependant", None):
                self._operations[dependant.call] = _compile(dependant), find_known(dependant)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = scope["method"] == "HEAD"
        state = {**scope["state"], "head": head}
        scope = {**scope, "method": "GET" if head else scope["method"], "state": state, "app": self._app}
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except OrchestratorError as error:
            response = answer_error(request, error)
        except RequestValidationError as error:
            response = answer_invalid(error)
        except ClientDisconnected:
            response = answer_disconnected()
        try:
            await response(scope, receive, send)
        except OrchestratorError as error:
            raise RuntimeError("the response was not completed") from error  # its start has been sent: no other can follow

    async def _answer(self, request: Request) -> Response:
        scope = request.scope
        found = self._table.find(scope["method"], scope["path"])
        if found is None:
            return answer_no_operation(request, self._table.methods(scope["path"]))
        route, scope["path_params"] = found
        call, known = self._operations[route.endpoint]
        reject_unknown_input(request, known)
        arguments: dict[str, Any] = {}
        if errors := await call.collect(request, arguments):
            raise RequestValidationError(errors)
        response: Response = await call.function(**arguments)
        return response


def _compile(dependant: Any) -> _Call:
    """From FastAPI's Dependant: the parameters of a function, and the functions on which it depends."""

    def read(kind: str, *place: str) -> tuple[_Field, ...]:
        fields = getattr(dependant, f"{kind}_params")
        return tuple(_Field(field.name, field.alias, (*place, field.alias) if place else ("body",), field) for field in fields)

    bodies = read("body")
    assert len(bodies) <= 1, f"{dependant.call}: several bodies"  # FastAPI would read each from a member of the body
    return _Call(
        dependant.call, dependant.request_param_name, tuple((one.name, _compile(one)) for one in dependant.dependencies),
        read("path", "path"), read("query", "query"), read("header", "header"), bodies[0] if bodies else None,
    )  # fmt: skip
