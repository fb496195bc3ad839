"""Compares the configuration with the host, for `nohype config check --host`, the manager's start and each plan. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from orchestrator.config import DaemonConfig
from orchestrator.host.cmdline import MAX_CMDLINE, find_unsafe_words
from orchestrator.model.exit_policy import ExitPolicies
from orchestrator.model.plan import Policy
from orchestrator.model.topology import Topology
from orchestrator.model.waiver import Waiver
from orchestrator.planning.uplink import NO_IOMMU, find_edge
from orchestrator.values import CpuSet


class Severity(StrEnum):
    ERROR = "error"
    """Guests cannot be started."""
    WARNING = "warning"
    """Guests can be started, but host and configuration differ."""


@dataclass(frozen=True)
class HostFinding:
    """One difference. ``text`` has the setting, its value, and the host's value."""

    severity: Severity
    text: str
    hint: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}\n  hint: {self.hint}"


def build_policy(config: DaemonConfig) -> Policy:
    host, disks = config.host, config.disks
    boot = replace(config.boot.policy, tenants=sum(bool(tenant.boot_servers) for tenant in config.tenants.values()))
    return Policy(
        host.housekeeping_cpus, host.uplinks, host.page, host.vfs_per_uplink, host.reserved, boot,
        frozenset(disks.serials), disks.emulated or "", host.accept,
        tuple((name, uplink.mode) for name, uplink in config.uplinks.items() if uplink.mode),
        {name: vlans for name, uplink in config.uplinks.items() if (vlans := uplink.vlan_set) is not None},
        frozenset(config.tenants), disks.volume_group or "",
        {name: vlans for name, uplink in config.uplinks.items() if (vlans := uplink.channel_set) is not None},
        ExitPolicies(config.exits.policy, {name: t.exit_policy for name, t in config.tenants.items() if t.exit_policy}),
        frozenset(name for name, uplink in config.uplinks.items() if uplink.switch),
    )  # fmt: skip


def check_host(policy: Policy, topology: Topology) -> tuple[HostFinding, ...]:
    """All differences, errors first."""
    findings = [
        *find_blockers(policy, topology),
        *_check_devices(policy, topology),
        *_check_housekeeping(policy, topology),
        *_check_guest_cpus(policy, topology),
        *_check_pages(policy, topology),
        *_check_cmdline(topology),
        *(HostFinding(Severity.WARNING, text, "check the kernel log: journalctl -k") for text in topology.problems),
    ]
    return tuple(sorted(findings, key=lambda finding: finding.severity is not Severity.ERROR))


def find_blockers(policy: Policy, topology: Topology) -> tuple[HostFinding, ...]:
    """Errors of cores and KVM that exclude every guest."""
    return tuple(_find_blockers(policy.housekeeping, topology))


def _find_blockers(housekeeping: CpuSet, topology: Topology) -> Iterator[HostFinding]:
    absent = housekeeping - topology.possible if topology.possible else CpuSet()
    edit = "set [host] housekeeping to CPUs that `lscpu -e` shows"
    if absent:
        yield HostFinding(Severity.ERROR, f"housekeeping CPUs {absent} do not exist: the host has CPUs {topology.possible}", edit)
    elif not housekeeping & topology.cpus:
        text = f"housekeeping CPUs {housekeeping} are all offline: CPUs {topology.cpus} are online"
        yield HostFinding(Severity.ERROR, text, f"set them online (echo 1 > /sys/devices/system/cpu/cpuN/online), or {edit}")
    if not topology.kvm:
        hint = "enable SVM or VT-x in the firmware, and load kvm_amd or kvm_intel"
        yield HostFinding(Severity.ERROR, "the kernel offers no KVM: there is no /dev/kvm", hint)


def _check_devices(policy: Policy, topology: Topology) -> Iterator[HostFinding]:
    useless: dict[str, str] = {}
    software: dict[str, str] = {}
    for uplink in policy.uplinks:
        edge = find_edge(uplink, topology, policy)
        if isinstance(edge, str):
            useless |= {uplink: edge} if edge != NO_IOMMU else {}
        elif edge.mode.is_software:
            software[uplink] = f"{edge.why}; guests that accept {Waiver.SOFTWARE_EDGE} get edge mode {edge.mode}"
    if Waiver.SOFTWARE_EDGE not in policy.accept:
        useless |= software
    for uplink, reason in (useless | software).items():
        severity = Severity.ERROR if uplink in useless and len(useless) == len(policy.uplinks) else Severity.WARNING
        hint = "`nohype survey` and `ip link` show the interfaces; set [host] uplinks"
        yield HostFinding(severity, f"uplink {uplink}: {reason}", hint)
    only_software = bool(software) and len(software | useless) == len(policy.uplinks)
    if not topology.iommu_groups:
        hint = "enable the IOMMU in the firmware; boot with intel_iommu=on on Intel"
        severity = Severity.WARNING if only_software and Waiver.NO_IOMMU in policy.accept else Severity.ERROR
        yield HostFinding(severity, "the host has no IOMMU in use: /sys/kernel/iommu_groups is empty", hint)
    if not topology.vfio and not only_software:
        hint = "modprobe vfio-pci, at each boot by a file in /etc/modules-load.d"
        yield HostFinding(Severity.ERROR, "the driver vfio-pci is not loaded: no VF can be given to a guest", hint)


def _check_housekeeping(policy: Policy, topology: Topology) -> Iterator[HostFinding]:
    housekeeping, online = policy.housekeeping, policy.housekeeping & topology.cpus
    offline = housekeeping & topology.possible - topology.cpus
    if offline and online:
        text = f"housekeeping CPUs {offline} are offline: {online} are used"
        yield HostFinding(Severity.WARNING, text, "set them online, or take them out of [host] housekeeping")
    isolated = online & topology.isolated
    if isolated:
        text = f"housekeeping CPUs {isolated} are isolated: the kernel does not spread threads over them"
        yield HostFinding(
            Severity.WARNING, text, "take them out of isolcpus= on the kernel command line, or out of [host] housekeeping"
        )
    split = topology.siblings(online) - online
    if split:
        text = f"housekeeping CPUs {online} are not whole cores: CPUs {split} are their siblings, and no guest's"
        yield HostFinding(Severity.WARNING, text, "add the siblings to [host] housekeeping")


def _check_guest_cpus(policy: Policy, topology: Topology) -> Iterator[HostFinding]:
    guest_cpus = topology.cpus - topology.siblings(policy.housekeeping)
    if not guest_cpus:
        text = f"no CPU is left for guests: CPUs {topology.cpus} are online, and {policy.housekeeping} are for housekeeping"
        yield HostFinding(Severity.ERROR, text, "take CPUs out of [host] housekeeping")
    unused = guest_cpus - topology.isolated if topology.isolated else CpuSet()
    if unused:
        text = f"CPUs {unused} are neither for housekeeping nor isolated: guests cannot have them"
        yield HostFinding(Severity.WARNING, text, "add them to isolcpus= on the kernel command line, or to [host] housekeeping")


def _check_pages(policy: Policy, topology: Topology) -> Iterator[HostFinding]:
    if not any(pool.total for pool in topology.pools if pool.page_size == policy.page_size):
        sizes = ", ".join(sorted({str(pool.page_size) for pool in topology.pools if pool.total})) or "none"
        text = f"page_size is {policy.page_size}, but no node has huge pages of this size (sizes with pages: {sizes})"
        yield HostFinding(Severity.WARNING, text, "reserve pages at boot (hugepages=), or set [host] page_size")
    for size, kept in policy.reserved_pages:
        for pool in topology.pools:
            if pool.page_size == size and 0 < pool.total <= kept:
                text = f"reserved_pages keeps {kept} pages of {size} on each node, but node {pool.node} has {pool.total}"
                yield HostFinding(
                    Severity.WARNING, text, "reserve more pages at boot (hugepages=), or lower [host.reserved_pages]"
                )


def _check_cmdline(topology: Topology) -> Iterator[HostFinding]:
    if len(topology.cmdline) >= MAX_CMDLINE:
        text = f"the kernel command line has {len(topology.cmdline)} characters; x86 keeps {MAX_CMDLINE}, and the rest is lost"
        yield HostFinding(Severity.WARNING, text, "write CPU lists as ranges, and take out what is not needed")
    for word, why in find_unsafe_words(topology.cmdline):
        yield HostFinding(
            Severity.WARNING, f"{word} is on the kernel command line: {why}", "take it out: the proof device-isolated fails"
        )
