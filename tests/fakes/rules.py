"""What a fake host must be like when a guest is started: nothing of the kernel's own that could be elsewhere is on its cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.errors import HostError
from orchestrator.host.irqs import read_irqs
from orchestrator.host.processes import survey_threads
from orchestrator.values import CpuSet
from tests.fakes.root import LOOPBACK, FakeRoot

FIRST_PID = 10_000
"""Processes of guests have ids from here on."""
_DTXSWC = 0x3500


def find_unprepared(host: FakeRoot, guest: dict[str, Any], pfs: list[str]) -> list[str]:
    """What would disturb the guest on its cores, or let its frames past the external switch."""
    # What is offline disturbs no guest.
    online = CpuSet.parse(host.text("sys/devices/system/cpu/online"))
    housekeeping = CpuSet.parse(guest["emulator"])
    found = [
        f"the kernel thread {thread} may run on CPUs {thread.allowed}"
        for thread in survey_threads(host)[0]
        if thread.pid < FIRST_PID
        and thread.kernel
        and not thread.pinned_by_kernel
        and not thread.allowed & online <= housekeeping
        if _would_move(lambda tid=thread.tid: host.sched_setaffinity(tid, housekeeping))  # type: ignore[misc]
    ]
    found += [
        f"interrupt {irq.number} may be sent to CPUs {irq.affinity}"
        for irq in (read_irqs(host) if host.exists("proc/irq") else ())
        if not irq.affinity & online <= housekeeping and f"proc/irq/{irq.number}/smp_affinity_list" not in host.write_errors
        if _would_move(lambda name=f"proc/irq/{irq.number}/smp_affinity_list": host.write(name, str(housekeeping)))  # type: ignore[misc]
    ]
    found += [
        "its PF is not in VEPA mode, and its VF has no VLAN of its own"
        for vf, pf in zip(guest["vfs"], pfs, strict=True)
        if host.registers.get((host.real(f"{pf}/resource0"), _DTXSWC), 0) & LOOPBACK and not _has_own_vlan(host, vf, pf)
    ]
    macs = guest["macs"]
    found += [f"VF {vf} has no address" for vf, mac in zip(guest["vfs"], macs, strict=True) if not mac]
    return found if len(macs) == len(set(macs)) else [*found, "two of its VFs have the same address"]


def _has_own_vlan(host: FakeRoot, vf: str, pf: str) -> bool:
    states = host.fake_net.vfs(host.fake_net.own_interface(pf))
    (own,) = [state.vlan for state in states if host.link(f"{pf}/virtfn{state.index}") == vf]
    return own > 0 and [state.vlan for state in states].count(own) == 1


def _would_move(move: Callable[[], object]) -> bool:
    """Whether the kernel lets it be moved: what it refuses to move no manager can be blamed for."""
    try:
        move()
    except HostError:
        return False
    return True
