"""Reads the survey of the host."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
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
from orchestrator.host.disk_use import find_users
from orchestrator.host.hugepages import survey_pools, survey_promised_pages
from orchestrator.host.interfaces import read_interfaces
from orchestrator.host.iommu import read_iommu_groups
from orchestrator.host.isolation import Owner, read_settings
from orchestrator.host.nvme import NVME, read_controllers
from orchestrator.host.partitions import MACHINES, exclusive_file, read_exclusive
from orchestrator.host.pci import DEVICES, VFIO, is_loaded, read_functions
from orchestrator.host.root import HostRoot
from orchestrator.host.signatures import find_signatures
from orchestrator.host.sriov import read_link, read_pfs
from orchestrator.model.topology import Interface, KernelSetting, NvmeController, Topology
from orchestrator.values import CpuSet

_Value = TypeVar("_Value")


def read_topology(host: HostRoot) -> Topology:
    """Raises HostError only if sysfs, CPUs or PCI bus are missing, or a folder cannot be listed. Other errors are in `problems`,
    and the values are as on a host without the feature.
    """
    for name in (ONLINE, DEVICES):
        if not host.exists(name):
            raise HostError(f"cannot survey the host: /{name} is missing", "check that sysfs is mounted on /sys", ENOENT)
    cores, no_cores = survey_cores(host)
    pools, no_pools = survey_pools(host)
    promised, no_promised = survey_promised_pages(host, (pool.page_size for pool in pools if pool.total))
    problems = [*no_cores, *no_pools, *no_promised]
    return Topology(
        cores=cores,
        isolated=_try(lambda: _read_isolated(host), problems, otherwise=CpuSet()),
        pools=pools,
        pfs=read_pfs(host),
        iommu_groups=read_iommu_groups(host),
        topoext=_try(lambda: read_topoext(host), problems, otherwise=False),
        possible=_try(lambda: read_possible(host), problems, otherwise=CpuSet()),
        promised=promised,
        kvm=read_kvm(host),
        vfio=is_loaded(host, VFIO),
        cmdline=read_cmdline(host),
        controllers=_read_controllers(host, problems),
        interfaces=_read_interfaces(host, problems),
        kernel_settings=_read_settings(host, problems),
        problems=tuple(error.message for error in problems),
    )


def _try(read: Callable[[], _Value], problems: list[HostError], *, otherwise: _Value) -> _Value:
    try:
        return read()
    except HostError as error:
        problems.append(error)
        return otherwise


def refresh_topology(host: HostRoot, known: Topology) -> Topology:
    """Reads again only what guests change: pools, and interfaces and links of PFs (20 files instead of a thousand with 128 VFs).

    Reads everything if CPUs or PCI functions have changed. Drivers and uses of VFs are not read again: read the chosen VF.
    """
    functions = {device for group in known.iommu_groups for device in group.devices}
    # Earlier errors may have been temporary.
    if known.problems or known.cpus != read_online(host) or functions != read_functions(host):
        return read_topology(host)
    pfs, (pools, no_pools) = tuple(read_link(host, pf) for pf in known.pfs), survey_pools(host)
    promised, no_promised = survey_promised_pages(host, (pool.page_size for pool in pools if pool.total))
    problems = [*no_pools, *no_promised]
    isolated = _try(lambda: _read_isolated(host), problems, otherwise=known.isolated)
    controllers, interfaces = _read_controllers(host, problems), _read_interfaces(host, problems)
    settings = _read_settings(host, problems)
    return replace(
        known,
        isolated=isolated,
        pools=pools,
        promised=promised,
        pfs=pfs,
        controllers=controllers,
        interfaces=interfaces,
        kernel_settings=settings,
        kvm=read_kvm(host),
        vfio=is_loaded(host, VFIO),
        problems=tuple(error.message for error in problems),
    )


def _read_isolated(host: HostRoot) -> CpuSet:
    """Without the partitions of guests: they do not tell which CPUs the host has isolated for guests that are created later."""
    return read_isolated(host) - read_exclusive(host, MACHINES)


def _read_controllers(host: HostRoot, problems: list[HostError]) -> tuple[NvmeController, ...]:
    none: tuple[NvmeController, ...] = ()
    return _try(lambda: read_controllers(host), problems, otherwise=none)


def _read_interfaces(host: HostRoot, problems: list[HostError]) -> tuple[Interface, ...]:
    none: tuple[Interface, ...] = ()
    return _try(lambda: read_interfaces(host), problems, otherwise=none)


def _read_settings(host: HostRoot, problems: list[HostError]) -> tuple[KernelSetting, ...]:
    """Those that the manager changes, without those that the kernel does not have."""
    readings = read_settings(host, Owner.MANAGER)
    problems += [HostError(f"{reading.setting.name}: {reading.problem}") for reading in readings if reading.problem]
    found = tuple(KernelSetting(reading.setting.name, reading.text) for reading in readings if reading.text is not None)
    exclusive = _try(lambda: host.find(exclusive_file(MACHINES)) or "", problems, otherwise="")
    return (*found, KernelSetting(f"{MACHINES} exclusive", exclusive))


def read_disk_use(
    host: HostRoot, controllers: Iterable[NvmeController], *, owned: Container[str] = ()
) -> tuple[NvmeController, ...]:
    """Adds uses and signatures. Takes a process per controller, and reads the open files of all processes: seconds, or 30 s for a
    disk that does not respond.

    ``owned``: serial numbers of controllers that guests own, which are not examined.
    """
    return tuple(_read_use(host, controller, owned) for controller in controllers)


def _read_use(host: HostRoot, controller: NvmeController, owned: Container[str]) -> NvmeController:
    if controller.driver != NVME or controller.fault or controller.serial in owned:
        return controller
    uses = find_users(host, controller)
    try:
        return replace(controller, uses=uses, signatures=find_signatures(host, controller))
    except HostError as error:
        return replace(controller, fault=f"its contents cannot be examined: {error.message}")
