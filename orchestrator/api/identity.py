"""Who asks: what the kernel or TLS tells of the other end of a connection, and whom the configuration makes of it."""

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

from orchestrator.config import CERTIFICATE_NAMES, DaemonConfig, Principals
from orchestrator.errors import Forbidden, RequestError, Unauthorized
from orchestrator.model.access import Identity, Role

# include/uapi/asm-generic/socket.h; the socket module does not know it.
_SO_PEERGROUPS = 59
# The most that Python's getsockopt gives room for; who is in more groups is known by the main one only.
_GROUPS_ROOM = 1024
_ROOT = 0
_SHOWN = 200
_TITLES = {"commonName": "CN", "DNS": "DNS", "URI": "URI", "email": "email"}


@dataclass(frozen=True)
class Peer:
    """The other end of a connection.

    Attributes:
        uid: user at the other end of a Unix socket when it was connected; None over TCP.
        gids: that process's groups, supplementary ones included.
        certificate: names in the client certificate that TLS has verified, as in the configuration (``CN:alice``); None without
            such a certificate.
        address: IP address over TCP.
    """

    uid: int | None = None
    gids: frozenset[int] = frozenset()
    certificate: frozenset[str] | None = None
    address: str = ""

    @property
    def local(self) -> bool:
        """Whether it came over the Unix socket."""
        return self.uid is not None

    @property
    def rate_limit_key(self) -> str:
        """What the connections of one user, or of one address on the network, have in common.

        Of an IPv6 address the first 64 bits count: a site assigns the others as it likes (RFC 4291 2.5.1, RFC 8981).
        """
        return f"user {self.uid}" if self.uid is not None else f"address {_network(self.address)}"


def read_peer(connection: socket.socket, certificate: Mapping[str, object] | None) -> Peer:
    """Asks the kernel who is at the other end (unix(7), SO_PEERCRED; SO_PEERGROUPS: net/core/sock.c).

    Args:
        certificate: what ``ssl.SSLSocket.getpeercert`` gives; None or empty without a verified one.
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
    """The names in a certificate as ``getpeercert`` shows it: common names of the subject, and alternative names."""
    subject: Iterable[Iterable[tuple[str, str]]] = certificate.get("subject", ())  # type: ignore[assignment]
    alternative: Iterable[tuple[str, str]] = certificate.get("subjectAltName", ())  # type: ignore[assignment]
    pairs = [*(pair for part in subject for pair in part), *alternative]
    return frozenset(f"{_TITLES[title]}:{value}" for title, value in pairs if title in _TITLES)


@dataclass(frozen=True)
class IdentityMap:
    """Everybody whom the configuration knows.

    Attributes:
        group_is_operator: whoever can open the Unix socket is an operator.
        users, groups: by number; a group's members get the user's name.
        certificates: by name in the certificate.
        tokens: SHA-256 of each token.
    """

    group_is_operator: bool
    users: Mapping[int, Identity]
    groups: Mapping[int, tuple[Identity, ...]]
    certificates: Mapping[str, Identity]
    tokens: Mapping[bytes, Identity]


def build_identity_map(config: DaemonConfig) -> IdentityMap:
    """Looks up the users and groups that the configuration names.

    Raises:
        RequestError: there is no such user or group.
    """
    roles: list[tuple[str, Principals, Identity]] = []
    if config.access:
        roles += [("access.operators", config.access.operators, Identity("", Role.OPERATOR))]
        roles += [("access.viewers", config.access.viewers, Identity("", Role.VIEWER))]
    for name, tenant in config.tenants.items():
        roles.append((f"tenants.{name}", tenant, Identity("", Role.TENANT, name, tenant.quota)))
    users: dict[int, Identity] = {}
    groups: dict[int, tuple[Identity, ...]] = {}
    certificates: dict[str, Identity] = {}
    for where, people, role in roles:
        for user in people.users:
            uid = _find_user(user, where)
            if uid == _ROOT and role.role is not Role.OPERATOR:
                raise RequestError(f"{where}.users: {user!r} is root, who is always an operator", "name another user")
            if users.setdefault(uid, replace(role, name=user)) != replace(role, name=user):
                raise RequestError(f"{where}.users: {user!r} has a role already", "a user has one role")
        for group in people.groups:
            gid = _find_group(group, where)
            if groups.setdefault(gid, (role,)) != (role,):
                raise RequestError(f"{where}.groups: {group!r} has a role already", "a group has one role")
        certificates |= {one: replace(role, name=one) for one in people.certificates}
    tokens = {}
    for name, token in config.tokens.items():
        quota = config.tenants[token.tenant].quota if token.tenant else Identity("", token.role).quota
        tokens[bytes.fromhex(token.hash.removeprefix("sha256:"))] = Identity(f"token {name}", token.role, token.tenant, quota)
    return IdentityMap(config.access is None and not config.tenants, users, groups, certificates, tokens)


def identify(identities: IdentityMap, peer: Peer, authorization: str | None) -> Identity:
    """Who asks. Over a Unix socket the kernel decides, over TCP a bearer token or else the client certificate.

    Args:
        authorization: the request's Authorization field, None without one.

    Raises:
        Unauthorized: neither a known token nor a certificate was shown.
        Forbidden: the user or certificate is genuine, but has no role here.
    """
    if peer.uid is not None:
        return _identify_user(identities, peer.uid, peer.gids)
    if authorization is not None:
        return _identify_bearer(identities, authorization)
    if peer.certificate is None:
        raise Unauthorized(
            "no credentials were presented", "present a client certificate, or a token: `Authorization: Bearer ...`"
        )
    if not peer.certificate:
        raise Forbidden(
            f"the client certificate has no name of a kind that is known here ({', '.join(CERTIFICATE_NAMES)})",
            "use a certificate with a common name, or with an alternative name of type DNS, URI or email",
        )
    found = {identities.certificates[name] for name in peer.certificate & identities.certificates.keys()}
    if len({replace(one, name="") for one in found}) > 1:
        raise Forbidden(
            "the names in your certificate have different roles here", "the operator can change [access] and [tenants]"
        )
    if not found:
        names = _shorten(", ".join(sorted(peer.certificate)))
        raise Forbidden(f"your certificate ({names}) has no role here", "the operator can name it in [access] or [tenants]")
    return min(found, key=lambda one: one.name)


def acts_for(identities: IdentityMap, name: str, tenant: str) -> bool:
    """Whether the caller whom an event names acts for a tenant. May ask the host's name service (nsswitch.conf(5))."""
    named = (*identities.users.values(), *identities.certificates.values(), *identities.tokens.values())
    if any((one.name, one.tenant) == (name, tenant) for one in named):
        return True
    try:
        user = pwd.getpwnam(name)
        groups = frozenset(os.getgrouplist(name, user.pw_gid))
        return _identify_user(identities, user.pw_uid, groups).tenant == tenant
    except (KeyError, ValueError, Forbidden):
        return False


def hash_token(token: str) -> bytes:
    """What is kept of a token. One hash is enough: it has 256 random bits, so there is nothing to guess."""
    return hashlib.sha256(token.encode()).digest()


def _identify_user(identities: IdentityMap, uid: int, gids: frozenset[int]) -> Identity:
    name = _name_user(uid)
    if uid == _ROOT:
        return Identity(name, Role.OPERATOR)
    if uid in identities.users:
        return identities.users[uid]
    roles = {role for gid in gids for role in identities.groups.get(gid, ())}
    # Who is in the operators' group needs no other.
    chosen = {role for role in roles if role.role is Role.OPERATOR} or roles
    if len(chosen) > 1:
        several = ", ".join(sorted(role.tenant or str(role.role) for role in chosen))
        raise Forbidden(
            f"user {name} is in groups of different roles: {several}", "the operator can name the user in one of them"
        )
    if chosen:
        return replace(chosen.pop(), name=name)
    if identities.group_is_operator:
        return Identity(name, Role.OPERATOR)
    raise Forbidden(f"user {name} has no role here", "the operator can name the user, or a group, in [access] or [tenants]")


def _identify_bearer(identities: IdentityMap, authorization: str) -> Identity:
    scheme, _, token = authorization.strip().partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthorized(f"the Authorization scheme {scheme[:20]!r} is not known", "write `Authorization: Bearer ...`")
    if not token.strip():
        # Whatever the configuration holds: its hash may be that of nothing at all.
        raise Unauthorized("the Authorization field has no token", "send `Authorization: Bearer TOKEN`")
    digest = hash_token(token.strip())
    found = None
    # All are compared, each in constant time.
    for known, identity in identities.tokens.items():
        if hmac.compare_digest(known, digest):
            found = identity
    if not found:
        raise Unauthorized("this token is not known", "it may be mistyped, or withdrawn")
    return found


def _find_user(text: str, where: str) -> int:
    if text.isdecimal():
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError):
        raise RequestError(f"{where}.users: there is no user {text!r}", "see `getent passwd`") from None


def _find_group(text: str, where: str) -> int:
    if text.isdecimal():
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except (KeyError, ValueError):
        raise RequestError(f"{where}.groups: there is no group {text!r}", "see `getent group`") from None


@functools.lru_cache(maxsize=256)
def _name_user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _shorten(text: str) -> str:
    """Names in a certificate are of any length, and may hold what moves a terminal's cursor."""
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
        return "unknown"  # it has gone already
