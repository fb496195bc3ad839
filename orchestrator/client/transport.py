"""Connects to a manager over a Unix socket or TLS, and explains connection errors."""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import stat
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.errors import OrchestratorError, RequestError

# Seconds. Shorter than the wait for a response: a manager that has accepted the connection may still be recovering.
CONNECT_TIMEOUT = 10.0
_HTTPS = 443
_SHOWN = 100
# X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH (openssl/x509_vfy.h); X509_V_ERR_CERT_NOT_YET_VALID and
# X509_V_ERR_CERT_HAS_EXPIRED.
_WRONG_NAME = (62, 64)
_WRONG_TIME = (9, 10)
# A DNS host name in ASCII form (RFC 5890 2.3.2.1), or an address, with the zone of a link-local one.
_HOST = re.compile(rb"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?")
_ENDED = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
_ANOTHER = "check the port against [api] listen; another program may be listening there"
_TAKES_LONG = "the request may still complete: check `nohype guest list` and `nohype events`, then retry"


class Unreachable(OrchestratorError):
    """The connection to the manager failed or was lost."""


class TimedOut(Unreachable):
    """The manager did not respond in time."""


class _WholeRequests(http.client.HTTPConnection):
    """Sends head and body of a request in one piece; http.client sends two, for which the manager wakes up twice."""

    _parts: list[bytes] | None = None

    def request(self, method: str, url: str, body: str | bytes | None, headers: Mapping[str, str]) -> None:  # type: ignore[override]
        parts: list[bytes] = []
        self._parts = parts
        try:
            super().request(method, url, body, headers)
        finally:
            self._parts = None
        self.send(b"".join(parts))

    def send(self, data: bytes) -> None:  # type: ignore[override]
        if self._parts is None:
            super().send(data)
        else:
            self._parts.append(data)


class UnixConnection(_WholeRequests):
    """HTTP over a Unix socket; ``timeout`` is seconds per read and write."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class TlsConnection(_WholeRequests):
    """HTTP over TLS; ``timeout`` is seconds per read and write; the TCP connection must be established within 10 s."""

    default_port = _HTTPS

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext, timeout: float) -> None:
        super().__init__(*address, timeout=timeout)
        self._context, self._seconds = context, timeout

    def connect(self) -> None:
        self.sock = socket.create_connection((self.host, self.port), min(CONNECT_TIMEOUT, self._seconds))
        # Otherwise the body waits for the acknowledgement of the head (Nagle's algorithm).
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.settimeout(self._seconds)
        self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)


def parse_url(text: str) -> tuple[str, int]:
    """Host and port of a manager's URL, ``https://host:8443``; the default port is 443. Raises RequestError."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
        # The encoding of the resolver fails for labels that are too long or empty.
        if not _HOST.fullmatch((host or "").encode("idna")):
            host = None
    except ValueError:  # of the port, of brackets, of a name
        host, port = None, None
    rest = text.partition("://")[2].partition("/")
    # Also line ends and tabs, which the parser drops.
    odd = not text.isprintable() or any(sign in rest[0] for sign in "@?#")
    if not host or port == 0 or parts.scheme != "https" or rest[2] or odd:
        shown = _without_user(text)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        raise RequestError(f"invalid manager URL {shown!r}", "use the form https://host:8443")
    return host, port or _HTTPS


def build_context(ca: Path | None, certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    """Raises RequestError if a file cannot be used, the key has a passphrase, or a key is given without a certificate."""
    if key and not certificate:
        raise RequestError(f"key {key} is given without a certificate", "give the certificate too")
    for file in filter(None, (ca, certificate, key)):
        _check_file(file)
    used = ca
    try:
        context = ssl.create_default_context(cafile=ca)
        if certificate:
            used = key or certificate

            def refuse() -> str:
                # OpenSSL would prompt on the terminal.
                raise RequestError(f"key {used} has a passphrase", "use an unencrypted key with mode 0600")

            context.load_cert_chain(certificate, key, password=refuse)
    except OSError as error:  # ssl.SSLError is one
        files = ca if used == ca else " and ".join(str(file) for file in (certificate, key) if file)
        if used == certificate:
            hint = "no private key found: give --key, or a certificate file that includes the key"
        elif used == ca:
            hint = "use a PEM file with at least one certificate"
        else:
            hint = "use PEM files; the key must match the certificate"
        raise RequestError(f"TLS cannot use {files}: {_reason(error)}", hint) from None
    return context


def is_alert(error: ssl.SSLError) -> bool:
    """Whether the peer sent an alert with its reason (RFC 8446 6.2)."""
    return "ALERT" in (error.reason or "")


def map_connection_error(
    where: Path | str, error: OSError | http.client.HTTPException, *, connected: bool = False
) -> Unreachable:
    """The error of a request without a response; ``connected``: the TLS handshake was complete."""
    if isinstance(error, ssl.SSLCertVerificationError) and isinstance(where, str):
        return _explain_certificate(where, error)
    hint = _hint_socket(error) if isinstance(where, Path) else _hint_url(error, connected=connected)
    kind = TimedOut if isinstance(error, TimeoutError) else Unreachable
    return kind(f"cannot reach the manager at {where}: {_reason(error)}", hint)


def _explain_certificate(where: str, error: ssl.SSLCertVerificationError) -> Unreachable:
    reason = error.verify_message
    if error.verify_code in _WRONG_NAME:
        hint = "use a host name that the certificate lists"
        return Unreachable(f"the certificate of {where} is for another name: {reason}", hint)
    if error.verify_code in _WRONG_TIME:
        text = f"the certificate of {where} has expired or is not yet valid: {reason}"
        return Unreachable(text, "renew the certificate, or correct this machine's clock")
    hint = "give the CA of the manager's certificate with --ca FILE or NOHYPE_CA"
    return Unreachable(f"the certificate of {where} is not trusted (certificate verify failed): {reason}", hint)


def _hint_socket(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "run as root or as a member of group nohype; log in again after being added"
    if isinstance(error, TimeoutError):
        return _TAKES_LONG
    return "check that nohyped runs on this host (`systemctl status nohyped`); for a lab, run `nohype lab exec -- nohype ...`"


def _hint_url(error: Exception, *, connected: bool) -> str:
    if isinstance(error, socket.gaierror):
        return "check the host name"
    if isinstance(error, ssl.SSLError) and not (connected and isinstance(error, _ENDED)):
        if is_alert(error):
            return "check that the client certificate is signed by client_ca in [api] and has not expired"
        return _ANOTHER
    if isinstance(error, TimeoutError):
        return _TAKES_LONG
    if _is_no_http(error):
        return _ANOTHER
    if connected or isinstance(error, ConnectionResetError | http.client.HTTPException):
        # Also a refused client certificate whose alert was lost (TLS 1.3: after the handshake).
        return "check that client_ca covers the certificate and connections are free; see `journalctl -u nohyped`"
    return "check that nohyped runs with an [api] section and that no firewall blocks the port"


def _reason(error: Exception) -> str:
    """The reason from the kernel or TLS, without the source positions that OpenSSL and Python add."""
    if isinstance(error, _ENDED):
        return "the connection was closed"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    if _is_no_http(error):
        return "the peer does not speak HTTP"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _is_no_http(error: Exception) -> bool:
    # The text of such an error comes from an unknown program, and can contain control characters.
    return isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected)


def _check_file(file: Path) -> None:
    # OpenSSL's errors do not name the file, and it would wait indefinitely on a pipe.
    try:
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise RequestError(f"TLS cannot use {file}: not a regular file", "give a file: TLS reads it more than once")
        with file.open("rb"):
            pass
    except OSError as error:
        raise RequestError(f"TLS cannot use {file}: {error.strerror}", "check the path and its permissions") from None


def _without_user(text: str) -> str:
    """A URL without user and password: errors can be logged."""
    scheme, separator, rest = text.partition("://")
    return scheme + separator + rest.rpartition("@")[2]
