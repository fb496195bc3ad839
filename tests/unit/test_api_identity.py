"""Who somebody is: peers, certificates, tokens, and what the configuration makes of them."""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.identity import IdentityMap, Peer, acts_for, build_identity_map, hash_token, identify, read_names, read_peer
from orchestrator.config import DaemonConfig, read_config
from orchestrator.errors import Forbidden, RequestError, Unauthorized
from orchestrator.model.access import Quota, Role
from orchestrator.values import Size

HOST = {"housekeeping": "0-1", "uplinks": ["nic0"]}
ZEROS = "sha256:" + "0" * 64
TLS = {"listen": "[::1]:8443", "certificate": "c", "key": "k"}


def identities(**settings: Any) -> IdentityMap:
    return build_identity_map(DaemonConfig.model_validate({"host": HOST, **settings}))


def user(uid: int, *gids: int) -> Peer:
    return Peer(uid=uid, gids=frozenset(gids))


def test_by_default_the_socket_decides() -> None:
    assert identify(identities(), user(1234), None).role is Role.OPERATOR
    assert identify(identities(), user(1234), None).name == "user 1234"
    with pytest.raises(Unauthorized):
        identify(identities(), Peer(address="192.0.2.1"), None)


@pytest.mark.parametrize("settings", [{"access": {}}, {"tenants": {"acme": {}}}])
def test_with_access_or_tenants_only_root_and_who_is_named(settings: dict[str, Any]) -> None:
    with pytest.raises(Forbidden, match="no role"):
        identify(identities(**settings), user(1234), None)
    root = identify(identities(**settings), user(0), None)
    assert (root.role, root.name) == (Role.OPERATOR, "root")


def test_a_named_user_comes_before_groups_and_operators_before_others() -> None:
    known = identities(
        access={"operators": {"groups": ["10"]}, "viewers": {"groups": ["20"]}},
        tenants={"acme": {"users": ["1001"], "groups": ["30"], "cores": 4, "memory": "8G", "vfs": 2}, "bolt": {"groups": ["40"]}},
    )
    acme = identify(known, user(1001, 10, 20), None)
    assert (acme.role, acme.tenant, acme.quota) == (Role.TENANT, "acme", Quota(4, Size.parse("8G"), 2))
    assert identify(known, user(1002, 20, 10, 30), None).role is Role.OPERATOR
    assert identify(known, user(1002, 20), None).role is Role.VIEWER
    assert identify(known, user(1002, 40), None).tenant == "bolt"
    for gids in ((30, 40), (20, 30)):
        with pytest.raises(Forbidden, match="different roles"):
            identify(known, user(1002, *gids), None)


def test_certificates_by_any_of_their_names() -> None:
    known = identities(
        api={**TLS, "client_ca": "ca"},
        access={"operators": {"certificates": ["CN:root-host", "DNS:ops.example"]}},
        tenants={"acme": {"certificates": ["alice", "email:alice@acme.example"]}},
    )

    def who(*names: str) -> Any:
        return identify(known, Peer(address="192.0.2.1", certificate=frozenset(names)), None)

    assert who("CN:alice").tenant == "acme"
    assert who("CN:alice", "email:alice@acme.example").tenant == "acme"
    assert who("DNS:ops.example", "CN:x").role is Role.OPERATOR
    with pytest.raises(Forbidden, match="different roles"):
        who("DNS:ops.example", "CN:alice")
    # A name counts as what it is: a DNS name "alice" is not the common name.
    with pytest.raises(Forbidden, match="DNS:alice"):
        who("DNS:alice")


def test_names_of_a_certificate_as_python_shows_it() -> None:
    shown = {
        "subject": ((("countryName", "DE"),), (("commonName", "alice"), ("commonName", "al"))),
        "subjectAltName": (("DNS", "a.example"), ("URI", "spiffe://x"), ("email", "a@b"), ("IP Address", "192.0.2.1")),
    }
    assert read_names(shown) == {"CN:alice", "CN:al", "DNS:a.example", "URI:spiffe://x", "email:a@b"}
    assert read_names({}) == frozenset()


def test_a_certificate_without_a_name_is_not_the_same_as_none() -> None:
    known = identities(api={**TLS, "client_ca": "ca"}, tenants={"acme": {"certificates": ["alice"]}})
    with pytest.raises(Unauthorized, match="no credentials were presented"):
        identify(known, Peer(address="192.0.2.1"), None)
    with pytest.raises(Forbidden, match="has no name of a supported kind"):
        identify(known, Peer(address="192.0.2.1", certificate=frozenset()), None)


def test_a_name_in_a_certificate_moves_no_cursor_and_is_shortened() -> None:
    known = identities(api={**TLS, "client_ca": "ca"}, tenants={"acme": {"certificates": ["alice"]}})
    with pytest.raises(Forbidden, match=r"CN:\\x1b\[2Jx+\.\.\.") as caught:
        identify(known, Peer(address="192.0.2.1", certificate=frozenset({"CN:\x1b[2J" + "x" * 5000})), None)
    assert len(str(caught.value)) < 400


def test_the_empty_token_is_never_valid() -> None:
    """Not even if the configuration had its hash, which it refuses."""
    config = DaemonConfig.model_validate(
        {"host": HOST, "api": {**TLS, "client_ca": "ca"}, "tokens": {"none": {"hash": f"sha256:{'1' * 64}", "role": "operator"}}}
    )
    empty = config.tokens["none"].model_copy(update={"hash": f"sha256:{hash_token('').hex()}"})
    known = build_identity_map(config.model_copy(update={"tokens": {"none": empty}}))
    for field in ("Bearer", "Bearer ", "bearer   ", "Bearer\t", " Bearer "):
        with pytest.raises(Unauthorized):
            identify(known, Peer(address="192.0.2.1"), field)


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("192.0.2.1", "address 192.0.2.1"),
        ("2001:db8:1:2::1", "address 2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff:ffff:ffff:ffff", "address 2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", "address 192.0.2.1"),
        ("::1", "address ::/64"),
        ("fe80::1%eth0", "address fe80::/64"),
        ("unknown", "address unknown"),
    ],
)
def test_what_connections_of_one_site_have_in_common(address: str, key: str) -> None:
    assert Peer(address=address).rate_limit_key == key


def test_a_token_counts_before_the_certificate() -> None:
    hashed = f"sha256:{hash_token('secret').hex()}"
    known = identities(
        api={**TLS, "client_ca": "ca"}, tenants={"acme": {"certificates": ["alice"]}},
        tokens={"ci": {"hash": hashed, "role": "viewer"}},
    )  # fmt: skip
    peer = Peer(address="192.0.2.1", certificate=frozenset({"CN:alice"}))
    assert identify(known, peer, "Bearer secret").role is Role.VIEWER
    assert identify(known, peer, "bearer  secret ").name == "token ci"
    for wrong in ("Bearer wrong", "Bearer", "", "Basic c2VjcmV0", "secret", "Bearer séc"):
        with pytest.raises(Unauthorized):
            identify(known, peer, wrong)


def test_who_acts_for_a_tenant() -> None:
    known = identities(
        api={**TLS, "client_ca": "ca"},
        access={"operators": {"users": ["bin"], "certificates": ["CN:boss"]}},
        tenants={"acme": {"users": ["daemon"], "certificates": ["alice"], "groups": ["games"]}, "bolt": {"users": ["sys"]}},
        tokens={
            "ci": {"hash": ZEROS, "role": "tenant", "tenant": "acme"},
            "root": {"hash": ZEROS[:-1] + "1", "role": "operator"},
        },
    )
    assert all(acts_for(known, name, "acme") for name in ("daemon", "CN:alice", "token ci", "games"))
    others = ("bin", "sys", "root", "CN:boss", "token root", "nobody", "no-such-user", "operator", "", "a\x00b")
    assert not any(acts_for(known, name, "acme") for name in others)
    assert not any(acts_for(identities(), name, "acme") for name in ("root", "daemon"))


def test_the_kernel_says_who_is_at_the_other_end() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        peer = read_peer(ours, None)
    assert (peer.uid, peer.gids) == (os.getuid(), {os.getgid(), *os.getgroups()})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokens": {"ci": {"hash": ZEROS, "role": "tenant", "tenant": "nix"}}}, r"tokens\.ci: \[tenants\.nix\] does not exist"),
        ({"tokens": {"ci": {"hash": ZEROS, "role": "tenant"}}}, r"tokens\.ci: a tenant is required"),
        ({"tokens": {"ci": {"hash": ZEROS, "role": "viewer", "tenant": "acme"}}}, r"tokens\.ci: a tenant is required"),
        ({"tokens": {"ci": {"hash": "0" * 64, "role": "viewer"}}}, r"tokens\.ci\.hash"),
        ({"tokens": {"ci": {"hash": ZEROS, "role": "king"}}}, r"tokens\.ci\.role"),
        ({"tokens": {"low": {"hash": ZEROS, "role": "viewer"}, "high": {"hash": ZEROS, "role": "operator"}}},
         r"tokens\.high: same hash as tokens\.low"),
        ({"tenants": {"a": {"users": ["x"]}, "b": {"users": ["x"]}}}, r"tenants\.b\.users: 'x' is already in tenants\.a"),
        ({"tenants": {"a": {"certificates": ["x"]}, "b": {"certificates": ["CN:x"]}}}, r"'CN:x' is already in tenants\.a"),
        ({"tenants": {"A B": {}}}, "not a guest name"),
        ({"tenants": {"a": {"cores": True}}}, r"tenants\.a\.cores"),
        ({"tenants": {"a": {"cores": -1}}}, r"tenants\.a\.cores"),
        ({"tenants": {"a": {"memory": "much"}}}, r"tenants\.a\.memory"),
        ({"tenants": {"a": {"certificates": ["O:x"]}}}, "invalid certificate name"),
        ({"tenants": {"a": {"color": 1}}}, r"tenants\.a\.color"),
        ({"api": TLS}, "no credentials are configured for this port"),
        ({"api": TLS, "tenants": {"a": {"certificates": ["x"]}}}, r"api\.client_ca"),
        ({"api": {**TLS, "listen": "8443"}}, "invalid listen address"),
        ({"api": {**TLS, "listen": "host:99999"}}, "invalid listen address"),
        ({"limits": {"rate": 0}}, r"limits\.rate"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_one_clear_error(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "nohype.toml"
    file.write_text(_toml({"host": HOST, **settings}))
    with pytest.raises(RequestError, match=said) as caught:
        read_config(file)
    assert ": :" not in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"tenants": {"a": {"users": ["no-such-user"]}}}, {"access": {"viewers": {"groups": ["no-such-group"]}}}]
)
def test_users_and_groups_must_be_there(settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="(user|group) 'no-such"):
        identities(**settings)


def test_one_user_by_name_and_number_has_one_role() -> None:
    with pytest.raises(RequestError, match="already has a role"):
        identities(tenants={"a": {"users": ["daemon"]}, "b": {"users": [str(pwd.getpwnam("daemon").pw_uid)]}})


def _toml(value: Any, path: str = "") -> str:
    """Enough of TOML for these tests."""
    lines, tables = [], []
    for name, one in value.items():
        key = f'"{name}"'
        if isinstance(one, dict):
            tables.append(_toml(one, f"{path}.{key}" if path else key))
        else:
            lines.append(f"{key} = {str(one).lower() if isinstance(one, bool) else repr(one)}")
    return "\n".join([f"[{path}]" if path else "", *lines, *tables])
