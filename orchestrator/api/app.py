"""The manager's HTTP interface: what can be asked, and how answers and errors look. No decision is made here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from orchestrator import __version__
from orchestrator.api.problems import MEDIA_TYPE, build_problem
from orchestrator.errors import OrchestratorError, RequestError
from orchestrator.lifecycle import SystemManager
from orchestrator.proof import Proof
from orchestrator.request import GuestRequest, describe
from orchestrator.topology import Topology
from orchestrator.values import CpuSet, MacAddress, PciAddress, Size

Timeout = Annotated[float, Field(gt=0, le=3600, strict=False)]


class Tell(BaseModel):
    """A line for a guest's console, and how many seconds to wait for the answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    line: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[\x20-\x7e]+$")]
    timeout: Timeout = 60.0


def build_app(manager: SystemManager, audit: Callable[[int], tuple[Proof, ...]]) -> FastAPI:
    """The application.

    Args:
        manager: does the work.
        audit: measures all proofs; takes the number of frames to send from guest to guest, 0 for none.
    """
    app = FastAPI(title="NoHype system manager", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(OrchestratorError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)

    @app.get("/v1/version")
    def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/v1/survey")
    def survey() -> dict[str, Any]:
        return survey_json(manager.survey())

    @app.get("/v1/guests")
    def guests() -> list[dict[str, Any]]:
        return [guest.to_json() for guest in manager.guests()]

    @app.post("/v1/guests", status_code=201)
    def create(request: GuestRequest) -> dict[str, Any]:
        return manager.create(request).to_json()

    @app.post("/v1/plans")
    def plan(request: GuestRequest) -> dict[str, Any]:
        return manager.plan(request).to_json()

    @app.get("/v1/guests/{name}")
    def guest(name: str) -> dict[str, Any]:
        return manager.guest(name).to_json()

    @app.delete("/v1/guests/{name}", status_code=204)
    def stop(name: str) -> None:
        manager.stop(name)

    @app.get("/v1/guests/{name}/ready")
    def ready(name: str, timeout: Annotated[float, Query(gt=0, le=3600)] = 60.0) -> dict[str, str]:
        return {"line": manager.wait_ready(name, timeout)}

    @app.post("/v1/guests/{name}/tell")
    def tell(name: str, body: Tell) -> dict[str, str]:
        return {"answer": manager.tell(name, body.line, body.timeout)}

    @app.get("/v1/audit")
    def proofs(frames: Annotated[int, Query(ge=0, le=10_000)] = 0) -> list[dict[str, object]]:
        return [proof.to_json() for proof in audit(frames)]

    return app


def survey_json(topology: Topology) -> dict[str, Any]:
    """A survey as plain JSON types: CPU sets as lists in the kernel's format, sizes in bytes."""
    plain: dict[str, Any] = _plain(topology)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, CpuSet | MacAddress | PciAddress):
        return str(value)
    if isinstance(value, Size):
        return value.bytes
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


async def _answer_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OrchestratorError)
    problem = build_problem(error)
    return JSONResponse(problem, int(str(problem["status"])), media_type=MEDIA_TYPE)


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return await _answer_error(request, RequestError("the request is wrong: " + describe(error)))
