"""Checks of what lets a guest run without VM exits, and of what a guest may do with the processor's virtualization."""

from __future__ import annotations

from orchestrator.doctor.check import Check, Finding, Principle, failed, not_measured, passed
from orchestrator.doctor.facts import Facts
from orchestrator.host.cmdline import find_words_against_iommu, find_words_against_posting
from orchestrator.host.iommu import is_visible, read_units
from orchestrator.host.processor import read_clock_source, read_kvm_parameter

_ON, _OFF = ("Y", "1"), ("N", "0")


def _check_clock(facts: Facts) -> Finding:
    source = read_clock_source(facts.host)
    if source == "tsc":
        return passed("the clock source is tsc")
    if source is None:
        return not_measured("the kernel does not tell its clock source", "tsc: a guest reads the time without an exit")
    remedy = "check dmesg for `tsc: Marking TSC unstable`; update the firmware"
    return failed(f"the clock source is {source}", "tsc: a guest reads the time without an exit", remedy)


def _read_acceleration(facts: Facts) -> tuple[str, str | None]:
    """Of interrupts of guests: the name of KVM's parameter, and its value."""
    name = "avic" if "svm" in facts.flags else "enable_apicv"
    return name, read_kvm_parameter(facts.host, name)


def _check_exits(facts: Facts) -> Finding:
    name, value = _read_acceleration(facts)
    needed = "interrupts that a guest receives without an exit (AVIC or APICv)"
    if value is None:
        return not_measured("KVM does not report it", needed, "load kvm_amd or kvm_intel")
    if value in _ON:
        return passed(f"{name} is on")
    remedy = f"load the module with {name}=1 if the processor has it; otherwise each interrupt of a guest is an exit"
    return failed(f"{name} is {value}", needed, remedy)


def _check_posting(facts: Facts) -> Finding:
    """Of VFs: KVM alone handles the interrupts that virtual CPUs send each other."""
    needed = "an IOMMU that delivers interrupts of devices to running virtual CPUs (posted interrupts, guest virtual APIC)"
    if words := find_words_against_posting(facts.cmdline) + find_words_against_iommu(facts.cmdline):
        return failed(f"{', '.join(words)} in the kernel's command line", needed, f"remove {', '.join(words)}")
    name, value = _read_acceleration(facts)
    if value is not None and value not in _ON:
        return not_measured(f"{name} is {value}: KVM posts no interrupts without it", needed, f"load the module with {name}=1")
    units = read_units(facts.host)
    if not units:
        text = "the kernel drives no IOMMU" if is_visible(facts.host) else "IOMMUs are not visible"
        return not_measured(text, needed)
    if unable := [unit for unit in units if unit.posts_interrupts is False]:
        text = f"not supported by {', '.join(f'{unit.name} ({unit.kind})' for unit in unable)}"
        return failed(text, needed, "none for this processor: each interrupt of a VF is an exit, or wakes a housekeeping CPU")
    if unknown := [unit.name for unit in units if unit.posts_interrupts is None]:
        return not_measured(f"not known for {', '.join(unknown)}", needed)
    if value is None:
        return not_measured(f"KVM does not report {name}, which it also needs", needed, "load kvm_amd or kvm_intel")
    return passed(f"supported by {len(units)} IOMMUs ({', '.join(sorted({unit.kind for unit in units}))})")


def _check_parameters(facts: Facts) -> Finding:
    """tuned's profile realtime-virtual-host sets the same for Intel."""
    needed = "no exits of spinning vCPUs, which have cores of their own, and none to correct their clocks every five minutes"
    module, pause = ("kvm_amd", "pause_filter_count") if "svm" in facts.flags else ("kvm_intel", "ple_gap")
    values = {f"{module}.{pause}": read_kvm_parameter(facts.host, pause)}
    values["kvm.kvmclock_periodic_sync"] = read_kvm_parameter(facts.host, "kvmclock_periodic_sync")
    wrong = {name: value for name, value in values.items() if value not in (None, *_OFF)}
    if wrong:
        lines = " and ".join(f"`options {name.replace('.', ' ')}=0`" for name in wrong)
        found = ", ".join(f"{name} is {value}" for name, value in wrong.items())
        return failed(found, needed, f"write {lines} to a file in /etc/modprobe.d, and reboot")
    if all(value is None for value in values.values()):
        return not_measured("KVM does not report them", needed, "load kvm_amd or kvm_intel")
    return passed(f"{', '.join(name for name, value in values.items() if value is not None)}: off")


def _check_nesting(facts: Facts) -> Finding:
    value = read_kvm_parameter(facts.host, "nested")
    needed = "guests that cannot use VMX or SVM themselves: KVM's code for it is large, and serves exits"
    if value is None:
        return not_measured("KVM does not report it", needed, "load kvm_amd or kvm_intel")
    if value in _OFF:
        return passed("KVM offers guests no virtualization")
    if value not in _ON:
        return not_measured(f"nested is {value!r}", needed)
    module = "kvm_amd" if "svm" in facts.flags else "kvm_intel"
    remedy = f"write `options {module} nested=0` to /etc/modprobe.d/nohype-nested.conf, and reboot"
    return failed(f"nested is {value}: a guest can start virtual machines", needed, remedy)


_C = Principle.CORES
CHECKS = (
    Check("clock-source", _C, "the clock source is tsc", "clock source in sysfs", _check_clock, required=False),
    Check(
        "interrupt-exits",
        _C,
        "guests receive interrupts without exits",
        "parameters avic of kvm_amd, enable_apicv of kvm_intel",
        _check_exits,
        required=False,
    ),
    Check(
        "device-interrupts",
        _C,
        "interrupts of VFs reach guests without exits",
        "capabilities of the IOMMUs in sysfs, the kernel's command line",
        _check_posting,
        required=False,
    ),
    Check(
        "kvm-parameters",
        _C,
        "KVM makes no exits that guests with own cores do not need",
        "parameters of kvm, kvm_amd and kvm_intel",
        _check_parameters,
        required=False,
    ),
    Check(
        "nested-guests",
        _C,
        "guests cannot start virtual machines",
        "parameter nested of kvm_amd or kvm_intel",
        _check_nesting,
        required=False,
    ),
)
