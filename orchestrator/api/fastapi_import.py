"""FastAPI, imported so that it costs less.

Importing it builds the validators of some thirty pydantic models of the OpenAPI format: a third of the time that it takes (0.05
of 0.17 s, twenty times that under emulation). They are only used to make /v1/openapi.json; told to (`defer_build`), pydantic
builds each when it is first used.

FastAPI asks of each field whether its type is of pydantic's first version, and imports that for it: 23 modules, 1.5 MB that the
manager would keep. That it can't be imported FastAPI takes for a no (fastapi/_compat/shared.py).
"""

from __future__ import annotations

import sys

from pydantic import BaseModel

# None: importing it is an ImportError (https://docs.python.org/3/reference/import.html#the-module-cache).
sys.modules.setdefault("pydantic.v1", None)  # type: ignore[arg-type]

_before = BaseModel.model_config.get("defer_build", False)
BaseModel.model_config["defer_build"] = True
try:
    from fastapi import Body, Depends, FastAPI, Header, Path, Query, Request
    from fastapi.exceptions import RequestValidationError
finally:
    BaseModel.model_config["defer_build"] = _before

__all__ = ["Body", "Depends", "FastAPI", "Header", "Path", "Query", "Request", "RequestValidationError"]
