"""The ways from the client to a manager, a Unix socket or TLS, and what it means when there is no way. Standard library only."""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import stat
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.errors import OrchestratorError, RequestError

# Seconds. Who drops packets without a word is not waited for as long as a manager that has accepted us and still recovers.
CONNECT_TIMEOUT = 10.0
_HTTPS = 443
_SHOWN = 100
# X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH (openssl/x509_vfy.h); X509_V_ERR_CERT_NOT_YET_VALID and
# X509_V_ERR_CERT_HAS_EXPIRED.
_WRONG_NAME = (62, 64)
_WRONG_TIME = (9, 10)
# A host name of DNS as people write it, in its ASCII form (RFC 5890 2.3.2.1), or an address; the zone of a link-local one too.
_HOST = re.compile(rb"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?")
_ENDED = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
_ANOTHER = "is the port that of [api] in the manager's configuration? another program may serve there"
_TAKES_LONG = "it may still do what it was asked for: look (`nohype guest list`, `nohype events`) before you ask again"


class Unreachable(OrchestratorError):
    """There is no connection to the manager, or no more."""


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket.

    Args:
        path: of the socket.
        timeout: seconds for each read and write.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """See http.client."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class TlsConnection(http.client.HTTPConnection):
    """HTTP over TLS; only for the TCP connection itself there is a short time.

    Args:
        address: host and port.
        context: see ``build_context``.
        timeout: seconds for each read and write.
    """

    default_port = _HTTPS

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext, timeout: float) -> None:
        super().__init__(*address, timeout=timeout)
        self._context, self._seconds = context, timeout

    def connect(self) -> None:
        """See http.client."""
        self.sock = socket.create_connection((self.host, self.port), min(CONNECT_TIMEOUT, self._seconds))
        # Else the body of a request waits for the acknowledgement of its head (Nagle's algorithm).
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.settimeout(self._seconds)
        self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)


def parse_url(text: str) -> tuple[str, int]:
    """Host and port of a manager's TLS port, written like ``https://host:8443``; the port is 443 if left out.

    Raises:
        RequestError: it is no such address.
    """
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
        # As the resolver will write it: a label that is too long or empty is found here.
        if not _HOST.fullmatch((host or "").encode("idna")):
            host = None
    except ValueError:  # of the port, of brackets, of a name
        host, port = None, None
    rest = text.partition("://")[2].partition("/")
    # Line ends and tabs, too: the parser leaves them out, wherever they are.
    odd = not text.isprintable() or any(sign in rest[0] for sign in "@?#")
    if not host or port == 0 or parts.scheme != "https" or rest[2] or odd:
        shown = _without_user(text)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        raise RequestError(f"{shown!r} is no address of a manager", "write it like https://host:8443")
    return host, port or _HTTPS


def build_context(ca: Path | None, certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    """What the client believes and shows.

    Args:
        ca: PEM file with the CA of the manager's certificate; None for those of the system.
        certificate: PEM file with the client certificate, or None.
        key: PEM file with its key; None if that is in ``certificate``.

    Raises:
        RequestError: a file can't be read or used, the key has a pass phrase, or there is a key without a certificate.
    """
    if key and not certificate:
        raise RequestError(f"the key {key} is of no use without its certificate", "name the certificate too")
    for file in filter(None, (ca, certificate, key)):
        _check_file(file)
    used = ca
    try:
        context = ssl.create_default_context(cafile=ca)
        if certificate:
            used = key or certificate

            def refuse() -> str:
                # OpenSSL would ask the terminal.
                raise RequestError(f"the key in {used} has a pass phrase", "use one without, that only you can read (chmod 600)")

            context.load_cert_chain(certificate, key, password=refuse)
    except OSError as error:  # ssl.SSLError is one
        files = ca if used == ca else " and ".join(str(file) for file in (certificate, key) if file)
        if used == certificate:
            hint = "its key is in no file that was named: it may be in that of the certificate"
        elif used == ca:
            hint = "it is PEM, with at least one certificate"
        else:
            hint = "they are PEM; key and certificate belong together"
        raise RequestError(f"TLS can't use {files}: {_reason(error)}", hint) from None
    return context


def is_alert(error: ssl.SSLError) -> bool:
    """Whether the other side has said why it refuses (RFC 8446 6.2)."""
    return "ALERT" in (error.reason or "")


def map_connection_error(
    where: Path | str, error: OSError | http.client.HTTPException, *, connected: bool = False
) -> Unreachable:
    """What it means that a request got no answer.

    Args:
        where: the manager's socket or URL.
        error: what came instead of the answer.
        connected: whether there was a connection, of which TLS's handshake is a part.
    """
    if isinstance(where, Path):
        return Unreachable(f"the manager does not answer on {where}: {_reason(error)}", _hint_socket(error))
    if isinstance(error, ssl.SSLCertVerificationError):
        return _explain_certificate(where, error)
    return Unreachable(f"the manager does not answer on {where}: {_reason(error)}", _hint_url(error, connected=connected))


def _explain_certificate(where: str, error: ssl.SSLCertVerificationError) -> Unreachable:
    said = error.verify_message
    if error.verify_code in _WRONG_NAME:
        hint = "the name in the URL must be one in the certificate; or is this another server?"
        return Unreachable(f"the certificate of {where} is for another name: {said}", hint)
    if error.verify_code in _WRONG_TIME:
        return Unreachable(f"the certificate of {where} is not valid now: {said}", "renew it; or is this machine's clock wrong?")
    hint = "name the CA of the manager's certificate: `--ca FILE` or NOHYPE_CA"
    return Unreachable(f"the certificate of {where} is not trusted (certificate verify failed): {said}", hint)


def _hint_socket(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "root and members of the group nohype may; who was just put into the group logs in anew"
    if isinstance(error, TimeoutError):
        return _TAKES_LONG
    return "is it running? `systemctl status nohyped`; are you root or in the group nohype?"


def _hint_url(error: Exception, *, connected: bool) -> str:
    if isinstance(error, socket.gaierror):
        return "is the name of the host right?"
    if isinstance(error, ssl.SSLError) and not (connected and isinstance(error, _ENDED)):
        if is_alert(error):
            return "it refused us: is our client certificate of its `client_ca` ([api] in its configuration), and not expired?"
        return _ANOTHER
    if isinstance(error, TimeoutError):
        return _TAKES_LONG
    if _is_no_http(error):
        return _ANOTHER
    if connected or isinstance(error, ConnectionResetError | http.client.HTTPException):
        # Also what is left of a refused client certificate, where the alert that says so is lost (TLS 1.3: after the handshake).
        return "does it believe the CA of our client certificate, if we show one? are there too many connections? see its journal"
    return "is it running, with [api] in its configuration? is there a firewall between?"


def _reason(error: Exception) -> str:
    """What the kernel or TLS said, without the places in source files that OpenSSL and Python add."""
    if isinstance(error, _ENDED):
        return "the connection was closed"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    if _is_no_http(error):
        return "the answer is not HTTP"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _is_no_http(error: Exception) -> bool:
    """Its text is what a stranger has said, and may move a terminal's cursor."""
    return isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected)


def _check_file(file: Path) -> None:
    """OpenSSL's errors do not name the file, and OpenSSL would wait indefinitely for the other end of a pipe."""
    try:
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise RequestError(f"TLS can't use {file}: it is not a regular file", "name a file: TLS reads it more than once")
        with file.open("rb"):
            pass
    except OSError as error:
        raise RequestError(f"TLS can't use {file}: {error.strerror}", "is the name right, and may you read it?") from None


def _without_user(text: str) -> str:
    """A URL without user and password: an error may end up in a log."""
    scheme, separator, rest = text.partition("://")
    return scheme + separator + rest.rpartition("@")[2]
