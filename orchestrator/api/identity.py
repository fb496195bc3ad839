"""Identifies callers: reads a peer's credentials from the kernel or TLS, and finds the identity assigned in the configuration."""

from __future__ import annotations

import functools
import grp
import hashlib
import hmac
import ipaddress
import os
import pwd
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from orchestrator.config import CERTIFICATE_NAMES, DaemonConfig, Principals, TenantConfig
from orchestrator.errors import Forbidden, RequestError, Unauthorized
from orchestrator.model.access import Identity, Role

# include/uapi/asm-generic/socket.h; not in the socket module.
_SO_PEERGROUPS = 59
# The maximum buffer of Python's getsockopt; with more groups, only the main one is known.
_GROUPS_ROOM = 1024
_ROOT = 0
_SHOWN = 200
_TITLES = {"commonName": "CN", "DNS": "DNS", "URI": "URI", "email": "email"}


@dataclass(frozen=True)
class Peer:
    """The other end of a connection.

    Attributes:
        uid: user of the connecting process of a Unix socket; None over TCP.
        gids: groups of that process, supplementary ones included.
        certificate: names in the verified client certificate, as in the configuration (``CN:alice``); None without one.
        address: IP address over TCP.
    """

    uid: int | None = None
    gids: frozenset[int] = frozenset()
    certificate: frozenset[str] | None = None
    address: str = ""

    @property
    def local(self) -> bool:
        return self.uid is not None

    @property
    def rate_limit_key(self) -> str:
        # Of an IPv6 address the first 64 bits count: a site assigns the others freely (RFC 4291 2.5.1, RFC 8981).
        return f"user {self.uid}" if self.uid is not None else f"address {_network(self.address)}"


def read_peer(connection: socket.socket, certificate: Mapping[str, object] | None) -> Peer:
    """Reads the peer's credentials from the kernel (unix(7), SO_PEERCRED; SO_PEERGROUPS: net/core/sock.c).

    ``certificate`` is the result of ``getpeercert``: None or empty without a verified certificate.
    """
    if connection.family != socket.AF_UNIX:
        return Peer(certificate=read_names(certificate) if certificate else None, address=_address(connection))
    _, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        data = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_ROOM)
    except OSError:
        data = b""
    groups = struct.unpack(f"{len(data) // 4}I", data)
    return Peer(uid=uid & 0xFFFFFFFF, gids=frozenset({gid & 0xFFFFFFFF, *groups}))


def read_names(certificate: Mapping[str, object]) -> frozenset[str]:
    """The common names and alternative names of a certificate as returned by ``getpeercert``."""
    subject: Iterable[Iterable[tuple[str, str]]] = certificate.get("subject", ())  # type: ignore[assignment]
    alternative: Iterable[tuple[str, str]] = certificate.get("subjectAltName", ())  # type: ignore[assignment]
    pairs = [*(pair for part in subject for pair in part), *alternative]
    return frozenset(f"{_TITLES[title]}:{value}" for title, value in pairs if title in _TITLES)


@dataclass(frozen=True)
class IdentityMap:
    """The configured identities."""

    group_is_operator: bool  # every user who can connect to the Unix socket is an operator
    users: Mapping[int, Identity]
    groups: Mapping[int, tuple[Identity, ...]]  # a member's identity gets the name of the user
    certificates: Mapping[str, Identity]  # by name in the certificate
    tokens: Mapping[bytes, Identity]  # by SHA-256 of the token


def build_identity_map(config: DaemonConfig) -> IdentityMap:
    """Raises RequestError if a user or group of the configuration does not exist or has two roles."""
    roles: list[tuple[str, Principals, Identity]] = []
    if config.access:
        roles += [("access.operators", config.access.operators, Identity("", Role.OPERATOR))]
        roles += [("access.viewers", config.access.viewers, Identity("", Role.VIEWER))]
    for name, tenant in config.tenants.items():
        roles.append((f"tenants.{name}", tenant, Identity("", Role.TENANT, name, tenant.quota, tenant.boot_servers)))
    users: dict[int, Identity] = {}
    groups: dict[int, tuple[Identity, ...]] = {}
    certificates: dict[str, Identity] = {}
    for where, people, role in roles:
        for user in people.users:
            uid = _find_user(user, where)
            if uid == _ROOT and role.role is not Role.OPERATOR:
                raise RequestError(f"{where}.users: {user!r} is root, which is always an operator", "remove it")
            if users.setdefault(uid, replace(role, name=user)) != replace(role, name=user):
                raise RequestError(f"{where}.users: {user!r} already has a role", "assign one role per user")
        for group in people.groups:
            gid = _find_group(group, where)
            if groups.setdefault(gid, (role,)) != (role,):
                raise RequestError(f"{where}.groups: {group!r} already has a role", "assign one role per group")
        certificates |= {certificate: replace(role, name=certificate) for certificate in people.certificates}
    tokens = {}
    for name, token in config.tokens.items():
        tenant = config.tenants[token.tenant] if token.tenant else TenantConfig()
        tokens[bytes.fromhex(token.hash.removeprefix("sha256:"))] = Identity(
            f"token {name}", token.role, token.tenant, tenant.quota, tenant.boot_servers
        )
    return IdentityMap(config.access is None and not config.tenants, users, groups, certificates, tokens)


def identify(identities: IdentityMap, peer: Peer, authorization: str | None) -> Identity:
    """Returns the identity of the user on a Unix socket; over TCP that of the bearer token, otherwise of the client certificate.

    Raises:
        Unauthorized: no known token and no certificate was presented.
        Forbidden: the user or certificate is valid, but has no role.
    """
    if peer.uid is not None:
        return _identify_user(identities, peer.uid, peer.gids)
    if authorization is not None:
        return _identify_bearer(identities, authorization)
    if peer.certificate is None:
        raise Unauthorized("no credentials were presented", "use a client certificate or a bearer token")
    if not peer.certificate:
        raise Forbidden(
            f"the client certificate has no name of a supported kind ({', '.join(CERTIFICATE_NAMES)})",
            "use a certificate with a common name, or with an alternative name of type DNS, URI or email",
        )
    found = {identities.certificates[name] for name in peer.certificate & identities.certificates.keys()}
    if len({replace(identity, name="") for identity in found}) > 1:
        raise Forbidden("the certificate's names map to different roles", "map them to one role in [access] or [tenants]")
    if not found:
        names = _shorten(", ".join(sorted(peer.certificate)))
        raise Forbidden(f"no role is assigned to certificate {names}", "add it to [access] or [tenants]")
    return min(found, key=lambda identity: identity.name)


def acts_for(identities: IdentityMap, name: str, tenant: str) -> bool:
    """Whether the caller named in an event belongs to a tenant. Can query the host's name service (nsswitch.conf(5))."""
    named = (*identities.users.values(), *identities.certificates.values(), *identities.tokens.values())
    if any((identity.name, identity.tenant) == (name, tenant) for identity in named):
        return True
    try:
        user = pwd.getpwnam(name)
        groups = frozenset(os.getgrouplist(name, user.pw_gid))
        return _identify_user(identities, user.pw_uid, groups).tenant == tenant
    except (KeyError, ValueError, Forbidden):
        return False


def hash_token(token: str) -> bytes:
    """The stored form of a token. A plain hash is sufficient: a token has 256 random bits."""
    return hashlib.sha256(token.encode()).digest()


def _identify_user(identities: IdentityMap, uid: int, gids: frozenset[int]) -> Identity:
    name = _name_user(uid)
    if uid == _ROOT:
        return Identity(name, Role.OPERATOR)
    if uid in identities.users:
        return identities.users[uid]
    roles = {role for gid in gids for role in identities.groups.get(gid, ())}
    # The operator role includes all others.
    chosen = {role for role in roles if role.role is Role.OPERATOR} or roles
    if len(chosen) > 1:
        several = ", ".join(sorted(role.tenant or str(role.role) for role in chosen))
        raise Forbidden(f"user {name} is in groups with different roles: {several}", "assign the user a role directly")
    if chosen:
        return replace(chosen.pop(), name=name)
    if identities.group_is_operator:
        return Identity(name, Role.OPERATOR)
    raise Forbidden(f"no role is assigned to user {name}", "add the user or a group to [access] or [tenants]")


def _identify_bearer(identities: IdentityMap, authorization: str) -> Identity:
    scheme, _, token = authorization.strip().partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthorized(f"unsupported Authorization scheme {scheme[:20]!r}", "send `Authorization: Bearer TOKEN`")
    if not token.strip():
        # Also if the configuration contains the hash of the empty token.
        raise Unauthorized("the Authorization field has no token", "send `Authorization: Bearer TOKEN`")
    digest = hash_token(token.strip())
    found = None
    # All are compared, each in constant time.
    for known, identity in identities.tokens.items():
        if hmac.compare_digest(known, digest):
            found = identity
    if not found:
        raise Unauthorized("unknown token", "check for typos; the token may have been revoked")
    return found


def _find_user(text: str, where: str) -> int:
    if text.isdecimal():
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError):
        raise RequestError(f"{where}.users: user {text!r} does not exist", "see `getent passwd`") from None


def _find_group(text: str, where: str) -> int:
    if text.isdecimal():
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except (KeyError, ValueError):
        raise RequestError(f"{where}.groups: group {text!r} does not exist", "see `getent group`") from None


@functools.lru_cache(maxsize=256)
def _name_user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _shorten(text: str) -> str:
    # Names in a certificate have any length, and can contain control characters.
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in shown)


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))


def _address(connection: socket.socket) -> str:
    try:
        return str(connection.getpeername()[0])
    except OSError:
        return "unknown"  # the client has closed the connection already
