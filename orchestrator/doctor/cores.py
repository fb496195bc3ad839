"""Checks of processors: virtualization, whole cores, and what disturbs guests on them."""

from __future__ import annotations

from orchestrator.doctor.check import Check, Finding, Principle, failed, not_measured, passed
from orchestrator.doctor.facts import Facts
from orchestrator.doctor.firmware import enable_virtualization
from orchestrator.errors import HostError
from orchestrator.host.cpus import read_kvm, read_online, read_present, shows_devices
from orchestrator.host.isolation import Owner, Reading, read_settings
from orchestrator.host.processor import (
    read_capacities,
    read_core_types,
    read_kvm_parameter,
    read_smt_control,
    read_vulnerabilities,
)

_VIRTUALIZATION = {"svm": "SVM", "vmx": "VMX"}
_ON_HOST = "run the command on the server itself, and not in a container"
# EACCES, EPERM and ENOENT, the last two in containers
_NO_ACCESS = ("Permission denied", "Operation not permitted", "No such file")
_NESTED = {"svm": "npt", "vmx": "ept"}
# Boot parameters of the settings that have one (templates/kernel.cmdline.j2 of the role has them too).
_PARAMETERS = {
    "isolcpus": "isolcpus=nohz,domain,managed_irq,{guest}",
    "nohz_full": "nohz_full={guest}",
    "rcu_nocbs": "rcu_nocbs={guest}",
}


def _check_virtualization(facts: Facts) -> Finding:
    needed = "SVM (AMD) or VMX (Intel) with nested paging"
    remedy = enable_virtualization(facts)
    flag = next((flag for flag in _VIRTUALIZATION if flag in facts.flags), None)
    if flag is None:
        if read_kvm(facts.host):
            return not_measured("the processors show neither flag, but the kernel offers KVM: this server is a guest", needed)
        if not shows_devices(facts.host):  # it may have such a KVM
            return not_measured("the processors show neither svm nor vmx, and devices are not visible", needed, _ON_HOST)
        return failed("the processors show neither svm nor vmx", needed, remedy)
    paging = read_kvm_parameter(facts.host, _NESTED[flag])
    if paging is None:
        module = "kvm_amd" if flag == "svm" else "kvm_intel"
        text = f"the flag {flag}; nested paging is not known while {module} is not loaded"
        return not_measured(text, needed, f"run `modprobe {module}`; if it fails: {remedy}")
    if paging not in ("Y", "1"):
        return failed(f"{_NESTED[flag]} is {paging}", needed, f"remove {_NESTED[flag]}=0 from /etc/modprobe.d")
    return passed(f"{_VIRTUALIZATION[flag]} with nested paging ({_NESTED[flag]})")


def _check_kvm(facts: Facts) -> Finding:
    needed = "a virtual CPU that executes instructions"
    if not read_kvm(facts.host):
        if not shows_devices(facts.host):
            return not_measured("the kernel's devices are not visible", needed, _ON_HOST)
        return failed("the kernel does not offer KVM", needed, f"{enable_virtualization(facts)}, and load kvm_amd or kvm_intel")
    try:
        facts.run_instruction()
    except HostError as error:
        if any(text in error.message for text in _NO_ACCESS):
            return not_measured(error.message, needed, "run the command as root, and not in a container")
        return failed(
            error.message,
            needed,
            "check dmesg; on a virtual server, enable nested virtualization on its host",
        )
    return passed("a virtual CPU executed an instruction")


def _check_cores(facts: Facts) -> Finding:
    cores = len(facts.cores)
    text = f"{cores} physical cores with {sum(len(core.cpus) for core in facts.cores)} CPUs"
    if cores < 2:
        return failed(text, "at least 2: one for the manager, one for a guest", "use a server with more cores")
    own = _count_own(facts)
    if own == cores:
        what = f"{text}, all of them for the host (CPUs {facts.housekeeping})"
        return failed(what, "a core for guests", "name fewer CPUs in --housekeeping and in the manager's configuration")
    return passed(f"{text}; cores for guests: {cores - own}, for the host: CPUs {facts.housekeeping}")


def _count_own(facts: Facts) -> int:
    return sum(core.cpus.meets(facts.housekeeping) for core in facts.cores)


def _check_siblings(facts: Facts) -> Finding:
    control = read_smt_control(facts.host)
    present = read_present(facts.host)
    if not present:
        return not_measured("the kernel does not tell which CPUs are plugged in", "each core online as a whole")
    offline = present - read_online(facts.host)
    if not offline:
        return passed(f"all threads of each core are online (SMT {control or 'not controllable'})")
    # The kernel does not tell the core of an offline CPU.
    has_pairs = all(len(core.cpus) > 1 for core in facts.cores)
    if not has_pairs and control not in ("off", "forceoff", "notsupported", "notimplemented"):
        remedy = f"run `chcpu -e {offline}`, or switch SMT off for all cores: echo off > /sys/devices/system/cpu/smt/control"
        return failed(
            f"CPUs {offline} are offline, SMT: {control or 'not controllable'}",
            "all threads of each core online, or SMT off",
            remedy,
        )
    kept = "each online core has all its threads" if has_pairs else f"SMT is {control}"
    return passed(f"{kept}; CPUs {offline} are offline")


def _check_alike(facts: Facts) -> Finding:
    needed = "all CPUs of the same type, with the same features and microcode"
    remedy = "update the microcode; on a hybrid processor, switch the efficiency cores off in the firmware settings"
    types = read_core_types(facts.host)
    if len(types) > 1:
        return failed(f"{len(types)} types of cores: CPUs {' and CPUs '.join(types)}", needed, remedy)
    if len(capacities := read_capacities(facts.host, read_online(facts.host))) > 1:
        text = ", ".join(f"{value} of CPUs {cpus}" for value, cpus in capacities.items())
        return failed(f"cores of different capacity: {text}", needed, remedy)
    first = facts.processors[0]
    for other in facts.processors[1:]:
        if differing := sorted(first.flags ^ other.flags):
            return failed(f"CPU {first.cpu} and CPU {other.cpu} differ in {', '.join(differing[:5])}", needed, remedy)
        if first.microcode != other.microcode:
            return failed(f"microcode {first.microcode} on CPU {first.cpu}, {other.microcode} on CPU {other.cpu}", needed, remedy)
    if not first.microcode:
        return not_measured(f"{first.model or first.vendor}: the kernel does not show the microcode", needed)
    return passed(f"{first.model or first.vendor}, microcode {first.microcode} on all CPUs")


def _check_settings(facts: Facts) -> Finding:
    """The settings of the Ansible role, in their effective state."""
    division = facts.division
    wrong: list[Reading] = []
    unread: list[str] = []
    readings = [reading for reading in read_settings(facts.host, Owner.ROLE) if not reading.is_absent]
    for reading in readings:
        if reading.problem:
            unread.append(f"{reading.setting.name}: {reading.problem}")
            continue
        try:
            is_wrong = not reading.is_wanted(division) and not reading.is_excused
        except HostError as error:
            unread.append(error.message)
            continue
        wrong += [reading] if is_wrong else []
    if unread and not wrong:
        needed = "settings that keep the kernel's work off guest CPUs"
        return not_measured("; ".join(unread), needed, "run the command as root, and not in a container")
    if not wrong:
        return passed(f"{len(readings)} settings keep the kernel's own work off CPUs {division.guest}")
    found = [f"{reading.setting.name} is {reading.text or 'none'}" for reading in wrong]
    wanted = [f"{reading.setting.name} {reading.setting.wanted.describe(division)}" for reading in wrong]
    return failed(", ".join(found), ", ".join(wanted), _describe_remedy(wrong, facts))


def _check_options(facts: Facts) -> Finding:
    """Without such an option no setting helps: only another kernel does."""
    every = read_settings(facts.host, Owner.ROLE)
    options = [reading for reading in every if reading.setting.option]
    needed = f"a kernel with {', '.join(reading.setting.option for reading in options)}"
    # Every kernel has the file of isolated CPUs: without it, a missing file says nothing about the kernel.
    unread = [reading for reading in every if reading.problem and (reading in options or reading.setting.name == "isolcpus")]
    if unread:
        found = "; ".join(f"{reading.setting.name}: {reading.problem}" for reading in unread)
        return not_measured(found, needed, "run the command as root, and not in a container")
    if missing := [reading.setting for reading in options if reading.is_absent]:
        found = ", ".join(f"the kernel has no {setting.name}: {setting.absent}" for setting in missing)
        option = ", ".join(setting.option for setting in missing)
        return failed(found, f"a kernel with {option}", f"boot a kernel that is built with {option}")
    return passed(", ".join(reading.setting.option for reading in options))


def _describe_remedy(wrong: list[Reading], facts: Facts) -> str:
    names = {reading.setting.name for reading in wrong}
    words = " ".join(text.format(guest=facts.division.guest) for name, text in _PARAMETERS.items() if name in names)
    rest = "apply the Ansible role nohype_host, which sets them"
    return f"add `{words}` to the kernel's command line and reboot; {rest}" if words else rest


def _check_bare(facts: Facts) -> Finding:
    if "hypervisor" in facts.flags:
        text = "this server is itself a virtual machine: its host can preempt any guest, and figures of time mean little"
        return failed(text, "a server without a hypervisor below", "use a physical server for measurements")
    return passed("no hypervisor below")


def _check_vulnerabilities(facts: Facts) -> Finding:
    found = read_vulnerabilities(facts.host)
    if not found:
        return not_measured("the kernel does not report vulnerabilities", "a kernel that reports them", "use Linux 4.15 or later")
    open_ones = [f"{name}: {text}" for name, text in sorted(found.items()) if "vulnerable" in text.lower()]
    if open_ones:
        return failed(
            "; ".join(open_ones),
            "no vulnerability without a mitigation",
            "update microcode and kernel, and remove mitigations=off",
        )
    if unknown := [
        f"{name}: {text or 'empty'}" for name, text in sorted(found.items()) if not text or text.startswith("Unknown")
    ]:
        remedy = "on a virtual server, look at its host; otherwise ask the manufacturer of the processor"
        return not_measured("; ".join(unknown), "no vulnerability without a mitigation", remedy)
    return passed(f"{len(found)} known vulnerabilities, none without a mitigation")


_C = Principle.CORES
CHECKS = (
    Check(
        "virtualization",
        _C,
        "the processors run virtual machines with nested paging",
        "flags of the processors, parameters of kvm_amd or kvm_intel",
        _check_virtualization,
    ),
    Check("kvm-runs", _C, "KVM executes an instruction", "/dev/kvm: a virtual machine with one page is made and run", _check_kvm),
    Check("cores", _C, "there is a core for the manager and one for a guest", "CPU topology in sysfs", _check_cores),
    Check(
        "smt-siblings",
        _C,
        "each core is online as a whole",
        "present and online CPUs, SMT control",
        _check_siblings,
    ),
    Check(
        "cpus-alike",
        _C,
        "all CPUs are alike",
        "flags and microcode of all processors, types of cores",
        _check_alike,
        required=False,
    ),
    Check(
        "isolation",
        _C,
        "the kernel keeps its own work off guest CPUs",
        "the settings that docs/isolation.md lists",
        _check_settings,
    ),
    Check(
        "kernel-options",
        _C,
        "the kernel can stop the tick of guest CPUs",
        "files of the kernel in sysfs",
        _check_options,
    ),
    Check(
        "bare-metal",
        _C,
        "the server is not a virtual machine",
        "the flag hypervisor of the processors",
        _check_bare,
        required=False,
    ),
    Check(
        "vulnerabilities",
        _C,
        "known vulnerabilities are mitigated",
        "vulnerabilities in sysfs",
        _check_vulnerabilities,
        required=False,
    ),
)
