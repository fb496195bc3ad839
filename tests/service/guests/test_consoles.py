"""Consoles of guests: a caller gets output only of the guest and the run that it waits for."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from orchestrator.console import LogReader
from orchestrator.errors import GuestError, HostError, HypervisorError, NotFound, OrchestratorError
from orchestrator.guests import question as question_module
from orchestrator.guests.console_logs import ConsoleLogs
from orchestrator.guests.service import GuestService
from orchestrator.hypervisor.connection import EndCause, SerialConsole
from orchestrator.images.description import write_description
from orchestrator.images.store import read_image
from orchestrator.ledger import Ledger
from orchestrator.model.access import OPERATOR, Identity, Role
from orchestrator.model.plan import Plan
from orchestrator.model.request import parse_guest_request
from orchestrator.model.state import GuestState
from tests.fakes.server import IMAGE
from tests.harness.crash import World
from tests.harness.guests import create, start_by_hand, state, until

ACME, BOLT = (Identity(name, Role.TENANT, name) for name in ("acme", "bolt"))
READY = b"nohype: ready name=web\n"


def log_of(world: World, name: str = "web") -> Path:
    log = world.hypervisor.console(world.hypervisor.read_guest(name).uuid).log
    assert log
    return log


def make(manager: GuestService, who: Identity, name: str = "web") -> Plan:
    return manager.create(who, parse_guest_request({"name": name, "image": IMAGE, "memory": "64M"}))[0].plan


def said(ask: Callable[[], object]) -> str:
    """The response that a client gets, or the error."""
    try:
        return str(ask())
    except OrchestratorError as error:
        return str(error)


@contextmanager
def answering(world: World, answer: Callable[[str], bytes], name: str = "web") -> Iterator[list[str]]:
    """A guest behind a real pty that prints something for each line that is typed; gives the lines."""
    ours, theirs = os.openpty()
    world.hypervisor.ptys[name] = Path(os.ttyname(theirs))
    heard: list[str] = []

    def listen() -> None:
        while line := os.read(ours, 512).decode().strip():
            if line == "hang up":
                return
            heard.append(line)
            world.hypervisor.write(name, answer(line))

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        os.write(theirs, b"hang up\n")
        thread.join(30)
        os.close(theirs)
        os.close(ours)
        del world.hypervisor.ptys[name]


# Whose it is.


@pytest.mark.parametrize("moment", ["claimed", "prepared", "runs"])
@pytest.mark.parametrize("file", ["", ".0", ".1"])
def test_output_of_an_earlier_guest_of_the_same_name_is_not_shown(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch, moment: str, file: str
) -> None:
    """Also while it is being started: a name may be had again as soon as it is free."""
    make(manager, BOLT)
    log = log_of(world)
    log.with_name(f"{log.name}{file}").write_bytes(b"root password of bolt is hunter2\n" + READY)
    manager.delete(BOLT, "web")
    # Earlier versions named logs so.
    (world.folder / "consoles" / f"web.log{file}").write_bytes(b"root password of bolt is hunter2\n" + READY)
    told: list[str] = []

    def look(*_: object) -> None:
        told.extend(
            said(lambda ask=ask: ask())
            for ask in (lambda: manager.wait_ready(ACME, "web", 0.01), lambda: manager.send_command(ACME, "web", "x", 0.01))
        )  # type: ignore[misc]

    if moment == "claimed":
        begin = ConsoleLogs.begin
        monkeypatch.setattr(ConsoleLogs, "begin", lambda *arguments: (look(), begin(*arguments))[1])
    elif moment == "prepared":
        start = world.hypervisor.create_paused
        monkeypatch.setattr(world.hypervisor, "create_paused", lambda xml: (look(), start(xml))[1])
    make(manager, ACME)
    if moment == "runs":
        look()
    assert len(told) == 2
    assert not re.search("hunter2|nohype: ready|ready name", str(told)), told
    assert ("console output: nothing" in told[0]) == (moment == "runs")
    assert moment == "runs" or "is creating" in told[0]


@pytest.mark.parametrize("console", [None, "another-1"])
def test_image_without_the_console_protocol_is_reported_immediately(
    world: World, manager: GuestService, console: str | None
) -> None:
    make(manager, ACME)
    image = read_image(world.folder / "images" / IMAGE)
    write_description(image.folder, image.model_copy(update={"console": console, "ready": None}))
    with pytest.raises(GuestError, match=f"guest web: image {IMAGE} does not speak the protocol nohype-1") as caught:
        manager.begin_command(ACME, "web", "mac", 60)
    assert "use an image that speaks it" in caught.value.hint
    with pytest.raises(GuestError, match=f"guest web: image {IMAGE} does not report when it is ready") as caught:
        manager.wait_ready(ACME, "web", 60)
    assert "omit --wait" in caught.value.hint
    shutil.rmtree(image.folder)
    manager.begin_ready(ACME, "web", 60).cancel()  # the guest was started from it all the same


def test_logs_of_two_guests_of_one_name_are_two_files(world: World, manager: GuestService) -> None:
    logs = []
    for who in (OPERATOR, ACME, BOLT):
        plan = make(manager, who)
        world.hypervisor.write("web", who.name.encode())
        logs.append(log_of(world))
        assert str(plan.uuid) in logs[-1].name
        manager.delete(who, "web")
    assert [log.read_text() for log in logs] == [OPERATOR.name, "acme", "bolt"], "each stays for a while"
    assert logs[1].parent.name == "acme"
    assert logs[1].parent.stat().st_mode & 0o777 == 0o700


def test_counters_are_of_the_guest_and_not_of_its_name(world: World, manager: GuestService) -> None:
    first = create(manager)
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    world.hypervisor.end("web", EndCause.FAILED)
    start_by_hand(world, first, uuid=UUID(int=1), cpus="0-7")
    with pytest.raises(NotFound):
        world.hypervisor.read_exits(first.uuid)
    assert world.hypervisor.read_exits(UUID(int=1))


def test_output_of_a_later_guest_of_the_same_name_is_not_shown(world: World, manager: GuestService) -> None:
    """The guest was deleted and created again during the wait."""
    create(manager)
    wait = manager.begin_ready(OPERATOR, "web", 60)
    manager.delete(OPERATOR, "web")
    create(manager)
    world.hypervisor.write("web", b"nohype: ready secret\n")
    with pytest.raises(NotFound, match="guest web ended or was replaced"):
        wait.result(20)


def test_nothing_is_typed_on_the_console_of_another_guest_of_the_name(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(manager)
    find = world.hypervisor.console

    def swap(uuid: UUID) -> SerialConsole:
        monkeypatch.setattr(world.hypervisor, "console", find)
        manager.delete(OPERATOR, "web")
        create(manager)
        return find(uuid)

    monkeypatch.setattr(world.hypervisor, "console", swap)
    with pytest.raises(NotFound, match="guest web ended or was replaced"):
        manager.send_command(OPERATOR, "web", "halt", 1)


def test_command_with_a_uuid_is_typed_only_for_that_guest(world: World, manager: GuestService) -> None:
    """As the audit does: it has looked at the guests some time before."""
    first = create(manager)
    manager.delete(OPERATOR, "web")
    create(manager)
    with answering(world, lambda line: b"nohype: done %s\n" % line.encode()) as heard:
        world.hypervisor.write("web", READY)
        with pytest.raises(NotFound, match="guest web ended or was replaced"):
            manager.send_command(OPERATOR, "web", "flood", 5, first.uuid)
        assert heard == []


# In which life.


@pytest.mark.parametrize("end", ["stop", "kill", "by itself", "unseen"])
def test_a_guest_that_does_not_run_is_not_ready(world: World, manager: GuestService, end: str) -> None:
    create(manager)
    world.hypervisor.write("web", READY)
    assert manager.wait_ready(OPERATOR, "web", 5) == "nohype: ready name=web"
    if end == "unseen":
        world.hypervisor.watch_ends(lambda _uuid, _end: None)
    if end in ("by itself", "unseen"):
        world.hypervisor.end("web", EndCause.POWERED_OFF)
        until(lambda: state(manager) == ("stopped" if end == "by itself" else "ended"))
    else:
        getattr(manager, end)(OPERATOR, "web", *([1] if end == "stop" else []))
    for ask in (lambda: manager.wait_ready(OPERATOR, "web", 60), lambda: manager.send_command(OPERATOR, "web", "mac", 60)):
        with pytest.raises(NotFound, match=f"guest web {'has ended' if end == 'unseen' else 'is stopped'}"):
            ask()


@pytest.mark.parametrize("stage", [GuestState.STARTING, GuestState.STOPPING])
def test_a_guest_that_is_being_started_or_stopped_is_not_ready(
    manager: GuestService, world: World, ledger: Ledger, stage: GuestState
) -> None:
    create(manager)
    world.hypervisor.write("web", READY)
    for new in (GuestState.STOPPING, GuestState.STOPPED, GuestState.STARTING):
        ledger.set_state("web", new)
        if new == stage:
            break
    with pytest.raises(GuestError, match=f"guest web is {stage}, not running"):
        manager.wait_ready(OPERATOR, "web", 60)
    if stage == GuestState.STARTING:
        with pytest.raises(GuestError, match="guest web is starting, not running"):
            manager.send_command(OPERATOR, "web", "mac", 60)


@pytest.mark.parametrize("file", ["", ".0"])
def test_ready_line_of_an_earlier_run_is_ignored(world: World, manager: GuestService, file: str) -> None:
    create(manager)
    log = log_of(world)
    log.with_name(f"{log.name}{file}").write_bytes(b"former\n" + READY)
    manager.restart(OPERATOR, "web", 1)
    for ask in (lambda: manager.wait_ready(OPERATOR, "web", 0.05), lambda: manager.send_command(OPERATOR, "web", "mac", 0.05)):
        with pytest.raises(GuestError, match="after 0.05 s waiting for the guest to report ready; console output: nothing"):
            ask()
    world.hypervisor.write("web", b"nohype: ready again\n")
    assert manager.wait_ready(OPERATOR, "web", 5) == "nohype: ready again"


def test_wait_ends_with_its_run(world: World, manager: GuestService) -> None:
    """However quickly the guest is there again."""
    create(manager)
    wait = manager.begin_ready(OPERATOR, "web", 60)
    manager.restart(OPERATOR, "web", 1)
    world.hypervisor.write("web", READY)
    with pytest.raises(GuestError, match="the guest ended"):
        wait.result(20)
    assert manager.wait_ready(OPERATOR, "web", 5) == "nohype: ready name=web"


def test_a_guest_that_ends_is_not_waited_for(world: World, manager: GuestService) -> None:
    """Its end was not reported: libvirt was not reachable."""
    create(manager)
    world.hypervisor.watch_ends(lambda _uuid, _end: None)
    world.hypervisor.write("web", b"kernel panic\n")
    wait = manager.begin_ready(OPERATOR, "web", 3000)
    world.hypervisor.end("web", EndCause.FAILED)
    with pytest.raises(GuestError, match=r"ended before it could report ready; console output:\n    kernel panic"):
        wait.result(20)


def test_output_at_the_end_of_a_guest_completes_a_reply(world: World, manager: GuestService) -> None:
    """It has ended by then, as after `halt`."""
    create(manager)
    world.hypervisor.write("web", READY)

    def halt(_line: str) -> bytes:
        world.hypervisor.write("web", b"nohype: done halt\n")
        world.hypervisor.end("web", EndCause.POWERED_OFF)
        return b""

    with pytest.MonkeyPatch.context() as patch, answering(world, lambda _line: b"") as heard:
        write = world.hypervisor.write
        patch.setattr(world.hypervisor, "write", lambda name, printed: write(name, printed) if printed else None)
        wait = manager.begin_command(OPERATOR, "web", "halt", 60)
        until(lambda: heard)
        halt("halt")
        assert wait.result(20) == "nohype: done halt\n"


# Guests that an earlier version has started.


def make_legacy(world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> Path:
    log = world.folder / "consoles" / "web.log"
    with monkeypatch.context() as patch:
        log.parent.mkdir(exist_ok=True)
        patch.setattr(ConsoleLogs, "begin", lambda _logs, _plan, _owner: log)
        create(manager)
    return log


def test_a_guest_whose_log_goes_by_its_name_is_read(
    world: World, manager: GuestService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = make_legacy(world, manager, monkeypatch)
    log.write_bytes(READY)
    log.with_name("web.log.0").write_bytes(b"nohype: ready other\nsecret of another\n")
    ledger.close()
    manager, _ = world.open_manager()
    manager.reconciler.recover()
    world.hypervisor.watch_ends(manager.reconciler.on_guest_ended)
    assert manager.wait_ready(OPERATOR, "web", 5) == "nohype: ready name=web"
    with answering(world, lambda line: b"nohype: done %s\n" % line.encode()):
        assert manager.send_command(OPERATOR, "web", "mac", 5) == "nohype: done mac\n"
    log.write_bytes(b"")
    manager.restart(OPERATOR, "web", 1)
    assert log_of(world) != log
    with pytest.raises(GuestError, match="console output: nothing"):
        manager.wait_ready(OPERATOR, "web", 0.05)


def test_old_logs_by_name_are_removed_but_not_those_in_use(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = make_legacy(world, manager, monkeypatch)
    create(manager, name="db")
    for name in ("web.log", "db.log", "db.log.0", "gone.log"):
        (log.parent / name).touch()
        os.utime(log.parent / name, (0, 0))
    manager.remove_old_logs()
    assert sorted(file.name for file in log.parent.iterdir()) == [log_of(world, "db").name, "web.log"]


# How long it stays.


def test_deleted_guests_logs_of_a_tenant_have_a_bound(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names cost nothing: a tenant that makes and deletes guests must not fill the disk. Others' stay."""
    from orchestrator.guests import console_logs

    monkeypatch.setattr(console_logs, "KEPT_BYTES", 5 * (10_000 + 65536))
    kept = {}
    for who in (BOLT, OPERATOR):
        make(manager, who)
        world.hypervisor.write("web", b"mine")
        kept[who] = log_of(world)
        manager.delete(who, "web")
    for number in range(12):
        make(manager, ACME)
        log = log_of(world)
        world.hypervisor.write("web", b"x" * 10_000)
        os.utime(log, (number, time.time() - 1000 + number))
        manager.delete(ACME, "web")
        assert len(list(log.parent.iterdir())) <= 6, "five, and that of the guest which was there last"
    assert log.exists(), "the oldest go first"
    assert [log.read_bytes() for log in kept.values()] == [b"mine", b"mine"]


def test_deleted_guests_logs_are_not_many(world: World, manager: GuestService) -> None:
    """Each start looks at all that are kept."""
    make(manager, ACME)
    folder = log_of(world).parent
    for _ in range(1200):
        (folder / f"web.{uuid4()}.log").touch()
    make(manager, ACME, "other")
    assert 1000 < len(list(folder.iterdir())) <= 1024 + 2


def test_a_guest_that_is_there_keeps_its_log(world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.guests import console_logs

    monkeypatch.setattr(console_logs, "KEPT_BYTES", 0)
    monkeypatch.setattr(console_logs, "KEPT_BYTES_OF_ALL", 0)
    for who, name in ((ACME, "web"), (OPERATOR, "db")):
        make(manager, who, name)
        world.hypervisor.write(name, b"x" * 100_000)
    manager.stop(OPERATOR, "db", 1)
    manager.remove_old_logs()
    make(manager, ACME, "other")
    assert len(list((world.folder / "consoles").glob("**/*.log"))) == 3


@pytest.mark.parametrize("bound", ["KEPT_BYTES", "KEPT_BYTES_OF_ALL"])
def test_all_deleted_guests_logs_have_a_bound(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    from orchestrator.guests import console_logs

    monkeypatch.setattr(console_logs, bound, 0)
    for who in (ACME, BOLT, OPERATOR):
        make(manager, who)
        manager.delete(who, "web")
    manager.remove_old_logs()
    assert list((world.folder / "consoles").glob("**/*.log")) == []


def test_a_folder_that_can_not_be_made_is_a_clear_error(world: World, manager: GuestService) -> None:
    (world.folder / "consoles").touch()
    with pytest.raises(HostError, match="cannot prepare .*web"):
        create(manager)


# Many at a time.


def open_logs(world: World) -> set[str]:
    """Console logs that this process has open."""
    links = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.add(os.readlink(descriptor))
    return {link for link in links if link.startswith(str((world.folder / "consoles").resolve()))}


def test_waits_share_one_thread_that_ends_when_all_are_cancelled(world: World, manager: GuestService) -> None:
    for name in ("web", "db"):
        create(manager, name=name)
    waits = [manager.begin_ready(OPERATOR, name, 3000) for name in ("web", "db") for _ in range(100)]
    waits += [manager.begin_command(OPERATOR, "web", "mac", 3000) for _ in range(100)]
    until(lambda: len(open_logs(world)) == 2)
    assert [thread.name for thread in threading.enumerate()].count("consoles") == 1
    for wait in waits:
        wait.cancel()
    until(lambda: "consoles" not in [thread.name for thread in threading.enumerate()])
    assert not open_logs(world)
    for wait in waits:
        with pytest.raises(CancelledError):
            wait.result(0)
    world.hypervisor.write("web", READY)
    assert manager.wait_ready(OPERATOR, "web", 5), "and another one begins"


def test_a_piece_of_each_log_is_read_in_turn(world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that prints without end delays no other, and no more than a piece is read at a time."""
    sizes: list[int] = []
    for name in ("noisy", "web"):
        create(manager, name=name)
    endless = log_of(world, "noisy")
    read = LogReader.read

    def count(reader: LogReader, limit: int) -> bytes:
        sizes.append(limit)
        return b"\x01" * limit if reader.log == endless else read(reader, limit)

    monkeypatch.setattr(LogReader, "read", count)
    waits = [manager.begin_ready(OPERATOR, "noisy", 3000) for _ in range(16)]
    world.hypervisor.write("web", b"x" * 200_000 + b"\n" + READY)
    assert manager.wait_ready(OPERATOR, "web", 30) == "nohype: ready name=web"
    assert max(sizes) <= 16384
    for wait in waits:
        wait.cancel()


@pytest.mark.parametrize("noise", [b"\xff", b"\x01", b"x", b"nohype: "])
def test_console_output_in_an_error_is_bounded(world: World, manager: GuestService, noise: bytes) -> None:
    create(manager)
    world.hypervisor.write("web", noise * ((2 << 20) // len(noise)))
    assert len(said(lambda: manager.wait_ready(OPERATOR, "web", 0.05)).encode()) < 2300


def test_a_log_that_can_not_be_read_is_an_error_of_that_guest_alone(world: World, manager: GuestService) -> None:
    for name in ("web", "db"):
        create(manager, name=name)
    log = log_of(world)
    log.unlink()
    log.symlink_to("elsewhere")
    other = manager.begin_ready(OPERATOR, "db", 60)
    with pytest.raises(HostError, match="cannot read the console log .*web.*levels of symbolic links"):
        manager.wait_ready(OPERATOR, "web", 60)
    world.hypervisor.write("db", READY)
    assert other.result(20)


def test_wait_times_out_while_libvirt_hangs(world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> None:
    create(manager)
    hangs = threading.Event()
    monkeypatch.setattr(world.hypervisor, "running_uuids", lambda: (hangs.wait(30), frozenset())[1])
    with pytest.raises(GuestError, match="timed out after 0.3 s"):
        manager.begin_ready(OPERATOR, "web", 0.3).result(20)
    hangs.set()


def test_libvirt_error_does_not_end_a_wait(world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> None:
    create(manager)
    looks: list[int] = []

    def fail() -> frozenset[UUID]:
        looks.append(1)
        raise HypervisorError("away")

    monkeypatch.setattr(world.hypervisor, "running_uuids", fail)
    wait = manager.begin_ready(OPERATOR, "web", 60)
    until(lambda: looks)
    world.hypervisor.write("web", READY)
    assert wait.result(20)


def test_closing_the_manager_ends_all_waits(manager: GuestService) -> None:
    create(manager)
    waits = [manager.begin_ready(OPERATOR, "web", 3000), manager.begin_command(OPERATOR, "web", "mac", 3000)]
    manager.close()
    for wait in waits:
        with pytest.raises(GuestError, match="the manager is being stopped"):
            wait.result(20)


# What is typed.


def test_reply_begins_after_the_command(world: World, manager: GuestService) -> None:
    create(manager)
    world.hypervisor.write("web", READY + b"nohype: done mac old\nhalf a line ")
    with answering(world, lambda line: b"noise\r\nnohype: done %s\r\nmore\n" % line.encode()) as heard:
        assert manager.send_command(OPERATOR, "web", "mac", 5) == "noise\nnohype: done mac\n"
        assert manager.send_command(OPERATOR, "web", "halt", 5) == "noise\nnohype: done halt\n"
        assert heard == ["mac", "halt"]


def test_missing_reply_shows_the_end_of_the_console(world: World, manager: GuestService) -> None:
    create(manager)
    world.hypervisor.write("web", READY)
    with answering(world, lambda _line: b"noise\n"):
        with pytest.raises(GuestError, match=r"after 1 s waiting for the guest to reply to 'mac'; console output:\n    noise"):
            manager.send_command(OPERATOR, "web", "mac", 1)


def test_a_guest_that_is_not_ready_yet_is_waited_for(world: World, manager: GuestService) -> None:
    """A command that is typed before is lost: the guest does not read its console yet."""
    create(manager)
    world.hypervisor.write("web", b"booting\n")
    with answering(world, lambda line: b"nohype: done %s\n" % line.encode()) as heard:
        with pytest.raises(GuestError, match=r"after 0.3 s waiting for the guest to report ready; console output:\n    booting"):
            manager.send_command(OPERATOR, "web", "mac", 0.3)
        assert heard == []
        wait = manager.begin_command(OPERATOR, "web", "mac", 60)
        world.hypervisor.write("web", READY)
        assert wait.result(20) == "nohype: done mac\n"


def test_a_guest_whose_log_was_rotated_is_ready(world: World, manager: GuestService) -> None:
    create(manager)
    log = log_of(world)
    log.rename(f"{log}.0")
    log.touch()
    with answering(world, lambda line: b"nohype: done %s\n" % line.encode()):
        assert manager.send_command(OPERATOR, "web", "mac", 5) == "nohype: done mac\n"


def test_no_pty_is_a_clear_error(world: World, manager: GuestService) -> None:
    create(manager)
    world.hypervisor.write("web", READY)
    world.hypervisor.ptys["web"] = world.folder / "pty"
    with pytest.raises(GuestError, match="cannot open the guest's console .*pty: No such file"):
        manager.send_command(OPERATOR, "web", "mac", 5)


def test_an_answer_after_much_noise_is_short(world: World, manager: GuestService) -> None:
    create(manager)
    world.hypervisor.write("web", READY)
    with answering(world, lambda line: b"noise\n" * 500_000 + b"nohype: done %s\n" % line.encode()):
        answer = manager.send_command(OPERATOR, "web", "mac", 60)
    assert len(answer) < 17_000
    assert re.match(r"\[[0-9]{7} bytes before this are omitted\]\nnoise\n", answer)
    assert answer.endswith("noise\nnohype: done mac\n")


def test_commands_are_typed_one_at_a_time(world: World, manager: GuestService) -> None:
    create(manager)
    world.hypervisor.write("web", READY)
    with answering(world, lambda line: b"nohype: done %s\n" % line.encode()) as heard:
        waits = [manager.begin_command(OPERATOR, "web", f"word{number}", 60) for number in range(10)]
        assert [wait.result(20) for wait in waits] == [f"nohype: done word{number}\n" for number in range(10)]
        assert heard == [f"word{number}" for number in range(10)]


def test_reply_to_a_cancelled_command_is_not_the_reply_to_the_next(world: World, manager: GuestService) -> None:
    create(manager)
    world.hypervisor.write("web", READY)
    late: list[str] = []
    with answering(
        world, lambda line: late.append(line) or b"thinking\n" if line == "slow" else b"nohype: done %s\n" % line.encode()
    ) as heard:  # type: ignore[func-returns-value]
        first = manager.begin_command(OPERATOR, "web", "slow", 3000)
        until(lambda: heard == ["slow"])
        first.cancel()
        unheard = manager.begin_command(OPERATOR, "web", "unheard", 60)
        second = manager.begin_command(OPERATOR, "web", "mac", 60)
        unheard.cancel()
        world.hypervisor.write("web", b"nohype: done slow\n")
        assert second.result(20) == "nohype: done mac\n"
        assert heard == ["slow", "mac"], "what was not typed yet is not typed"


def test_cancelled_command_does_not_delay_the_next_for_long(
    world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(question_module, "ABANDONED_SECONDS", 0.1)
    create(manager)
    world.hypervisor.write("web", READY)
    with answering(world, lambda line: b"" if line == "slow" else b"nohype: done %s\n" % line.encode()) as heard:
        first = manager.begin_command(OPERATOR, "web", "slow", 3000)
        until(lambda: heard == ["slow"])
        first.cancel()
        assert manager.send_command(OPERATOR, "web", "mac", 60) == "nohype: done mac\n"


def test_a_guest_without_a_console(world: World, manager: GuestService, monkeypatch: pytest.MonkeyPatch) -> None:
    create(manager)
    monkeypatch.setattr(world.hypervisor, "console", lambda _uuid: SerialConsole(None, None))
    with pytest.raises(GuestError, match="has no serial console"):
        manager.send_command(OPERATOR, "web", "mac", 1)
    with pytest.raises(GuestError, match="has no log"):
        manager.wait_ready(OPERATOR, "web", 1)
