"""Guests with their root on the network, through their own VF: NVMe over TCP from a target on the lab host, iSCSI from one in the
network namespace of the external switch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest

from orchestrator.images.build import build_image
from orchestrator.images.cache import cache_folder
from orchestrator.images.recipe import recipes_folder
from orchestrator.images.store import STORE, Image, read_image
from orchestrator.lab.qmp import ask
from orchestrator.model.proof import Verdict
from tests.harness import iscsi_target
from tests.harness.network_root import IMAGE, NQN, PORT, SERVER, NvmetServer, install_image, make_root
from tests.lab.conftest import LabHost
from tests.lab.test_manager import await_state
from tests.unit.test_target import dhchap

pytestmark = pytest.mark.soak

NAME, ADDRESS = "netroot", "10.9.0.31/24"
HOST_NQN = "nqn.2026-11.example:host1"
TARGET = f"nvme-tcp://{SERVER}:{PORT}/{NQN}"
SECRET, WRONG = dhchap(b"a secret of the lab's guest".ljust(32)), dhchap(b"another secret".ljust(32))
SECRET_FILE = "/run/netroot.secret"
PATTERN = f"{SECRET_FILE}.pattern"
PATIENCE = "180"  # seconds, on a busy machine
MACHINE = ("--image", IMAGE, "--memory", "128M", "--address", ADDRESS)


@pytest.fixture(scope="module")
def built() -> Image:
    return read_image(build_image(recipes_folder(), "debian", cache_folder(), progress=print))


@pytest.fixture(scope="module")
def server(host: LabHost, built: Image) -> Iterator[NvmetServer]:
    """The target, which accepts one host with its secret."""
    server = NvmetServer(host.lab)
    server.remove()
    install_image(host.lab, built, server.file)
    host.run(f"(umask 077 && echo '{SECRET}' >{SECRET_FILE} && echo '{WRONG}' >{SECRET_FILE}.wrong)")
    host.run(f"cut -d: -f3 {SECRET_FILE} | cut -c1-20 >{PATTERN}")
    try:
        server.start(host=HOST_NQN, secret=SECRET)
        yield server
    finally:
        server.remove()
        host.run(f"rm -rf {STORE / IMAGE} {SECRET_FILE} {SECRET_FILE}.wrong {PATTERN}")


def disk(target: str = TARGET, *, secret: str = SECRET_FILE) -> tuple[str, ...]:
    return ("--disk", f"target={target},initiator={HOST_NQN},secret={secret}")


@contextmanager
def created(host: LabHost) -> Iterator[dict[str, Any]]:
    try:
        yield json.loads(host.nohype("guest", "create", NAME, *MACHINE, *disk(), "--wait", PATIENCE, "--json").stdout)
    finally:
        host.nohype("guest", "delete", NAME, check=False)


@pytest.fixture(scope="module")
def guest(host: LabHost, server: NvmetServer) -> Iterator[dict[str, Any]]:
    with created(host) as made:
        yield made


def tell(host: LabHost, line: str, name: str = NAME) -> str:
    return host.nohype("guest", "tell", name, line, "--timeout", PATIENCE).stdout.strip()


def test_guest_has_its_root_on_the_target(host: LabHost, guest: dict[str, Any]) -> None:
    assert " root=/dev/nvme" in guest["ready"]
    assert guest["disks"][0]["target"] == TARGET
    assert guest["initiator"] == HOST_NQN
    assert tell(host, "write first").endswith("done write")
    assert tell(host, "read").endswith("done read first")
    assert not host.run("ls /sys/class/block | grep nvme.*c", check=False).stdout, "the host has no block device of it"


def test_secret_is_nowhere_on_the_host(host: LabHost, guest: dict[str, Any]) -> None:
    """Except in the files of the manager that only root can read."""
    assert TARGET in host.run(f"virsh dumpxml {NAME}").stdout
    shown = f"virsh dumpxml {NAME}; cat /proc/[0-9]*/cmdline /run/libvirt/qemu/*.xml; journalctl -o export"
    files = "/var/log/libvirt/qemu/*.log /var/log/nohype/guests/*.log /var/lib/nohype/ledger.sqlite*"
    search = f"({shown}; for f in {files}; do [ ! -f $f ] || cat $f; done) 2>/dev/null | grep -acFf {PATTERN}"
    assert host.run(search, check=False).stdout.strip() == "0"
    assert host.run(f"cat {SECRET_FILE} | grep -acFf {PATTERN}").stdout.strip() == "1"


def test_audit_does_not_claim_what_the_host_cannot_know(host: LabHost, guest: dict[str, Any]) -> None:
    proofs = host.proofs()
    for name in ("disk-isolated", "disk-clean"):
        assert proofs[name, NAME].verdict == Verdict.NOT_MEASURED
        assert proofs[name, NAME].evidence[0].startswith(f"{TARGET}: ")
    for name in ("device-isolated", "devices-minimal", "memory-static"):
        assert proofs[name, NAME].verdict == Verdict.PASS, proofs[name, NAME].evidence


def test_disk_isolated_fails_while_the_host_is_connected(host: LabHost, guest: dict[str, Any]) -> None:
    # one queue: the kernel cannot use a queue that has only isolated CPUs
    target = f"transport=tcp,traddr={SERVER},trsvcid={PORT},nqn={NQN},nr_io_queues=1"
    words = f"{target},hostnqn={HOST_NQN},hostid={uuid4()},dhchap_secret={SECRET}"
    leave = f"for c in /sys/class/nvme/nvme*; do ! grep -qx {NQN} $c/subsysnqn || echo 1 >$c/delete_controller; done"
    with host.changed(f"modprobe nvme_tcp && echo '{words}' >/dev/nvme-fabrics", leave):
        proof = host.proofs()["disk-isolated", NAME]
    assert (proof.verdict, proof.figure) == (Verdict.FAIL, 1)
    assert proof.evidence[0] == f"{TARGET}: the host is connected to it too"


def test_second_guest_of_the_target_is_refused(host: LabHost, guest: dict[str, Any]) -> None:
    done = host.nohype("guest", "create", "second", *MACHINE[:-1], "10.9.0.32/24", *disk(), check=False)
    assert done.status == 1
    assert f"another guest of this host owns the target {TARGET}" in done.stderr


def test_contents_stay_while_the_guest_is_stopped(host: LabHost, guest: dict[str, Any]) -> None:
    tell(host, "write second")
    host.nohype("guest", "kill", NAME)
    host.nohype("guest", "start", NAME, "--wait", PATIENCE)
    assert tell(host, "read").endswith("done read second")


def set_carrier(host: LabHost, *, up: bool) -> None:
    """Of the lab's NIC, and with it of all its VFs."""
    ask(host.lab.folder.qmp, "set_link", arguments={"name": "data", "up": up})


def wait_for(host: LabHost, state: str) -> None:
    deadline = time.monotonic() + int(PATIENCE)
    while (found := tell(host, "state")) != f"nohype: done state {state}":
        assert time.monotonic() < deadline, found


def test_guest_goes_on_after_the_link_was_lost(host: LabHost, guest: dict[str, Any]) -> None:
    set_carrier(host, up=False)
    try:
        wait_for(host, "connecting")  # the keep-alive has failed
    finally:
        set_carrier(host, up=True)
    assert tell(host, "write after the link came back").endswith("done write")
    assert tell(host, "read").endswith("done read after the link came back")
    wait_for(host, "live")


def test_guest_goes_on_after_the_target_was_gone(host: LabHost, server: NvmetServer, guest: dict[str, Any]) -> None:
    server.stop()
    try:
        wait_for(host, "connecting")
        assert await_state(host, NAME, "running")
    finally:
        server.start(host=HOST_NQN, secret=SECRET)
    assert tell(host, "write after the target came back").endswith("done write")
    wait_for(host, "live")


def test_guest_ends_when_the_server_offers_another_disk(host: LabHost, server: NvmetServer, guest: dict[str, Any]) -> None:
    """Under the same name. The guest's kernel removes the disk, and the guest reports that."""
    server.stop()
    try:
        wait_for(host, "connecting")
        server.start(host=HOST_NQN, secret=SECRET, uuid=str(uuid4()))
        deadline = time.monotonic() + int(PATIENCE)
        while json.loads(host.nohype("guest", "show", NAME, "--json").stdout)["state"] != "stopped":
            assert time.monotonic() < deadline
        assert f"nohype: error disk the disk {TARGET} is gone" in host.run(f"cat /var/log/nohype/guests/{NAME}*.log").stdout
    finally:
        server.stop()
        server.start(host=HOST_NQN, secret=SECRET)


REFUSED = {
    "wrong secret": (disk(secret=f"{SECRET_FILE}.wrong"), "the target refused the secret"),
    "no secret": (("--disk", f"target={TARGET},initiator={HOST_NQN}"), "the target requires a secret"),
    "another initiator": (("--disk", f"target={TARGET}"), "the target does not allow the guest to use the disk"),
    "unknown name": (disk(f"{TARGET}2"), "the target does not know the disk"),
    "no server": (disk(TARGET.replace(f":{PORT}", ":4421")), "Connection refused"),
    "no machine": (disk(TARGET.replace(SERVER, "10.9.0.99")), "check that 10.9.0.99 runs"),
}


def check_reported(host: LabHost, name: str, words: tuple[str, ...], says: str) -> None:
    """A guest with this disk ends, and the manager reports what was tried, the reason, and what to do."""
    try:
        done = host.nohype("guest", "create", name, *words, "--wait", PATIENCE, check=False)
        assert done.status == 1
        assert "nohype: error boot cannot connect to " in done.stderr
        assert says in done.stderr
        assert "nohype: error boot hint: " in done.stderr
        await_state(host, name, "stopped")
    finally:
        host.nohype("guest", "delete", name, check=False)


@pytest.mark.parametrize("case", REFUSED)
def test_guest_that_cannot_connect_says_why_and_ends(host: LabHost, server: NvmetServer, case: str) -> None:
    host.nohype("guest", "delete", NAME, check=False)
    words, says = REFUSED[case]
    check_reported(host, NAME, (*MACHINE, *words), says)


ISCSI = f"iscsi://{iscsi_target.SERVER}:{iscsi_target.PORT}/{iscsi_target.IQN}/1"
CHAP = ("tenant", "correct-horse-battery")
ISCSI_NAME, CHAP_FILE = "iscsiroot", "/run/iscsiroot.secret"


@pytest.fixture(scope="module")
def iscsi(host: LabHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A target that requires CHAP, and an image that supports iSCSI."""
    built = read_image(build_image(recipes_folder(), "debian-iscsi", cache_folder(), progress=print))
    install_image(host.lab, built, "/dev/null", ISCSI_NAME)
    file = make_root(built, tmp_path_factory.mktemp("iscsi"))
    host.run(f"(umask 077 && echo '{CHAP[1]}' >{CHAP_FILE} && echo 'another-secret' >{CHAP_FILE}.wrong)")
    try:
        with iscsi_target.serving(host.lab.name, file, user=CHAP[0], secret=CHAP[1]):
            yield
    finally:
        host.run(f"rm -rf {STORE / ISCSI_NAME} {CHAP_FILE} {CHAP_FILE}.wrong")


ISCSI_MACHINE = ("--image", ISCSI_NAME, "--memory", "128M", "--address", "10.9.0.33/24")


def test_iscsi_guest_has_its_root_on_the_lun(host: LabHost, iscsi: None) -> None:
    words = (*ISCSI_MACHINE, "--disk", f"target={ISCSI},user={CHAP[0]},secret={CHAP_FILE}", "--wait", PATIENCE)
    try:
        assert " root=/dev/sda " in host.nohype("guest", "create", ISCSI_NAME, *words).stdout
        assert tell(host, "write to a LUN", ISCSI_NAME).endswith("done write")
        assert tell(host, "read", ISCSI_NAME).endswith("done read to a LUN")
    finally:
        host.nohype("guest", "delete", ISCSI_NAME, check=False)


WRONG_LOGIN = f"user={CHAP[0]},secret={CHAP_FILE}.wrong"
RIGHT_LOGIN = f"user={CHAP[0]},secret={CHAP_FILE}"
ISCSI_REFUSED = {
    "wrong secret": (f"target={ISCSI},{WRONG_LOGIN}", "the target refused the secret"),
    "no secret": (f"target={ISCSI}", "the target requires a secret"),
    "unknown name": (f"target={ISCSI.replace(':netroot', ':netroot2')},{RIGHT_LOGIN}", "the target does not know the disk"),
    "unknown LUN": (f"target={ISCSI.removesuffix('/1')}/7,{RIGHT_LOGIN}", "the target has no LUN 7"),
    "no server": (f"target={ISCSI.replace(':3260', ':3261')},{RIGHT_LOGIN}", "Connection refused"),
    "no machine": (f"target={ISCSI.replace('10.9.0.1:', '10.9.0.99:')},{RIGHT_LOGIN}", "check that 10.9.0.99 runs"),
}


@pytest.mark.parametrize("case", ISCSI_REFUSED)
def test_iscsi_guest_that_cannot_connect_says_why_and_ends(host: LabHost, iscsi: None, case: str) -> None:
    words, says = ISCSI_REFUSED[case]
    check_reported(host, ISCSI_NAME, (*ISCSI_MACHINE, "--disk", words), says)
