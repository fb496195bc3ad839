"""What the host has, read live and put together. Composes the readers; knows no files itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from errno import ENOENT
from typing import TypeVar

from orchestrator.errors import HostError
from orchestrator.host.cpus import (
    ONLINE,
    read_cmdline,
    read_isolated,
    read_kvm,
    read_online,
    read_possible,
    read_topoext,
    survey_cores,
)
from orchestrator.host.hugepages import survey_pools, survey_promised_pages
from orchestrator.host.iommu import read_iommu_groups
from orchestrator.host.pci import DEVICES, VFIO, is_loaded, read_functions
from orchestrator.host.root import HostRoot
from orchestrator.host.sriov import read_link, read_pfs
from orchestrator.model.topology import Topology
from orchestrator.values import CpuSet

_Value = TypeVar("_Value")


def read_topology(host: HostRoot) -> Topology:
    """Surveys the host. No huge pages, PFs or IOMMU groups are facts, and show as empty; without CPUs or PCI there is no host.

    What else cannot be read is named, and is as on a host that does not have it.

    Raises:
        HostError: sysfs is not mounted, or lacks the CPUs or the PCI bus; or one of its folders cannot be listed.
    """
    for name in (ONLINE, DEVICES):
        if not host.exists(name):
            raise HostError(f"cannot survey the host: there is no /{name}", "is sysfs mounted on /sys?", ENOENT)
    cores, no_cores = survey_cores(host)
    pools, no_pools = survey_pools(host)
    promised, no_promised = survey_promised_pages(host, (pool.page_size for pool in pools if pool.total))
    problems = [*no_cores, *no_pools, *no_promised]
    return Topology(
        cores=cores,
        isolated=_try(lambda: read_isolated(host), problems, otherwise=CpuSet()),
        pools=pools,
        pfs=read_pfs(host),
        iommu_groups=read_iommu_groups(host),
        topoext=_try(lambda: read_topoext(host), problems, otherwise=False),
        possible=_try(lambda: read_possible(host), problems, otherwise=CpuSet()),
        promised=promised,
        kvm=read_kvm(host),
        vfio=is_loaded(host, VFIO),
        cmdline=read_cmdline(host),
        problems=tuple(error.message for error in problems),
    )


def _try(read: Callable[[], _Value], problems: list[HostError], *, otherwise: _Value) -> _Value:
    try:
        return read()
    except HostError as error:
        problems.append(error)
        return otherwise


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
    pfs, (pools, no_pools) = tuple(read_link(host, pf) for pf in known.pfs), survey_pools(host)
    promised, no_promised = survey_promised_pages(host, (pool.page_size for pool in pools if pool.total))
    problems = [*no_pools, *no_promised]
    isolated = _try(lambda: read_isolated(host), problems, otherwise=known.isolated)
    said = tuple(error.message for error in problems)
    return replace(
        known,
        isolated=isolated,
        pools=pools,
        promised=promised,
        pfs=pfs,
        kvm=read_kvm(host),
        vfio=is_loaded(host, VFIO),
        problems=said,
    )
