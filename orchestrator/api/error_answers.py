"""Builds problem documents from all errors: of the service, the framework and this program."""

from __future__ import annotations

import logging

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from orchestrator.api.body import ClientDisconnected
from orchestrator.api.fastapi_import import FastAPI, Request, RequestValidationError
from orchestrator.api.waits import ignore_disconnected
from orchestrator.client.problems import MEDIA_TYPE, InternalError, WrongMethod, build_headers, build_problem
from orchestrator.errors import ImageError, NotFound, OrchestratorError, RequestError
from orchestrator.model.access import Identity, Role
from orchestrator.model.fields import describe

_log = logging.getLogger(__name__)

_LONGEST_DETAIL = 2000
_LONGEST_PATH = 200


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(OrchestratorError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_fault)
    app.add_exception_handler(ClientDisconnected, ignore_disconnected)


def _problem(error: OrchestratorError, headers: dict[str, str] | None = None) -> JSONResponse:
    problem = build_problem(error)
    return JSONResponse(problem, int(str(problem["status"])), {**build_headers(error), **(headers or {})}, MEDIA_TYPE)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OrchestratorError)
    if isinstance(error, ImageError) and request.state.caller.role is Role.TENANT:
        error = ImageError(error.message, "ask the operator of the host")  # the hint may name the folder of the images
    answer = _problem(error)
    if answer.status_code >= 500:
        _log.error("%s %s: %s", request.method, _path(request), error)
        return _problem(hide_details(error, request.state.caller))
    return answer


async def _answer_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Names of fields come from the client.
    return _problem(RequestError("invalid request: " + _printable(describe(error)[:_LONGEST_DETAIL])))


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = _path(request)
    if error.status_code == 404:
        return _problem(NotFound(f"no such endpoint: {path}", "GET /v1/openapi.json lists all endpoints"))
    if error.status_code == 405:
        methods = sorted(find_methods(request.app, request.scope["path"]))
        wrong = WrongMethod(f"method {request.method[:20]} is not allowed for {path}", f"use {' or '.join(methods)}")
        return _problem(wrong, {"Allow": ", ".join(methods)})
    if error.status_code == 400:
        return _problem(RequestError(f"invalid request: {error.detail}"))
    _log.error("%s %s: %s", request.method, path, error.detail)
    return _problem(InternalError())


async def _answer_fault(_request: Request, _error: Exception) -> Response:
    # The framework raises the error again afterwards, and the guard logs it.
    return _problem(InternalError())


def hide_details(error: OrchestratorError, caller: Identity) -> OrchestratorError:
    """What the caller may see: for tenants without the messages of the kernel or of libvirt, which may name other guests."""
    if caller.role is not Role.TENANT or int(str(build_problem(error)["status"])) < 500:
        return error
    hidden = OrchestratorError("the host could not complete the request", "ask its operator to check the log")
    hidden.code = error.code
    return hidden


def find_methods(app: FastAPI, path: str) -> frozenset[str]:
    """All methods of a path. Each method is a separate route, and the framework reports only those of the first."""
    routes = [route for route in app.routes if (regex := getattr(route, "path_regex", None)) and regex.match(path)]
    methods = frozenset(method for route in routes for method in getattr(route, "methods", None) or ())
    return methods | {"HEAD"} if "GET" in methods else methods


def _path(request: Request) -> str:
    # Not from request.url: without a valid Host field the framework builds it from the server's address, here the socket's path.
    return _printable(str(request.scope["path"])[:_LONGEST_PATH])


def _printable(text: str) -> str:
    # A terminal would act on control characters.
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
