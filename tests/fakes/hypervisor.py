"""A hypervisor that plays its part on a fake host: guests take huge pages, hold their VF open, have threads and control groups.

Running guests are on disk, below `.state/guests` of the host, one file each: they outlive the manager, as QEMU does. What no
manager may do (start two guests on one core, one VF, one address; start one on a host that is not prepared) is refused, and
noted with `FakeRoot.violate`, since the real ones would let some of it pass.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from errno import ENOMEM
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import libvirt
from lxml import etree

from orchestrator.errors import HypervisorError, NotFound
from orchestrator.hypervisor.connection import EndCause, Pinning, RunningGuest, SerialConsole, Vcpu
from orchestrator.hypervisor.guests import EmulatedNic, parse_nics
from orchestrator.hypervisor.unmanaged import Unmanaged
from orchestrator.values import CpuSet, PciAddress, Size
from tests.fakes import nvme
from tests.fakes.domains import FakeDomains, add_thread
from tests.fakes.root import DEVICES, FakeRoot, set_partition
from tests.fakes.rules import FIRST_PID, find_unprepared

_GUESTS = ".state/guests"
_BROKEN = "cannot read its XML: internal error: the domain is not described"
_THREADS = 1_000
"""A process's threads have ids from its own up to its own plus this."""


class Life(NamedTuple):
    """A guest from one start to its end. Another start has the same id, and may have the same process id, but another time."""

    name: str
    uuid: str
    start: int


class FakeHypervisor:
    """See `orchestrator.hypervisor.connection.Hypervisor`, whose methods these are.

    Args:
        host: the fake host that the guests run on.

    Attributes:
        domains: what the host's administrator runs beside the manager's guests.
        deaf: names of guests that do not hear their power button.
        broken: names of guests and domains of which libvirt tells nothing but that they are there.
        ptys: the consoles of guests, by name, that are not /dev/null.
    """

    def __init__(self, host: FakeRoot) -> None:
        self._host = host
        self._folder = host.path / _GUESTS
        self._ended: Callable[[UUID, EndCause], None] | None = None
        self._callbacks: list[threading.Thread] = []
        self.domains = FakeDomains(host)
        self.deaf: set[str] = set()
        self.broken: set[str] = set()
        self.ptys: dict[str, Path] = {}

    def create_paused(self, xml: str) -> None:
        """See Hypervisor. The guest is paused; what libvirt, QEMU or VFIO would refuse is refused."""
        guest = _parse(etree.fromstring(xml.encode()))
        name = guest["name"]
        with self._host.changing("hypervisor start", name):
            others = self._all()
            if any(name == other["name"] or guest["uuid"] == other["uuid"] for other in others):
                raise HypervisorError(f"cannot create the guest: domain {name} exists", number=libvirt.VIR_ERR_OPERATION_FAILED)
            guest["disks"] = [device for device in guest["vfs"] if nvme.is_nvme(self._host, device)]
            guest["vfs"] = [device for device in guest["vfs"] if device not in guest["disks"]]
            for device in (*guest["vfs"], *guest["disks"]):
                if self._host.link(f"{DEVICES}/{device}/driver") != "vfio-pci":
                    raise HypervisorError(f"cannot create the guest: {device} is not bound to vfio-pci")
            pfs = [f"{DEVICES}/{self._host.link(f'{DEVICES}/{vf}/physfn')}" for vf in guest["vfs"]]
            guest["macs"] = [self._read_mac(vf, pf) for vf, pf in zip(guest["vfs"], pfs, strict=True)]
            disks = [fault for disk in guest["disks"] for fault in nvme.use_disk(self._host, disk, guest["uuid"])]
            if found := [*self._find_doubles(guest, others), *find_unprepared(self._host, guest, pfs), *disks]:
                for violation in found:
                    self._host.violate(f"{name}: {violation}")
                raise HypervisorError(f"cannot create the guest: {'; '.join(found)}")
            for tap, _ in guest["nics"]:
                self._host.fake_net.hold_tap(tap)
            if missing := [file for file in guest["boots"] if not Path(file).is_file()]:
                raise HypervisorError(f"cannot create the guest: cannot access {missing[0]}")
            Path(guest["log"]).touch()  # virtlogd opens it
            self.take_pages(guest, guest["pages"])
            for device in (*guest["vfs"], *guest["disks"]):
                self._host.add(f"{DEVICES}/{device}/enable", "1")
            guest["pid"] = next(pid for pid in range(FIRST_PID, 10**9, _THREADS) if not self._host.exists(f"proc/{pid}"))
            # As the kernel keeps it of each process (starttime in proc_pid_stat(5)); no two starts have the same.
            guest["start"] = time.monotonic_ns()
            self.add_threads(guest)
            self.store(guest | {"paused": True})

    def resume(self, uuid: UUID) -> None:
        """See Hypervisor. KVM makes its helper when the first vCPU first runs, in that vCPU's control group (virt/kvm)."""
        with self._host.changing("hypervisor resume", str(uuid)):
            guest = self._find(uuid)
            if guest is None or not guest["paused"]:
                raise NotFound(f"the guest {uuid} has ended, or runs already")
            scope, own = f"sys/fs/cgroup/{_group(guest)}", _pinned(guest) | CpuSet.parse(guest["emulator"])
            if not CpuSet.parse(self._host.text(f"{scope}/cpuset.cpus.effective")) <= own:
                self._host.violate(f"{guest['name']} was let run though threads of it may reach cores that are not its own")
            group, helper = f"{_group(guest)}/libvirt/vcpu0", guest["pid"] + 1 + len(guest["pins"])
            add_thread(self._host, guest["pid"], helper, "kvm-nx-lpage-re", guest["pins"][0], group=f"/{group}")
            self.store(guest | {"paused": False})

    def suspend(self, name: str) -> None:
        """What `virsh suspend` does."""
        self.store(self._load(name) | {"paused": True})

    def pause(self, uuid: UUID) -> None:
        """See Hypervisor."""
        self.suspend(self._get(uuid)["name"])

    def is_paused(self, uuid: UUID) -> bool:
        """See Hypervisor."""
        guest = self._find(uuid)
        return guest is not None and bool(guest["paused"])

    def paused(self) -> frozenset[str]:
        """The names of the guests that are paused."""
        return frozenset(guest["name"] for guest in self._all() if guest["paused"])

    def destroy(self, uuid: UUID) -> None:
        """See Hypervisor."""
        self._end_if_there(uuid, EndCause.DESTROYED)

    def shutdown(self, uuid: UUID) -> None:
        """See Hypervisor. The guest powers off at once, unless it is deaf, or paused."""
        guest = self._find(uuid)
        if guest and guest["name"] not in self.deaf and not guest["paused"]:
            self._end_if_there(uuid, EndCause.POWERED_OFF)

    def end(self, name: str, how: EndCause = EndCause.FAILED) -> UUID:
        """Ends a guest behind the manager's back; returns its id."""
        uuid = UUID(self._load(name)["uuid"])
        self._end_if_there(uuid, how)
        return uuid

    def pin(self, uuid: UUID, vcpu: int, cpus: CpuSet) -> None:
        """See Hypervisor."""
        with self._host.changing("hypervisor pin", f"{uuid} {vcpu} {cpus}"):
            guest = self._get(uuid)
            guest["pins"][vcpu] = str(cpus)
            self.store(guest)

    def pin_emulator(self, uuid: UUID, cpus: CpuSet) -> None:
        """See Hypervisor."""
        with self._host.changing("hypervisor pin emulator", f"{uuid} {cpus}"):
            guest = self._get(uuid) | {"emulator": str(cpus)}
            self.store(guest)
            self._host.sched_setaffinity(guest["pid"], cpus)

    def running_uuids(self) -> frozenset[UUID]:
        """See Hypervisor."""
        return frozenset(map(UUID, self._files().values())) | {domain.uuid for domain in self.domains.all() if domain.running}

    def running_names(self) -> frozenset[str]:
        """See Hypervisor."""
        return frozenset(self._files()) | {domain.name for domain in self.domains.all() if domain.running}

    def lives(self) -> frozenset[Life]:
        """The running guests, each told from the same one after another start."""
        return frozenset(Life(guest["name"], guest["uuid"], guest["start"]) for guest in self._all())

    def read_guests(self) -> tuple[tuple[RunningGuest, ...], dict[str, str]]:
        """See Hypervisor."""
        live = sorted([*map(_live, self._all()), *self.domains.live()], key=lambda guest: guest.name)
        unread = {guest.name: _BROKEN for guest in live if guest.name in self.broken}
        return tuple(guest for guest in live if guest.name not in unread), unread

    def list_running(self, managed: frozenset[UUID]) -> tuple[frozenset[UUID], tuple[Unmanaged, ...]]:
        """See Hypervisor."""
        running = self.running_uuids()
        # Only those are read: a manager knows its own, which may be many.
        others = [self._find(uuid) for uuid in map(UUID, self._files().values()) if uuid not in managed]
        found = [
            *(_unmanaged(guest) for guest in others if guest),
            *(known for known in self.domains.all() if known.uuid not in managed),
        ]
        return running, tuple(
            replace(domain, pins=(), nodes=frozenset(), hostdevs=frozenset(), memory=None, problem=_BROKEN)
            if domain.name in self.broken
            else domain
            for domain in sorted(found, key=lambda domain: domain.name)
        )

    def read_guest(self, which: str | UUID) -> RunningGuest:
        """See Hypervisor, which takes an id only; tests may name a guest."""
        return _live(self._load(which) if isinstance(which, str) else self._get(which))

    def console(self, uuid: UUID) -> SerialConsole:
        """See Hypervisor."""
        guest = self._get(uuid)
        return SerialConsole(self.ptys.get(guest["name"], Path("/dev/null")), Path(guest["log"]) if guest.get("log") else None)

    def write(self, name: str, printed: bytes) -> None:
        """The guest prints something."""
        with Path(self._load(name)["log"]).open("ab") as log:
            log.write(printed)

    def read_pinning(self, uuid: UUID) -> Pinning:
        """See Hypervisor."""
        return replace(self.read_guest(uuid).pinning, paused=self.is_paused(uuid))

    def read_exits(self, uuid: UUID) -> tuple[dict[str, int], ...]:
        """See Hypervisor."""
        guest = self._get(uuid)
        return tuple({"exits": 0 if guest["paused"] else 1000} for _ in guest["pins"])

    def watch_ends(self, ended: Callable[[UUID, EndCause], None]) -> None:
        """See Hypervisor: the callback comes in a thread of its own."""
        self._ended = ended

    def wait_for_callbacks(self, timeout: float) -> None:
        """Until what was told of ends of guests is handled. A test that ends before removes the files of the host meanwhile."""
        deadline = time.monotonic() + timeout
        for thread in self._callbacks:
            thread.join(max(0, deadline - time.monotonic()))

    def _end_if_there(self, uuid: UUID, how: EndCause) -> None:
        with self._host.changing("hypervisor end", f"{uuid} {how}"):
            guest = self._find(uuid)
            if guest is None:
                return
            (self._folder / f"{guest['name']}@{guest['uuid']}").unlink()
            self.take_pages(guest, -guest["pages"])
            for device in (*guest["vfs"], *guest.get("disks", ())):
                self._host.add(f"{DEVICES}/{device}/enable", "0")
            for tap, _ in guest.get("nics", ()):
                self._host.fake_net.release_tap(tap)
            for path in self._host.path.glob(f"sys/fs/cgroup/{_group(guest)}/libvirt/*/cpuset.cpus.partition"):
                set_partition(self._host, str(path.relative_to(self._host.path)), "member")
            shutil.rmtree(self._host.path / "sys/fs/cgroup" / _group(guest))
            for tid in range(guest["pid"], guest["pid"] + len(guest["pins"]) + 2):
                shutil.rmtree(self._host.path / f"proc/{tid}", ignore_errors=True)
        if self._ended:
            thread = threading.Thread(target=self._ended, args=(uuid, how), daemon=True)
            self._callbacks.append(thread)
            thread.start()

    def _find_doubles(self, guest: dict[str, Any], others: list[dict[str, Any]]) -> list[str]:
        found = []
        for other in others:
            both = _pinned(guest) & _pinned(other)
            found += [f"CPUs {both} are in use by {other['name']}"] if both else []
            found += [
                f"{what} {one} is in use by {other['name']}"
                for what in ("vf", "mac", "disk")
                for one in guest[f"{what}s"]
                if one in other.get(f"{what}s", ())
            ]
        return found

    def _read_mac(self, vf: str, pf: str) -> str | None:
        (index,) = [
            int(name.removeprefix("virtfn"))
            for name in self._host.names(pf)
            if name.startswith("virtfn") and self._host.link(f"{pf}/{name}") == vf
        ]
        mac = self._host.fake_net.vfs(self._host.names(f"{pf}/net")[0])[index].mac
        return str(mac) if mac else None

    def take_pages(self, guest: dict[str, Any], count: int) -> None:
        """mm/hugetlb.c: pages of the guest's node only (mbind strict), or none: QEMU ends then (allocation immediate)."""
        pool = f"sys/devices/system/node/node{guest['node']}/hugepages/hugepages-{guest['page_kib']}kB/free_hugepages"
        left = int(self._host.text(pool)) - count
        if left < 0:
            self._host.violate(f"{guest['name']} was promised {count} pages on node {guest['node']}, {-left} are not there")
            raise HypervisorError(f"cannot create the guest: {OSError(ENOMEM, 'cannot allocate memory')}")
        flat = f"sys/kernel/mm/hugepages/hugepages-{guest['page_kib']}kB/resv_hugepages"
        promised = int(self._host.text(flat)) if self._host.exists(flat) else 0
        nodes = self._host.path.glob(f"sys/devices/system/node/node*/hugepages/hugepages-{guest['page_kib']}kB/free_hugepages")
        if count > 0 and sum(int(file.read_text()) for file in nodes) - count < promised:
            # mm/hugetlb.c, hugetlb_acct_memory(); not noted: programs may reserve pages at any moment.
            raise HypervisorError("cannot create the guest: unable to map backing store for guest RAM: Cannot allocate memory")
        self._host.add(pool, str(left))

    def add_threads(self, guest: dict[str, Any]) -> None:
        """QEMU's main thread and one a vCPU, in groups as libvirt and systemd make them; the scope has all CPUs yet."""
        online = self._host.text("sys/devices/system/cpu/online")
        scope = f"sys/fs/cgroup/{_group(guest)}"
        self._host.add(f"{scope}/cpuset.cpus")
        self._host.add(f"{scope}/cpuset.cpus.effective", online)
        for folder in (scope, f"{scope}/libvirt"):
            self._host.add(f"{folder}/cpuset.cpus.exclusive")
        names = [("qemu-system-x86", "emulator", guest["emulator"])]
        names += [(f"CPU {index}/KVM", f"vcpu{index}", cpus) for index, cpus in enumerate(guest["pins"])]
        for number, (name, group, cpus) in enumerate(names):
            folder = f"{_group(guest)}/libvirt/{group}"
            for file, text in (("type", "threaded"), ("threads", "")):
                self._host.add(f"sys/fs/cgroup/{folder}/cgroup.{file}", text)
            for file in ("cpuset.cpus", "cpuset.cpus.effective"):
                self._host.add(f"sys/fs/cgroup/{folder}/{file}", cpus)
            self._host.add(f"sys/fs/cgroup/{folder}/cpuset.cpus.exclusive")
            self._host.add(f"sys/fs/cgroup/{folder}/cpuset.cpus.partition", "member")
            add_thread(
                self._host,
                guest["pid"],
                guest["pid"] + number,
                name,
                cpus,
                group=f"/{folder}",
                started=0 if number else guest.get("start", 0) // 1000,
            )

    def _files(self) -> dict[str, str]:
        """Names of the running guests, and their ids."""
        names = os.listdir(self._folder) if self._folder.exists() else []
        return dict(sorted(name.split("@") for name in names))

    def _all(self) -> list[dict[str, Any]]:
        found = []
        for name in self._files():
            try:
                found.append(self._load(name))
            except NotFound:
                continue  # it has just ended
        return found

    def _find(self, uuid: UUID) -> dict[str, Any] | None:
        for name, other in self._files().items():
            if other == str(uuid):
                try:
                    return self._load(name)
                except NotFound:
                    return None
        return None

    def _get(self, uuid: UUID) -> dict[str, Any]:
        if (guest := self._find(uuid)) is None:
            raise NotFound(f"no guest {uuid} runs")
        return guest

    def _load(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self._folder / f"{name}@{self._files()[name]}").read_text())  # type: ignore[no-any-return]
        except (KeyError, FileNotFoundError):
            raise NotFound(f"no guest {name} runs") from None

    def store(self, guest: dict[str, Any]) -> None:
        self._host.add(f"{_GUESTS}/{guest['name']}@{guest['uuid']}", json.dumps(guest))


def _parse(tree: Any) -> dict[str, Any]:
    """What of a guest's XML matters here."""
    page = int(tree.find("memoryBacking/hugepages/page").get("size"))
    memory = int(tree.findtext("memory"))
    vfs = [
        PciAddress(*(int(address.get(part), 16) for part in ("domain", "bus", "slot", "function")))
        for address in tree.iterfind("devices/hostdev/source/address")
    ]
    pins = {int(pin.get("vcpu")): pin.get("cpuset") for pin in tree.iterfind("cputune/vcpupin")}
    return {
        "name": tree.findtext("name"),
        "uuid": tree.findtext("uuid"),
        "pins": [pins[vcpu] for vcpu in range(int(tree.findtext("vcpu")))],
        "emulator": tree.find("cputune/emulatorpin").get("cpuset"),
        "node": int(tree.find("numatune/memory").get("nodeset")),
        "page_kib": page,
        "pages": -(-memory // page),
        "memory": memory,
        "vfs": list(map(str, vfs)),
        "nics": [(nic.interface, nic.mac) for nic in parse_nics(tree)],
        "boots": [file for file in (tree.findtext("os/kernel"), tree.findtext("os/initrd")) if file],
        "log": tree.find("devices/serial/log").get("file"),
    }


def _live(guest: dict[str, Any]) -> RunningGuest:
    pins = [CpuSet.parse(cpus) for cpus in guest["pins"]]
    return RunningGuest(
        name=guest["name"],
        pid=guest["pid"],
        vcpus=tuple(Vcpu(index, guest["pid"] + 1 + index, cpus) for index, cpus in enumerate(pins)),
        emulator_pin=CpuSet.parse(guest["emulator"]),
        node=guest["node"],
        memory=Size(guest["memory"] << 10),
        hostdevs=tuple(map(PciAddress.parse, (*guest["vfs"], *guest.get("disks", ())))),
        devices=("vfio-pci",),
        uuid=UUID(guest["uuid"]),
        nics=tuple(EmulatedNic(*nic) for nic in guest.get("nics", ())),
    )


def _unmanaged(guest: dict[str, Any]) -> Unmanaged:
    return Unmanaged(
        guest["name"], UUID(guest["uuid"]), running=True,
        pins=tuple(map(CpuSet.parse, (*guest["pins"], guest["emulator"]))), nodes=frozenset([guest["node"]]),
        hostdevs=frozenset(map(PciAddress.parse, (*guest["vfs"], *guest.get("disks", ())))),
        memory=Size(guest["memory"] << 10), pid=guest["pid"],
    )  # fmt: skip


def _pinned(guest: dict[str, Any]) -> CpuSet:
    return CpuSet.parse(",".join(guest["pins"]))


def _group(guest: dict[str, Any]) -> str:
    return f"machine.slice/machine-qemu-{guest['name']}.scope"
