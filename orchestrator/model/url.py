"""URLs of files on boot servers."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import SplitResult, urlsplit

MAX_URL = 1024
"""Characters."""
_SCHEMES = {"http": 80, "https": 443}


def parse_url(text: str) -> SplitResult:
    """An absolute http or https URL of plain characters. Raises ValueError with the reason."""
    if len(text) > MAX_URL:
        raise ValueError(f"a URL of {len(text)} characters; at most {MAX_URL} are allowed")
    # "\\" and tabs: clients differ in how they read them (WHATWG URL standard, basic URL parser).
    if not text.isascii() or not text.isprintable() or any(sign in text for sign in ' \\"<>^`{|}'):
        raise ValueError(f"{text!r} is not a URL: encode special characters as %XX")
    url = urlsplit(text)  # raises ValueError for a damaged IPv6 address
    if url.scheme not in _SCHEMES or not url.hostname:
        raise ValueError(f"{text!r} is not a URL of the form https://HOST/PATH or http://HOST/PATH")
    if "@" in url.netloc:
        raise ValueError("the URL contains a user name; boot files are downloaded without credentials")
    if url.fragment or url.query:
        raise ValueError(f"{text!r} has a query or a fragment; give the path of a file")
    if any(part in (".", "..") for part in url.path.lower().replace("%2e", ".").replace("%2f", "/").split("/")):
        raise ValueError(f"{text!r} has a path with . or ..; give the path without them")
    find_port(url)  # raises ValueError for a number above 65535
    return url


def is_allowed(url: SplitResult, servers: Iterable[str]) -> bool:
    """Whether a server's URL is a prefix of ``url``: same scheme, host and port, and a folder above its path."""
    return any(_is_below(url, parse_url(server)) for server in servers)


def _is_below(url: SplitResult, server: SplitResult) -> bool:
    folder = server.path if server.path.endswith("/") else f"{server.path}/"
    return (url.scheme, url.hostname, find_port(url)) == (server.scheme, server.hostname, find_port(server)) and (
        url.path.startswith(folder) and url.path != folder
    )


def find_port(url: SplitResult) -> int:
    return url.port if url.port is not None else _SCHEMES[url.scheme]
