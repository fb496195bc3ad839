"""Builds problem documents from errors of the service and of the input of a request."""

from __future__ import annotations

import logging
from collections.abc import Collection

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orchestrator.api.parameters import InvalidInput
from orchestrator.client.problems import MEDIA_TYPE, WrongMethod, build_headers, build_problem
from orchestrator.errors import ImageError, NotFound, OrchestratorError, RequestError
from orchestrator.model.access import Identity, Role
from orchestrator.model.fields import describe

_log = logging.getLogger(__name__)

_LONGEST_DETAIL = 2000
_LONGEST_PATH = 200


def _problem(error: OrchestratorError, headers: dict[str, str] | None = None) -> JSONResponse:
    problem = build_problem(error)
    return JSONResponse(problem, int(str(problem["status"])), {**build_headers(error), **(headers or {})}, MEDIA_TYPE)


def answer_error(request: Request, error: OrchestratorError) -> Response:
    caller = request.scope["state"]["caller"]
    if isinstance(error, ImageError) and caller.role is Role.TENANT:
        error = ImageError(error.message, "ask the operator of the host")  # the hint may name the folder of the images
    answer = _problem(error)
    if answer.status_code >= 500:
        _log.error("%s %s: %s", request.method, _path(request), error)
        return _problem(hide_details(error, caller))
    return answer


def answer_invalid(error: InvalidInput) -> Response:
    # Names of fields come from the client.
    return _problem(RequestError("invalid request: " + _printable(describe(error)[:_LONGEST_DETAIL])))


def answer_no_operation(request: Request, methods: Collection[str]) -> Response:
    """For a path without operations, or without one of the request's method: then ``methods`` are those of the path."""
    path = _path(request)
    if not methods:
        return _problem(NotFound(f"no such endpoint: {path}", "GET /v1/openapi.json lists all endpoints"))
    allowed = sorted(methods)
    wrong = WrongMethod(f"method {request.method[:20]} is not allowed for {path}", f"use {' or '.join(allowed)}")
    return _problem(wrong, {"Allow": ", ".join(allowed)})


def answer_disconnected() -> Response:
    # The server drops a response to a closed connection.
    return Response(status_code=499)


def hide_details(error: OrchestratorError, caller: Identity) -> OrchestratorError:
    """What the caller may see: for tenants without the messages of the kernel or of libvirt, which may name other guests."""
    if caller.role is not Role.TENANT or int(str(build_problem(error)["status"])) < 500:
        return error
    hidden = OrchestratorError("the host could not complete the request", "ask its operator to check the log")
    hidden.code = error.code
    return hidden


def _path(request: Request) -> str:
    # Not from request.url: without a valid Host field the framework builds it from the server's address, here the socket's path.
    return _printable(str(request.scope["path"])[:_LONGEST_PATH])


def _printable(text: str) -> str:
    # A terminal would act on control characters.
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
