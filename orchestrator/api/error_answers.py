"""What is answered to a request that is refused or fails: one problem document each, whatever raised the error."""

from __future__ import annotations

import logging

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from orchestrator.api.body import ClientGone
from orchestrator.api.fast import FastAPI, Request, RequestValidationError
from orchestrator.api.waits import answer_nobody
from orchestrator.client.problems import MEDIA_TYPE, InternalError, WrongMethod, build_headers, build_problem
from orchestrator.errors import NotFound, OrchestratorError, RequestError
from orchestrator.model.access import Role
from orchestrator.model.fields import describe

_log = logging.getLogger(__name__)

_LONGEST_DETAIL = 2000
_LONGEST_PATH = 200


def add_error_handlers(app: FastAPI) -> None:
    """Has the application answer every error with a problem document."""
    app.add_exception_handler(OrchestratorError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_fault)
    app.add_exception_handler(ClientGone, answer_nobody)


def _problem(error: OrchestratorError, headers: dict[str, str] | None = None) -> JSONResponse:
    problem = build_problem(error)
    return JSONResponse(problem, int(str(problem["status"])), {**build_headers(error), **(headers or {})}, MEDIA_TYPE)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OrchestratorError)
    answer = _problem(error)
    if answer.status_code >= 500:
        _log.error("%s %s: %s", request.method, _path(request), error)
        if request.state.who.role is Role.TENANT:
            # What the kernel or libvirt said may name other guests.
            hidden = OrchestratorError("the host could not do this", "its operator's log says why")
            hidden.code = error.code
            return _problem(hidden)
    return answer


async def _answer_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Names of fields come from the client.
    return _problem(RequestError("the request is wrong: " + _printable(describe(error)[:_LONGEST_DETAIL])))


async def _answer_http(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: a path that is not there, or that can't be asked this way."""
    assert isinstance(error, HTTPException)
    path = _path(request)
    if error.status_code == 404:
        return _problem(NotFound(f"there is nothing at '{path}'", "GET /v1/openapi.json lists what there is"))
    if error.status_code == 405:
        methods = sorted(find_methods(request.app, request.scope["path"]))
        wrong = WrongMethod(f"'{path}' can't be asked with {request.method[:20]}", f"use {' or '.join(methods)}")
        return _problem(wrong, {"Allow": ", ".join(methods)})
    if error.status_code == 400:
        return _problem(RequestError(f"the request is wrong: {error.detail}"))
    _log.error("%s %s: %s", request.method, path, error.detail)
    return _problem(InternalError())


async def _answer_fault(_request: Request, _error: Exception) -> Response:
    """A fault of ours; the framework raises it again afterwards, and the guard logs it."""
    return _problem(InternalError())


def find_methods(app: FastAPI, path: str) -> frozenset[str]:
    """The methods with which a path can be asked; each is a route of its own, and the framework names those of the first only."""
    routes = [route for route in app.routes if (regex := getattr(route, "path_regex", None)) and regex.match(path)]
    methods = frozenset(method for route in routes for method in getattr(route, "methods", None) or ())
    return methods | {"HEAD"} if "GET" in methods else methods


def _path(request: Request) -> str:
    """The path that was asked for. Not of the request's URL: without a good Host field that is put together of the server's own
    address, which on the Unix socket is the socket's path."""
    return _printable(str(request.scope["path"])[:_LONGEST_PATH])


def _printable(text: str) -> str:
    """What could move a terminal's cursor is shown as it would be written."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
