"""Interrupts and the CPUs that they are sent to (kernel: Documentation/core-api/irq/irq-affinity.rst)."""

from __future__ import annotations

from dataclasses import dataclass
from errno import EINVAL, EIO, ENOSPC, EPERM

from orchestrator.errors import HostError, RequestError
from orchestrator.host.cpus import parse_cpus
from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet

MANAGED = frozenset({EIO, EPERM})
"""What the kernel answers for an interrupt that it manages itself: EIO before Linux 6.12, EPERM since (commit eb29369fa543)."""

_MANAGED_HINT = "the kernel manages this interrupt itself; isolcpus=managed_irq,CPUS at boot keeps it off CPUs that do no I/O"
_HINTS = {
    EIO: _MANAGED_HINT,
    EPERM: _MANAGED_HINT,
    EINVAL: "none of the CPUs is online",
    ENOSPC: "these CPUs have no interrupt vector left; give more CPUs",
}


@dataclass(frozen=True)
class Irq:
    """An interrupt.

    Attributes:
        name: what its handlers are called, joined by commas ("nic0-TxRx-0"); empty while nobody handles it.
        affinity: CPUs that it may be sent to.
        effective: CPUs that it is really sent to; empty where the interrupt controller does not say.
        problem: why its CPUs could not be read; they are empty then.
    """

    number: int
    name: str
    affinity: CpuSet
    effective: CpuSet
    problem: str = ""

    def __str__(self) -> str:
        return f"interrupt {self.number} ({self.name or 'without a handler'})"


def read_irqs(host: HostRoot) -> tuple[Irq, ...]:
    """All interrupts by number, those without a handler too. One that cannot be read says so, and the others are read.

    Raises:
        HostError: /proc/irq cannot be read.
    """
    numbers = sorted(int(name) for name in host.names("proc/irq") if name.isdecimal())
    known: dict[str, CpuSet] = {}
    return tuple(irq for number in numbers if (irq := read_irq(host, number, known)))


def read_irq(host: HostRoot, number: int, known: dict[str, CpuSet] | None = None) -> Irq | None:
    """One interrupt, None if there is none of this number (any more).

    Args:
        known: sets of CPUs by their text, which grows: most interrupts share a few, which are long on a large host.
    """
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
    """Sends an interrupt to CPUs only, and reads back. It may arrive once more on an old CPU: many are moved when they next fire.

    Raises:
        HostError: the kernel manages the interrupt itself (an errno in MANAGED), no such interrupt (ENOENT), no CPU of these is
            online (EINVAL), no vector is free (ENOSPC), or other CPUs were taken, with both sets.
    """
    name = f"proc/irq/{number}/smp_affinity_list"
    try:
        host.write(name, str(cpus))
    except HostError as error:
        what = f"cannot send interrupt {number} to CPUs {cpus} (/{name})"
        raise HostError(what, _HINTS.get(error.errno, error.hint), error.errno) from None
    actual = parse_cpus(name, host.read(name))
    if actual != cpus:
        raise HostError(f"interrupt {number} was to be sent to CPUs {cpus}, but may be sent to {actual}")
