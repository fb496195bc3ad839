"""Domains of a fake host that the manager did not create, by their XML; running or shut off. They are on disk, as guests are."""

from __future__ import annotations

import json
import os
from typing import Any
from uuid import UUID
from xml.etree import ElementTree

from orchestrator.hypervisor.connection import RunningGuest, Vcpu
from orchestrator.hypervisor.guests import parse_pinning
from orchestrator.hypervisor.unmanaged import Unmanaged, parse_unmanaged
from orchestrator.values import CpuSet, Size
from tests.fakes.root import FakeRoot

_DOMAINS = ".state/domains"
_LAST_PID = 9_999


class FakeDomains:
    """The domains."""

    def __init__(self, host: FakeRoot) -> None:
        self._host = host

    def define(self, xml: str, *, threads: str | None = None) -> None:
        """A domain of the host's administrator, by its XML.

        Args:
            threads: where its QEMU's threads may run, as the kernel tells; None for a domain that is shut off.
        """
        tree: Any = ElementTree.fromstring(xml)
        name, uuid, pid = tree.findtext("name"), tree.findtext("uuid"), None
        if threads is not None:
            pid = next(pid for pid in range(_LAST_PID, 0, -1) if not self._host.exists(f"proc/{pid}"))
            add_thread(self._host, pid, pid, "qemu-system-x86", threads, group=f"/machine.slice/machine-qemu-{name}.scope")
        self._host.add(f"{_DOMAINS}/{name}", json.dumps({"uuid": uuid, "xml": xml, "pid": pid}))

    def all(self) -> list[Unmanaged]:
        """All domains, as libvirt's XML tells them."""
        folder, found = self._host.path / _DOMAINS, []
        for name in sorted(os.listdir(folder)) if folder.exists() else ():
            stored = json.loads((folder / name).read_text())
            domain = Unmanaged(name, UUID(stored["uuid"]), stored["pid"] is not None, pid=stored["pid"])
            found.append(parse_unmanaged(domain, stored["xml"]))
        return found

    def _live(self, domain: Unmanaged) -> RunningGuest:
        tree: Any = ElementTree.fromstring(json.loads((self._host.path / _DOMAINS / domain.name).read_text())["xml"])
        cpus = CpuSet.parse(self._host.text("sys/devices/system/cpu/possible"))
        pinning = parse_pinning(tree, range(int(tree.findtext("vcpu"))), lambda: len(cpus))
        pid = domain.pid or 0
        return RunningGuest(
            name=domain.name, pid=pid, vcpus=tuple(Vcpu(index, pid, pin) for index, pin in enumerate(pinning.pins)),
            emulator_pin=pinning.emulator_pin, node=None, memory=domain.memory or Size(0), hostdevs=pinning.hostdevs, devices=(),
            uuid=domain.uuid,
        )  # fmt: skip

    def live(self) -> list[RunningGuest]:
        """Those that run."""
        return [self._live(domain) for domain in self.all() if domain.running]


def add_thread(
    host: FakeRoot, pid: int, tid: int, name: str, cpus: str, *, flags: int = 0, group: str = "/", started: int = 0
) -> None:
    """A thread in /proc, as much of it as tells what it is and where it may run (fs/proc/array.c). ``started``: in ticks."""
    folder = f"proc/{pid}/task/{tid}"
    # After the flags come 29 fields to the CPU it last ran on, which is number 39 of all (proc_pid_stat(5)).
    fields = [
        "S",
        "1",
        "1",
        "1",
        "0",
        "-1",
        str(flags),
        *["0"] * 12,
        str(started),
        *["0"] * 16,
        str(min(CpuSet.parse(cpus).ids)),
        *["0"] * 13,
    ]
    host.add(f"{folder}/stat", f"{tid} ({name}) {' '.join(fields)}")
    host.add(f"{folder}/status", f"Name:\t{name}\nCpus_allowed_list:\t{cpus}")
    host.add(f"{folder}/cgroup", f"0::{group}")
    host.add(f"proc/{tid}/cgroup", f"0::{group}")
    host.add(f"proc/{tid}/comm", name)
