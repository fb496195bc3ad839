"""The client and the commands against the real application on a real Unix socket: real manager and ledger, fake host."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.api.openapi import build_schema
from orchestrator.api.server import open_socket
from orchestrator.cli.main import nohype
from orchestrator.client import client as client_module
from orchestrator.client import shapes
from orchestrator.client.client import Client
from orchestrator.errors import Conflict, HostError, NoRoom, NotFound, OrchestratorError, RequestError, Stale
from tests.harness.api_server import FAULT, Served, serve

REQUEST = {"name": "one", "memory": "256M", "image": "minimal"}


@pytest.fixture(scope="module")
def module_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("served"), metrics=lambda: (b"nohype_guests 0\n", "text/plain; version=0.0.4")) as served:
        yield served


@pytest.fixture
def served(module_served: Served) -> Iterator[Served]:
    yield module_served
    for guest in module_served.client.guests():
        module_served.client.delete(guest["name"])


def check_shape(value: object, kind: object) -> None:
    """Whether an answer is of the type that the client promises."""
    named: dict[str, dict[str, object]] = {}
    _check(value, build_schema(kind, named), named)


def _check(value: object, schema: dict, named: dict) -> None:
    if "$ref" in schema:
        schema = named[schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        assert any(_fits(value, one, named) for one in schema["anyOf"]), (value, schema)
    elif "enum" in schema:
        assert value in schema["enum"]
    elif schema.get("type") == "object":
        assert isinstance(value, dict)
        if "properties" not in schema:
            for item in value.values():
                _check(item, schema["additionalProperties"], named)
            return
        assert set(value) == set(schema["properties"])
        for name, one in schema["properties"].items():
            _check(value[name], one, named)
    elif schema.get("type") == "array":
        assert isinstance(value, list)
        for item in value:
            _check(item, schema["items"], named)
    else:
        types = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
        assert isinstance(value, types[schema["type"]]), (value, schema)
        assert isinstance(value, bool) == (schema["type"] == "boolean")


def _fits(value: object, schema: dict, named: dict) -> bool:
    try:
        _check(value, schema, named)
    except AssertionError:
        return False
    return True


def test_guest_goes_from_plan_to_deletion(served: Served) -> None:
    client = served.client
    planned = client.plan(REQUEST)
    assert (planned["state"], planned["version"], client.guests()) == ("planned", 0, [])
    made = client.create(REQUEST)
    assert made["state"] == "running"
    assert made["created"]
    known = {key: made[key] for key in ("version", "created", "creator")}
    assert {**planned, **known, "state": "running"} == made
    assert client.guest("one") == made
    stopped = client.stop("one", timeout=5)
    assert stopped["state"] == "stopped"
    assert client.start("one", version=stopped["version"])["state"] == "running"
    assert client.restart("one", timeout=5)["state"] == "running"
    assert client.kill("one")["state"] == "stopped"
    client.delete("one")
    assert client.guests() == []
    kinds = [event["kind"] for event in client.events() if event["subject"] == "one"]
    assert kinds[0] == "claimed"
    assert "started" in kinds


def test_responses_have_the_types_of_the_client(served: Served) -> None:
    client = served.client
    made = client.create({**REQUEST, "id": "order-1", "restart": "on-failure"})
    check_shape(made, shapes.Guest)
    check_shape(client.guests(), list[shapes.Guest])
    check_shape(client.survey(), shapes.Survey)
    check_shape(client.audit(0), list[shapes.Proof])
    check_shape(client.events(), list[shapes.Event])
    check_shape(client.quarantined(), list[shapes.Quarantined])
    assert client.metrics() == "nohype_guests 0\n"
    assert client.version()


def test_repeated_request_with_an_id_creates_one_guest(served: Served) -> None:
    request = {**REQUEST, "id": "order-17"}
    made = served.client.create(request)
    assert served.client.create(request) == made
    with pytest.raises(Conflict, match="order-17"):
        served.client.create({**request, "cores": 2})


def test_change_with_an_old_version_is_refused(served: Served) -> None:
    seen = served.client.create(REQUEST)["version"]
    served.client.stop("one", timeout=5)
    for change in (served.client.start, served.client.stop, served.client.restart, served.client.kill, served.client.delete):
        with pytest.raises(Stale, match="is at version"):
            change("one", version=seen)
    assert served.client.guest("one")["state"] == "stopped"


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"name": "No_Name"}, RequestError, "not a guest name"),
        ({"name": "host"}, RequestError, "the host itself"),
        ({"memory": "257K"}, RequestError, "memory"),
        ({"cores": True}, RequestError, "cores"),
        ({"cores": "1"}, RequestError, "cores"),
        ({"color": "red"}, RequestError, "color"),
        ({"cmdline": "a\nb"}, RequestError, "one line"),
        ({"image": "nix"}, NotFound, "available: debian-cloud, minimal"),
        ({"cores": 8}, NoRoom, "cores"),
    ],
)
def test_invalid_request_is_one_error(served: Served, change: dict[str, object], kind: type, said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        served.client.plan({**REQUEST, **change})
    if kind is NoRoom:
        assert caught.value.reasons


def test_unknown_guest_is_not_found(served: Served) -> None:
    client = served.client
    asks = (client.guest, client.stop, client.start, client.restart, client.kill, client.delete)
    for ask in (*asks, lambda name: client.send_command(name, "mac", 1), lambda name: client.wait_ready(name, 1)):
        with pytest.raises(NotFound, match="no guest named nobody"):
            ask("nobody")
    with pytest.raises(NotFound, match="quarantine"):
        client.clear_quarantine("nobody", force=True)


def test_console_command_of_several_lines_is_refused(served: Served) -> None:
    with pytest.raises(RequestError, match="line"):
        served.client.send_command("nobody", "mac\nhalt", 1)


def test_commands_show_the_responses_of_the_manager(served: Served) -> None:
    run, socket = CliRunner().invoke, ["--socket", str(served.path)]
    assert "no guests" in run(nohype, ["guest", "list", *socket]).output
    assert "0000:" in run(nohype, ["survey", *socket]).output
    audit = run(nohype, ["audit", *socket], standalone_mode=False)
    assert audit.return_value == 1
    assert "CPU 3 is shared" in audit.output
    plan = run(nohype, ["guest", "create", "one", "--memory", "256M", "--image", "minimal", "--plan", *socket])
    assert "planned" in plan.output


def test_second_manager_on_the_socket_is_refused(served: Served) -> None:
    with pytest.raises(HostError, match="another manager listens on"):
        open_socket(served.path)


def test_socket_admits_only_root_and_the_group(served: Served) -> None:
    assert served.path.stat().st_mode & 0o777 == 0o660


def test_socket_of_a_killed_manager_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "left.sock"
    open_socket(path).close()
    open_socket(path).close()


def test_socket_of_a_starting_manager_is_not_replaced(tmp_path: Path) -> None:
    with open_socket(tmp_path / "early.sock"), pytest.raises(HostError, match="another manager listens on"):
        open_socket(tmp_path / "early.sock")


def test_internal_error_is_one_error_without_details(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(OrchestratorError, match="internal error in the manager") as caught:
        served.client.audit(FAULT)
    assert (caught.value.code, "journalctl" in caught.value.hint) == ("internal", True)
    assert "ZeroDivisionError" not in str(caught.value)
    deadline = time.monotonic() + 60
    while not caplog.records and time.monotonic() < deadline:  # it is logged after it was answered
        time.sleep(0.01)
    assert [bool(record.exc_info) for record in caplog.records] == [True]


def test_empty_name_is_refused(served: Served) -> None:
    for ask in (served.client.guest, served.client.delete):
        with pytest.raises(OrchestratorError):
            ask("")


def test_missing_manager_is_reported_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(OrchestratorError, match="cannot reach the manager") as caught:
        Client(tmp_path / "none.sock").guests()
    assert "systemctl status nohyped" in caught.value.hint


def test_64_concurrent_clients_get_only_success_or_no_room(served: Served) -> None:
    seen: list[object] = []

    def work(number: int) -> None:
        name = f"guest{number}"
        try:
            served.client.create({**REQUEST, "name": name, "memory": "64M"})
            seen.append("made")
            served.client.delete(name)
        except OrchestratorError as error:
            seen.append(error.code)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 64
    assert set(seen) <= {"made", "no-room"}


def test_client_imports_only_the_standard_library() -> None:
    """`nohype` must start quickly."""
    code = "import sys, orchestrator.client.client; print(sorted({name.split('.')[0] for name in sys.modules}))"
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert not {"pydantic", "fastapi", "starlette", "uvicorn", "h11", "anyio"} & set(eval(done.stdout))


def test_slow_manager_is_reported_to_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while systemd holds the socket of one that does not come up. What may take long is not."""
    monkeypatch.setattr(client_module, "SLOW_SECONDS", 0.1)
    path, told = tmp_path / "socket", threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        client = Client(path, on_slow=told.set)
        asking = threading.Thread(target=lambda: pytest.raises(OrchestratorError, client.version), daemon=True)
        asking.start()
        assert told.wait(10)
        listener.accept()[0].close()
        asking.join(10)
    assert not asking.is_alive()
