"""What connections keep between requests."""

from __future__ import annotations

import socket
import tracemalloc
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.api_server import serve

SIZE, CONNECTIONS = 128 << 10, 40


@pytest.mark.parametrize("fields", ["", "Authorization: x\r\nAuthorization: y\r\n"])
def test_idle_connection_does_not_keep_the_body_of_its_last_request(tmp_path: Path, fields: str) -> None:
    head = f"POST /v1/plans HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{fields}Content-Length: {SIZE}\r\n\r\n"
    data = head.encode() + b'"' + b"x" * (SIZE - 2) + b'"'
    with serve(tmp_path) as served, ExitStack() as opened:
        tracemalloc.start()
        opened.callback(tracemalloc.stop)
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(CONNECTIONS):
            connection = opened.enter_context(socket.socket(socket.AF_UNIX))
            # So that all of it arrives in one read.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * SIZE)
            connection.connect(str(served.path))
            connection.sendall(data)
            assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
        assert tracemalloc.get_traced_memory()[0] - before < CONNECTIONS * SIZE / 4
