"""How the kernel confines a process: user, capabilities, seccomp, security label and namespaces. Reads only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from errno import EINVAL, ENOENT, ESRCH

from orchestrator.errors import HostError
from orchestrator.host.root import HostRoot

# Capabilities that a thread has or can get back without a new program (capabilities(7)); the bounding set gives none.
_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapAmb")
_FIELD = re.compile(r"^(\w+):[ \t]*(.*)$", re.MULTILINE | re.ASCII)


@dataclass(frozen=True)
class ThreadCredentials:
    """Of one thread: seccomp filters and capabilities belong to threads, not to processes."""

    tid: int
    uids: frozenset[int]  # real, effective, saved and file system user
    gids: frozenset[int]  # the same, and the supplementary groups
    capabilities: int  # the union of the sets in `_CAPABILITIES`, one bit per capability
    no_new_privileges: bool
    seccomp: int  # 0 off, 1 strict, 2 filter (seccomp(2))


@dataclass(frozen=True)
class Confinement:
    threads: tuple[ThreadCredentials, ...]
    label: str | None  # of AppArmor or SELinux; None if the kernel has neither
    selinux_enforcing: bool | None  # None without SELinux
    namespaces: Mapping[str, bool]  # by kind; whether it differs from that of the first process


def read_security_modules(host: HostRoot) -> tuple[str, ...]:
    """Names of the active security modules, such as "apparmor"; empty if securityfs is not mounted."""
    return tuple(filter(None, (host.find("sys/kernel/security/lsm") or "").split(",")))


def read_enforcing(host: HostRoot) -> bool | None:
    """Whether SELinux refuses what its policy does not allow; None without SELinux, or without a policy."""
    enforce = host.find("sys/fs/selinux/enforce")
    return None if enforce is None else enforce == "1"


def read_confinement(host: HostRoot, pid: int) -> Confinement:
    """Raises HostError if a file cannot be read, or the process has ended."""
    threads = []
    for tid in sorted(map(int, host.names(f"proc/{pid}/task"))):
        try:
            threads.append(_parse_status(tid, host.read(f"proc/{pid}/task/{tid}/status")))
        except HostError as error:
            if error.errno not in (ENOENT, ESRCH):
                raise  # a thread that ended meanwhile is left out
    return Confinement(tuple(threads), _read_label(host, pid), read_enforcing(host), _compare_namespaces(host, pid))


def _read_label(host: HostRoot, pid: int) -> str | None:
    try:
        return host.read(f"proc/{pid}/attr/current").rstrip("\0")
    except HostError as error:
        # fs/proc/base.c, proc_pid_attr_read(): EINVAL without a security module that has labels; ENOENT without CONFIG_SECURITY.
        if error.errno == EINVAL or error.errno == ENOENT and host.exists(f"proc/{pid}"):
            return None
        raise


def _compare_namespaces(host: HostRoot, pid: int) -> dict[str, bool]:
    """``*_for_children`` are those of children that QEMU cannot have (seccomp, ``spawn=deny``)."""
    kinds = [kind for kind in host.names(f"proc/{pid}/ns") if not kind.endswith("_for_children")]
    pairs = {kind: (host.target(f"proc/{pid}/ns/{kind}"), host.target(f"proc/1/ns/{kind}")) for kind in kinds}
    return {kind: own != first for kind, (own, first) in pairs.items() if own and first}


def _parse_status(tid: int, text: str) -> ThreadCredentials:
    fields = dict(_FIELD.findall(text))
    try:
        uids, gids = (frozenset(map(int, fields[name].split())) for name in ("Uid", "Gid"))
        capabilities = 0
        for name in _CAPABILITIES:
            capabilities |= int(fields[name], 16)
        groups = frozenset(map(int, fields["Groups"].split()))
        return ThreadCredentials(tid, uids, gids | groups, capabilities, fields["NoNewPrivs"] == "1", int(fields["Seccomp"]))
    except (KeyError, ValueError) as error:
        raise HostError(f"cannot parse the status of thread {tid}: {error}", "use a kernel with seccomp filters") from None
