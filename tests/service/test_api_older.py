"""A client that is newer than its manager, with what a manager of an earlier version has sent (tests/data/api)."""

from __future__ import annotations

import json
import socketserver
import threading
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from click.testing import CliRunner

from orchestrator.cli.main import nohype
from orchestrator.client import cache_shapes, disk_shapes, exit_shapes, host_shapes, nic_shapes, shapes, switch_shapes
from orchestrator.client.added import Added
from orchestrator.client.answers import has_shape
from orchestrator.client.client import Client
from orchestrator.errors import OrchestratorError

KEPT = json.loads((Path(__file__).parents[1] / "data/api/without-creator.json").read_text())
"""The members of each type, and responses; written by the version before guests had a creator."""
TYPES = {
    kind.__name__: kind
    for module in (shapes, cache_shapes, disk_shapes, exit_shapes, host_shapes, nic_shapes, switch_shapes)
    for kind in vars(module).values()
    if typing.is_typeddict(kind)
}


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@contextmanager
def serve(folder: Path, responses: dict[str, Any]) -> Iterator[Path]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(responses[self.path.partition("?")[0]]).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with _Server(str(folder / "older.sock"), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield folder / "older.sock"
        server.shutdown()


@pytest.fixture
def older(tmp_path: Path) -> Iterator[Path]:
    with serve(tmp_path, KEPT["responses"]) as path:
        yield path


def find_added(kind: Any) -> dict[str, Added]:
    hints = get_type_hints(kind, include_extras=True)
    return {name: get_args(hint)[1] for name, hint in hints.items() if get_origin(hint) is Annotated}


@pytest.mark.parametrize("name", sorted(KEPT["members"].keys() & TYPES.keys()))
def test_member_that_an_older_manager_does_not_send_has_a_value(name: str) -> None:
    """Fails for each new member without `Added`: see CONTRIBUTING.md."""
    assert set(get_type_hints(TYPES[name])) - set(KEPT["members"][name]) <= find_added(TYPES[name]).keys()


@pytest.mark.parametrize("kind", [kind for kind in TYPES.values() if find_added(kind)], ids=lambda kind: kind.__name__)
def test_value_of_an_added_member_is_empty_and_of_its_type(kind: Any) -> None:
    hints = get_type_hints(kind)
    for name, added in find_added(kind).items():
        assert not added.value
        assert has_shape(added.value, hints[name]), name


def test_responses_of_an_older_manager_are_read(older: Path) -> None:
    client = Client(older)
    assert [guest["name"] for guest in client.guests()] == ["batch", "db", "idle", "web"]
    guest, host = client.guest("web"), client.host()
    assert (guest["created"], guest["creator"]) == (None, None)
    assert (host["vfs"], host["attention"], host["lights"]) == ([], [], [])
    assert {guest["creator"] for guest in host["guests"]} == {None}
    assert client.survey()["cores"]
    assert client.events()
    assert client.uplinks()


def test_values_of_two_responses_are_not_shared(older: Path) -> None:
    client = Client(older)
    client.host()["lost"].append("x")
    client.host()["vfs"].append({})  # type: ignore[typeddict-item]
    assert client.host()["vfs"] == []


def test_member_that_every_manager_sends_is_still_required(tmp_path: Path) -> None:
    guest = {name: value for name, value in KEPT["responses"]["/v1/guests/web"].items() if name != "cores"}
    with serve(tmp_path, {"/v1/guests/web": guest}) as path, pytest.raises(OrchestratorError, match="not a NoHype manager"):
        Client(path).guest("web")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("top --once", "this version of the manager does not report verdicts"),
        ("map", "web  running"),
        ("map --svg -", "this version of the manager does not report verdicts"),
        ("who 3", "CPU 3: guest web (running); cores 2-3 on node 0"),
        ("guest show web", "web"),
        ("guest list", "web"),
        ("survey", "isolated CPUs: 2-31"),
    ],
)
def test_commands_show_an_older_manager(older: Path, words: str, text: str) -> None:
    result = CliRunner().invoke(nohype, ["--socket", str(older), *words.split()])
    assert result.exit_code == 0, result.output
    assert text in result.output
