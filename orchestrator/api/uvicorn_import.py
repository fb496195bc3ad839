"""uvicorn without its command line, which imports click options, supervisors and reloaders that the manager does not use."""

from __future__ import annotations

from orchestrator.partial_import import parts_only

with parts_only("uvicorn"):
    from uvicorn.config import Config
    from uvicorn.protocols.http.flow_control import CLOSE_HEADER
    from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol, RequestResponseCycle
    from uvicorn.server import Server, ServerState

__all__ = ["CLOSE_HEADER", "STATUS_PHRASES", "Config", "H11Protocol", "RequestResponseCycle", "Server", "ServerState"]
