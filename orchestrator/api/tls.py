"""The TLS side of the manager's port: its certificate, read again when it was renewed, and client certificates."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path

from orchestrator.config import ApiConfig
from orchestrator.errors import HostError, RequestError

_log = logging.getLogger(__name__)


class Certificates:
    """What a TLS port shows and believes.

    Args:
        config: names the files.

    Raises:
        RequestError: a file is not what it should be, or others than root can read the key.
        HostError: a file can't be read.
    """

    def __init__(self, config: ApiConfig) -> None:
        self._config = config
        self._seen = self._read_times()
        self._current = build_context(config)
        # Each handshake comes here first. Certificates live for weeks, the manager for years.
        self._current.sni_callback = self._renew
        self.context = self._current

    def _renew(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        try:
            seen = self._read_times()
            if seen != self._seen:
                self._current = build_context(self._config)
                self._seen = seen
                _log.info("the certificate %s was read again", self._config.certificate)
        except (RequestError, HostError) as error:
            _log.error("the old certificate is kept: %s", error)
        connection.context = self._current

    def _read_times(self) -> tuple[int, ...]:
        config = self._config
        return tuple(_stat(file).st_mtime_ns for file in (config.certificate, config.key, config.client_ca) if file)


def build_context(config: ApiConfig) -> ssl.SSLContext:
    """TLS 1.3 with the manager's certificate; clients may show one, which is then verified.

    Raises:
        RequestError, HostError: see ``Certificates``.
    """
    if _stat(config.key).st_mode & 0o077:
        raise RequestError(f"api.key: others can read {config.key}", f"chmod 600 {config.key}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # No tickets: a session that is resumed later must not outlive a change of the client CAs.
    context.num_tickets = 0
    try:
        # Never asked for a password: a daemon has nobody to ask.
        context.load_cert_chain(config.certificate, config.key, password=lambda: "")
        if config.client_ca:
            context.load_verify_locations(config.client_ca)
            # Optional: who shows none may still have a token.
            context.verify_mode = ssl.CERT_OPTIONAL
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(filter(None, (config.certificate, config.key, config.client_ca)))
        raise RequestError(f"api: TLS can't use {files}: {error}", "they are PEM; key and certificate belong together") from None
    return context


def _stat(file: str) -> os.stat_result:
    try:
        return Path(file).stat()
    except OSError as error:
        raise HostError(f"cannot read {file}", "see [api] in the configuration", error.errno or 0) from None
