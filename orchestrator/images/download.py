"""Downloads boot files over HTTP or HTTPS from servers that the operator allows, with limits of size and time, by checksum."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import SplitResult

from orchestrator.errors import Forbidden, ImageError
from orchestrator.model.url import find_port, is_allowed, parse_url

_PIECE = 1 << 18
_SILENCE = 15.0  # seconds without a byte


def download(text: str, sha256: str, target: Path, *, servers: Iterable[str], limit: int, timeout: float) -> int:
    """Writes the file at the URL to ``target``, which must not exist; returns its size in bytes.

    Redirects are not followed, and the machine's proxy settings are not used: only the allowed servers are contacted.
    Certificates are checked with the CAs that the machine trusts.

    Args:
        servers: URLs of folders that files may come from.
        limit: maximum size in bytes.
        timeout: seconds for all of it.

    Raises:
        Forbidden: the URL is not below one of ``servers``. The server is not contacted.
        ImageError: the server cannot be reached, refuses, sends too much or other content. ``target`` is removed.
    """
    url = check_allowed(text, servers)
    deadline = time.monotonic() + timeout
    try:
        return _fetch(url, sha256, target, limit, deadline)
    except (OSError, HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"cannot download {text}: {reason}", "check the URL and the boot server") from None
    except _Refused as error:
        raise ImageError(f"cannot use {text}: {error}", error.hint) from None


def check_allowed(text: str, servers: Iterable[str]) -> SplitResult:
    """The parsed URL. Raises Forbidden if it is not below one of ``servers``."""
    url = parse_url(text)
    if not is_allowed(url, servers):
        raise Forbidden(
            f"boot files from {text} are not allowed on this host",
            "ask the operator to add the server to boot_servers in the manager's configuration",
        )
    return url


class _Refused(Exception):
    def __init__(self, text: str, hint: str = "check the URL and the boot server") -> None:
        super().__init__(text)
        self.hint = hint


def _fetch(url: SplitResult, sha256: str, target: Path, limit: int, deadline: float) -> int:
    sock = _connect(url, deadline)
    # A server that sends one byte now and then never exceeds the socket's own timeout.
    timer = threading.Timer(max(0, deadline - time.monotonic()), _shut_down, [sock])
    timer.daemon = True
    timer.start()
    connection = HTTPConnection(str(url.hostname), find_port(url))
    connection.sock = sock
    try:
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        connection.request("GET", url.path or "/", headers={"Accept-Encoding": "identity", "User-Agent": "nohype"})
        response = connection.getresponse()
        _check_answer(response, limit)
        return _store(response, sha256, target, limit)
    except (OSError, HTTPException, _Refused):
        if time.monotonic() >= deadline:
            raise _Refused("the download was not complete in time", "use a faster boot server") from None
        raise
    finally:
        timer.cancel()
        connection.close()


def _connect(url: SplitResult, deadline: float) -> socket.socket:
    """A connected socket; without TLS handshake."""
    host, timeout = str(url.hostname), min(_SILENCE, max(0.1, deadline - time.monotonic()))
    sock = socket.create_connection((host, find_port(url)), timeout)
    if url.scheme == "http":
        return sock
    return ssl.create_default_context().wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)


def _shut_down(sock: socket.socket) -> None:
    with suppress(OSError):
        # Not SSLSocket's method, which waits for the other side.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _check_answer(response: HTTPResponse, limit: int) -> None:
    if 300 <= response.status < 400:
        raise _Refused("the server redirects; redirects are not followed", "give the URL to which the server redirects")
    if response.status != 200:
        raise _Refused(f"the server responded with status {response.status}")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise _Refused("the server sends the file with a Content-Encoding, which was not requested")
    if response.length is not None and response.length > limit:
        raise _Refused(f"it has {response.length} bytes, the limit is {limit}", "boot a smaller file")


def _store(response: HTTPResponse, sha256: str, target: Path, limit: int) -> int:
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            while piece := response.read1(_PIECE):
                size += len(piece)
                if size > limit:
                    raise _Refused(f"it is longer than {limit} bytes, the limit", "boot a smaller file")
                digest.update(piece)
                file.write(piece)
            if response.length:
                raise _Refused(f"the server closed the connection {response.length} bytes before the end")
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != sha256:
            raise _Refused(f"its SHA-256 is {digest.hexdigest()}, requested {sha256}", "check the file and the checksum")
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return size
