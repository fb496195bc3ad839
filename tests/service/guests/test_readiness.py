"""How guests of different images report that they are ready, and the SSH host keys that they report."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from orchestrator.errors import GuestError, ReadyBySsh
from orchestrator.guests.service import GuestService
from orchestrator.hypervisor.connection import EndCause
from orchestrator.images.description import Readiness, write_description
from orchestrator.images.store import read_image
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR
from tests.fakes.server import IMAGE
from tests.harness.crash import World
from tests.harness.guests import create, open_manager, until


def make_key(letter: bytes) -> str:
    return base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + letter * 32).decode()


ONE, TWO = make_key(b"1"), make_key(b"2")


def report(key: str) -> bytes:
    return f"nohype: ready name=web hostkey=ssh-ed25519:{key} uptime=9\r\n".encode()


def set_readiness(world: World, ready: Readiness | None) -> None:
    image = read_image(world.folder / "images" / IMAGE)
    write_description(image.folder, image.model_copy(update={"console": None, "ready": ready}))


def known_key(manager: GuestService) -> str:
    return manager.guest(OPERATOR, "web").host_key


@pytest.mark.parametrize(
    ("ready", "what"),
    [
        ("notify", "report ready on its console when its SSH server runs"),
        ("cloud-init", "report ready on its console at the end of"),
    ],
)
def test_image_without_the_protocol_reports_ready(world: World, manager: GuestService, ready: Readiness, what: str) -> None:
    set_readiness(world, ready)
    create(manager)
    with pytest.raises(GuestError, match=f"timed out after 0.05 s waiting for the guest to {what}"):
        manager.wait_ready(OPERATOR, "web", 0.05)
    wait = manager.begin_ready(OPERATOR, "web", 60)
    world.hypervisor.write("web", b"[   12.3] systemd[1]: started\r\n" + report(ONE))
    assert wait.result(20).startswith("nohype: ready name=web hostkey=")
    with pytest.raises(GuestError, match="does not speak the protocol nohype-1"):
        manager.send_command(OPERATOR, "web", "mac", 1)


def test_imported_image_is_ready_at_the_end_of_its_cloud_init(world: World, manager: GuestService) -> None:
    set_readiness(world, "cloud-init")
    create(manager)
    wait = manager.begin_ready(OPERATOR, "web", 60)
    line = "Cloud-init v. 25.1.4 finished at Thu, 26 Nov 2026 13:57:02 +0000. Datasource DataSourceNoCloud.  Up 9 seconds"
    world.hypervisor.write("web", f"[    9.123456] cloud-init[470]: {line}\r\n".encode())
    assert wait.result(20) == line
    assert known_key(manager) == ""


PRINTED = (
    "-----BEGIN SSH HOST KEY KEYS-----\r\necdsa-sha2-nistp256 AAAAE2VjZHNh root@web\r\n"
    f"ssh-ed25519 {ONE} root@web\r\nssh-ed25519 {TWO} root@web\r\n-----END SSH HOST KEY KEYS-----\r\n"
)
FINISHED = "Cloud-init v. 25.1.4 finished at Thu, 26 Nov 2026 13:57:02 +0000. Datasource DataSourceNoCloud.  Up 9 seconds\r\n"


@pytest.mark.parametrize("piece", [1, 50, 4096])
def test_host_key_that_cloud_init_prints_is_recorded(world: World, manager: GuestService, piece: int) -> None:
    set_readiness(world, "cloud-init")
    create(manager)
    wait = manager.begin_ready(OPERATOR, "web", 60)
    text = (PRINTED + FINISHED).encode()
    for start in range(0, len(text), piece):
        world.hypervisor.write("web", text[start : start + piece])
    wait.result(20)
    until(lambda: known_key(manager))
    assert known_key(manager) == f"ssh-ed25519 {ONE}"


@pytest.mark.parametrize(
    "text",
    [
        f"ssh-ed25519 {ONE} root@web\r\n{FINISHED}",  # not in the block
        PRINTED.replace(ONE, "AAAA").replace(TWO, "AAAA") + f"ssh-ed25519 {ONE} user@example\r\n{FINISHED}",  # behind the block
        f"x{PRINTED.partition(TWO)[0]}\r\n{FINISHED}",
        PRINTED.replace(ONE, "AAAA").replace(TWO, "A" * 68) + FINISHED,
        FINISHED + PRINTED,
    ],
)
def test_other_printed_keys_are_not_recorded(world: World, manager: GuestService, text: str) -> None:
    set_readiness(world, "cloud-init")
    create(manager)
    wait = manager.begin_ready(OPERATOR, "web", 60)
    world.hypervisor.write("web", text.encode())
    wait.result(20)
    world.hypervisor.write("web", report(TWO))
    manager.wait_ready(OPERATOR, "web", 10)
    assert known_key(manager) == ""


@pytest.mark.parametrize("piece", [1, 50, 4096])
def test_key_of_a_user_before_the_host_keys_is_not_recorded(world: World, manager: GuestService, piece: int) -> None:
    set_readiness(world, "cloud-init")
    create(manager)
    wait = manager.begin_ready(OPERATOR, "web", 60)
    text = (f"ssh-ed25519 {TWO} user@example\r\n" + PRINTED + FINISHED).encode()
    for start in range(0, len(text), piece):
        world.hypervisor.write("web", text[start : start + piece])
    wait.result(20)
    until(lambda: known_key(manager))
    assert known_key(manager) == f"ssh-ed25519 {ONE}"


def test_image_that_answers_ssh_is_left_to_the_client(world: World, manager: GuestService) -> None:
    set_readiness(world, "ssh")
    create(manager)
    with pytest.raises(
        ReadyBySsh, match=f"image {IMAGE} reports ready by answering SSH, which the manager does not check"
    ) as caught:
        manager.wait_ready(OPERATOR, "web", 60)
    assert "nohype guest ssh web -- true" in caught.value.hint


def test_host_key_is_recorded_without_a_client_that_waits(world: World, manager: GuestService) -> None:
    set_readiness(world, "notify")
    create(manager)
    assert known_key(manager) == ""
    version = manager.guest(OPERATOR, "web").version
    world.hypervisor.write("web", report(ONE))
    until(lambda: known_key(manager) == f"ssh-ed25519 {ONE}")
    assert manager.guest(OPERATOR, "web").version == version, "the guest has not changed"


def test_only_the_first_report_of_a_run_counts(world: World, manager: GuestService) -> None:
    """A program in the guest that prints later cannot replace the key."""
    set_readiness(world, "notify")
    create(manager)
    world.hypervisor.write("web", report(ONE) + report(TWO))
    until(lambda: known_key(manager))
    world.hypervisor.write("web", report(TWO))
    manager.wait_ready(OPERATOR, "web", 10)
    assert known_key(manager) == f"ssh-ed25519 {ONE}"


@pytest.mark.parametrize("start", ["start", "restart"])
def test_key_of_an_earlier_run_is_forgotten(world: World, manager: GuestService, start: str) -> None:
    set_readiness(world, "notify")
    create(manager)
    world.hypervisor.write("web", report(ONE))
    until(lambda: known_key(manager))
    if start == "start":
        manager.kill(OPERATOR, "web")
        assert known_key(manager) == "", "a guest that does not run has none"
        manager.start(OPERATOR, "web")
    else:
        manager.restart(OPERATOR, "web", 1)
    assert known_key(manager) == ""
    world.hypervisor.write("web", report(TWO))
    until(lambda: known_key(manager) == f"ssh-ed25519 {TWO}")


def test_key_of_a_deleted_guest_is_not_that_of_its_successor(world: World, manager: GuestService) -> None:
    set_readiness(world, "notify")
    create(manager)
    world.hypervisor.write("web", report(ONE))
    until(lambda: known_key(manager))
    manager.delete(OPERATOR, "web")
    create(manager)
    assert known_key(manager) == ""


@pytest.mark.parametrize("reported", ["before", "while down", "after"])
def test_key_survives_the_manager(world: World, opened: tuple[GuestService, Ledger], reported: str) -> None:
    manager, ledger = opened
    set_readiness(world, "notify")
    create(manager)
    if reported == "before":
        world.hypervisor.write("web", report(ONE))
        until(lambda: known_key(manager))
    manager.close()
    ledger.close()
    if reported == "while down":
        world.hypervisor.write("web", report(ONE))
    again = open_manager(world)
    if reported == "after":
        world.hypervisor.write("web", report(ONE))
    until(lambda: known_key(again) == f"ssh-ed25519 {ONE}")
    again.close()


def test_key_of_a_guest_that_has_ended_is_not_recorded(world: World, manager: GuestService) -> None:
    set_readiness(world, "notify")
    create(manager)
    world.hypervisor.end("web", EndCause.POWERED_OFF)
    until(lambda: manager.guest(OPERATOR, "web").state == "stopped")
    log = next(Path(world.folder / "consoles").glob("web.*.log"))
    log.write_bytes(report(ONE))
    manager.start(OPERATOR, "web")
    assert known_key(manager) == ""


def test_report_of_the_protocol_can_have_a_key_too(world: World, manager: GuestService) -> None:
    create(manager)
    world.hypervisor.write("web", report(ONE))
    manager.wait_ready(OPERATOR, "web", 10)
    until(lambda: known_key(manager) == f"ssh-ed25519 {ONE}")
