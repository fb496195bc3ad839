"""The end of guests, from the events of libvirt and QEMU."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import libvirt
import libvirt_qemu

from orchestrator.hypervisor.guests import EndCause

OnEnd = Callable[[UUID, EndCause], None]

_CAUSES = {
    "guest-reset": EndCause.RESET,
    "guest-panic": EndCause.RESET,
    "host-signal": EndCause.FAILED,
    "host-error": EndCause.FAILED,
}


class EndWatch:
    """Calls `ended` when a guest ends, each time from a new thread. It outlives the connections of which it receives events."""

    def __init__(self, ended: OnEnd) -> None:
        self._ended = ended
        # QEMU's reason, by the guest's id, until libvirt reports the end.
        self._reasons: dict[str, str] = {}

    def register(self, connection: Any) -> None:
        """Registers for the events of a new connection; raises what libvirt raises."""
        connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle, None)
        libvirt_qemu.qemuMonitorEventRegister(connection, None, "SHUTDOWN", self._on_shutdown, None)

    def _on_shutdown(self, _connection: Any, domain: Any, _event: str, _s: int, _us: int, details: str, _opaque: Any) -> None:
        # QMP's event SHUTDOWN has the reason; libvirt's own event does not distinguish a power-off from a reset. The first
        # reason counts: libvirt then ends QEMU by a signal, for which QEMU sends another event.
        self._reasons.setdefault(domain.UUIDString(), str(json.loads(details or "{}").get("reason", "")))

    def _on_lifecycle(self, _connection: Any, domain: Any, kind: int, detail: int, _opaque: Any) -> None:
        if kind == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            uuid = domain.UUIDString()
            cause = find_cause(detail, self._reasons.pop(uuid, ""))
            # In a thread: this callback runs inside libvirt's event loop, which must keep running for calls of libvirt.
            threading.Thread(target=self._ended, args=(UUID(uuid), cause), daemon=True).start()


def find_cause(detail: int, reason: str) -> EndCause:
    """`detail`: virDomainEventStoppedDetailType. `reason`: QEMU's ShutdownCause (qapi/run-state.json), empty if unknown."""
    if detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN:
        return _CAUSES.get(reason, EndCause.POWERED_OFF)
    if detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED:
        return EndCause.DESTROYED
    return EndCause.FAILED


def start_event_loop() -> None:
    """Runs libvirt's event loop in a thread, until the process exits. Call it once, before the first connection."""
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_run_event_loop, name="libvirt-events", daemon=True).start()


def _run_event_loop() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError:
            time.sleep(1)  # libvirt was stopped; the next call connects again
