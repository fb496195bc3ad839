"""Boot files from HTTP servers: only allowed ones, and nothing but the requested content."""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from orchestrator.errors import Forbidden, ImageError
from orchestrator.images.download import download
from orchestrator.model.url import is_allowed, parse_url
from tests.harness.api_server import Authority

DATA = b"kernel" * 50_000
SHA256 = hashlib.sha256(DATA).hexdigest()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
Serve = Callable[[Callable[[socket.socket], object]], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server on loopback that hands each connection, after its request, to a function; returns its URL."""
    with ExitStack() as stack:

        def start(answer: Callable[[socket.socket], object]) -> str:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            stack.callback(lambda: listener.shutdown(socket.SHUT_RDWR))
            threading.Thread(target=accept, args=(listener, answer), daemon=True).start()
            return f"http://127.0.0.1:{listener.getsockname()[1]}/boot/"

        yield start


def accept(listener: socket.socket, answer: Callable[[socket.socket], object]) -> None:
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65536)
                answer(connection)


def fetch(url: str, target: Path, *, sha256: str = SHA256, limit: int = 1 << 20, timeout: float = 60) -> int:
    return download(f"{url}vmlinuz", sha256, target, servers=[url], limit=limit, timeout=timeout)


def test_file_is_written_with_its_content(serve: Serve, tmp_path: Path) -> None:
    url = serve(lambda connection: connection.sendall(HEAD % len(DATA) + DATA))
    assert fetch(url, tmp_path / "file") == len(DATA)
    assert (tmp_path / "file").read_bytes() == DATA


def trickle(connection: socket.socket) -> None:
    connection.sendall(HEAD % len(DATA))
    while not stop.wait(0.02):
        connection.sendall(b"k")


def trickle_head(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while not stop.wait(0.02):
        connection.sendall(b"k")


stop = threading.Event()
BAD: dict[str, tuple[Callable[[socket.socket], object], str]] = {
    "not found": (lambda connection: connection.sendall(b"HTTP/1.1 404 Not Found\r\n\r\n"), "status 404"),
    "redirect": (
        lambda connection: connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n"),
        "redirects are not followed",
    ),
    "other content": (lambda connection: connection.sendall(HEAD % 3 + b"abc"), "its SHA-256 is ba7816bf"),
    "announced too long": (lambda connection: connection.sendall(HEAD % (1 << 40)), "1099511627776 bytes, the limit is 1048576"),
    "longer than it says": (
        lambda connection: connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * (2 << 20)),
        "longer than 1048576 bytes",
    ),
    "shorter than it says": (
        lambda connection: connection.sendall(HEAD % len(DATA) + DATA[:-1]),
        "closed the connection 1 bytes before the end",
    ),
    "compressed": (
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n"),
        "Content-Encoding",
    ),
    "no HTTP": (lambda connection: connection.sendall(b"SSH-2.0-x\r\n"), "cannot download"),
    "no answer": (lambda connection: None, "cannot download"),
    "huge head": (lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000), "cannot download"),
    "slow content": (trickle, "was not complete in time"),
    "slow head": (trickle_head, "was not complete in time"),
}


@pytest.mark.parametrize(("answer", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_answer_is_one_error_and_leaves_no_file(
    serve: Serve, tmp_path: Path, answer: Callable[[socket.socket], object], reason: str
) -> None:
    stop.clear()
    with pytest.raises(ImageError, match=reason):
        fetch(serve(answer), tmp_path / "file", timeout=2 if answer in (trickle, trickle_head) else 60)
    stop.set()
    assert list(tmp_path.iterdir()) == []


def test_server_that_does_not_listen_is_one_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/boot/"
    with pytest.raises(ImageError, match="Connection refused"):
        fetch(url, tmp_path / "file")


def test_server_that_is_not_allowed_is_not_contacted(serve: Serve, tmp_path: Path) -> None:
    contacted = threading.Event()
    url = serve(lambda _: contacted.set())
    for servers in ((), ("https://boot.example/",), (url.replace("http:", "https:"),), (f"{url}other/",)):
        with pytest.raises(Forbidden, match="not allowed on this host"):
            download(f"{url}vmlinuz", SHA256, tmp_path / "file", servers=servers, limit=1, timeout=5)
    assert not contacted.is_set()


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("http://boot.example/a/b/vmlinuz", True),
        ("http://boot.example:80/a/b/vmlinuz", True),
        ("http://BOOT.example/a/b/vmlinuz", True),
        ("http://boot.example/a/bad", False),
        ("http://boot.example/a/b/", False),
        ("http://boot.example/a/b", False),
        ("https://boot.example/a/b/vmlinuz", False),
        ("http://boot.example:8080/a/b/vmlinuz", False),
        ("http://boot.example.org/a/b/vmlinuz", False),
    ],
)
def test_server_is_a_folder_of_the_url(url: str, allowed: bool) -> None:
    for server in ("http://boot.example/a/b", "http://boot.example/a/b/"):
        assert is_allowed(parse_url(url), [server]) is allowed


@pytest.mark.parametrize(
    "url",
    [
        "", "vmlinuz", "file:///etc/shadow", "ftp://boot.example/x", "http:///x", "http://user:secret@boot.example/x",
        "http://boot.example/a/../../x", "http://boot.example/a/%2E%2e/x", "http://boot.example/a%2f..%2fx",
        "http://boot.example/a b",
        "http://boot.example/x\r\nHost: y", "http://boot.example\\@other.example/x", "http://boot.example:99999/x", "http://[::1/x",
        "http://boot.example/x?y", "http://boot.example/x#y", "http://boot.example/" + "x" * 2000, "http://bücher.example/x",
    ],
)  # fmt: skip
def test_url_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parse_url(url)
    assert "secret" not in str(error.value)


def test_certificate_of_an_unknown_authority_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("boot", addresses=("127.0.0.1",))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(2):
                raw, _ = listener.accept()
                with raw, suppress(OSError), context.wrap_socket(raw, server_side=True) as connection:
                    connection.recv(65536)
                    connection.sendall(HEAD % len(DATA) + DATA)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/"
        with pytest.raises(ImageError, match="certificate verify failed"):
            fetch(url, tmp_path / "file")
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
        assert fetch(url, tmp_path / "file") == len(DATA)
        thread.join(20)


def test_silent_tls_server_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ImageError, match="not complete in time"):
        fetch(f"https://127.0.0.1:{listener.getsockname()[1]}/", tmp_path / "file", timeout=1)
