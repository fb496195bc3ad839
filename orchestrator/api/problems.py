"""Errors on the wire: RFC 9457 problem details, and back into our own errors on the client's side."""

from __future__ import annotations

from http import HTTPStatus

from orchestrator import errors
from orchestrator.errors import OrchestratorError

MEDIA_TYPE = "application/problem+json"

_STATUS = {
    errors.RequestError.code: HTTPStatus.BAD_REQUEST,
    errors.NotFound.code: HTTPStatus.NOT_FOUND,
    errors.Conflict.code: HTTPStatus.CONFLICT,
    errors.NoRoom.code: HTTPStatus.CONFLICT,
    errors.GuestError.code: HTTPStatus.GATEWAY_TIMEOUT,
    errors.HypervisorError.code: HTTPStatus.BAD_GATEWAY,
}


def build_problem(error: OrchestratorError) -> dict[str, object]:
    """An error as a problem document. ``code`` is stable; ``detail`` and ``hint`` are for people."""
    status = _STATUS.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR)
    return {"title": status.phrase, "status": int(status), "code": error.code, "detail": error.message, "hint": error.hint}


def parse_problem(document: dict[str, object]) -> OrchestratorError:
    """The error that a problem document tells of. Only ``code``, ``message`` and ``hint`` survive the journey."""
    error = OrchestratorError(str(document.get("detail", "the manager gave no reason")), str(document.get("hint", "")))
    error.code = str(document.get("code", OrchestratorError.code))
    return error
