"""The files of the page, and the header fields that keep other sites and hostile texts out of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
SAFETY_FIELDS = {
    "Content-Security-Policy": _POLICY,  # https://www.w3.org/TR/CSP3/, https://w3c.github.io/trusted-types/
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
_NAMES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/api.js": ("api.js", "text/javascript; charset=utf-8"),
    "/host.js": ("host.js", "text/javascript; charset=utf-8"),
    "/console.js": ("console.js", "text/javascript; charset=utf-8"),
}


@dataclass(frozen=True)
class PageFile:
    media: str
    content: bytes


@cache
def find_file(path: str) -> PageFile | None:
    """None for a path without a file."""
    if path not in _NAMES:
        return None
    name, media = _NAMES[path]
    return PageFile(media, (files(__package__) / "page" / name).read_bytes())
