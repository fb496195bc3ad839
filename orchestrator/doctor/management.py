"""Checks of what the manager needs: control groups, libvirt, QEMU, and no program that works against it."""

from __future__ import annotations

import os
import re

from orchestrator.doctor.check import Check, Finding, Principle, failed, not_measured, passed
from orchestrator.doctor.facts import Facts
from orchestrator.errors import CommandError, HostError
from orchestrator.host.cgroups import is_version_1, read_controllers
from orchestrator.host.confinement import read_enforcing, read_security_modules
from orchestrator.host.cpus import read_isolated
from orchestrator.host.irqbalance import find_irqbalance
from orchestrator.host.measure import read_release
from orchestrator.host.run import Completed
from orchestrator.host.tuned import find_tuned

_KERNEL = (6, 1)
_AGAINST = ("irqbalance", "ksmtuned", "numad")
_FREE = 1 << 30  # bytes
_VERSIONS = {"libvirt": (9, 0), "QEMU": (7, 2)}  # of Debian 12, as the kernel's
_CONTROLLERS = ("cpu", "io", "memory", "pids")  # with which libvirt limits and counts; guests start without them
_START = "start it: `systemctl start libvirtd`, or `systemctl start virtqemud.socket` where each driver has its own daemon"


def _check_kernel(facts: Facts) -> Finding:
    release = read_release(facts.host)
    match = re.match(r"(\d+)\.(\d+)", release)
    needed = f"Linux {_KERNEL[0]}.{_KERNEL[1]} or later"
    if not match:
        return not_measured(f"the kernel's release is {release!r}", needed)
    if (int(match[1]), int(match[2])) < _KERNEL:
        return failed(f"Linux {release}", needed, "install a later kernel")
    return passed(f"Linux {release}")


def _check_groups(facts: Facts) -> Finding:
    found, needed = read_controllers(facts.host), "control groups of version 2 with the controller cpuset"
    remedy = "add `systemd.unified_cgroup_hierarchy=1` to the kernel's command line and reboot"
    if found is None:
        old = is_version_1(facts.host)
        if old is None:
            return not_measured("no hierarchy of control groups is visible", needed, "run the command on the server itself")
        return failed("version 2 is not mounted on /sys/fs/cgroup" + ("; version 1 is" if old else ""), needed, remedy)
    if "cpuset" not in found and not facts.shows_all_processes:  # a container sees the controllers of its own group
        text = f"the controllers of this container are {', '.join(found) or 'none'}"
        return not_measured(text, needed, "run the command on the server itself, as root")
    if "cpuset" not in found:
        return failed(
            f"version 2 has only {', '.join(found) or 'no controllers'}",
            needed,
            f"{remedy}; check that no program uses version 1 for cpuset",
        )
    rest = [name for name in _CONTROLLERS if name not in found]
    return passed("version 2 with cpuset" + (f", without {', '.join(rest)}" if rest else ""))


def _ask_libvirt(facts: Facts, *words: str) -> Completed:
    """Raises CommandError if virsh cannot be run, or does not end: then it is not run again."""
    if facts.silence:
        raise CommandError(facts.silence)
    try:
        return facts.execute(["virsh", "--readonly", "--connect", "qemu:///system", *words])
    except CommandError as error:
        facts.silence = error.message
        raise


def _join_errors(done: Completed) -> str:
    return done.stderr.strip().replace("\n", "; ")


def _check_libvirt(facts: Facts) -> Finding:
    needed = "libvirt's daemon for QEMU"
    try:
        done = _ask_libvirt(facts, "version")
    except CommandError as error:
        if "Permission denied" in error.message:
            return not_measured(error.message, needed, "run the command as root")
        install = "install libvirt: apt install libvirt-daemon-system libvirt-clients qemu-system-x86"
        return failed(error.message, needed, install if "not installed" in error.message else _START)
    if done.status:
        text = _join_errors(done) or f"virsh ended with {done.status}"
        if any(word in text for word in ("Permission denied", "authentication", "polkit")):
            return not_measured(text, needed, "run the command as root")
        has_qemu = "emulator" not in text and "hypervisor version" not in text
        return failed(text, needed, _START if has_qemu else "install QEMU: apt install qemu-system-x86")
    lines = [
        line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith(("Using library", "Running hypervisor"))
    ]
    if not any(map(_read_version, lines)):
        return not_measured(f"the answer of virsh has no version: {done.stdout.strip()[:80]!r}", needed)
    if old := [line for line in lines if _is_old(line)]:
        versions = ", ".join(f"{name} {'.'.join(map(str, version))}" for name, version in _VERSIONS.items())
        return failed(f"too old: {', '.join(old)}", f"at least {versions}", "use a later release of the distribution")
    return passed(", ".join(lines))


def _is_old(line: str) -> bool:
    numbers = _read_version(line)
    return bool(numbers) and (*numbers, 0) < _VERSIONS.get(line.partition(" ")[0], ())


def _read_version(line: str) -> tuple[int, ...]:
    return tuple(int(part) for part in line.partition(" ")[2].split(".") if part.isdecimal())


def _check_guests(facts: Facts) -> Finding:
    needed = "no guests that another program started: their threads may run on any CPU"
    try:
        done = _ask_libvirt(facts, "list", "--name")
    except CommandError as error:
        return not_measured(error.message, needed)
    if done.status:
        return not_measured(_join_errors(done), needed)
    if names := [line.strip() for line in done.stdout.splitlines() if line.strip()]:
        if facts.find_programs("nohyped"):
            return not_measured("the manager runs, which knows its guests", needed, "see `nohype guest list`")
        return failed(f"guests run: {', '.join(names)}", needed, f"confine them to CPUs {facts.housekeeping}, or stop them")
    return passed("no guests run")


def _check_programs(facts: Facts) -> Finding:
    found = list(facts.find_programs(*_AGAINST))
    tuned, harmless = find_tuned(facts.host), ""
    if "irqbalance" in found and _leaves_guests_alone(facts):
        found.remove("irqbalance")
        harmless = "; irqbalance leaves guest CPUs alone"
    parts = [*found, *([str(tuned)] if tuned else [])]
    if parts:
        names = " ".join((*found, *(["tuned"] if tuned else [])))
        remedy = f"run `systemctl disable --now {names}`, or configure it to leave guest CPUs alone"
        return failed(f"running: {', '.join(parts)}", "no program that moves interrupts, threads or pages", remedy)
    if not facts.shows_all_processes:
        needed = "no program that moves interrupts, threads or pages"
        return not_measured("not all processes are visible", needed, "run the command as root, and not in a container")
    return passed(f"none of {', '.join(name for name in _AGAINST if name not in harmless)}, tuned runs{harmless}")


def _leaves_guests_alone(facts: Facts) -> bool:
    """By its own list of CPUs, or by its default: isolated ones."""
    try:
        daemons, isolated = find_irqbalance(facts.host, facts.threads), read_isolated(facts.host)
    except HostError:  # only root can read its environment
        return False
    return bool(daemons) and all(facts.division.guest <= (isolated if one.banned is None else one.banned) for one in daemons)


def _check_confinement(facts: Facts) -> Finding:
    modules = read_security_modules(facts.host)
    if "apparmor" in modules:
        return passed("apparmor confines QEMU")
    if "selinux" in modules:
        if read_enforcing(facts.host):
            return passed("selinux confines QEMU")
        return failed(
            "selinux refuses nothing: it is permissive, or has no policy",
            "a security module that confines QEMU",
            "set SELINUX=enforcing in /etc/selinux/config, and reboot",
        )
    if not modules:
        return not_measured("the kernel does not show its security modules", "AppArmor or SELinux")
    return failed(
        "neither AppArmor nor SELinux is active",
        "a security module that confines QEMU",
        "add `security=apparmor` to the kernel's command line",
    )


def _check_space(facts: Facts) -> Finding:
    folder = facts.host.path / "var" / "lib"
    try:
        found = os.statvfs(folder)
    except OSError as error:
        return not_measured(f"/var/lib: {error.strerror}", "1 GB free")
    free = found.f_bavail * found.f_frsize
    text = f"{free >> 20} MB free in /var/lib"
    if free < _FREE:
        return failed(text, "1 GB for the ledger, logs and images", "free some space")
    return passed(text)


_G = Principle.MANAGEMENT
CHECKS = (
    Check("kernel", _G, "the kernel is recent", "release of the kernel", _check_kernel),
    Check(
        "cgroups", _G, "control groups can hold guests on their cores", "controllers of the version 2 hierarchy", _check_groups
    ),
    Check("libvirt", _G, "libvirt responds", "virsh version", _check_libvirt),
    Check("other-guests", _G, "no other program has guests here", "virsh list", _check_guests, required=False),
    Check(
        "other-programs",
        _G,
        "no program works against the manager",
        "processes, profile of tuned",
        _check_programs,
        required=False,
    ),
    Check(
        "qemu-confinement",
        _G,
        "a security module confines QEMU",
        "security modules of the kernel",
        _check_confinement,
        required=False,
    ),
    Check("disk-space", _G, "there is space for the ledger and images", "statvfs(3) of /var/lib", _check_space),
)
