"""Who may do what, over the Unix socket: real processes of several users ask, and the kernel says who they are."""

from __future__ import annotations

import json
import os
import pwd
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api import server as api_server
from orchestrator.api.identity import hash_token
from orchestrator.images import store_lock
from tests.harness.api_server import Authority, Served, build_unverified_context, open_to_all, serve
from tests.harness.images import make_build

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")

# Users that every Debian has; nothing is done with them but to ask.
ALICE, BOB, CAROL, DAVE, EVE = "daemon", "bin", "games", "nobody", "sys"
STAFF, ACME, BOLT = 4321, 4322, 4323
SETTINGS: dict[str, object] = {
    "access": {"operators": {"groups": [str(STAFF)]}, "viewers": {"users": [CAROL]}},
    "tenants": {
        "acme": {"users": [ALICE], "cores": 2, "groups": [str(ACME)]},
        "bolt": {"users": [BOB], "groups": [str(BOLT)]},
    },
}
REQUEST = {"memory": "64M", "image": "minimal"}

# It can't be told apart from `Client` by the manager; written out, as other users may not be able to read our modules.
ASK = """
import http.client, json, os, socket, sys
uid, gid, groups, path, method, target, body, headers = json.loads(sys.argv[1])
os.chdir(os.path.dirname(path))
os.setgroups(groups), os.setgid(gid), os.setuid(uid)
connection = http.client.HTTPConnection("localhost", timeout=30)
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect(os.path.basename(path))
fields = {"Content-Type": "application/json", **headers} if body is not None else headers
connection.request(method, target, None if body is None else json.dumps(body), fields)
answer = connection.getresponse()
content = answer.read()
print(json.dumps([answer.status, json.loads(content) if content else None]))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("access")
    with serve(folder, SETTINGS) as served:
        open_to_all(served.path)
        yield served


def ask(
    served: Served, user: str, method: str, target: str, body: object = None, groups: tuple[int, ...] = (), **headers: str
) -> tuple[int, Any]:
    """What the manager answers to a user: status and document."""
    who = pwd.getpwnam(user)
    arguments = [who.pw_uid, who.pw_gid, groups, str(served.path), method, target, body, headers]
    done = subprocess.run([sys.executable, "-c", ASK, json.dumps(arguments)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    status, document = json.loads(done.stdout)
    return status, document


def test_user_without_role_gets_forbidden(served: Served) -> None:
    for method, target in (("GET", "/v1/version"), ("GET", "/v1/guests"), ("DELETE", "/v1/guests/one"), ("GET", "/nix")):
        status, problem = ask(served, EVE, method, target)
        assert (status, problem["code"]) == (403, "forbidden")
        assert "sys" in problem["detail"]


def test_supplementary_group_gives_its_role(served: Served) -> None:
    assert ask(served, DAVE, "GET", "/v1/survey")[0] == 403
    assert ask(served, DAVE, "GET", "/v1/host")[0] == 403
    assert ask(served, DAVE, "GET", "/v1/survey", groups=(77, STAFF))[0] == 200


def test_user_in_groups_of_two_tenants_is_refused(served: Served) -> None:
    status, problem = ask(served, DAVE, "GET", "/v1/guests", groups=(ACME, BOLT))
    assert (status, problem["code"]) == (403, "forbidden")
    assert "acme, bolt" in problem["detail"]


def test_token_on_the_unix_socket_is_refused(served: Served) -> None:
    assert ask(served, EVE, "GET", "/v1/guests", Authorization="Bearer anything")[0] == 403


def test_viewer_reads_everything_and_changes_nothing(served: Served) -> None:
    assert ask(served, ALICE, "POST", "/v1/guests", {"name": "seen", **REQUEST})[0] == 201
    for target in ("/v1/guests", "/v1/guests/seen", "/v1/survey", "/v1/host", "/v1/audit", "/v1/quarantine", "/v1/events"):
        assert ask(served, CAROL, "GET", target)[0] == 200, target
    assert ask(served, CAROL, "POST", "/v1/plans", {"name": "other", **REQUEST})[0] == 200
    changes = [
        ("POST", "/v1/guests", {"name": "other", **REQUEST}),
        ("POST", "/v1/guests/seen/tell", {"line": "halt"}),
        ("POST", "/v1/guests/seen/kill", None),
        ("POST", "/v1/guests/seen/stop", {"timeout": 1}),
        ("POST", "/v1/guests/seen/start", None),
        ("POST", "/v1/guests/seen/restart", None),
        ("DELETE", "/v1/guests/seen", None),
        ("DELETE", "/v1/quarantine/seen", None),
        ("GET", "/v1/audit?frames=10", None),
    ]
    for method, target, body in changes:
        status, problem = ask(served, CAROL, method, target, body)
        assert (status, problem["code"]) == (403, "forbidden"), target
    served.client.delete("seen")


def test_tenant_cannot_see_guests_of_another_tenant(served: Served) -> None:
    assert ask(served, ALICE, "POST", "/v1/guests", {"name": "secret", "id": "shared-id", **REQUEST})[0] == 201
    before = served.client.guest("secret")
    assert before["owner"] == "acme"
    assert ask(served, BOB, "GET", "/v1/guests") == (200, [])
    changes = ["start", "stop", "restart", "kill"]
    asks: list[tuple[str, str, object]] = [("POST", f"/v1/guests/secret/{change}", None) for change in changes]
    asks += [("GET", "/v1/guests/secret", None), ("DELETE", "/v1/guests/secret", None)]
    asks += [("GET", "/v1/guests/secret/ready?timeout=1", None), ("POST", "/v1/guests/secret/tell", {"line": "x"})]
    for method, target, body in asks:
        status, problem = ask(served, BOB, method, target, body)
        assert (status, problem["code"]) == (404, "not-found"), target
        nobody = ask(served, BOB, method, target.replace("secret", "nobody"), body)[1]
        assert problem["detail"] == nobody["detail"].replace("nobody", "secret"), "the answer tells that it is there"
    # The id is the caller's own: another tenant's stands for something else.
    status, made = ask(served, BOB, "POST", "/v1/guests", {"name": "bolts", "id": "shared-id", **REQUEST})
    assert (status, made["owner"]) == (201, "bolt")
    assert {event["subject"] for event in ask(served, BOB, "GET", "/v1/events?after=0")[1]} == {"bolts"}
    status, problem = ask(served, BOB, "POST", "/v1/guests", {"name": "secret", **REQUEST})
    assert (status, problem["code"]) == (409, "conflict")
    assert "acme" not in json.dumps(problem)
    for name in ("survey", "audit", "quarantine", "metrics"):
        assert ask(served, BOB, "GET", f"/v1/{name}")[0] == 403
    assert served.client.guest("secret") == before
    served.client.delete("secret")
    served.client.delete("bolts")


def test_refusal_for_a_tenant_names_only_its_own_guests(served: Served) -> None:
    assert ask(served, ALICE, "POST", "/v1/guests", {"name": "tattletale", "cores": 2, **REQUEST})[0] == 201
    status, problem = ask(served, BOB, "POST", "/v1/plans", {"name": "big", "cores": 7, **REQUEST})
    assert (status, problem["code"]) == (409, "no-room")
    assert problem["reasons"]
    placement = {"cpus": ",".join(served.client.guest("tattletale")["cores"])}
    taken, refused = ask(served, BOB, "POST", "/v1/plans", {"name": "there", "cores": 2, "placement": placement, **REQUEST})
    assert taken == 409
    for said in (problem, refused):
        assert not {"tattletale", "acme"} & set(json.dumps(said).replace('"', " ").replace("'", " ").split()), said
    served.client.delete("tattletale")


def test_events_of_a_tenant_hide_names_of_other_users(served: Served) -> None:
    """Over the list and the stream; ALICE is named, DAVE is in a group of the tenant, EVE in one of the operators."""
    assert ask(served, ALICE, "POST", "/v1/guests", {"name": "ours", **REQUEST})[0] == 201
    assert ask(served, DAVE, "POST", "/v1/guests/ours/kill", groups=(STAFF,))[0] == 200
    assert ask(served, ALICE, "POST", "/v1/guests/ours/start")[0] == 200
    served.client.delete("ours")
    mine = [event for event in ask(served, ALICE, "GET", "/v1/events?after=0")[1] if event["subject"] == "ours"]
    assert {event["who"] for event in mine} == {ALICE, "operator"}
    assert [event["who"] for event in mine if event["kind"] in ("stopped", "deleted")] == ["operator", "operator"]
    whole = [event["who"] for event in served.client.events(0) if event["subject"] == "ours"]
    assert {ALICE, DAVE, "root"} == set(whole)


def test_event_stream_of_a_tenant_hides_names_of_other_users(served: Served) -> None:
    assert ask(served, ALICE, "POST", "/v1/guests", {"name": "ours", **REQUEST})[0] == 201
    served.client.delete("ours")
    who = pwd.getpwnam(ALICE)
    arguments = [who.pw_uid, who.pw_gid, (), str(served.path), "GET", "/v1/events/stream?after=0", None, {}]
    script = (
        ASK[: ASK.index("answer = connection")]
        + """
answer = connection.getresponse()
for line in answer:
    print(line.decode(), end="", flush=True)
    if b'"deleted"' in line and b'"ours"' in line:
        break
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(arguments)], capture_output=True, text=True, cwd="/", timeout=60
    )
    events = [json.loads(line.removeprefix("data: ")) for line in done.stdout.splitlines() if line.startswith("data: ")]
    assert events[-1]["who"] == "operator"
    assert {event["who"] for event in events} <= {ALICE, "operator", "manager"}


def test_missing_image_hides_the_store_from_a_tenant(served: Served) -> None:
    for target in ("/v1/plans", "/v1/guests"):
        status, problem = ask(served, BOB, "POST", target, {"name": "x", "memory": "64M", "image": "none"})
        assert (status, problem["code"]) == (404, "not-found")
        assert not any(word in json.dumps(problem) for word in ("minimal", str(served.world.folder), "build"))
    status, problem = ask(served, CAROL, "POST", "/v1/plans", {"name": "x", "memory": "64M", "image": "none"})
    assert (status, "minimal" in problem["detail"]) == (404, True)


def test_damaged_image_hides_the_store_from_a_tenant(served: Served) -> None:
    (make_build(served.world.folder / "images/damaged") / "vmlinuz").unlink()
    wanted = {"name": "x", "memory": "128M", "image": "damaged"}
    for target in ("/v1/plans", "/v1/guests"):
        status, problem = ask(served, BOB, "POST", target, wanted)
        assert (status, problem["code"]) == (409, "image")
        assert "missing vmlinuz" in problem["detail"]
        assert str(served.world.folder) not in json.dumps(problem)
    assert str(served.world.folder) in json.dumps(ask(served, CAROL, "POST", "/v1/plans", wanted)[1])


def test_image_store_that_is_locked_is_reported_without_its_path(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_lock, "CLAIM_SECONDS", 0.0)
    with store_lock.removing_builds(served.world.folder / "images"):
        status, problem = ask(served, BOB, "POST", "/v1/guests", {"name": "x", **REQUEST})
    assert (status, problem["code"]) == (409, "image")
    assert "is locked by another process" in problem["detail"]
    assert str(served.world.folder) not in json.dumps(problem)
    assert not [claim for claim in served.ledger.read().claims if claim.plan.name == "x"]


def test_claimed_vf_hides_its_owner_from_a_tenant(served: Served) -> None:
    """Of a guest's, of one that is not there, and of another device the refusal is the same."""
    assert ask(served, ALICE, "POST", "/v1/guests", {"name": "owner", **REQUEST})[0] == 201
    taken = served.client.guest("owner")["vf"]
    said = set()
    for vf in (taken["address"], taken["pf"], "0000:7f:1f.7"):
        body = {"name": "there", "placement": {"cpus": "6", "vf": vf}, **REQUEST}
        status, problem = ask(served, BOB, "POST", "/v1/plans", body)
        assert (status, problem["code"]) == (409, "no-room")
        said.add(json.dumps(problem).replace(vf, "VF"))
        assert "VF" in problem["reasons"][0]
    assert len(said) == 1, said
    body = {"name": "there", "placement": {"cpus": "6", "vf": taken["address"]}, **REQUEST}
    assert f"VF {taken['address']} is owned by a guest" in json.dumps(ask(served, CAROL, "POST", "/v1/plans", body)[1])
    served.client.delete("owner")


def test_tenant_above_its_quota_is_refused(served: Served) -> None:
    assert ask(served, ALICE, "POST", "/v1/guests", {"name": "first", "cores": 2, **REQUEST})[0] == 201
    status, problem = ask(served, ALICE, "POST", "/v1/guests", {"name": "second", **REQUEST})
    assert (status, problem["code"]) == (409, "quota")
    assert "3 of 2 cores" in problem["reasons"][0]
    served.client.delete("first")


def test_configuration_without_roles_admits_all_users_of_the_socket(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        open_to_all(served.path)
        assert ask(served, EVE, "GET", "/v1/survey")[0] == 200
        assert ask(served, EVE, "POST", "/v1/guests", {"name": "one", **REQUEST})[0] == 201
        assert ask(served, EVE, "GET", "/v1/events?after=0")[1][0]["who"] == "sys"


def test_idle_tls_connections_lock_out_no_other_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_server, "MAX_CONNECTIONS_PER_CLIENT", 4)
    monkeypatch.setattr(api_server, "MAX_CONNECTIONS", 12)
    certificate, key = Authority(tmp_path).issue("manager", addresses=("127.0.0.1",))
    settings = {
        "api": {"listen": "127.0.0.1:0", "certificate": str(certificate), "key": str(key)},
        "access": {"operators": {"users": [ALICE]}},
        "tokens": {"ci": {"hash": f"sha256:{hash_token('t').hex()}", "role": "viewer"}},
    }
    strangers = build_unverified_context()
    with serve(tmp_path, settings) as served, ExitStack() as held:
        open_to_all(served.path)
        port = int(served.url.rpartition(":")[2])
        for number in range(4 * 4):
            raw = socket.create_connection(("127.0.0.1", port), 10, source_address=(f"127.0.0.{2 + number // 4}", 0))
            held.enter_context(strangers.wrap_socket(raw))
        deadline = time.monotonic() + 10
        while len(served.server.server_state.connections) < 12:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert ask(served, ALICE, "GET", "/v1/guests") == (200, [])
        # Nor are others locked out of the TLS port: the oldest idle connection gives way.
        with socket.create_connection(("127.0.0.1", port), 10, source_address=("127.0.0.9", 0)) as raw:
            with strangers.wrap_socket(raw) as one:
                one.sendall(b"GET /v1/version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert one.recv(100).startswith(b"HTTP/1.1 401")
        assert len(served.server.server_state.connections) <= 12
