"""Targets of network disks: their URLs, the names and secrets with which guests log in, and what is refused."""

from __future__ import annotations

import base64
import zlib
from typing import Any
from uuid import UUID

import pytest

from orchestrator.errors import RequestError
from orchestrator.model.request import GuestRequest, parse_guest_request, parse_stored_request
from orchestrator.model.target import Transport, check_disk_secret, default_initiator, parse_target

NQN, IQN = "nqn.2026-11.example:disk1", "iqn.2026-11.example:disk1"
NVME, ISCSI = f"nvme-tcp://10.9.0.100:4420/{NQN}", f"iscsi://10.9.0.100:3260/{IQN}/0"
HOST_NQN = "nqn.2026-11.example:host1"


def dhchap(key: bytes = bytes(range(32)), *, code: str = "00", check: bytes | None = None) -> str:
    """As `nvme gen-dhchap-key` prints it."""
    total = key + (zlib.crc32(key).to_bytes(4, "little") if check is None else check)
    return f"DHHC-1:{code}:{base64.b64encode(total).decode()}:"


def request(*disks: dict[str, Any], **fields: Any) -> GuestRequest:
    wanted = {"name": "g1", "memory": "64M", "image": "debian", "address": "10.9.0.11/24", "disks": list(disks), **fields}
    return parse_guest_request(wanted)


@pytest.mark.parametrize(
    ("text", "normalised", "key"),
    [
        (NVME, NVME, f"nvme-tcp:{NQN}"),
        (f"nvme-tcp://10.9.0.100/{NQN}", NVME, f"nvme-tcp:{NQN}"),
        (f"nvme-tcp://[FD00:0::1]:4421/{NQN}", f"nvme-tcp://[fd00::1]:4421/{NQN}", f"nvme-tcp:{NQN}"),
        (f"iscsi://10.9.0.100/{IQN.upper().replace('IQN', 'iqn')}", ISCSI, f"iscsi:{IQN}/0"),
        (f"iscsi://10.9.0.100/{IQN}/7", f"iscsi://10.9.0.100:3260/{IQN}/7", f"iscsi:{IQN}/7"),
        ("iscsi://10.9.0.1/eui.02004567A425678D", "iscsi://10.9.0.1:3260/eui.02004567a425678d/0", "iscsi:eui.02004567a425678d/0"),
    ],
)
def test_target_is_normalised(text: str, normalised: str, key: str) -> None:
    target = parse_target(text)
    assert (str(target), target.key) == (normalised, key)
    assert parse_target(normalised) == target


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a target; use the form"),
        (f"tcp://10.9.0.100/{NQN}", "is not a target"),
        (f"nvme-tcp:/10.9.0.100/{NQN}", "is not a target"),
        ("nvme-tcp://10.9.0.100", "is not a target"),
        (f"nvme-tcp://storage.example/{NQN}", "is not an IP address"),
        (f"nvme-tcp://fd00::1/{NQN}", "is not a target"),
        (f"nvme-tcp://[10.9.0.1]/{NQN}", "in brackets"),
        (f"nvme-tcp://[fe80::1%eth0]/{NQN}", "is not a target"),
        (f"nvme-tcp://127.0.0.1/{NQN}", "is not the address of one machine"),
        (f"nvme-tcp://0.0.0.0/{NQN}", "is not the address of one machine"),
        (f"nvme-tcp://224.0.0.1/{NQN}", "is not the address of one machine"),
        (f"nvme-tcp://10.9.0.100:0/{NQN}", "has the port 0"),
        (f"nvme-tcp://10.9.0.100:65536/{NQN}", "has the port 65536"),
        (f"nvme-tcp://10.9.0.100/{IQN}", "is not a name of nvme-tcp"),
        (f"nvme-tcp://10.9.0.100/{NQN},hostnqn=x", "is not a name of nvme-tcp"),
        (f"nvme-tcp://10.9.0.100/{NQN} init=/bin/sh", "is not a name of nvme-tcp"),
        (f"nvme-tcp://10.9.0.100/{NQN}\n", "is not a target"),
        (f"nvme-tcp://10.9.0.100/{NQN}{'x' * 223}", "is not a name of nvme-tcp"),
        ("nvme-tcp://10.9.0.100/nqn.2014-08.org.nvmexpress.discovery", "is the discovery service"),
        (f"nvme-tcp://10.9.0.100/{NQN}/1", "is not a name of nvme-tcp"),
        (f"iscsi://10.9.0.100/{IQN}/256", "is not a LUN"),
        (f"iscsi://10.9.0.100/{IQN}/-1", "is not a LUN"),
        (f"iscsi://10.9.0.100/{IQN}/", "is not a LUN"),
        (f"iscsi://10.9.0.100/{NQN}", "is not a name of iscsi"),
        ("iscsi://10.9.0.100/iqn.2026-13.example:x", "is not a name of iscsi"),
    ],
)
def test_wrong_target_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_target(text)
    with pytest.raises(RequestError, match=r"disks\.0\.target: "):
        request({"target": text})


def test_target_makes_a_network_disk() -> None:
    wanted = request({"target": NVME})
    assert wanted == request({"target": NVME, "kind": "network"})
    assert wanted.network_disk == parse_target(NVME)
    assert parse_stored_request(wanted.model_dump_json(exclude_unset=True)) == wanted
    assert request({}).network_disk is None


@pytest.mark.parametrize(
    ("disks", "fields", "says"),
    [
        ([{"kind": "network"}], {}, "a network disk has a target"),
        ([{"kind": "nvme", "target": NVME}], {}, "other disks have no target"),
        ([{"target": NVME, "size": "1G"}], {}, "neither size nor serial"),
        ([{"target": NVME, "serial": "x"}], {}, "neither size nor serial"),
        ([{"secret": dhchap()}], {}, "are for the target of a network disk"),
        ([{}, {"target": NVME}], {}, "only the first disk can be one"),
        ([{"target": NVME}], {"address": None}, "requires a NIC with an IP address"),
        ([{"target": NVME}], {"address": "10.8.0.11/24"}, r"not in a network of the guest's NICs \(10\.8\.0\.0/24\)"),
        ([{"target": NVME}], {"address": "fd00::1/64"}, "not in a network"),
        ([{"target": NVME}], {"address": "10.9.0.100/24"}, "the guest's own address"),
        ([{"target": NVME, "user": "me"}], {}, "DH-HMAC-CHAP has no user"),
        ([{"target": NVME, "secret": dhchap()}], {}, "requires initiator"),
        ([{"target": NVME, "initiator": IQN}], {}, "is not a name of nvme-tcp"),
        ([{"target": ISCSI, "initiator": NQN}], {}, "is not a name of iscsi"),
        ([{"target": ISCSI, "initiator": "iqn.2026-11.example:HOST"}], {}, "in lower case"),
        ([{"target": ISCSI, "user": "me"}], {}, "both user and secret"),
        ([{"target": ISCSI, "secret": "correcthorse"}], {}, "both user and secret"),
        ([{"target": ISCSI, "user": "a b", "secret": "correcthorse"}], {}, "is not a user for CHAP"),
    ],
)
def test_inconsistent_network_disk_is_refused(disks: list[dict[str, Any]], fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        request(*disks, **fields)


@pytest.mark.parametrize(("size", "code"), [(32, "00"), (48, "00"), (64, "00"), (32, "01"), (48, "02"), (64, "03")])
def test_dhchap_secrets_of_all_hashes_are_accepted(size: int, code: str) -> None:
    check_disk_secret(Transport.NVME_TCP, dhchap(bytes(range(size)), code=code))


@pytest.mark.parametrize(
    ("transport", "text", "says"),
    [
        ("nvme-tcp", "hunter2hunter2", "not a DH-HMAC-CHAP secret"),
        ("nvme-tcp", dhchap()[:-1], "not a DH-HMAC-CHAP secret"),
        ("nvme-tcp", dhchap(code="04"), "not a DH-HMAC-CHAP secret"),
        ("nvme-tcp", dhchap(check=b"abcd"), "wrong checksum"),
        ("nvme-tcp", dhchap(bytes(31)), "cannot have a key of 31 bytes"),
        ("nvme-tcp", dhchap(bytes(32), code="03"), "cannot have a key of 32 bytes"),
        ("nvme-tcp", "DHHC-1:00:abcde:", "not valid base64"),
        ("iscsi", "short", "12 or more visible characters"),
        ("iscsi", "with space inside", "12 or more visible characters"),
    ],
)
def test_wrong_secret_is_refused_without_showing_it(transport: str, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        check_disk_secret(Transport(transport), text)
    assert text not in str(caught.value)


def test_request_without_secret_texts_keeps_the_hash() -> None:
    wanted = request({"target": NVME, "secret": dhchap(), "initiator": HOST_NQN}, {"size": "1G"})
    hidden = wanted.without_secret_texts()
    assert hidden == wanted
    assert hidden.disks[0].secret
    assert hidden.disks[0].secret.text is None
    assert dhchap() not in repr(hidden) + repr(wanted) + hidden.model_dump_json()
    stored = parse_stored_request(hidden.model_dump_json(exclude_unset=True))
    assert stored == wanted
    other = request({"target": NVME, "secret": dhchap(bytes(32)), "initiator": HOST_NQN}, {"size": "1G"})
    assert other != wanted


def test_default_initiators_are_unique_and_valid() -> None:
    for transport in Transport:
        names = {default_initiator(transport, UUID(int=number)) for number in (1, 2)}
        assert len(names) == 2
        for name in names:
            request({"target": NVME if transport is Transport.NVME_TCP else ISCSI, "initiator": name})
