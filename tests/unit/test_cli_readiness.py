"""`--wait` for guests that report ready by answering SSH: this machine connects to them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from orchestrator.cli import readiness
from orchestrator.errors import GuestError, NotFound, ReadyBySsh


class FakeClient:
    """A manager that leaves the wait to the client."""

    def __init__(self, addresses: list[str], *states: str) -> None:
        self._guest = {"name": "web", "addresses": addresses}
        self._states = list(states)

    def wait_ready(self, name: str, timeout: float) -> str:
        raise ReadyBySsh(f"guest {name} reports ready by answering SSH")

    def guest(self, name: str) -> dict[str, Any]:
        return {**self._guest, "state": self._states.pop(0) if self._states else "running"}


def wait(client: FakeClient, seconds: float) -> str:
    return readiness.wait_ready(client, "web", seconds)  # type: ignore[arg-type]


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(readiness, "SSH_PORT", listener.getsockname()[1])
        yield listener
        with suppress(OSError):  # closed by the test
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread of `greet`: its descriptor gets another meaning


def greet(listener: socket.socket, *greetings: bytes) -> None:
    def serve() -> None:
        with suppress(OSError):
            for greeting in greetings:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(greeting)

    threading.Thread(target=serve, daemon=True).start()


def test_greeting_of_the_server_is_the_result(listener: socket.socket) -> None:
    greet(listener, b"", b"HTTP/1.1 400\r\n", b"SSH-2.0-OpenSSH_10.0 Debian\r\n")
    said = wait(FakeClient(["127.0.0.1/8"]), 60)
    assert said == f"SSH at 127.0.0.1 port {listener.getsockname()[1]}: SSH-2.0-OpenSSH_10.0 Debian"


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [(b"", "not an SSH server"), (b"220 mail\r\n", "not an SSH server"), (b"S" * 400, "not an SSH server")],
)
def test_another_server_times_out(listener: socket.socket, greeting: bytes, reason: str) -> None:
    greet(listener, greeting, greeting, greeting)
    with pytest.raises(GuestError, match=f"timed out after 0.5 s waiting for guest web to answer SSH at .*{reason}"):
        wait(FakeClient(["127.0.0.1/8"]), 0.5)


def test_closed_port_times_out(listener: socket.socket) -> None:
    listener.close()
    with pytest.raises(GuestError, match="timed out after 0.5 s .* Connection refused") as caught:
        wait(FakeClient(["127.0.0.1/8"]), 0.5)
    assert "nohype guest console web" in caught.value.hint


def test_guest_that_ends_is_not_waited_for(listener: socket.socket) -> None:
    listener.close()
    with pytest.raises(GuestError, match="guest web is stopped; it did not answer SSH"):
        wait(FakeClient(["127.0.0.1/8"], "running", "stopped"), 600)


def test_guest_without_an_address_is_a_clear_error() -> None:
    with pytest.raises(NotFound, match="guest web was created without an IP address"):
        wait(FakeClient([]), 60)
