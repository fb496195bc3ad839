"""A host made of files in a temporary folder, which behaves like sysfs and procfs where plain files would not.

Everything that changes is on disk there (what is no file of the kernel's, below `.state`), so that the host outlives the process
that plays with it: `FakeRoot(folder)` opens it again.

Hosts are data, tests/data/hosts/NAME.txt: lines `path = text`, `path -> target` (symbolic link), `path !read ERRNO`,
`path !write ERRNO`, `path @0x3500 = 0x80000000` (a device register). tests/harness/capture_host.py writes them. The same contract
tests run on this and on a real host, so that a hook that lies is caught.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from orchestrator.errors import HostError, RequestError
from orchestrator.host.root import HostRoot, host_error
from orchestrator.values import CpuSet, PciAddress
from tests.fakes import nvme, resctrl, tracing
from tests.fakes.net import FakeNet

HOSTS = Path(__file__).parents[1] / "data" / "hosts"
DEVICES = "sys/bus/pci/devices"
DRIVERS = "sys/bus/pci/drivers"
GROUPS = "sys/kernel/iommu_groups"
LOOPBACK = 1 << 31  # in igb's DTXSWC and TXSWC
_TABLES, _REGISTERS, _VIOLATIONS = ".state/tables", ".state/registers", ".state/violations"
_PF_NO_SETAFFINITY = 0x0400_0000  # include/linux/sched.h
_LINE = re.compile(
    r"(?P<path>\S+) (?:= ?(?P<text>.*)|-> (?P<target>\S+)|!(?P<kind>read|write) (?P<errno>E\w+)"
    r"|@(?P<offset>\w+) = (?P<value>\w+))"
)
_Item = TypeVar("_Item")
_ALLOWED = r"^Cpus_allowed_list:\s*(\S+)"
# The drivers that know a VF by its id, where they are loaded.
_VF_DRIVERS = {("8086", "10ca"): "igbvf", ("8086", "1520"): "igbvf", ("8086", "10ed"): "ixgbevf"}


@dataclass(frozen=True)
class FakeRoot(HostRoot):
    """A host below a temporary folder.

    Attributes:
        writes: each (name, value) written, in order, failed ones too; changes of the network and of affinities as well.
        read_errors, write_errors: name -> errno that access gives, until it is taken out again. Names may go through links.
            `affinity of TID` among the latter: that of moving a thread.
        page_limit: how many huge pages a pool can grow to.
        native: device folder -> the driver that knows it by its id; VFs are known by theirs.
        watch: called before and after each change of the host, with the moment ("before", "after") and what is changed.
    """

    writes: list[tuple[str, str]] = field(default_factory=list)
    read_errors: dict[str, int] = field(default_factory=dict)
    write_errors: dict[str, int] = field(default_factory=dict)
    page_limit: int = 1024
    native: dict[str, str] = field(default_factory=dict)
    watch: Callable[[str, str], None] = field(default=lambda _moment, _what: None, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "net", FakeNet(self, self.changing))
        if (self.path / _TABLES).exists():
            tables = json.loads(self.text(_TABLES))
            for name in ("read_errors", "write_errors", "native"):
                getattr(self, name).update(tables[name])

    def keep_tables(self) -> None:
        """Writes the tables down for the next one who opens the host."""
        tables = {"read_errors": self.read_errors, "write_errors": self.write_errors, "native": self.native}
        self.add(_TABLES, json.dumps(tables))

    @property
    def fake_net(self) -> FakeNet:
        """The network with what only a fake has."""
        assert isinstance(self.net, FakeNet)
        return self.net

    @property
    def registers(self) -> MutableMapping[tuple[str, int], int]:
        """(Real name of the resource file, byte offset) -> value."""
        return _RegisterFile(self)

    @contextmanager
    def changing(self, name: str, value: str) -> Iterator[None]:
        """For the time of one change of the host, which no other one may meet half-done: the kernel has its locks, too."""
        with self._lock:
            self.writes.append((name, value))
            self.watch("before", f"{name} = {value}")
            yield
            self.watch("after", f"{name} = {value}")

    def wait_between_changes(self) -> AbstractContextManager[bool]:
        """Within it, no thread is in the middle of a change: kernel and hypervisor do not die with the manager."""
        return self._lock

    def violate(self, what: str) -> None:
        """Notes that something was done which no manager may do, and which the kernel may let pass."""
        with self._lock, open(self.path / _VIOLATIONS, "a") as file:
            file.write(what + "\n")

    def violations(self) -> list[str]:
        """What was noted."""
        return self.text(_VIOLATIONS).splitlines() if (self.path / _VIOLATIONS).exists() else []

    def in_use(self, folder: str) -> bool:
        """Whether a guest has the function open; vfio-pci enables it only then."""
        return self.link(f"{folder}/driver") == "vfio-pci" and self.text(f"{folder}/enable") != "0"

    def add(self, name: str, text: str = "") -> None:
        """Makes a file, and its folders, or gives it another text, which readers see whole or not at all."""
        # os and not pathlib: hosts are made of thousands of files.
        path, new = f"{self.path}/{name}", f"{self.path}/.state/new-{threading.get_ident()}"
        for folder in (os.path.dirname(new), os.path.dirname(path)):
            if not os.path.exists(folder):
                os.makedirs(folder, exist_ok=True)
        with open(new, "w") as file:
            file.write(text + "\n" if text else "")
        os.replace(new, path)

    def add_link(self, name: str, target: str) -> None:
        """Makes a symbolic link; the target is as readlink(2) shall give it."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    def real(self, name: str) -> str:
        """The name without symbolic links on the way, as the kernel knows the file."""
        return os.path.relpath(os.path.realpath(self.path / name), os.path.realpath(self.path))

    def tree(self) -> dict[str, str]:
        """Every file's text and every link's target, but for violations: two of these compare the host before and after."""
        found: dict[str, str] = {}
        start = len(str(self.path)) + 1
        for folder, folders, files in os.walk(self.path):
            for name in [*folders, *files]:
                path = f"{folder}/{name}"
                if os.path.islink(path):
                    found[path[start:]] = "-> " + os.readlink(path)
                elif name in files and not path.endswith(_VIOLATIONS):
                    with open(path) as file:
                        found[path[start:]] = file.read().strip()
        return found

    def read_bytes(self, name: str) -> bytes:
        """See HostRoot."""
        self._check(self.read_errors, name, "cannot read")
        return super().read_bytes(name)

    def make_folder(self, name: str) -> None:
        """See HostRoot."""
        self._change_folder(
            "cannot create", name, resctrl.make_group if name.startswith(resctrl.RESCTRL) else tracing.make_instance
        )

    def remove_folder(self, name: str) -> None:
        """See HostRoot."""
        self._change_folder(
            "cannot remove", name, resctrl.remove_group if name.startswith(resctrl.RESCTRL) else tracing.remove_instance
        )

    def _change_folder(self, what: str, name: str, change: Callable[[FakeRoot, str], None]) -> None:
        with self.changing(name, what.partition(" ")[2]):
            self._check(self.write_errors, name, what)
            try:
                change(self, name)
            except OSError as error:
                raise host_error(what, name, error) from None

    def read32(self, name: str, offset: int) -> int:
        """See HostRoot."""
        self._check(self.read_errors, name, "cannot map the device registers")
        self._check_present(name)
        return self.registers.get((self.real(name), offset), 0)

    def write32(self, name: str, offset: int, value: int) -> None:
        """See HostRoot."""
        with self.changing(f"{name}@{offset:#x}", f"{value:#x}"):
            self._check(self.write_errors, name, "cannot map the device registers")
            self._check_present(name)
            self.registers[self.real(name), offset] = value

    def write(self, name: str, value: str) -> None:
        """See HostRoot. What a file does beyond keeping the text is in the hook of its name."""
        with self.changing(name, value):
            self._check(self.write_errors, name, f"cannot write {value!r} to")
            self._check_present(name)
            path = self.real(name)
            try:
                _HOOKS.get(os.path.basename(path), _store)(self, path, value)
            except OSError as error:
                raise host_error(f"cannot write {value!r} to", name, error) from None

    def open_device(self, name: str, number: str, flags: int) -> int:
        """See HostRoot. A disk is a file, which knows neither O_DIRECT nor O_EXCL: the table of read errors has what is busy."""
        self._check(self.read_errors, f"dev/{name}", "cannot open")
        try:
            descriptor = os.open(self.path / "dev" / name, flags & ~(os.O_DIRECT | os.O_EXCL) | os.O_CLOEXEC)
        except OSError as error:
            raise host_error("cannot open", f"dev/{name}", error) from None
        return descriptor

    def ioctl(self, descriptor: int, request: int, argument: bytearray, data: bytearray | None = None) -> int:
        """See HostRoot."""
        try:
            return nvme.execute(self, descriptor, request, argument, data)
        except OSError as error:
            raise HostError(f"ioctl {request:#x} failed", errno=error.errno or 0) from None

    def sched_getaffinity(self, tid: int) -> CpuSet:
        """See HostRoot. kernel/sched/syscalls.c, sched_getaffinity(): what it may run on, less what is offline."""
        allowed = re.search(_ALLOWED, self.text(f"{self._thread(tid)}/status"), re.MULTILINE)
        assert allowed
        return CpuSet.parse(allowed[1]) & self._online()

    def sched_setaffinity(self, tid: int, cpus: CpuSet) -> None:
        """See HostRoot. kernel/sched/syscalls.c, sched_setaffinity() and __sched_setaffinity()."""
        with self.changing(f"affinity of {tid}", str(cpus)):
            if number := self.write_errors.get(f"affinity of {tid}"):
                raise HostError(f"cannot confine thread {tid} to CPUs {cpus}", errno=number)
            folder = self._thread(tid)
            stat = self.text(f"{folder}/stat")
            possible = cpus & self._cpuset(folder)
            flags = int(stat[stat.rindex(")") + 2 :].split()[6])
            if flags & _PF_NO_SETAFFINITY or not possible & self._online():
                raise HostError(f"cannot confine thread {tid} to CPUs {cpus}", errno=errno.EINVAL)
            status = re.sub(_ALLOWED, f"Cpus_allowed_list:\t{possible}", self.text(f"{folder}/status"), flags=re.MULTILINE)
            self.add(f"{folder}/status", status)

    def _thread(self, tid: int) -> str:
        for folder in self.path.glob(f"proc/[0-9]*/task/{tid}"):
            return str(folder.relative_to(self.path))
        raise HostError(f"there is no thread {tid}", errno=errno.ESRCH)

    def _online(self) -> CpuSet:
        return CpuSet.parse(self.text("sys/devices/system/cpu/online"))

    def _cpuset(self, folder: str) -> CpuSet:
        """What the cpuset of a thread's control group allows (cgroup-v2.rst, cpuset.cpus.effective)."""
        group = self.text(f"{folder}/cgroup").removeprefix("0::") if self.exists(f"{folder}/cgroup") else ""
        file = f"sys/fs/cgroup{group}/cpuset.cpus.effective"
        return CpuSet.parse(self.text(file if self.exists(file) else "sys/devices/system/cpu/possible"))

    def text(self, name: str) -> str:
        """The file's text, past the table of errors."""
        return (self.path / name).read_text().strip()

    def _check(self, errors: dict[str, int], name: str, what: str) -> None:
        if errors:
            for key, number in errors.items():
                if self.real(key) == self.real(name):
                    raise host_error(what, name, OSError(number, ""))

    def _check_present(self, name: str) -> None:
        if not (self.path / name).is_file():
            raise HostError(f"there is no /{name}", errno=errno.ENOENT)


class _RegisterFile(MutableMapping[tuple[str, int], int]):
    """Device registers, kept in a file of the host."""

    def __init__(self, fake: FakeRoot) -> None:
        self._fake = fake

    def __getitem__(self, key: tuple[str, int]) -> int:
        return self._load()[key]

    def __setitem__(self, key: tuple[str, int], value: int) -> None:
        self._store({**self._load(), key: value})

    def __delitem__(self, key: tuple[str, int]) -> None:
        self._store({other: value for other, value in self._load().items() if other != key})

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())

    def _load(self) -> dict[tuple[str, int], int]:
        text = self._fake.text(_REGISTERS) if (self._fake.path / _REGISTERS).exists() else ""
        lines = (line.split() for line in text.splitlines())
        return {(name, int(offset, 0)): int(value, 0) for name, offset, value in lines}

    def _store(self, values: dict[tuple[str, int], int]) -> None:
        self._fake.add(_REGISTERS, "\n".join(f"{name} {offset:#x} {value:#x}" for (name, offset), value in values.items()))


def all_read(survey: tuple[tuple[_Item, ...], tuple[HostError, ...]]) -> tuple[_Item, ...]:
    """What a `survey_*` function has read; raises the first error."""
    items, problems = survey
    if problems:
        raise problems[0]
    return items


def load_host(folder: Path, name: str) -> FakeRoot:
    """Makes the host tests/data/hosts/NAME.txt below the (empty) folder."""
    return build_host(folder, (HOSTS / f"{name}.txt").read_text())


def build_host(folder: Path, text: str) -> FakeRoot:
    """Makes a host from lines of the data format; empty lines and those that begin with # say nothing."""
    fake = FakeRoot(folder)
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        assert match, f"not a line of host data: {line}"
        path = match["path"]
        if match["target"] is not None:
            fake.add_link(path, match["target"])
        elif match["kind"] is not None:
            table = fake.read_errors if match["kind"] == "read" else fake.write_errors
            table[path] = getattr(errno, match["errno"])
        elif match["offset"] is not None:
            fake.registers[fake.real(path), int(match["offset"], 0)] = int(match["value"], 0)
        else:
            fake.add(path, match["text"])
    tracing.add_tracing(fake)
    for device in fake.names(DEVICES) if fake.exists(DEVICES) else ():
        driver = fake.link(f"{DEVICES}/{device}/driver")
        physical = not fake.exists(f"{DEVICES}/{device}/physfn")
        if driver and driver != "vfio-pci" and physical:
            fake.native[fake.real(f"{DEVICES}/{device}")] = driver
        if fake.exists(f"{DEVICES}/{device}/net") and fake.exists(f"{DEVICES}/{device}/sriov_numvfs"):
            own = fake.fake_net.own_interface(f"{DEVICES}/{device}")
            fake.fake_net.make_vfs(own, int(fake.text(f"{DEVICES}/{device}/sriov_numvfs")))
    fake.keep_tables()
    return fake


def _store(fake: FakeRoot, path: str, value: str) -> None:
    fake.add(path, value.strip())


def _driver_override(fake: FakeRoot, path: str, value: str) -> None:
    _store(fake, path, value.strip() or "(null)")


def _numvfs(fake: FakeRoot, path: str, value: str) -> None:
    """drivers/pci/iov.c, sriov_numvfs_store()."""
    pf, count, before = os.path.dirname(path), int(value), int(fake.text(path))
    if count > int(fake.text(f"{pf}/sriov_totalvfs")):
        raise OSError(errno.ERANGE, "")
    if count == before:
        return
    if not fake.link(f"{pf}/driver"):
        raise OSError(errno.ENOENT, "")
    if count and before:
        raise OSError(errno.EBUSY, "")
    for index in range(before):
        if fake.in_use(f"{pf}/virtfn{index}"):
            fake.violate(f"VF {index} of {pf} was removed while a guest has it: the kernel would wait for the guest's end")
        remove_vf(fake, pf, index)
    for index in range(count):
        _add_vf(fake, pf, index)
    _store(fake, path, value)
    if fake.exists(f"{pf}/net"):
        fake.fake_net.make_vfs(fake.fake_net.own_interface(pf), count)
    for resource, offset in list(fake.registers):
        if os.path.dirname(resource) == pf:
            # igb resets the PF, and from then on checks addresses and VLANs of all pools but its own, which is the one after the
            # VFs', and switches between them: igb_vmm_control().
            fake.registers[resource, offset] = LOOPBACK | (0xFFFF ^ (0x101 << count)) if count else 0


def _add_vf(fake: FakeRoot, pf: str, index: int) -> None:
    offset = int(fake.text(f"{pf}/sriov_offset")) + index * int(fake.text(f"{pf}/sriov_stride"))
    address = PciAddress.parse(os.path.basename(pf)).offset(offset)
    folder = f"{os.path.dirname(pf)}/{address}"
    vendor, device = fake.text(f"{pf}/vendor"), fake.text(f"{pf}/sriov_vf_device")
    for name in ("class", "numa_node"):
        fake.add(f"{folder}/{name}", fake.text(f"{pf}/{name}"))
    texts = {"vendor": vendor, "device": f"0x{device}", "enable": "0", "driver_override": "(null)", "reset": ""}
    for name, text in texts.items():
        fake.add(f"{folder}/{name}", text)
    fake.add_link(f"{pf}/virtfn{index}", f"../{address}")
    fake.add_link(f"{folder}/physfn", f"../{os.path.basename(pf)}")
    fake.add_link(f"{DEVICES}/{address}", os.path.relpath(folder, DEVICES))
    if fake.link(f"{pf}/iommu_group"):
        number = max(int(name) for name in fake.names(GROUPS)) + 1
        fake.add(f"{GROUPS}/{number}/type", fake.text(f"{pf}/iommu_group/type"))
        fake.add_link(f"{GROUPS}/{number}/devices/{address}", os.path.relpath(folder, f"{GROUPS}/{number}/devices"))
        fake.add_link(f"{folder}/iommu_group", os.path.relpath(f"{GROUPS}/{number}", folder))
    _probe_device(fake, folder)


def remove_vf(fake: FakeRoot, pf: str, index: int) -> None:
    folder = fake.real(f"{pf}/virtfn{index}")
    address = os.path.basename(folder)
    if fake.link(f"{folder}/iommu_group"):
        group = fake.path / fake.real(f"{folder}/iommu_group")
        (group / "devices" / address).unlink()
        (group / "type").unlink()
        (group / "devices").rmdir()
        group.rmdir()
    (fake.path / pf / f"virtfn{index}").unlink()
    (fake.path / DEVICES / address).unlink()
    shutil.rmtree(fake.path / folder)


def _drivers_probe(fake: FakeRoot, path: str, value: str) -> None:
    _probe_device(fake, fake.real(_device(fake, value)))


def _probe_device(fake: FakeRoot, folder: str) -> None:
    """drivers/pci/pci-driver.c, pci_match_device() and pci_device_can_probe()."""
    if fake.link(f"{folder}/driver"):
        return
    override = fake.text(f"{folder}/driver_override")
    chosen = override if override != "(null)" else _native(fake, folder)
    autoprobe = f"{folder}/physfn/sriov_drivers_autoprobe"
    if chosen == "pcieport" and not fake.text(f"{folder}/class").startswith("0x0604"):
        return  # drivers/pci/pcie/portdrv.c, pcie_portdrv_probe(): bridges only
    may_probe = override != "(null)" or not fake.exists(autoprobe) or fake.text(autoprobe) != "0"
    if chosen and may_probe and fake.exists(f"{DRIVERS}/{chosen}"):
        _bind_to(fake, folder, chosen)


def _native(fake: FakeRoot, folder: str) -> str | None:
    """The driver that knows the function by its id."""
    if fake.exists(f"{folder}/physfn"):
        return _VF_DRIVERS.get((fake.text(f"{folder}/vendor")[2:], fake.text(f"{folder}/device")[2:]))
    return fake.native.get(folder)


def _bind_to(fake: FakeRoot, folder: str, driver: str) -> None:
    fake.add_link(f"{folder}/driver", os.path.relpath(f"{DRIVERS}/{driver}", folder))
    # vfio-pci enables the function only while it is open; a driver that works with it, at once.
    fake.add(f"{folder}/enable", "0" if driver == "vfio-pci" else "1")
    if driver == "nvme" and nvme.is_nvme(fake, os.path.basename(folder)):
        nvme.show_nvme(fake, os.path.basename(folder))


def _bind(fake: FakeRoot, path: str, value: str) -> None:
    driver, folder = os.path.basename(os.path.dirname(path)), fake.real(_device(fake, value))
    if fake.link(f"{folder}/driver"):
        raise OSError(errno.EBUSY, "")
    if driver not in (fake.text(f"{folder}/driver_override"), _native(fake, folder)):
        raise OSError(errno.ENODEV, "")
    _bind_to(fake, folder, driver)


def _unbind(fake: FakeRoot, path: str, value: str) -> None:
    folder = fake.real(_device(fake, value))
    if fake.link(f"{folder}/driver") != os.path.basename(os.path.dirname(path)):
        raise OSError(errno.ENODEV, "")
    if fake.in_use(folder):
        fake.violate(f"{value} was unbound while a guest has it: the kernel would wait for the guest's end")
    (fake.path / folder / "driver").unlink()
    shutil.rmtree(fake.path / folder / "net", ignore_errors=True)
    if fake.exists(f"{folder}/nvme"):
        nvme.hide_nvme(fake, os.path.basename(folder))
    fake.add(f"{folder}/enable", "0")


def _reset(fake: FakeRoot, path: str, value: str) -> None:
    """drivers/pci/pci-sysfs.c, reset_store(): a function level reset. What the PF enforces stays; so does an address that it gave
    (igb_main.c, igb_vf_reset_event()).
    """
    if value.strip() != "1":
        raise OSError(errno.EINVAL, "")
    if fake.in_use(os.path.dirname(path)):
        fake.violate(f"{os.path.dirname(path)} was reset while a guest has it")


def _device(fake: FakeRoot, address: str) -> str:
    if not fake.exists(f"{DEVICES}/{address.strip()}"):
        raise OSError(errno.ENODEV, "")
    return f"{DEVICES}/{address.strip()}"


def _nr_hugepages(fake: FakeRoot, path: str, value: str) -> None:
    """mm/hugetlb.c, set_max_huge_pages(): pages in use stay, memory that is not there cannot be had, and neither is an error."""
    free = f"{os.path.dirname(path)}/free_hugepages"
    total, unused = int(fake.text(path)), int(fake.text(free))
    wanted = max(total - unused, min(int(value), fake.page_limit))
    _store(fake, path, str(wanted))
    _store(fake, free, str(unused + wanted - total))


def _smp_affinity_list(fake: FakeRoot, path: str, value: str) -> None:
    """kernel/irq/proc.c, write_irq_affinity(). Interrupts that the kernel manages are in the table of errors."""
    try:
        cpus = CpuSet.parse(value)
    except RequestError:
        raise OSError(errno.EINVAL, "") from None
    if not cpus & CpuSet.parse(fake.text("sys/devices/system/cpu/online")):
        raise OSError(errno.EINVAL, "")
    _store(fake, path, str(cpus))
    effective = f"{os.path.dirname(path)}/effective_affinity_list"
    if fake.exists(effective):
        _store(fake, effective, str(next(iter(cpus))))


def _cgroup_threads(fake: FakeRoot, path: str, value: str) -> None:
    """kernel/cgroup/cgroup.c, __cgroup_procs_write(). The thread gets the group's CPUs (kernel/cgroup/cpuset.c)."""
    tid = value.strip()
    found = list(fake.path.glob(f"proc/[0-9]*/task/{tid}"))
    if not found:
        raise OSError(errno.ESRCH, "")
    if fake.text(f"{os.path.dirname(path)}/cgroup.type") != "threaded":
        raise OSError(errno.EOPNOTSUPP, "")
    line = "0::/" + os.path.relpath(os.path.dirname(path), "sys/fs/cgroup")
    for folder in found:
        fake.add(f"{folder.relative_to(fake.path)}/cgroup", line)
        fake.add(f"proc/{tid}/cgroup", line)
        cpus = f"{os.path.dirname(path)}/cpuset.cpus.effective"
        if fake.exists(cpus):
            status = f"{folder.relative_to(fake.path)}/status"
            fake.add(status, re.sub(_ALLOWED, f"Cpus_allowed_list:\t{fake.text(cpus)}", fake.text(status), flags=re.MULTILINE))


def _cpuset_cpus(fake: FakeRoot, path: str, value: str) -> None:
    """cgroup-v2.rst, cpuset.cpus: a group has of its CPUs those that the group above has, and all of them if that is none."""
    try:
        CpuSet.parse(value)
    except RequestError:
        raise OSError(errno.EINVAL, "") from None
    _store(fake, path, value)
    _update_cpuset(fake, os.path.dirname(path))


def _update_cpuset(fake: FakeRoot, folder: str) -> None:
    above = f"{os.path.dirname(folder)}/cpuset.cpus.effective"
    parent = CpuSet.parse(fake.text(above)) if fake.exists(above) else fake._online()
    effective = CpuSet.parse(fake.text(f"{folder}/cpuset.cpus")) & parent or parent
    if str(effective) != fake.text(f"{folder}/cpuset.cpus.effective"):
        fake.add(f"{folder}/cpuset.cpus.effective", str(effective))
    for child in fake.path.glob(f"{folder}/*/cpuset.cpus"):
        _update_cpuset(fake, str(child.parent.relative_to(fake.path)))


def _cpu_mask(fake: FakeRoot, path: str, value: str) -> None:
    """kernel/workqueue.c, workqueue_set_unbound_cpumask(); kernel/irq/proc.c, default_affinity_write()."""
    possible = CpuSet.parse(fake.text("sys/devices/system/cpu/possible"))
    try:
        cpus = CpuSet.parse_mask(value) & possible
    except RequestError:
        raise OSError(errno.EINVAL, "") from None
    if not cpus:
        raise OSError(errno.EINVAL, "")
    # Printed with as many digits as there are possible CPUs (lib/vsprintf.c, bitmap_string()).
    digits = cpus.mask.replace(",", "").zfill(-(-(max(possible) + 1) // 4))
    first = len(digits) % 8
    _store(fake, path, ",".join(filter(None, (digits[:first], *(digits[at : at + 8] for at in range(first, len(digits), 8))))))


def _cpu_list(fake: FakeRoot, path: str, value: str) -> None:
    """kernel/watchdog.c, proc_watchdog_cpumask(): CPUs that are not possible are dropped."""
    try:
        cpus = CpuSet.parse(value)
    except RequestError:
        raise OSError(errno.EINVAL, "") from None
    _store(fake, path, str(cpus & CpuSet.parse(fake.text("sys/devices/system/cpu/possible"))))


def set_partition(fake: FakeRoot, path: str, value: str) -> None:
    """kernel/cgroup/cpuset.c, remote_partition_enable(): each group above must have the CPUs in cpuset.cpus.exclusive."""
    folder, state = os.path.dirname(path), value.strip()
    if state not in ("member", "isolated"):
        raise OSError(errno.EINVAL, "")
    own, above = CpuSet.parse(fake.text(f"{folder}/cpuset.cpus.exclusive")), os.path.dirname(folder)
    while state == "isolated" and above != "sys/fs/cgroup":
        if not own or not own <= CpuSet.parse(fake.text(f"{above}/cpuset.cpus.exclusive")):
            state = "isolated invalid (Parent is not a partition root)"
        above = os.path.dirname(above)
    isolated = "sys/fs/cgroup/cpuset.cpus.isolated"
    if state != fake.text(path) and "isolated" in (state, fake.text(path)) and fake.exists(isolated):
        others = CpuSet.parse(fake.text(isolated)) - own
        fake.add(isolated, str(others | own if state == "isolated" else others))
    _store(fake, path, state)


_HOOKS: dict[str, Callable[[FakeRoot, str, str], None]] = {
    "uevent": lambda _fake, _path, _value: None,  # an event for udev
    "driver_override": _driver_override,
    "sriov_numvfs": _numvfs,
    "drivers_probe": _drivers_probe,
    "bind": _bind,
    "unbind": _unbind,
    "reset": _reset,
    "nr_hugepages": _nr_hugepages,
    "smp_affinity_list": _smp_affinity_list,
    "cgroup.threads": _cgroup_threads,
    "cpuset.cpus": _cpuset_cpus,
    "trigger": tracing.write_trigger,
    "cpuset.cpus.partition": set_partition,
    "cpumask": _cpu_mask,
    "default_smp_affinity": _cpu_mask,
    "watchdog_cpumask": _cpu_list,
    "schemata": resctrl.write_schemata,
    "cpus_list": resctrl.write_cpus,
}
