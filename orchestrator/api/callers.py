"""Types of route parameters that admit only callers with certain roles. The service checks which guests a caller may change."""

from __future__ import annotations

from typing import Annotated

from starlette.requests import Request

from orchestrator.api.parameters import Depends
from orchestrator.errors import Forbidden
from orchestrator.model.access import Identity, Role

_ASK = "ask the operator of the host"


async def _find_caller(request: Request) -> Identity:
    caller: Identity = request.state.caller
    return caller


async def _require_host_access(request: Request) -> Identity:
    caller = await _find_caller(request)
    if caller.role is Role.TENANT:
        raise Forbidden(f"{caller.name} belongs to tenant {caller.tenant} and may read only that tenant's guests", _ASK)
    return caller


async def _require_write(request: Request) -> Identity:
    caller = await _find_caller(request)
    if caller.role is Role.VIEWER:
        raise Forbidden(f"{caller.name} has the read-only role viewer", _ASK)
    return caller


async def _require_operator(request: Request) -> Identity:
    caller = await _find_caller(request)
    if caller.role is not Role.OPERATOR:
        raise Forbidden(f"{caller.name} is not an operator", _ASK)
    return caller


Caller = Annotated[Identity, Depends(_find_caller)]
HostReader = Annotated[Identity, Depends(_require_host_access)]
Writer = Annotated[Identity, Depends(_require_write)]
Operator = Annotated[Identity, Depends(_require_operator)]
