"""FastAPI, imported so that it costs less.

Importing it builds the validators of some thirty pydantic models of the OpenAPI format: a third of the time that it takes (0.05
of 0.17 s, twenty times that under emulation). They are only used to make /v1/openapi.json; told to (`defer_build`), pydantic
builds each when it is first used.
"""

from __future__ import annotations

from pydantic import BaseModel

_before = BaseModel.model_config.get("defer_build", False)
BaseModel.model_config["defer_build"] = True
try:
    from fastapi import Body, Depends, FastAPI, Header, Path, Query, Request
    from fastapi.exceptions import RequestValidationError
finally:
    BaseModel.model_config["defer_build"] = _before

__all__ = ["Body", "Depends", "FastAPI", "Header", "Path", "Query", "Request", "RequestValidationError"]
