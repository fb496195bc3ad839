"""Interrupts and their affinities (Documentation/core-api/irq/irq-affinity.rst)."""

from __future__ import annotations

from dataclasses import dataclass
from errno import EINVAL, EIO, ENOSPC, EPERM

from orchestrator.errors import HostError, RequestError
from orchestrator.host.cpus import parse_cpus
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet

MANAGED = frozenset({EIO, EPERM})
"""Errors of a write to an interrupt that the kernel manages: EIO before Linux 6.12, then EPERM (commit eb29369fa543)."""

_MANAGED_HINT = "boot with isolcpus=managed_irq,CPUS: the kernel manages this interrupt, and keeps it off CPUs that do no I/O"
_HINTS = {
    EIO: _MANAGED_HINT,
    EPERM: _MANAGED_HINT,
    EINVAL: "no requested CPU is online",
    ENOSPC: "use more CPUs: these CPUs have no free interrupt vector",
}


@dataclass(frozen=True)
class Irq:
    number: int
    name: str  # names of its handlers, joined by commas ("nic0-TxRx-0"); empty without a handler
    affinity: CpuSet
    effective: CpuSet  # empty if the interrupt controller does not report it
    problem: str = ""  # why the CPUs could not be read

    def __str__(self) -> str:
        return f"interrupt {self.number} ({self.name or 'without a handler'})"


def read_irqs(host: HostRoot) -> tuple[Irq, ...]:
    """All interrupts by number, including those without a handler. Raises HostError only if /proc/irq cannot be listed."""
    numbers = sorted(int(name) for name in host.names("proc/irq") if name.isdecimal())
    known: dict[str, CpuSet] = {}
    return tuple(irq for number in numbers if (irq := read_irq(host, number, known)))


def read_irq(host: HostRoot, number: int, known: dict[str, CpuSet] | None = None) -> Irq | None:
    """None if the interrupt does not exist. Adds to `known`, CPU sets by their text: most interrupts share a few long texts."""
    name, known = "", {} if known is None else known

    def parse(text: str) -> CpuSet:
        return known.get(text) or known.setdefault(text, CpuSet.parse(text))

    try:
        affinity = host.find(f"proc/irq/{number}/smp_affinity_list")
        if affinity is None:
            return None
        name = host.find(f"sys/kernel/irq/{number}/actions") or ""
        effective = host.find(f"proc/irq/{number}/effective_affinity_list") or ""
        return Irq(number, name, parse(affinity), parse(effective))
    except (HostError, RequestError) as error:
        return Irq(number, name, CpuSet(), CpuSet(), error.message)


def set_irq_affinity(host: HostRoot, number: int, cpus: CpuSet) -> None:
    """The next interrupt can still arrive on an old CPU: many interrupts move when they fire."""
    name = f"proc/irq/{number}/smp_affinity_list"
    try:
        host.write(name, str(cpus))
    except HostError as error:
        what = f"cannot set the affinity of interrupt {number} to CPUs {cpus} (/{name})"
        raise HostError(what, _HINTS.get(error.errno, error.hint), error.errno) from None
    actual = parse_cpus(name, host.read(name))
    if actual != cpus:
        raise HostError(f"interrupt {number}: requested CPUs {cpus}, kernel set {actual}")
