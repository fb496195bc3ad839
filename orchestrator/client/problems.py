"""Converts errors to RFC 9457 problem documents and back."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

from orchestrator import errors
from orchestrator.errors import OrchestratorError

MEDIA_TYPE = "application/problem+json"


class WrongMethod(OrchestratorError):
    code = "method"


class CrossSite(errors.Forbidden):
    """A page of another site made a browser send the request, possibly without its user's knowledge."""

    code = "cross-site"


class WrongMedia(OrchestratorError):
    """Unsupported Content-Type or Content-Encoding."""

    code = "media-type"


class InternalError(OrchestratorError):
    code = "internal"

    def __init__(self) -> None:
        super().__init__("internal error in the manager", "see `journalctl -u nohyped`")


STATUS_BY_CLASS: Mapping[type[OrchestratorError], HTTPStatus] = {
    errors.RequestError: HTTPStatus.BAD_REQUEST,
    errors.Unauthorized: HTTPStatus.UNAUTHORIZED,
    errors.Forbidden: HTTPStatus.FORBIDDEN,
    CrossSite: HTTPStatus.FORBIDDEN,
    errors.NotFound: HTTPStatus.NOT_FOUND,
    WrongMethod: HTTPStatus.METHOD_NOT_ALLOWED,
    errors.Conflict: HTTPStatus.CONFLICT,
    errors.LostRace: HTTPStatus.CONFLICT,
    errors.NoRoom: HTTPStatus.CONFLICT,
    errors.QuotaExceeded: HTTPStatus.CONFLICT,
    # Not 5xx: the manager works; the guest did not become ready.
    errors.GuestError: HTTPStatus.CONFLICT,
    errors.ReadyBySsh: HTTPStatus.CONFLICT,
    # Likewise for a damaged image: another image can be requested.
    errors.ImageError: HTTPStatus.CONFLICT,
    errors.Stale: HTTPStatus.PRECONDITION_FAILED,
    errors.TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    WrongMedia: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    errors.TooMany: HTTPStatus.TOO_MANY_REQUESTS,
    InternalError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.HostError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.CommandError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.LedgerError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.OrchestratorError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.HypervisorError: HTTPStatus.BAD_GATEWAY,
    errors.SwitchError: HTTPStatus.BAD_GATEWAY,
}

# HTTP status by problem code. A code never changes its meaning.
STATUS: Mapping[str, HTTPStatus] = {kind.code: status for kind, status in STATUS_BY_CLASS.items()}

_CLASSES = {kind.code: kind for kind in STATUS_BY_CLASS}
# What the constructors set, for errors that are created without them.
_MAX_WAIT = 3600.0
_ATTRIBUTES: Mapping[str, object] = {"reasons": (), "wait": 1.0, "errno": 0, "number": 0}


def build_problem(error: OrchestratorError) -> dict[str, object]:
    """``code`` is stable; ``detail`` and ``hint`` are for people. "no-room" and "quota" have ``reasons``, one per candidate;
    "too-many" has ``wait``, in seconds.
    """
    status = STATUS.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR)
    problem: dict[str, object] = {
        "title": status.phrase, "status": int(status), "code": error.code, "detail": error.message, "hint": error.hint,
    }  # fmt: skip
    if isinstance(error, errors.NoRoom):
        problem["reasons"] = list(error.reasons)
    if isinstance(error, errors.TooMany):
        problem["wait"] = error.wait
    return problem


def build_headers(error: OrchestratorError) -> dict[str, str]:
    """WWW-Authenticate or Retry-After (RFC 9110 11.6.1, 10.2.3)."""
    if isinstance(error, errors.Unauthorized):
        return {"WWW-Authenticate": 'Bearer realm="nohype"'}
    return {"Retry-After": str(max(1, round(error.wait + 0.5)))} if isinstance(error, errors.TooMany) else {}


def parse_problem(document: Mapping[str, object]) -> OrchestratorError:
    """Returns an error of the same class as in the manager."""
    code = str(document.get("code", OrchestratorError.code))
    reasons, wait = document.get("reasons"), document.get("wait")
    kind = _CLASSES.get(code, OrchestratorError)
    # Not with the constructors of the classes: they would compose the message again.
    error = kind.__new__(kind)
    OrchestratorError.__init__(error, str(document.get("detail", "the manager gave no reason")), str(document.get("hint", "")))
    error.code = code
    attributes = dict(_ATTRIBUTES)
    if isinstance(reasons, list):
        attributes["reasons"] = [str(reason) for reason in reasons]
    if isinstance(wait, int | float) and 0 <= wait <= _MAX_WAIT:  # NaN is not
        attributes["wait"] = float(wait)
    for name, value in attributes.items():
        setattr(error, name, value)
    return error
