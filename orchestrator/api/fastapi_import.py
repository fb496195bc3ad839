"""FastAPI, imported at lower cost, and the operations in its words: it has own classes for the declarations of `api.parameters`.

The import builds the validators of some thirty pydantic models of the OpenAPI format: 0.05 of 0.17 s, twenty times that under
emulation. With `defer_build` pydantic builds each at its first use.

FastAPI checks each field for types of pydantic's first version, and imports that: 23 modules, 1.5 MB. If it cannot be imported,
FastAPI skips the check (fastapi/_compat/shared.py).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from pydantic import BaseModel

from orchestrator import __version__
from orchestrator.api.parameters import Depends, Marker, split_annotation
from orchestrator.api.routing import Route

# None: importing it is an ImportError (https://docs.python.org/3/reference/import.html#the-module-cache).
sys.modules.setdefault("pydantic.v1", None)  # type: ignore[arg-type]

_before = BaseModel.model_config.get("defer_build", False)
BaseModel.model_config["defer_build"] = True
try:
    import fastapi
    from fastapi.openapi.utils import get_openapi
finally:
    BaseModel.model_config["defer_build"] = _before

__all__ = ["build_app", "get_openapi"]

_MARKERS: dict[str, Callable[..., Any]] = {
    "path": fastapi.Path, "query": fastapi.Query, "header": fastapi.Header, "body": fastapi.Body,
}  # fmt: skip


def build_app(routes: Iterable[Route]) -> fastapi.FastAPI:
    """Serves nothing."""
    app = fastapi.FastAPI(
        title="NoHype system manager", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        openapi_url=None, generate_unique_id_function=lambda route: route.name,
    )  # fmt: skip
    for route in routes:
        described = _describe(route.endpoint)
        app.add_api_route(
            route.path, described, methods=[route.method], status_code=route.status, include_in_schema=route.documented
        )
    return app


def _describe(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the same name, text and arguments, which FastAPI can read."""

    async def described() -> None: ...

    signature = inspect.signature(function, eval_str=True)
    arguments = [one.replace(annotation=_translate(one.annotation)) for one in signature.parameters.values()]
    described.__name__, described.__doc__ = function.__name__, function.__doc__
    described.__signature__ = signature.replace(parameters=arguments)  # type: ignore[attr-defined]
    return described


def _translate(annotation: Any) -> Any:
    base, extras = split_annotation(annotation)
    translated = (base, *map(_translate_extra, extras))
    return Annotated[translated] if extras else annotation


def _translate_extra(extra: Any) -> Any:
    if isinstance(extra, Depends):
        return fastapi.Depends(_describe(extra.function))
    return _MARKERS[extra.place](**extra.options) if isinstance(extra, Marker) else extra
