"""Kernel settings that keep the host's own work off guest cores: each with its file, the wanted value, the reason, and its owner.

One owner changes a setting: the Ansible role for what holds from boot on, the manager for what holds while there are guests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.errors import HostError, RequestError
from orchestrator.host.cpus import read_affinity, read_isolated
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet

WORKQUEUE = "sys/devices/virtual/workqueue"


class Owner(StrEnum):
    ROLE = "Ansible role"
    MANAGER = "manager"


@dataclass(frozen=True)
class Division:
    """How the CPUs of a host are divided."""

    housekeeping: CpuSet
    guest: CpuSet  # all other CPUs that can be online
    used: CpuSet  # those that guests use now


class Notation(StrEnum):
    """How a file shows a set of CPUs."""

    MASK = "mask"
    LIST = "list"

    def parse(self, text: str) -> CpuSet:
        return CpuSet.parse_mask(text) if self is Notation.MASK else CpuSet.parse(text)

    def parse_file(self, file: str, text: str) -> CpuSet:
        """Raises HostError with the file's name."""
        try:
            return self.parse(text)
        except RequestError as error:
            raise HostError(f"cannot parse /{file}: {error.message}") from None

    def show(self, cpus: CpuSet) -> str:
        return cpus.mask if self is Notation.MASK else str(cpus)


@dataclass(frozen=True)
class Without:
    """CPUs, none of them a guest CPU."""

    notation: Notation

    def describe(self, division: Division) -> str:
        return f"CPUs {division.housekeeping}"

    def accepts(self, text: str, division: Division) -> bool:
        return not self.notation.parse(text).meets(division.guest)


@dataclass(frozen=True)
class Covers:
    """A list of CPUs that has the CPUs of all guests: of those that run, or without one, of those that may be created."""

    def describe(self, division: Division) -> str:
        return f"at least CPUs {division.used or division.guest}"

    def accepts(self, text: str, division: Division) -> bool:
        return (division.used or division.guest) <= CpuSet.parse(text)


@dataclass(frozen=True)
class OneOf:
    values: tuple[str, ...]

    def describe(self, _: Division) -> str:
        return " or ".join(self.values)

    def accepts(self, text: str, _: Division) -> bool:
        return text in self.values


@dataclass(frozen=True)
class Minimum:
    number: int

    def describe(self, _: Division) -> str:
        return f"at least {self.number}"

    def accepts(self, text: str, _: Division) -> bool:
        return text.isdecimal() and int(text) >= self.number


Rule = Without | Covers | OneOf | Minimum


@dataclass(frozen=True)
class Setting:
    name: str
    file: str  # below /; for a setting without a file, what is read instead
    owner: Owner
    wanted: Rule
    why: str
    source: str  # below Documentation/ of the kernel, or a manual page
    absent: str  # what a kernel without the file does
    tuned: tuple[str, ...] = ()  # words by which a profile of tuned sets it
    excuse: tuple[str, str] | None = None  # a value that is a limit and not a fault, and why
    read: Callable[[HostRoot], str | None] | None = None  # for a setting without a file
    option: str = ""  # of the kernel's build, if a kernel without the file disturbs guests

    def find(self, host: HostRoot) -> str | None:
        """Its text; None if the kernel does not have it. Raises HostError if it cannot be read."""
        return self.read(host) if self.read else host.find(self.file)


def _read_isolated(host: HostRoot) -> str:
    host.read("sys/devices/system/cpu/isolated")  # every kernel has it: without it, none isolated means nothing
    return str(read_isolated(host))


def _read_nocbs(host: HostRoot) -> str:
    """From the boot parameters: the kernel shows it nowhere else. `nohz_full` implies it (kernel/rcu/tree_nocb.h)."""
    found = CpuSet.parse(_none(host.find("sys/devices/system/cpu/nohz_full")))
    for word in host.read("proc/cmdline").split():
        name, _, cpus = word.partition("=")
        if name.replace("-", "_") == "rcu_nocbs":
            found |= _parse_parameter(host, cpus)
    return str(found)


def _none(text: str | None) -> str:
    """The kernel shows no CPUs as `(null)`, before Linux 4 as NUL, in some files."""
    return "" if text in (None, "(null)", "\0") else str(text)


def _parse_parameter(host: HostRoot, text: str) -> CpuSet:
    return CpuSet.parse(host.read("sys/devices/system/cpu/possible") if text in ("", "all") else text)


def _read_first_process(host: HostRoot) -> str:
    return str(read_affinity(host, 1))


def _read_nohz(host: HostRoot) -> str | None:
    text = host.find("sys/devices/system/cpu/nohz_full")
    return None if text is None else _none(text)


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "isolcpus", "sys/devices/system/cpu/isolated", Owner.ROLE, Covers(),
        "the scheduler moves no thread to a guest CPU by itself", "admin-guide/kernel-parameters.txt (isolcpus)",
        "", ("isolcpus=", "isolate_managed_irq"), read=_read_isolated,
    ),
    Setting(
        "nohz_full", "sys/devices/system/cpu/nohz_full", Owner.ROLE, Covers(),
        "no periodic tick while a CPU has one runnable thread", "timers/no_hz.rst",
        "each guest CPU has a periodic tick", ("nohz_full=",), read=_read_nohz, option="CONFIG_NO_HZ_FULL",
    ),
    Setting(
        "rcu_nocbs", "proc/cmdline", Owner.ROLE, Covers(),
        "RCU callbacks run in threads that can be moved, not in softirqs of guest CPUs",
        "admin-guide/kernel-parameters.txt (rcu_nocbs)", "", ("rcu_nocbs=",), read=_read_nocbs,
    ),
    Setting(
        "CPUAffinity", "affinity of process 1", Owner.ROLE, Without(Notation.LIST),
        "services inherit the CPUs of systemd", "systemd-system.conf(5)",
        "", ("cpu_affinity=",), read=_read_first_process,
    ),
    Setting(
        "default_smp_affinity", "proc/irq/default_smp_affinity", Owner.MANAGER, Without(Notation.MASK),
        "new interrupts are sent to housekeeping CPUs", "core-api/irq/irq-affinity.rst",
        "", ("default_irq_smp_affinity",),
    ),
    Setting(
        "workqueue", f"{WORKQUEUE}/cpumask", Owner.MANAGER, Without(Notation.MASK),
        "unbound work of all workqueues runs on housekeeping CPUs", "core-api/workqueue.rst",
        "unbound work may run on guest CPUs", ("workqueue/cpumask",),
    ),
    Setting(
        "writeback", f"{WORKQUEUE}/writeback/cpumask", Owner.MANAGER, Without(Notation.MASK),
        "dirty pages are written from housekeeping CPUs", "admin-guide/kernel-per-CPU-kthreads.rst (kworker)",
        "writeback may run on guest CPUs", ("writeback/cpumask",),
    ),
    Setting(
        "watchdog_cpumask", "proc/sys/kernel/watchdog_cpumask", Owner.MANAGER, Without(Notation.LIST),
        "the lockup detectors' timers and interrupts stay on housekeeping CPUs",
        "admin-guide/sysctl/kernel.rst (watchdog_cpumask)", "the kernel has no lockup detectors", ("kernel.watchdog_cpumask",),
    ),
    Setting(
        "nmi_watchdog", "proc/sys/kernel/nmi_watchdog", Owner.ROLE, OneOf(("0",)),
        "no non-maskable interrupts every few seconds, and no performance counter taken",
        "admin-guide/sysctl/kernel.rst (nmi_watchdog)", "the kernel has no such detector", ("kernel.nmi_watchdog",),
    ),
    Setting(
        "timer_migration", "proc/sys/kernel/timer_migration", Owner.ROLE, OneOf(("1",)),
        "timers of idle CPUs expire on other CPUs", "timers/no_hz.rst",
        "the kernel always moves them", ("kernel.timer_migration",),
    ),
    Setting(
        "stat_interval", "proc/sys/vm/stat_interval", Owner.ROLE, Minimum(10),
        "a worker of each CPU folds its counters rarely", "admin-guide/sysctl/vm.rst (stat_interval)",
        "", ("vm.stat_interval",),
    ),
    Setting(
        "numa_balancing", "proc/sys/kernel/numa_balancing", Owner.ROLE, OneOf(("0",)),
        "pages are not unmapped to detect accesses", "admin-guide/sysctl/kernel.rst (numa_balancing)",
        "the kernel has no NUMA balancing", ("kernel.numa_balancing",),
    ),
    Setting(
        "ksm", "sys/kernel/mm/ksm/run", Owner.ROLE, OneOf(("0", "2")),
        "no thread scans and merges pages", "admin-guide/mm/ksm.rst",
        "the kernel has no KSM", ("ksm/run",),
    ),
    Setting(
        "nx_huge_pages", "sys/module/kvm/parameters/nx_huge_pages", Owner.ROLE, OneOf(("never",)),
        "no recovery thread of KVM in each guest's QEMU", "admin-guide/hw-vuln/multihit.rst",
        "KVM does not split huge pages", ("nx_huge_pages",),
        ("Y", "the processor has the erratum iTLB multihit, or the role was told to leave it: KVM splits executable huge pages"),
    ),
    Setting(
        "halt_poll_ns", "sys/module/kvm/parameters/halt_poll_ns", Owner.ROLE, OneOf(("0",)),
        "KVM does not poll on the guest's core after a halt", "virt/kvm/halt-polling.rst",
        "KVM does not poll", ("halt_poll_ns",),
    ),
    Setting(
        "min_timer_period_us", "sys/module/kvm/parameters/min_timer_period_us", Owner.ROLE, Minimum(200),
        "a guest's periodic timer interrupts its core at most 5,000 times a second", "arch/x86/kvm/x86.c (min_timer_period_us)",
        "KVM does not limit periodic timers", ("min_timer_period_us",),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    setting: Setting
    text: str | None  # None if the kernel does not have it, or it could not be read
    problem: str = ""  # why it could not be read

    @property
    def is_absent(self) -> bool:
        """The kernel does not have the setting."""
        return self.text is None and not self.problem

    @property
    def is_excused(self) -> bool:
        """It has the value that is a limit and not a fault."""
        return self.setting.excuse is not None and self.text == self.setting.excuse[0]

    def is_wanted(self, division: Division) -> bool:
        """Raises HostError if the text has another format."""
        try:
            return self.text is not None and self.setting.wanted.accepts(self.text, division)
        except RequestError as error:
            raise HostError(f"cannot parse {self.setting.name} (/{self.setting.file}): {error.message}") from None


def read_settings(host: HostRoot, owner: Owner | None = None) -> tuple[Reading, ...]:
    """In the order of the table; of one owner, or of all."""
    return tuple(_read(host, setting) for setting in SETTINGS if owner in (None, setting.owner))


def _read(host: HostRoot, setting: Setting) -> Reading:
    try:
        return Reading(setting, setting.find(host))
    except HostError as error:
        return Reading(setting, None, error.message)
    except RequestError as error:
        return Reading(setting, None, f"cannot parse /{setting.file}: {error.message}")


def write_cpus(host: HostRoot, file: str, notation: Notation, cpus: CpuSet) -> None:
    """Raises HostError if the kernel refuses the CPUs or takes others."""
    write_text(host, file, notation.show(cpus))
    actual = notation.parse_file(file, host.read(file))
    if actual != cpus:
        raise HostError(f"/{file}: requested CPUs {cpus}, kernel set {actual}", "check that the CPUs are online")


def write_text(host: HostRoot, file: str, text: str) -> None:
    try:
        host.write(file, text)
    except HostError as error:
        hint = error.hint or f"check that /{file} is writable for the manager (ReadWritePaths= of its unit)"
        raise HostError(error.message, hint, error.errno) from None
