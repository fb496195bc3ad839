"""What the host has, read live and put together. Composes the readers; knows no files itself."""

from __future__ import annotations

from dataclasses import replace
from errno import ENOENT

from orchestrator.errors import HostError
from orchestrator.host.cpus import (
    read_cmdline,
    read_isolated,
    read_kvm,
    read_online,
    read_possible,
    read_topoext,
    survey_cores,
)
from orchestrator.host.hugepages import read_pools, read_promised_pages, survey_pools
from orchestrator.host.iommu import read_iommu_groups
from orchestrator.host.pci import read_functions
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import read_link, read_pfs
from orchestrator.topology import Topology


def read_topology(host: HostRoot) -> Topology:
    """Surveys the host. No huge pages, PFs or IOMMU groups are facts, and show as empty; without CPUs or PCI there is no host.

    Raises:
        HostError: sysfs is not mounted, or lacks the CPUs or the PCI bus; or a file cannot be read.
    """
    for name in ("sys/devices/system/cpu/online", "sys/bus/pci/devices"):
        if not host.exists(name):
            raise HostError(f"cannot survey the host: there is no /{name}", "is sysfs mounted on /sys?", ENOENT)
    cores, no_cores = survey_cores(host)
    pools, no_pools = survey_pools(host)
    return Topology(
        cores=cores,
        isolated=read_isolated(host),
        pools=pools,
        pfs=read_pfs(host),
        iommu_groups=read_iommu_groups(host),
        topoext=read_topoext(host),
        possible=read_possible(host),
        promised=read_promised_pages(host, (pool.page_size for pool in pools if pool.total)),
        kvm=read_kvm(host),
        cmdline=read_cmdline(host),
        problems=tuple(error.message for error in (*no_cores, *no_pools)),
    )


def refresh_topology(host: HostRoot, known: Topology) -> Topology:
    """An earlier survey, with what changes from guest to guest read again: pools, and the interfaces and links of the PFs.

    A server with 128 VFs is a thousand files; these are some twenty. Everything is surveyed anew if there are other CPUs or PCI
    functions. The drivers and uses of VFs are as they were: look at the VF that you want.

    Raises:
        HostError: as ``read_topology``.
    """
    functions = {device for group in known.iommu_groups for device in group.devices}
    # What could not be read may have been so for a moment.
    if known.problems or known.cpus != read_online(host) or functions != read_functions(host):
        return read_topology(host)
    pfs, pools = tuple(read_link(host, pf) for pf in known.pfs), read_pools(host)
    promised = read_promised_pages(host, (pool.page_size for pool in pools if pool.total))
    return replace(known, isolated=read_isolated(host), pools=pools, promised=promised, pfs=pfs, kvm=read_kvm(host))
