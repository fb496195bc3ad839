"""FastAPI, imported at lower cost.

The import builds the validators of some thirty pydantic models of the OpenAPI format: 0.05 of 0.17 s, twenty times that under
emulation. Only /v1/openapi.json uses them; with `defer_build` pydantic builds each at its first use.

FastAPI checks each field for types of pydantic's first version, and imports that: 23 modules, 1.5 MB. If it cannot be imported,
FastAPI skips the check (fastapi/_compat/shared.py).
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
