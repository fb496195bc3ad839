"""Decides which requests a server on loopback accepts.

Every user of this machine can connect, and every page in the user's browser can make it send requests. So each request of the API
needs a secret in a header field, which no other page can set without asking first, and which no cookie carries: cookies are sent
to all ports of a host. The one-time word of the address is exchanged for it. A name that an attacker points at 127.0.0.1 (DNS
rebinding) is refused by the field Host.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections.abc import Mapping

from orchestrator.errors import Forbidden, RequestError, Unauthorized

WORD_SECONDS = 600.0
"""For which the address can be opened."""
_HTTP = 80
_AGAIN = "run `nohype web` again"


class Session:
    """Of one run of the server; for several threads.

    Attributes:
        word: opens the session once.
    """

    def __init__(self, port: int) -> None:
        self.word = secrets.token_urlsafe(32)
        self._secret = secrets.token_urlsafe(32)
        names = ("127.0.0.1", "localhost")
        # Browsers omit the default port of http.
        self._hosts = frozenset((*(f"{name}:{port}" for name in names), *(names if port == _HTTP else ())))
        self._expires = time.monotonic() + WORD_SECONDS
        self._used = False
        self._lock = threading.Lock()

    def open(self, word: str) -> str:
        """Returns the secret of the session. Raises Unauthorized if the word is wrong, was used, or is too old."""
        with self._lock:
            if not hmac.compare_digest(word.encode(), self.word.encode()):
                raise Unauthorized("the address has a wrong word", _AGAIN)
            if self._used:
                raise Unauthorized("the address was opened before", _AGAIN)
            if time.monotonic() > self._expires:
                raise Unauthorized("the address is too old", _AGAIN)
            self._used = True
            return self._secret

    def check_secret(self, authorization: str) -> None:
        """Raises Unauthorized unless the field Authorization has the secret of the session."""
        if not hmac.compare_digest(authorization.encode(), f"Bearer {self._secret}".encode()):
            raise Unauthorized("the page has no session", _AGAIN)

    def check_host(self, host: str) -> None:
        """Raises RequestError unless the field Host is that of this server."""
        if host not in self._hosts:
            raise RequestError("the field Host is not that of this server", f"open http://{min(self._hosts)}/")

    def check_site(self, headers: Mapping[str, str]) -> None:
        """Raises Forbidden for a request that a page of another site makes a browser send.

        ``headers``: with names in lower case. Outside browsers, none of them has the field Origin or Sec-Fetch-Site.
        """
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") or (origin is not None and origin != f"http://{headers.get('host', '')}"):
            raise Forbidden("cross-site request refused")
