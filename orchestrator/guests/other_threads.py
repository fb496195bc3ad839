"""Which threads other than a guest's vCPUs have run on its cores, as the kernel counts them while there are guests."""

from __future__ import annotations

from collections.abc import Container, Iterator

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot
from orchestrator.host.switch_trace import SwitchesByCpu, read_all_switches
from orchestrator.host.thread_owner import ThreadOwner, find_owner
from orchestrator.model.host_view import OtherThread
from orchestrator.values import CpuSet

_Thread = tuple[int, str]
"""Id and name."""


class OtherThreads:
    """One reading after the other, for one thread at a time. The owner of a thread is read once."""

    def __init__(self, host: HostRoot) -> None:
        self._host = host
        self._owners: dict[_Thread, ThreadOwner | None] = {}
        self._switches: SwitchesByCpu | str = ""

    def read(self) -> str:
        """Returns why threads are not known, empty if all are."""
        try:
            self._switches, dropped = read_all_switches(self._host)
        except HostError as error:
            self._switches = f"threads on the guests' cores are not counted: {error.message}"
            return self._switches
        threads = {(one.tid, one.name) for of_cpu in self._switches.values() for one in of_cpu}
        self._owners = {thread: owner for thread, owner in self._owners.items() if thread in threads}
        return f"the kernel's histogram of threads is full: {dropped} time slices were not counted" if dropped else ""

    def list(self, cores: CpuSet, vcpus: Container[int]) -> tuple[OtherThread, ...] | None:
        """On these CPUs, as last read; None if not counted. ``vcpus``: ids of threads to leave out."""
        if isinstance(self._switches, str):
            return None
        return tuple(self._list(self._switches, cores, vcpus))

    def _list(self, switches: SwitchesByCpu, cores: CpuSet, vcpus: Container[int]) -> Iterator[OtherThread]:
        for cpu in cores:
            for one in switches.get(cpu, ()):
                if one.tid not in vcpus:
                    owner = self._find_owner((one.tid, one.name))
                    pid, unit = (owner.pid, owner.unit) if owner else (None, "")
                    yield OtherThread(cpu, one.tid, pid, one.name, unit, one.count)

    def _find_owner(self, thread: _Thread) -> ThreadOwner | None:
        if thread not in self._owners:
            try:
                self._owners[thread] = find_owner(self._host, thread[0])
            except HostError:
                self._owners[thread] = None
        return self._owners[thread]
