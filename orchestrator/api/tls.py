"""The TLS context of the manager's port."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path

from orchestrator.config import ApiConfig
from orchestrator.errors import HostError, RequestError

_log = logging.getLogger(__name__)


class Certificates:
    """The TLS context of a port; reloaded when its files change.

    Raises:
        RequestError: a file is invalid, or other users than root can read the key.
        HostError: a file cannot be read.
    """

    def __init__(self, config: ApiConfig) -> None:
        self._config = config
        self._seen = self._read_times()
        self._current = build_context(config)
        # Called at each handshake: certificates are renewed while the manager runs.
        self._current.sni_callback = self._renew
        self.context = self._current

    def _renew(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        try:
            seen = self._read_times()
            if seen != self._seen:
                self._current = build_context(self._config)
                self._seen = seen
                _log.info("reloaded the certificate %s", self._config.certificate)
        except (RequestError, HostError) as error:
            _log.error("keeping the old certificate: %s", error)
        connection.context = self._current

    def _read_times(self) -> tuple[int, ...]:
        config = self._config
        return tuple(_stat(file).st_mtime_ns for file in (config.certificate, config.key, config.client_ca) if file)


def build_context(config: ApiConfig) -> ssl.SSLContext:
    """TLS 1.3; client certificates are optional, and verified. Raises as ``Certificates`` does."""
    if _stat(config.key).st_mode & 0o077:
        raise RequestError(f"api.key: other users can read {config.key}", f"run `chmod 600 {config.key}`")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # No tickets: a session that is resumed later must not outlive a change of the client CAs.
    context.num_tickets = 0
    try:
        # OpenSSL must not prompt: a daemon has no terminal.
        context.load_cert_chain(config.certificate, config.key, password=lambda: "")
        if config.client_ca:
            context.load_verify_locations(config.client_ca)
            # Optional: a client without a certificate can present a token.
            context.verify_mode = ssl.CERT_OPTIONAL
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(filter(None, (config.certificate, config.key, config.client_ca)))
        raise RequestError(f"api: TLS cannot use {files}: {error}", "use PEM files; the key must match the certificate") from None
    return context


def _stat(file: str) -> os.stat_result:
    try:
        return Path(file).stat()
    except OSError as error:
        raise HostError(f"cannot read {file}", "check [api] in the configuration", error.errno or 0) from None
