"""How a guest has ended, from what libvirt and QEMU say of it. The order of events is that of libvirt 9.0 and QEMU 7.2."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from uuid import UUID

import libvirt
import libvirt_qemu
import pytest

from orchestrator.errors import HypervisorError
from orchestrator.hypervisor.connection import EndCause, Hypervisor

GUEST = "4e6f4879-7065-4000-8000-000000000001"


class FakeDomain:
    def UUIDString(self) -> str:
        return GUEST


class FakeConnection:
    """libvirt, which only tells what happens."""

    def __init__(self) -> None:
        self.lifecycle: Callable[..., None] | None = None
        self.monitor: Callable[..., None] | None = None

    def isAlive(self) -> bool:
        return True

    def setKeepAlive(self, _interval: int, _count: int) -> None:
        pass

    def listAllDomains(self, _flags: int) -> list[FakeDomain]:
        return []

    def domainEventRegisterAny(self, _domain: None, kind: int, callback: Callable[..., None], _opaque: None) -> None:
        assert kind == libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
        self.lifecycle = callback


@pytest.mark.parametrize(
    ("reasons", "detail", "end"),
    [
        (["guest-shutdown"], libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN, EndCause.POWERED_OFF),
        (["guest-shutdown", "host-signal"], libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN, EndCause.POWERED_OFF),
        (["guest-reset", "host-signal"], libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN, EndCause.RESET),
        (["guest-panic", "host-signal"], libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN, EndCause.RESET),
        (["host-signal"], libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN, EndCause.FAILED),
        ([], libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN, EndCause.POWERED_OFF),
        ([], libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED, EndCause.FAILED),
        ([], libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED, EndCause.FAILED),
        (["host-signal"], libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED, EndCause.DESTROYED),
    ],
)
def test_how_a_guest_has_ended(reasons: list[str], detail: int, end: EndCause, monkeypatch: pytest.MonkeyPatch) -> None:
    connection, told = FakeConnection(), queue.Queue[tuple[UUID, EndCause]]()

    def register(_connection: object, _domain: None, event: str, callback: Callable[..., None], _opaque: None) -> None:
        assert event == "SHUTDOWN"
        connection.monitor = callback

    monkeypatch.setattr(libvirt, "open", lambda _uri: connection)
    monkeypatch.setattr(libvirt, "virEventRegisterDefaultImpl", lambda: None)
    monkeypatch.setattr(libvirt, "virEventRunDefaultImpl", threading.Event().wait)
    monkeypatch.setattr(libvirt_qemu, "qemuMonitorEventRegister", register)
    Hypervisor().watch_ends(lambda uuid, how: told.put((uuid, how)))
    assert connection.monitor
    assert connection.lifecycle
    for run in range(2):  # what was said of one run is not taken for the next
        for reason in reasons if run == 0 else []:
            details = json.dumps({"guest": reason.startswith("guest"), "reason": reason})
            connection.monitor(connection, FakeDomain(), "SHUTDOWN", 0, 0, details, None)
        connection.lifecycle(connection, FakeDomain(), libvirt.VIR_DOMAIN_EVENT_STOPPED, detail, None)
        expected = end if run == 0 else (EndCause.POWERED_OFF if detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN else end)
        assert told.get(timeout=30) == (UUID(GUEST), expected)


def test_a_connection_that_tells_of_nothing_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """libvirt dies again while we connect: else nobody would hear of ends any more."""

    class Dying(FakeConnection):
        closed = False

        def isAlive(self) -> bool:
            return self is not made[0]  # libvirt was restarted

        def setKeepAlive(self, _interval: int, _count: int) -> None:
            if len(made) == 2:
                raise libvirt.libvirtError("the connection is closed")

        def close(self) -> None:
            self.closed = True

    made: list[Dying] = []

    def connect(_uri: str) -> Dying:
        made.append(Dying())
        return made[-1]

    monkeypatch.setattr(libvirt, "open", connect)
    monkeypatch.setattr(libvirt, "virEventRegisterDefaultImpl", lambda: None)
    monkeypatch.setattr(libvirt, "virEventRunDefaultImpl", threading.Event().wait)
    monkeypatch.setattr(libvirt_qemu, "qemuMonitorEventRegister", lambda *_: None)
    hypervisor = Hypervisor()
    hypervisor.watch_ends(lambda _uuid, _end: None)
    with pytest.raises(HypervisorError):
        hypervisor.running_uuids()
    assert hypervisor.running_uuids() == frozenset()
    assert [bool(one.lifecycle) for one in made] == [True, False, True]
    assert [one.closed for one in made] == [False, True, False]
