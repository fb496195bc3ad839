"""What the processors can do: features, microcode, vulnerabilities, parameters of KVM, clock source."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.host.root import HostRoot
from orchestrator.values import CpuSet

_CPUS = "sys/devices/system/cpu"
_TYPES = tuple(f"sys/devices/cpu_{kind}/cpus" for kind in ("core", "atom", "lowpower"))


@dataclass(frozen=True)
class Processor:
    """One online CPU, as /proc/cpuinfo shows it (arch/x86/kernel/cpu/proc.c)."""

    cpu: int
    vendor: str
    model: str
    microcode: str
    flags: frozenset[str]


def read_processors(host: HostRoot) -> tuple[Processor, ...]:
    """Raises HostError if /proc/cpuinfo cannot be read; empty on an architecture with other fields."""
    found = []
    for block in host.read("proc/cpuinfo").split("\n\n"):
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        if fields.get("processor", "").isdecimal() and "flags" in fields:
            # On Intel, the features of VMX have a line of their own since Linux 5.6.
            flags = frozenset(fields["flags"].split()) | frozenset(fields.get("vmx flags", "").split())
            vendor, model = fields.get("vendor_id", ""), fields.get("model name", "")
            found.append(Processor(int(fields["processor"]), vendor, model, fields.get("microcode", ""), flags))
    return tuple(found)


def read_kvm_parameter(host: HostRoot, name: str) -> str | None:
    """A parameter of kvm_intel, kvm_amd or kvm; None if no loaded module has it."""
    modules = ("kvm_intel", "kvm_amd", "kvm")
    return next((text for module in modules if (text := host.find(f"sys/module/{module}/parameters/{name}")) is not None), None)


def read_vulnerabilities(host: HostRoot) -> dict[str, str]:
    """By name, what the kernel reports (Documentation/ABI/testing/sysfs-devices-system-cpu); empty on an old kernel."""
    folder = f"{_CPUS}/vulnerabilities"
    return {name: host.read(f"{folder}/{name}") for name in host.names(folder)} if host.exists(folder) else {}


def read_clock_source(host: HostRoot) -> str | None:
    return host.find("sys/devices/system/clocksource/clocksource0/current_clocksource")


def read_smt_control(host: HostRoot) -> str | None:
    """ "on", "off", "forceoff", "notsupported" (Documentation/ABI/testing/sysfs-devices-system-cpu)."""
    return host.find(f"{_CPUS}/smt/control")


def read_core_types(host: HostRoot) -> tuple[str, ...]:
    """CPUs of each type of a hybrid processor; empty for one without types."""
    return tuple(text for name in _TYPES if (text := host.find(name)))


def read_capacities(host: HostRoot, cpus: CpuSet) -> dict[str, CpuSet]:
    """CPUs by the capacity that the scheduler reckons with; empty where it does not tell them apart (arch/x86/kernel/itmt.c)."""
    found: dict[str, CpuSet] = {}
    for cpu in cpus:
        if text := host.find(f"{_CPUS}/cpu{cpu}/cpu_capacity"):
            found[text] = found.get(text, CpuSet()) | CpuSet.of([cpu])
    return found


def has_remapped_interrupts(host: HostRoot) -> bool:
    """Whether the IOMMU remaps interrupts: their chips then have names with IR (drivers/iommu/{intel,amd}, irq_remapping.c).

    In /proc/interrupts the chip follows the counts of all CPUs (kernel/irq/proc.c, show_interrupts()).
    """
    lines = (line.partition(":")[2].split() for line in host.read("proc/interrupts").splitlines())
    chips = (next((word for word in words if not word.isdecimal()), "") for words in lines)
    return any(chip.startswith(("IR-", "AMD-IR-", "INTEL-IR-", "HYPERV-IR-")) for chip in chips)
