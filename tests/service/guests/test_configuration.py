"""Guests with keys, host name and user data: what they get, what is stored, and that a secret is nowhere else."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from orchestrator.api.routes import guests as routes
from orchestrator.errors import Conflict, HostError, LedgerError, OrchestratorError, QuotaExceeded, RequestError
from orchestrator.guests import core_manager
from orchestrator.guests.service import GuestService
from orchestrator.images.description import write_description
from orchestrator.images.store import read_image
from orchestrator.ledger import Ledger, claims
from orchestrator.model.access import OPERATOR, Identity, Quota, Role
from orchestrator.model.request import parse_guest_request
from orchestrator.model.secret import MAX_USER_DATA, Secret
from orchestrator.planning.quota import MAX_SECRETS, check_secrets
from orchestrator.resources.configuration import WriteInitrd
from tests.fakes.server import CLOUD_IMAGE, IMAGE, make_image
from tests.harness.api_server import serve
from tests.harness.crash import World
from tests.harness.guests import create, kinds, open_manager, spoil, state
from tests.harness.images import unpack_initrd
from tests.unit.test_target import HOST_NQN, NVME, dhchap

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAB alice@example"
MARKER = "hunter2-correct-horse-battery"
USER_DATA = f"#cloud-config\npassword: {MARKER}\n"
NETWORK = f"version: 2\nethernets:\n  {MARKER}: {{dhcp4: true}}\n"
CONFIGURED: dict[str, object] = {
    "image": CLOUD_IMAGE, "ssh_keys": [KEY], "hostname": "db.example", "user_data": USER_DATA, "network_config": NETWORK,
    "address": "10.9.0.11/24",
}  # fmt: skip
ALICE = Identity("alice", Role.TENANT, "alice", Quota())


@pytest.fixture
def domains(world: World, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The XML of each guest that was started."""
    texts: list[str] = []
    create_paused = world.hypervisor.create_paused

    def remember(xml: str) -> None:
        texts.append(xml)
        create_paused(xml)

    monkeypatch.setattr(world.hypervisor, "create_paused", remember)
    return texts


def files(world: World) -> list[str]:
    """The kinds of files with secrets."""
    return sorted(path.suffix for path in world.secrets.iterdir()) if world.secrets.exists() else []


def unpack_seed(xml: str, folder: Path) -> dict[str, str]:
    """The seed in the initrd that a domain boots."""
    unpack_initrd(Path(etree.fromstring(xml.encode()).findtext("os/initrd") or ""), folder)
    return {path.name: path.read_text() for path in (folder / "run/cloud-seed").iterdir()}


def read_credentials(xml: str) -> dict[str, str]:
    entries = [entry.text or "" for entry in etree.fromstring(xml.encode()).iterfind("sysinfo/oemStrings/entry")]
    pairs = [entry.removeprefix("io.systemd.credential.binary:").partition("=") for entry in entries]
    return {name: base64.b64decode(content).decode() for name, _, content in pairs}


def test_qboot_if_the_host_has_it_and_the_image_needs_no_more(
    world: World, manager: GuestService, domains: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the file guests start with SeaBIOS, as guests of other images."""
    image = read_image(world.folder / "images" / IMAGE)
    write_description(image.folder, image.model_copy(update={"bios": "qboot"}))
    create(manager, name="before")
    world.host.add("usr/share/qemu/qboot.rom", "")
    create(manager, name="web")
    create(manager, name="other", image=CLOUD_IMAGE)
    loaders = [etree.fromstring(xml.encode()).findtext("os/loader") for xml in domains]
    assert loaders == [None, "/usr/share/qemu/qboot.rom", None]


def test_guest_gets_its_configuration_at_each_start(
    world: World, manager: GuestService, domains: list[str], tmp_path: Path
) -> None:
    plan = create(manager, **CONFIGURED)
    for start in range(3):
        seed = unpack_seed(domains[-1], tmp_path / str(start))
        assert (seed["user-data"], seed["network-config"]) == (USER_DATA, NETWORK)
        assert json.loads(seed["meta-data"]) == {"instance-id": str(plan.uuid), "local-hostname": "db.example"}
        assert read_credentials(domains[-1]) == {"system.hostname": "db.example", "ssh.authorized_keys.root": f"{KEY}\n"}
        assert files(world) == [".initrd", ".json"]
        manager.kill(OPERATOR, "web")
        assert files(world) == [".json"]
        if start == 1:
            manager.close()
            manager = open_manager(world)
        manager.start(OPERATOR, "web")
    assert len(domains) == 4
    manager.delete(OPERATOR, "web")
    assert files(world) == []
    assert not world.count_undo_records()


def test_audit_is_told_that_texts_were_given_and_not_their_contents(manager: GuestService) -> None:
    plan = create(manager, **CONFIGURED)
    given = manager.records.given_texts(plan.uuid)
    assert [text.partition(" ")[0] for text in given] == ["user_data", "network_config"]
    assert f"{Secret.of(USER_DATA).short_hash}, {len(USER_DATA)} bytes" in given[0]
    assert MARKER not in str(given)
    assert manager.records.given_texts(create(manager, name="plain").uuid) == ()


def test_files_can_be_read_only_by_root_and_the_folder_not_listed(world: World, manager: GuestService) -> None:
    create(manager, **CONFIGURED)
    assert world.secrets.stat().st_mode & 0o777 == 0o711
    assert {path.stat().st_mode & 0o777 for path in world.secrets.iterdir()} == {0o600}


def test_guest_without_configuration_gets_name_and_network(
    world: World, manager: GuestService, domains: list[str], tmp_path: Path
) -> None:
    plan = create(manager, image=CLOUD_IMAGE)
    assert files(world) == [".initrd"]
    assert unpack_seed(domains[0], tmp_path / "seed")["user-data"] == "#cloud-config\n{}\n"
    credentials = read_credentials(domains[0])
    assert credentials["system.hostname"] == "web"
    assert f"MACAddress={plan.vf.mac}" in credentials["network.network.50-nohype0"]


def test_image_without_configuration_starts_as_before(world: World, manager: GuestService, domains: list[str]) -> None:
    create(manager)
    assert "sysinfo" not in domains[0]
    assert "cloud-seed" not in domains[0]
    assert files(world) == []


@pytest.mark.parametrize("field", ["ssh_keys", "hostname", "user_data", "network_config"])
def test_unsupported_field_is_refused_before_the_claim(world: World, manager: GuestService, ledger: Ledger, field: str) -> None:
    before = ledger.read()
    for caller, hint in ((OPERATOR, CLOUD_IMAGE), (ALICE, "ask the operator")):
        request = parse_guest_request({"name": "web", "image": "minimal", "memory": "64M", field: CONFIGURED[field]})
        for method in (manager.create, manager.plan):
            with pytest.raises(RequestError, match=f"image minimal does not support {field}") as caught:
                method(caller, request)
            assert hint in caught.value.hint
            assert (caller is OPERATOR) == (CLOUD_IMAGE in caught.value.hint)
    assert ledger.read() == before
    assert files(world) == []


@pytest.mark.parametrize(("field", "text"), [("user_data", f"password: {MARKER}"), ("network_config", f"{MARKER}: 1")])
def test_wrong_text_is_refused_before_the_claim(
    world: World, manager: GuestService, ledger: Ledger, field: str, text: str
) -> None:
    before = ledger.read()
    with pytest.raises(RequestError, match=field):
        create(manager, image=CLOUD_IMAGE, **{field: text})
    assert ledger.read() == before
    assert files(world) == []
    assert MARKER not in repr(manager.events(OPERATOR))


def test_plan_stores_nothing(world: World, manager: GuestService) -> None:
    view = manager.plan(OPERATOR, parse_guest_request({"name": "web", "memory": "64M", **CONFIGURED}))
    assert view.request.secrets["user_data"] == Secret.of(USER_DATA).without_text()
    assert all(secret.text is None for secret in view.request.secrets.values())
    assert files(world) == []


def test_repeated_request_is_compared_by_hash(world: World, manager: GuestService) -> None:
    plan = create(manager, id="order-1", **CONFIGURED)
    assert create(manager, id="order-1", **CONFIGURED) == plan
    assert create(open_manager(world), id="order-1", **CONFIGURED) == plan
    for field, text in (("user_data", f"{USER_DATA}# more\n"), ("network_config", "version: 2\n"), ("ssh_keys", [])):
        with pytest.raises(Conflict, match="request id order-1 was already used") as caught:
            create(manager, id="order-1", **{**CONFIGURED, field: text})
        assert MARKER not in str(caught.value)


def lose(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20])


def change(file: Path) -> None:
    file.write_text(json.dumps({"user_data": "#!/bin/sh\n", "network_config": NETWORK}))


def shorten(file: Path) -> None:
    file.write_text(json.dumps({"user_data": USER_DATA}))


def garble(file: Path) -> None:
    file.write_text(json.dumps({"user_data": ["\ud800"], "network_config": "\ud800"}))


@pytest.mark.parametrize("harm", [lose, cut, change, shorten, garble])
def test_guest_whose_file_is_lost_or_damaged_is_not_started(
    world: World, manager: GuestService, harm: Callable[[Path], None]
) -> None:
    create(manager, **CONFIGURED)
    manager.kill(OPERATOR, "web")
    (file,) = world.secrets.iterdir()
    content = file.read_bytes()
    harm(file)
    with pytest.raises(HostError, match=r"guest web: .*user_data and network_config") as caught:
        manager.start(OPERATOR, "web")
    assert str(file) in caught.value.message
    assert "delete the guest" in caught.value.hint
    assert MARKER not in str(caught.value)
    assert state(manager) == "stopped"
    file.write_bytes(content)
    other = open_manager(world)
    other.start(OPERATOR, "web")
    assert state(other) == "running"


def test_file_that_cannot_be_written_leaves_no_claim(world: World, manager: GuestService, ledger: Ledger) -> None:
    world.secrets.write_text("not a folder")
    with pytest.raises(HostError, match="cannot write"):
        create(manager, **CONFIGURED)
    assert not ledger.read().claims
    world.secrets.unlink()
    create(manager, **CONFIGURED)


def test_full_disk_leaves_neither_claim_nor_file(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.guests.secrets.os.fsync", fail)
        with pytest.raises(OrchestratorError, match="No space left|cannot"):
            create(manager, **CONFIGURED)
    assert not [claim for claim in ledger.read().claims if claim.plan.name == "web"]
    assert files(world) == []


def test_claim_that_does_not_reach_the_disk_leaves_no_file(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LedgerError("cannot write the ledger: I/O error")

    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.ledger.claims.Claims.wait_claimed", fail)
        with pytest.raises(LedgerError):
            create(manager, **CONFIGURED)
    assert files(world) == []


def test_launch_that_fails_leaves_no_file(world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.folder / "images" / CLOUD_IMAGE / "initrd").unlink()
    make_image(world.folder / "images", "no-initrd", configuration=["cloud-init"])
    with monkeypatch.context() as patch:
        patch.setattr(WriteInitrd, "apply", lambda *_: (_ for _ in ()).throw(HostError("cannot write")))
        with pytest.raises(HostError, match="cannot write"):
            create(manager, image="no-initrd", user_data=USER_DATA)
    assert files(world) == []
    assert not world.count_undo_records()


def test_orphans_are_removed_and_other_files_stay(world: World, manager: GuestService) -> None:
    create(manager, **CONFIGURED)
    stranger, note = "0b0b0b0b-0000-4000-8000-000000000000", world.secrets / "README"
    note.write_text("x")
    for collect in (manager.reconciler.reconcile, lambda: open_manager(world)):
        for suffix in ("json", "initrd"):
            (world.secrets / f"{stranger}.{suffix}").write_text("{}")
        collect()
        assert files(world) == ["", ".initrd", ".json"]
    assert note.exists()


def test_guest_that_a_stop_has_quarantined_keeps_its_file_until_it_is_cleared(world: World, manager: GuestService) -> None:
    plan = create(manager, **CONFIGURED)
    spoil(world, plan)
    assert manager.stop(OPERATOR, "web", 0).state == "quarantined"
    assert ".json" in files(world)
    manager.clear_quarantine(OPERATOR, "web", force=True)
    assert files(world) == []


def test_tenant_can_store_a_limited_amount(manager: GuestService) -> None:
    text = "#cloud-config\n" + "#" * (MAX_USER_DATA - 14)
    stored = Secret.of(text)
    # Requests of claims, without the work of 64 launches.
    first = manager.plan(ALICE, parse_guest_request({"name": "g0", "memory": "64M", "image": CLOUD_IMAGE, "user_data": text}))
    many = [
        first.request.model_copy(update={"name": f"g{number}", "user_data": stored})
        for number in range(MAX_SECRETS // MAX_USER_DATA)
    ]
    last = parse_guest_request({"name": "last", "memory": "64M", "image": CLOUD_IMAGE, "user_data": "#!/bin/sh\n"})
    check_secrets(ALICE, last, many[:-1])
    check_secrets(OPERATOR, last, many)
    with pytest.raises(QuotaExceeded, match=f"of {MAX_SECRETS} bytes of user data") as caught:
        check_secrets(ALICE, last, many)
    assert "alice" in caught.value.reasons[0]
    check_secrets(ALICE, parse_guest_request({"name": "plain", "memory": "64M", "image": CLOUD_IMAGE}), many)


# --- Nothing leaks ---

DISK_SECRET = dhchap(MARKER.encode().ljust(32, b"."))
DISK_MARKER = DISK_SECRET.split(":")[2][:40]
WITH_DISK: dict[str, Any] = {**CONFIGURED, "disks": [{"target": NVME, "initiator": HOST_NQN, "secret": DISK_SECRET}]}


@pytest.fixture
def journal() -> Iterator[Callable[[], str]]:
    """All that is logged, with the fields of the records as the journal stores them."""
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(f"{record.getMessage()} {record.__dict__!r} {record.exc_info!r}")

    root, handler = logging.getLogger(), Keep(logging.DEBUG)
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield lambda: "\n".join(records)
    root.removeHandler(handler)
    root.setLevel(level)


def live_with_secrets(folder: Path, world: World, collect: Callable[[str, object], object]) -> None:
    """A guest's life with errors, through the API; passes all that others can see to ``collect``."""
    with serve(folder, world=world) as served:
        client = served.client
        wanted = {"name": "web", "memory": "64M", "id": "order-1", **WITH_DISK}
        (disk,) = WITH_DISK["disks"]
        wrong: list[dict[str, object]] = [
            {"user_data": f"{MARKER}: x"}, {"user_data": f"#cloud-config\n{MARKER}: 1"}, {"user_data": [MARKER]},
            {"user_data": MARKER * 20_000}, {"network_config": f"version: 2\n{MARKER}: 1"}, {"image": "minimal"},
            {"user_data": f"#cloud-config\npassword: {MARKER}\n  x: ["}, {"memory": "1T"}, {"image": "missing"},
            {"disks": [{**disk, "secret": f"{DISK_SECRET}x"}]}, {"disks": [{**disk, "user": DISK_MARKER}]},
            {"disks": [{**disk, "secret": [DISK_SECRET]}]}, {"disks": [{**disk, "target": None}]},
            {"disks": [{**disk, "secret": DISK_SECRET.replace("-1:00", "-1:03")}]}, {"disks": [{}, disk]},
        ]  # fmt: skip
        for fields in wrong:
            for method in (client.plan, client.create):
                with pytest.raises(OrchestratorError) as caught:
                    method({**wanted, **fields})
                collect("error", (str(caught.value), repr(caught.value)))
        answers: list[object] = [client.plan(wanted), client.create(wanted), client.create(wanted)]
        with pytest.raises(OrchestratorError) as caught:
            client.create({**wanted, "user_data": f"{USER_DATA}#"})
        collect("error", str(caught.value))
        with pytest.raises(OrchestratorError) as caught:
            client.create({**wanted, "disks": [{**disk, "secret": dhchap()}]})
        collect("error", str(caught.value))
        stop = served.world.folder / "images" / CLOUD_IMAGE / "vmlinuz"
        client.kill("web")
        stop.rename(stop.with_suffix(".away"))
        with pytest.raises(OrchestratorError):
            client.start("web")
        stop.with_suffix(".away").rename(stop)
        answers += [client.start("web"), client.guest("web"), client.guests(), client.survey(), client.events(None, 1000)]
        collect("ledger", [path.read_bytes() for path in world.folder.glob("ledger.sqlite*") if path.is_file()])
        client.delete("web")
        answers += client.events(None, 1000)
    collect("answers", answers)
    collect("ledger", [path.read_bytes() for path in world.folder.glob("ledger.sqlite*") if path.is_file()])
    collect("consoles", [path.read_bytes() for path in (world.folder / "consoles").rglob("*") if path.is_file()])


LEAKS: dict[str, tuple[str, Any, str, object]] = {
    "the ledger stores the text": (
        "ledger", claims, "to_plain", lambda plan: {"name": plan.name, "x": USER_DATA}),
    "the API shows the text": ("answers", routes, "_show", lambda _secret: USER_DATA),
    "the XML contains the text": (
        "xml", core_manager, "build_credentials", lambda _image, given: {"x.user-data": given.user_data}),
    "the XML contains the disk's secret": (
        "xml", core_manager, "build_credentials", lambda _image, given: {"x.secret": given.disk_login.secret}),
    "a step describes the text": ("journal", WriteInitrd, "describe", lambda step: f"write {step.archive!r}"),
}  # fmt: skip


@pytest.fixture
def seen(
    _disk_image: None, world: World, domains: list[str], journal: Callable[[], str], tmp_path: Path
) -> Callable[[], set[str]]:
    """The places in which the marker was seen during a guest's life."""

    def live() -> set[str]:
        places: dict[str, list[object]] = {}
        with contextlib.suppress(OrchestratorError):  # a leak can make the manager fail
            live_with_secrets(tmp_path / "served", world, lambda place, what: places.setdefault(place, []).append(what))
        places["xml"] = [domains, [read_credentials(xml) for xml in domains]]
        places["journal"] = [journal()]
        arguments = [Path(f"/proc/{os.getpid()}/cmdline").read_bytes(), Path(f"/proc/{os.getpid()}/environ").read_bytes()]
        places["process"] = [arguments]
        return {place for place, what in places.items() if MARKER in repr(what) or DISK_MARKER in repr(what)}

    return live


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()


@pytest.fixture
def _disk_image(world: World) -> None:
    """The image can also have its root on the network."""
    shutil.rmtree(world.folder / "images" / CLOUD_IMAGE)
    disk = {"size": 4, "sha256": hashlib.sha256(b"root").hexdigest(), "layout": "ext4"}
    fields: dict[str, Any] = {"configuration": ["credentials", "cloud-init"], "network_root": ["nvme-tcp"], "disk": disk}
    make_image(world.folder / "images", CLOUD_IMAGE, **fields)
    (world.folder / "images" / CLOUD_IMAGE / "disk.raw").write_bytes(b"root")


def test_secret_is_seen_nowhere(seen: Callable[[], set[str]], world: World, domains: list[str]) -> None:
    assert seen() == set()
    assert len(domains) == 2
    assert all(NVME in xml for xml in domains), "the guest has the disk"
    assert files(world) == []
    assert kinds(open_manager(world)).count("started") == 2


@pytest.mark.parametrize("leak", LEAKS)
def test_secret_that_leaks_is_seen(seen: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch, leak: str) -> None:
    place, where, name, leaking = LEAKS[leak]
    monkeypatch.setattr(where, name, leaking)
    assert place in seen()
