"""Disks on the network: the target that a guest connects to, the name and the secret with which it logs in."""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv6Address, ip_address, ip_interface
from uuid import UUID

from orchestrator.model.secret import Secret

TARGET_WORD = "nohype.target="
"""Begins the word of the kernel command line that names a guest's target."""
MAX_TARGET = 320
"""Characters of a target's URL: a name has up to 223 (NVMe base specification 2.0, 4.5; RFC 7143 4.2.7.2)."""
MAX_NAME = 223
_MAX_LUN = 255
"""Peripheral device addressing has 8 bits (SAM-5 4.7.7.2)."""

_FORM = "use the form nvme-tcp://ADDRESS[:PORT]/NQN or iscsi://ADDRESS[:PORT]/IQN[/LUN]"
_HOST = r"\[[0-9A-Fa-f:.]+\]|[^/:\[\]]+"
_URL = re.compile(rf"(?P<transport>[a-z-]+)://(?P<host>{_HOST})(?::(?P<port>\d{{1,5}}))?/(?P<rest>.+)", re.ASCII)
_DATE = r"[12]\d{3}-(?:0[1-9]|1[0-2])"
# Without a comma, which separates the options of /dev/nvme-fabrics (drivers/nvme/host/fabrics.c, nvmf_parse_options).
_NQN = re.compile(rf"nqn\.{_DATE}\.[A-Za-z0-9.-]+(?::[A-Za-z0-9._:-]+)?", re.ASCII)
_DISCOVERY = "nqn.2014-08.org.nvmexpress.discovery"
# RFC 7143 4.2.7: the characters that are left after the preparation of names (RFC 3722).
_IQN = rf"iqn\.{_DATE}\.[a-z0-9.-]+(?::[a-z0-9.:-]+)?"
_ISCSI = re.compile(rf"{_IQN}|eui\.[0-9a-f]{{16}}|naa\.(?:[0-9a-f]{{16}}|[0-9a-f]{{32}})", re.ASCII)
_DHCHAP = re.compile(r"DHHC-1:(0[0-3]):([A-Za-z0-9+/]+={0,2}):", re.ASCII)
_DHCHAP_SIZES = {"00": (32, 48, 64), "01": (32,), "02": (48,), "03": (64,)}
_USER = re.compile(r"[!-~]{1,128}")
_CHAP = re.compile(r"[!-~]{12,}")


class Transport(StrEnum):
    NVME_TCP = "nvme-tcp"
    ISCSI = "iscsi"


_PORTS = {Transport.NVME_TCP: 4420, Transport.ISCSI: 3260}


@dataclass(frozen=True)
class Target:
    """``lun`` is 0 for NVMe, whose first namespace is the disk."""

    transport: Transport
    host: str  # IP address
    port: int
    name: str  # NQN or iSCSI name
    lun: int = 0

    @property
    def key(self) -> str:
        """Names are unique worldwide, and a target can have several addresses."""
        return f"{self.transport}:{self.name}" + (f"/{self.lun}" if self.transport is Transport.ISCSI else "")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lun = f"/{self.lun}" if self.transport is Transport.ISCSI else ""
        return f"{self.transport}://{host}:{self.port}/{self.name}{lun}"


def parse_target(text: str) -> Target:
    """Raises ValueError."""
    match = _URL.fullmatch(text)
    if not match or match["transport"] not in set(Transport):
        raise ValueError(f"{text!r} is not a target; {_FORM}")
    transport = Transport(match["transport"])
    port = int(match["port"]) if match["port"] else _PORTS[transport]
    if not 1 <= port <= 65535:
        raise ValueError(f"{text!r} has the port {port}; ports are 1 to 65535")
    name, lun = match["rest"], 0
    if transport is Transport.ISCSI:
        name, _, number = name.partition("/")
        lun = _parse_lun(number) if "/" in match["rest"] else 0
    return Target(transport, _parse_host(match["host"]), port, _parse_name(transport, name), lun)


def find_nic(target: Target, addresses: Sequence[str | None]) -> int:
    """The number, from 1, of the NIC through which the guest reaches the target. Raises ValueError without one.

    ``addresses``: per NIC, with prefix length. A guest has no gateway before its root is mounted.
    """
    wanted = ip_address(target.host)
    known = {number: ip_interface(address) for number, address in enumerate(addresses, 1) if address}
    for number, interface in known.items():
        if interface.ip == wanted:
            raise ValueError(f"the target has the guest's own address {wanted}")
        if wanted in interface.network:
            return number
    if not known:
        raise ValueError("a network disk requires a NIC with an IP address; give address")
    networks = ", ".join(str(interface.network) for interface in known.values())
    raise ValueError(f"the target {wanted} is not in a network of the guest's NICs ({networks}); a gateway is not supported")


def check_login(target: Target, initiator: str | None, user: str | None, secret: Secret | None) -> None:
    """Raises ValueError if names or secret do not have the form that the target's protocol requires."""
    transport = target.transport
    if initiator is not None and _parse_name(transport, initiator) != initiator:
        raise ValueError(f"write the initiator {initiator!r} in lower case")
    if user is not None and not _USER.fullmatch(user):
        raise ValueError(f"{user!r} is not a user for CHAP: use visible characters without spaces")
    if transport is Transport.ISCSI and (user is None) != (secret is None):
        raise ValueError("CHAP requires both user and secret")
    if transport is Transport.NVME_TCP:
        if user is not None:
            raise ValueError("DH-HMAC-CHAP has no user; omit it")
        if secret is not None and initiator is None:
            raise ValueError("DH-HMAC-CHAP requires initiator: the target has the secret of a host by its NQN")
    if secret is not None and secret.text is not None:
        check_disk_secret(transport, secret.text)


def default_initiator(transport: Transport, uuid: UUID) -> str:
    """Unique per guest. For iSCSI in the form that Debian's open-iscsi gives to its machines."""
    if transport is Transport.NVME_TCP:
        return f"nqn.2014-08.org.nvmexpress:uuid:{uuid}"
    return f"iqn.1993-08.org.debian:01:{uuid.hex}"


def check_disk_secret(transport: Transport, text: str) -> None:
    """Raises ValueError, without the text, for a secret that the guest's kernel or its initiator would refuse."""
    if transport is Transport.ISCSI:
        if not _CHAP.fullmatch(text):
            raise ValueError("a CHAP secret has 12 or more visible characters without spaces")  # RFC 7143 12.1.3
        return
    # NVMe base specification 2.0, 8.13.5.8: the key, then its CRC-32 with the lowest byte first.
    form = "use the form DHHC-1:HH:BASE64: as printed by `nvme gen-dhchap-key`"
    match = _DHCHAP.fullmatch(text)
    if not match:
        raise ValueError(f"not a DH-HMAC-CHAP secret; {form}")
    try:
        content = base64.b64decode(match[2], validate=True)
    except binascii.Error:
        raise ValueError(f"the DH-HMAC-CHAP secret is not valid base64; {form}") from None
    key, check = content[:-4], content[-4:]
    if len(key) not in _DHCHAP_SIZES[match[1]]:
        raise ValueError(f"a DH-HMAC-CHAP secret with hash {match[1]} cannot have a key of {len(key)} bytes; {form}")
    if zlib.crc32(key).to_bytes(4, "little") != check:
        raise ValueError("the DH-HMAC-CHAP secret has a wrong checksum: a character is missing or was changed")


def _parse_host(text: str) -> str:
    try:
        address = ip_address(text.strip("[]"))
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address: the guest cannot resolve names before it has its root") from None
    if isinstance(address, IPv6Address) != text.startswith("["):
        raise ValueError(f"{text!r}: write an IPv6 address in brackets, an IPv4 address without")
    if address.is_unspecified or address.is_multicast or address.is_loopback or address.is_link_local:
        raise ValueError(f"{address} is not the address of one machine in the guest's network")
    return str(address)


def _parse_name(transport: Transport, text: str) -> str:
    name = text.lower() if transport is Transport.ISCSI else text  # RFC 7143 4.2.7.1: without case
    if not (_ISCSI if transport is Transport.ISCSI else _NQN).fullmatch(name) or len(name) > MAX_NAME:
        forms = "iqn.YYYY-MM.DOMAIN:NAME, eui.HEX or naa.HEX" if transport is Transport.ISCSI else "nqn.YYYY-MM.DOMAIN:NAME"
        raise ValueError(f"{text!r} is not a name of {transport}; use {forms} with letters, digits and . : -, at most {MAX_NAME}")
    if name == _DISCOVERY:
        raise ValueError(f"{name} is the discovery service, not a disk; give the NQN of a subsystem")
    return name


def _parse_lun(text: str) -> int:
    if not re.fullmatch(r"0|[1-9]\d{0,2}", text, re.ASCII) or int(text) > _MAX_LUN:
        raise ValueError(f"{text!r} is not a LUN; use 0 to {_MAX_LUN}")
    return int(text)
