"""qemu-confined: the process that emulates a guest's devices cannot reach anything that is not the guest's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from errno import EINVAL

from orchestrator.audit.devices import list_vfio_files
from orchestrator.errors import HostError
from orchestrator.host.confinement import Confinement, ThreadCredentials, read_confinement
from orchestrator.host.interfaces import read_index
from orchestrator.host.processes import read_open_files
from orchestrator.host.root import HostRoot
from orchestrator.hypervisor.connection import RunningGuest
from orchestrator.hypervisor.guests import PID_FOLDER
from orchestrator.model.proof import Measurement, Values, count_findings, not_measured

_SECCOMP_FILTER = 2
# libvirt's name of a domain's profile (src/security/security_apparmor.c, AA_PREFIX), and how the kernel shows a mode.
_APPARMOR = re.compile(r"(?P<profile>.+) \((?P<mode>[a-z]+)\)|unconfined")
# libvirt creates no other (qemu.conf(5), `namespaces`): devices of the host do not exist in QEMU's /dev.
_NAMESPACES = ("mnt",)
# QEMU and libraries open these devices; none of them is one of the host's disks, NICs or memory.
_DEVICES = frozenset(
    f"/dev/{name}"
    for name in ("null", "zero", "full", "random", "urandom", "kvm", "ptmx", "iommu", "vfio/vfio", "vhost-net", "net/tun")
)
_OBJECTS = ("anon_inode:", "pipe:", "socket:", "/memfd:", "/dev/pts/")
# libvirt's folder of a domain in a mount of hugetlbfs, named by id and the first characters of the name (domain_conf.c,
# virDomainDefGetShortName()). QEMU has deleted the file: no other process can open it.
_HUGE_PAGES = r"/.*/libvirt/qemu/\d+-{name}/[^/]+ \(deleted\)"
_SHORT_NAME = 20


@dataclass(frozen=True)
class Confined:
    confinement: Confinement
    files: tuple[str, ...]  # targets of QEMU's open descriptors
    own: frozenset[str]  # files and devices of the guest: emulated disks, devices passed through, macvtaps


def read_confined(host: HostRoot, guest: RunningGuest) -> Confined:
    own = frozenset(guest.disks) | {f"/dev/{name}" for path in guest.disks if (name := _find_link(host, path))}
    own = own.union(*(list_vfio_files(host, address) for address in guest.hostdevs))
    indexes = (read_index(host, nic.interface) for nic in guest.nics if nic.interface)
    own |= {f"/dev/tap{index}" for index in indexes if index is not None}  # macvtap_newlink()
    return Confined(read_confinement(host, guest.pid), read_open_files(host, guest.pid), own)


def _find_link(host: HostRoot, path: str) -> str | None:
    """The name of the device to which a path links: QEMU's open file of a logical volume is /dev/dm-N."""
    try:
        return host.link(path.lstrip("/")) if path.startswith("/dev/") else None
    except HostError as error:
        if error.errno == EINVAL:  # not a symbolic link (readlink(2))
            return None
        raise


def prove_qemu_confined(guest: RunningGuest, state: Confined, others: Mapping[str, str | None]) -> Measurement:
    """The user, capabilities, seccomp filter, label, namespaces and open files of QEMU.

    ``others``: security labels of the other guests by name.
    """
    confinement, files, own = state.confinement, state.files, state.own
    threads = confinement.threads
    if not threads:
        return not_measured(f"process {guest.pid} has no threads that can be read")
    foreign = sorted({name for name in files if not _is_expected(guest, name, own)})
    findings = [*_check_threads(threads), *_check_label(guest, confinement, others), *_check_namespaces(confinement)]
    findings += [f"open file {name}" for name in foreign]
    uids = sorted(set().union(*(thread.uids for thread in threads)))
    values: Values = {
        "users": " ".join(map(str, uids)),
        "groups": " ".join(map(str, sorted(set().union(*(thread.gids for thread in threads))))),
        "threads": len(threads),
        "threads_without_seccomp_filter": sum(thread.seccomp != _SECCOMP_FILTER for thread in threads),
        "threads_that_may_gain_privileges": sum(not thread.no_new_privileges for thread in threads),
        "capabilities": f"{_unite(threads):#x}",
        "label": confinement.label or "",
        "namespaces": " ".join(sorted(kind for kind, own_one in confinement.namespaces.items() if own_one)),
        "open_files": len(files),
        "unexpected_open_files": len(foreign),
    }
    shared = ", ".join(sorted(kind for kind, own_one in confinement.namespaces.items() if not own_one)) or "none"
    evidence = [
        f"{len(threads)} threads of process {guest.pid}: user {values['users']}, capabilities {values['capabilities']}",
        f"label {confinement.label or 'none'}; namespaces of its own: {values['namespaces'] or 'none'}; of the host: {shared}",
        f"{len(files)} open files",
    ]
    return count_findings(findings, evidence, values)


def _unite(threads: Iterable[ThreadCredentials]) -> int:
    found = 0
    for thread in threads:
        found |= thread.capabilities
    return found


def _check_threads(threads: Iterable[ThreadCredentials]) -> Iterator[str]:
    for thread in threads:
        if 0 in thread.uids:
            yield f"thread {thread.tid} runs as root"
        if 0 in thread.gids:
            yield f"thread {thread.tid} is in the group of root"
        if thread.capabilities:
            yield f"thread {thread.tid} has capabilities {thread.capabilities:#x}"
        if thread.seccomp != _SECCOMP_FILTER:
            yield f"thread {thread.tid} has no seccomp filter (mode {thread.seccomp})"
        if not thread.no_new_privileges:
            yield f"thread {thread.tid} may gain privileges by a new program (NoNewPrivs is 0)"


def _check_label(guest: RunningGuest, confinement: Confinement, others: Mapping[str, str | None]) -> Iterator[str]:
    label = confinement.label
    if not label:
        yield "no security label: neither AppArmor nor SELinux confines QEMU"
        return
    if same := sorted(name for name, other in others.items() if other == label):
        yield f"label {label} is also that of {', '.join(same)}"
    if confinement.selinux_enforcing is not None:
        kind = [*label.split(":"), "", "", ""][2]
        if not confinement.selinux_enforcing:
            yield f"label {label}: SELinux is not enforcing"
        if not kind.startswith("svirt"):
            yield f"label {label} has the type {kind or 'none'}, expected svirt_t"
    elif (found := _APPARMOR.fullmatch(label)) is None or not found["profile"]:
        yield f"label {label} is not a profile that confines QEMU"
    elif found["mode"] != "enforce":
        yield f"profile {found['profile']} is in mode {found['mode']}, expected enforce"
    elif found["profile"] != f"libvirt-{guest.uuid}":
        yield f"profile {found['profile']} is not that of this guest, expected libvirt-{guest.uuid}"


def _check_namespaces(confinement: Confinement) -> Iterator[str]:
    for kind in _NAMESPACES:
        if not confinement.namespaces.get(kind):
            yield f"namespace {kind} is that of the host, expected one of its own"


def _is_expected(guest: RunningGuest, name: str, own: frozenset[str]) -> bool:
    if name.startswith(_OBJECTS) or name in _DEVICES or name in own or name == f"{PID_FOLDER}/{guest.name}.pid":
        return True
    return re.fullmatch(_HUGE_PAGES.format(name=re.escape(guest.name[:_SHORT_NAME])), name) is not None
