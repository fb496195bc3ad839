"""Finds the operation of a request, checks its input and calls it.

FastAPI only describes the operations (see `api.openapi`). It serves none: its layers take several times the processor time of the
same checks here, and six megabytes of memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orchestrator.api.backend import Backend
from orchestrator.api.body import ClientDisconnected
from orchestrator.api.error_answers import answer_disconnected, answer_error, answer_invalid, answer_no_operation
from orchestrator.api.fields import Known, find_known, reject_unknown_input
from orchestrator.api.parameters import Call, InvalidInput, read_signature
from orchestrator.api.routing import Route, RouteTable
from orchestrator.errors import OrchestratorError


class Dispatcher:
    """The ASGI application behind the guard, which has put the caller and the parsed body into ``scope["state"]``.

    HEAD is handled as GET (RFC 9110 9.3.2); the connection omits the content.
    """

    def __init__(self, backend: Backend, routes: Iterable[Route], table: RouteTable) -> None:
        self._backend, self._table = backend, table
        self._operations: dict[object, tuple[Call, Known]] = {}
        for route in routes:
            call = read_signature(route.endpoint, route.path)
            self._operations[route.endpoint] = call, find_known(call)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = scope["method"] == "HEAD"
        state = {**scope["state"], "head": head, "backend": self._backend}
        scope = {**scope, "method": "GET" if head else scope["method"], "state": state}
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except OrchestratorError as error:
            response = answer_error(request, error)
        except InvalidInput as error:
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
            raise InvalidInput(errors)
        response: Response = await call.function(**arguments)
        return response
