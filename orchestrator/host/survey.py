"""What the host has, read live and put together. Composes the readers; knows no files itself."""

from __future__ import annotations

from errno import ENOENT

from orchestrator.errors import HostError
from orchestrator.host.cpus import read_cores, read_isolated, read_online, read_topoext
from orchestrator.host.hugepages import read_pools
from orchestrator.host.pci import read_iommu_groups, read_pfs
from orchestrator.host.root import HostRoot
from orchestrator.topology import Topology


def read_topology(host: HostRoot, known: Topology | None = None) -> Topology:
    """Surveys the host. No huge pages, PFs or IOMMU groups are facts, and show as empty; without CPUs or PCI there is no host.

    Args:
        known: an earlier survey. Its cores are taken over if the same CPUs are online: nothing else can change them.

    Raises:
        HostError: sysfs is not mounted, or lacks the CPUs or the PCI bus; or a file cannot be read.
    """
    for name in ("sys/devices/system/cpu/online", "sys/bus/pci/devices"):
        if not host.exists(name):
            raise HostError(f"cannot survey the host: there is no /{name}", "is sysfs mounted on /sys?", ENOENT)
    return Topology(
        cores=known.cores if known and known.cpus == read_online(host) else read_cores(host),
        isolated=read_isolated(host),
        pools=read_pools(host),
        pfs=read_pfs(host),
        iommu_groups=read_iommu_groups(host),
        topoext=read_topoext(host),
    )
