"""Credentials and the seed of cloud-init: what an image gets, as the programs that read it see it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from orchestrator.errors import HostError, RequestError
from orchestrator.host.root import HostRoot
from orchestrator.images.configuration import build_credentials, build_seed, check_configurable, find_unsupported
from orchestrator.images.cpio import build_archive
from orchestrator.images.description import Description
from orchestrator.images.store import find_image
from orchestrator.model.configuration import Configuration, NicAddress
from orchestrator.model.request import GuestRequest, parse_guest_request
from orchestrator.resources.configuration import WriteInitrd
from orchestrator.resources.step import UndoContext
from orchestrator.values import MacAddress, Size
from tests.fakes.server import make_image

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAB alice@example"
BOTH, CLOUD, SYSTEMD, NEITHER = ["credentials", "cloud-init"], ["cloud-init"], ["credentials"], list[str]()
MACS = [MacAddress.parse(f"02:4e:48:00:00:0{number}") for number in range(3)]
WEB = Configuration(
    UUID("f64abb56-b811-53db-a220-f48cce745777"), "web.example", (KEY,),
    (NicAddress(MACS[0], "10.9.0.11/24"), NicAddress(MACS[1], None), NicAddress(MACS[2], "fd00::1/64")),
)  # fmt: skip
SECRETS = replace(WEB, user_data="#!/bin/sh\nsecret\n", network_config="version: 2\n")


def image(configuration: list[str], **fields: Any) -> Description:
    wanted = {"hash": "0", "kernel_version": "6.12", "cmdline": "", "memory": Size.parse("64M"), "console": None, **fields}
    return Description(configuration=tuple(configuration), **wanted)


def request(**fields: object) -> GuestRequest:
    return parse_guest_request({"name": "web", "memory": "64M", "image": "debian", **fields})


def unpack(archive: Path, folder: Path) -> dict[str, str]:
    """As cpio(1) reads it: file → content."""
    folder.mkdir()
    with archive.open("rb") as file:
        subprocess.run(["cpio", "-idm", "--quiet", "--no-absolute-filenames"], stdin=file, cwd=folder, check=True, timeout=60)
    assert all(path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o600) for path in folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def seed(tmp_path: Path, configuration: list[str], given: Configuration) -> dict[str, str]:
    archive = build_seed(image(configuration), given)
    assert archive is not None
    file = tmp_path / "archive"
    file.write_bytes(archive)
    prefix = "run/cloud-seed/"
    return {name.removeprefix(prefix): text for name, text in unpack(file, tmp_path / "root").items() if name.startswith(prefix)}


def test_image_with_cloud_init_alone_gets_all_by_the_seed(tmp_path: Path) -> None:
    found = seed(tmp_path, CLOUD, WEB)
    assert sorted(found) == ["meta-data", "network-config", "user-data"]
    assert json.loads(found["meta-data"]) == {
        "instance-id": str(WEB.uuid), "local-hostname": "web.example", "public-keys": [KEY],
    }  # fmt: skip
    assert found["user-data"].startswith("#cloud-config\n")
    assert json.loads(found["network-config"]) == {
        "version": 2,
        "ethernets": {
            "nic0": {"match": {"macaddress": str(MACS[0])}, "set-name": "nic0", "addresses": ["10.9.0.11/24"]},
            "nic1": {"match": {"macaddress": str(MACS[1])}, "set-name": "nic1", "dhcp4": True, "optional": True},
            "nic2": {"match": {"macaddress": str(MACS[2])}, "set-name": "nic2", "addresses": ["fd00::1/64"]},
        },
    }
    assert build_credentials(image(CLOUD), WEB) == {}


def test_image_with_both_gets_keys_and_network_only_by_credentials(tmp_path: Path) -> None:
    found = seed(tmp_path, BOTH, WEB)
    assert "public-keys" not in json.loads(found["meta-data"])
    assert json.loads(found["network-config"]) == {"config": "disabled"}
    assert set(build_credentials(image(BOTH), WEB)) == {
        "system.hostname", "ssh.authorized_keys.root", *(f"network.network.50-nohype{number}" for number in range(3)),
    }  # fmt: skip


def test_network_config_of_the_caller_replaces_the_credentials(tmp_path: Path) -> None:
    found = seed(tmp_path, BOTH, SECRETS)
    assert (found["user-data"], found["network-config"]) == (SECRETS.user_data, SECRETS.network_config)
    credentials = build_credentials(image(BOTH), SECRETS)
    assert set(credentials) == {"system.hostname", "ssh.authorized_keys.root"}
    assert "secret" not in repr(credentials) + repr(SECRETS)


def test_credentials_are_in_the_form_of_systemd() -> None:
    credentials = build_credentials(image(SYSTEMD), WEB)
    assert credentials["system.hostname"] == "web.example"
    assert credentials["ssh.authorized_keys.root"] == f"{KEY}\n"
    static, dynamic, ipv6 = (credentials[f"network.network.50-nohype{number}"] for number in range(3))
    assert static == f"[Match]\nMACAddress={MACS[0]}\nType=ether\n[Address]\nAddress=10.9.0.11/24\n"
    assert f"MACAddress={MACS[1]}\n" in dynamic
    assert "DHCP=yes\n" in dynamic
    assert ipv6.endswith("Address=fd00::1/64\nDuplicateAddressDetection=none\n")
    assert build_seed(image(SYSTEMD), WEB) is None
    assert "ssh.authorized_keys.root" not in build_credentials(image(SYSTEMD), replace(WEB, ssh_keys=()))


def test_image_without_configuration_gets_nothing() -> None:
    assert build_credentials(image(NEITHER), WEB) == {}
    assert build_seed(image(NEITHER), WEB) is None


def test_archive_is_the_same_each_time_and_independent_of_the_order() -> None:
    files = {"run/b": b"x", "run/a/c": b"", "z": b"12345"}
    assert build_archive(files) == build_archive(dict(reversed(files.items())))
    assert len(build_archive(files)) % 4 == 0


ALL = {"ssh_keys": [KEY], "hostname": "db", "user_data": "#cloud-config\n", "network_config": "version: 2\n"}
DISK = {"size": 1, "sha256": "0" * 64, "layout": "partitioned"}


@pytest.mark.parametrize(
    ("configuration", "fields", "unsupported"),
    [
        (BOTH, {}, ()),
        (CLOUD, {}, ()),
        (SYSTEMD, {}, ("user_data", "network_config")),
        (NEITHER, {}, tuple(ALL)),
        # Firmware boots from the disk: the host adds nothing to its initrd.
        (BOTH, {"boot": "firmware", "disk": DISK}, ("user_data", "network_config")),
        (CLOUD, {"boot": "firmware", "disk": DISK}, tuple(ALL)),
    ],
)
def test_unsupported_fields(configuration: list[str], fields: dict[str, Any], unsupported: tuple[str, ...]) -> None:
    described = image(configuration, **fields)
    assert find_unsupported(described, request(**ALL)) == unsupported
    for name, value in ALL.items():
        assert find_unsupported(described, request(**{name: value})) == ((name,) if name in unsupported else ())
    assert find_unsupported(described, request()) == ()


def test_profile_is_refused_for_an_image_that_boots_by_firmware(tmp_path: Path) -> None:
    make_image(tmp_path)
    direct, wanted = find_image(tmp_path, "minimal"), request(profile="tickless", housekeeping="0")
    check_configurable(direct, wanted, None)
    with pytest.raises(RequestError, match="minimal boots by firmware: the manager cannot give its kernel the words"):
        check_configurable(direct.model_copy(update={"boot": "firmware"}), wanted, None)


def test_refusal_names_the_images_that_support_the_fields(tmp_path: Path) -> None:
    make_image(tmp_path)
    make_image(tmp_path, "debian", configuration=SYSTEMD)
    make_image(tmp_path, "debian-cloud", configuration=BOTH)
    make_image(tmp_path, "damaged", configuration=BOTH)
    (tmp_path / "damaged" / "vmlinuz").unlink()
    minimal, keys, data = find_image(tmp_path, "minimal"), request(ssh_keys=[KEY]), request(user_data="#cloud-config\n")
    with pytest.raises(RequestError, match="minimal does not support ssh_keys: it supports no configuration") as caught:
        check_configurable(minimal, keys, tmp_path)
    assert caught.value.hint == "use an image that supports them: debian, debian-cloud"
    with pytest.raises(RequestError, match="debian does not support user_data: it supports credentials") as caught:
        check_configurable(find_image(tmp_path, "debian"), data, tmp_path)
    assert caught.value.hint == "use an image that supports them: debian-cloud"
    with pytest.raises(RequestError, match="does not support") as caught:
        check_configurable(minimal, keys, None)
    assert caught.value.hint == "ask the operator of the host for an image that supports them"
    cloud = find_image(tmp_path, "debian-cloud")
    check_configurable(cloud, request(**ALL), tmp_path)
    for wrong in ({"user_data": "password: x"}, {"network_config": "version: 1"}):
        with pytest.raises(RequestError, match=next(iter(wrong))):
            check_configurable(cloud, request(**wrong), tmp_path)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 3 << 20])
def test_initrd_is_the_images_with_the_archive_at_a_multiple_of_four(tmp_path: Path, size: int) -> None:
    base, path = tmp_path / "initrd", tmp_path / "guest.initrd"
    base.write_bytes(b"\xfd" * size)
    step = WriteInitrd(base, path, build_archive({"run/cloud-seed/user-data": b"secret"}))
    assert "secret" not in repr(step) + step.describe() + str(step.read_before(HostRoot(tmp_path)))
    for _ in range(2):  # a second time over what an interrupted launch has left
        step.apply(HostRoot(tmp_path))
    content = path.read_bytes()
    assert content.startswith(base.read_bytes())
    start = content.index(b"070701")
    assert start % 4 == 0
    assert not content[size:start].strip(b"\0")
    assert content[start:] == step.archive
    assert path.stat().st_mode & 0o777 == 0o600
    before = step.read_before(HostRoot(tmp_path))
    assert before is not None
    for _ in range(2):
        WriteInitrd.undo(UndoContext(HostRoot(tmp_path)), before)
        assert not path.exists()
    assert base.exists()


@pytest.mark.parametrize("why", ["no base", "no folder", "no room"])
def test_initrd_that_cannot_be_written_is_an_error(tmp_path: Path, why: str) -> None:
    base, path = tmp_path / "initrd", tmp_path / "guest.initrd"
    if why != "no base":
        base.write_bytes(b"x")
    if why == "no folder":
        path = tmp_path / "missing" / "guest.initrd"
    if why == "no room":
        path = Path("/proc/guest.initrd")  # a file system in which no file can be created
    with pytest.raises(HostError, match=f"cannot write {path}: "):
        WriteInitrd(base, path, b"").apply(HostRoot(tmp_path))


def test_description_of_a_configurable_image_is_read(tmp_path: Path) -> None:
    make_image(tmp_path, "debian", configuration=BOTH)
    assert find_image(tmp_path, "debian").configuration == tuple(BOTH)
